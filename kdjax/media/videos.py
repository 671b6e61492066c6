"""Videos as frames, through the programs ffmpeg and ffprobe.

    video = probe("in.mp4")
    write_video("out.mp4", video, (restore(frame) for frame in frames(video)))

Frames are RGB, uint8, or uint16 where the video has more than 8 bits; rotation is applied to them. Frame rate, sound,
subtitles, colour tags and the shape of pixels stay. Where frames come at irregular times some are dropped or repeated,
so that sound keeps in step. Colours go to RGB and back with the same matrix: the tagged one, or else ffmpeg's default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdjax.files import whole_file

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
_KEPT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # of containers for H.264

_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv"  # by ffmpeg's names
_CRF = "16"  # of x264, from 0, without loss, to 51; below 18 the eye sees no difference
BYTES_TO_CODE = 20  # about what decoder and encoder keep of a pixel: some tens of frames
_SCALER = "flags=bicubic+accurate_rnd+full_chroma_int"
_COLOUR_TAGS = {"color_space": "-colorspace", "color_primaries": "-color_primaries", "color_transfer": "-color_trc"}
# What the scaler calls a color_space that it can convert to.
_MATRICES = {name: name for name in ("bt709", "smpte170m", "bt470bg", "smpte240m", "fcc")} | {"bt2020nc": "bt2020"}


class VideoError(ValueError):
    """A video that cannot be read or written; the message starts with its path."""


@dataclasses.dataclass(frozen=True)
class Video:
    """What a file says about its first stream of pictures.

    Attributes:
      width, height: of a frame, before it is rotated.
      rate: frames in a second.
      length: about how many frames there are; 0 where the file does not tell.
      deep: more than 8 bits a sample.
      tags: about colour, by ffprobe's names.
      pixel_shape: width to height of a pixel, such as "64:45"; "" for squares.
    """

    path: Path
    width: int
    height: int
    rate: Fraction
    length: int
    deep: bool
    tags: dict[str, str]
    pixel_shape: str


def target_suffix(suffix: str) -> str:
    """The suffix of what is made from a video: the same where the container can hold H.264, else .mkv."""
    return suffix if suffix.lower() in _KEPT_SUFFIXES else ".mkv"


def probe(path: str | os.PathLike[str]) -> Video:
    """Looks at a video.

    Raises:
      VideoError: it cannot be read, or ffprobe is not installed.
    """
    entries = ["width", "height", "avg_frame_rate", "r_frame_rate", "nb_frames", "duration", "pix_fmt"]
    entries += ["sample_aspect_ratio", "color_range", *_COLOUR_TAGS]
    shown = f"stream={','.join(entries)}:format=duration"
    command = [_program("ffprobe", path), "-v", "error", "-select_streams", "V:0", "-show_entries", shown]
    result = subprocess.run([*command, "-of", "json", *_input(path)], capture_output=True)
    if result.returncode:
        raise VideoError(f"{path}: cannot be read: {_reason(result.stderr, path)}")
    try:
        return _described(Path(path), json.loads(result.stdout))
    except VideoError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise VideoError(f"{path}: cannot be read: what ffprobe says of it makes no sense ({error})") from error


def _described(path: Path, about: dict[str, Any]) -> Video:
    if not about.get("streams"):
        raise VideoError(f"{path}: holds no moving pictures")
    stream = about["streams"][0]
    # The nominal rate is exact for a steady stream, and too high where frames come at irregular times.
    nominal, average = (_fraction(stream.get(name)) for name in ("r_frame_rate", "avg_frame_rate"))
    rate = nominal if average == 0 or abs(nominal / average - 1) < 0.01 else average
    if rate == 0:
        raise VideoError(f"{path}: does not say how many frames there are in a second")
    seconds = float(stream.get("duration") or about.get("format", {}).get("duration") or 0)
    shape = stream.get("sample_aspect_ratio", "1:1")
    return Video(
        path=path,
        width=int(stream["width"]),
        height=int(stream["height"]),
        rate=rate,
        length=int(stream.get("nb_frames") or seconds * rate),
        deep=stream.get("pix_fmt", "").endswith(("le", "be")),  # samples of one byte have no byte order
        tags={name: stream[name] for name in (*_COLOUR_TAGS, "color_range") if name in stream},
        pixel_shape="" if shape in ("1:1", "0:1", "N/A") else shape,
    )


def frames(video: Video) -> Iterator[np.ndarray]:
    """The frames in order, uint8 or uint16 (height, width, 3).

    Raises:
      VideoError: they cannot be decoded, there are none, or ffmpeg is not installed.
    """
    # The start: sound may begin earlier than the pictures do.
    filters = f"fps={video.rate}:start_time=0,scale={_SCALER},format={'rgb48be' if video.deep else 'rgb24'}"
    # PPM, because it says how large a frame is after it has been rotated.
    output = ["-map", "0:V:0", "-vf", filters, "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    with _ffmpeg([*_input(video.path), *output], video.path, "cannot be decoded", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        number = 0
        while (frame := _read_ppm(process.stdout)) is not None:
            number += 1
            yield frame
    if number == 0:
        raise VideoError(f"{video.path}: not one frame could be decoded")


def write_video(path: str | os.PathLike[str], video: Video, frames: Iterable[np.ndarray]) -> tuple[int, int, int]:
    """Writes frames, made from those of `video`, as H.264, with the sound and the subtitles of `video`.

    The file appears whole or not at all.

    Args:
      frames: uint8 or uint16 (height, width, 3), all alike, at least one.

    Returns:
      How many frames were written, their height and their width.

    Raises:
      VideoError: ffmpeg cannot write them, or is not installed.
    """
    frames = iter(frames)
    first = next(frames)
    height, width, _ = first.shape
    samples, bits = ("rgb48le", "10le") if first.dtype == np.uint16 else ("rgb24", "")
    arguments = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        samples,
        "-s",
        f"{width}x{height}",
        "-r",
        str(video.rate),
        "-i",
        "pipe:0",
    ]
    arguments += [*_input(video.path), "-map", "0:v", "-map", "1:a?", "-map", "1:s?", "-map_metadata", "1"]
    arguments += ["-c", "copy", "-c:v", "libx264", "-crf", _CRF, *_colour(video)]
    chroma = "420" if height % 2 == 0 == width % 2 else "444"  # of which an odd picture has no half
    arguments += ["-vf", f"{_scaling(video)},format=yuv{chroma}p{bits}"]
    with whole_file(path) as temporary:
        # Without -xerror it ends with 0 when the disk is full.
        arguments += ["-movflags", "+faststart", "-xerror", _url(temporary)]
        with _ffmpeg(arguments, path, "cannot be written", stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            number = 0
            for frame in itertools.chain([first], frames):
                little_endian = frame.astype(frame.dtype.newbyteorder("<"), order="C", copy=False)
                process.stdin.write(little_endian.data)
                number += 1
    return number, height, width


def _colour(video: Video) -> list[str]:
    """Options that give the new video the colour tags of the old one."""
    if video.tags.get("color_space") not in _MATRICES:
        return []
    return [part for name, option in _COLOUR_TAGS.items() if name in video.tags for part in (option, video.tags[name])]


def _scaling(video: Video) -> str:
    full = video.tags.get("color_range") == "pc"
    scaling = f"scale={_SCALER}:out_range={'pc' if full else 'tv'}"
    if (matrix := _MATRICES.get(video.tags.get("color_space", ""))) is not None:
        scaling += f":out_color_matrix={matrix}"
    return f"{scaling},setsar={video.pixel_shape.replace(':', '/')}" if video.pixel_shape else scaling


@contextlib.contextmanager
def _ffmpeg(
    arguments: Sequence[str], path: str | os.PathLike[str], failure: str, **pipes: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """ffmpeg while the block runs, which ends it; an error of it becomes a `VideoError`."""
    command = [_program("ffmpeg", path), "-v", "error", "-nostdin", "-y", *arguments]
    with tempfile.TemporaryFile() as messages:
        # A session of its own: Ctrl-C is for this program, which may finish something first.
        process = subprocess.Popen[bytes](command, stderr=messages, start_new_session=True, **pipes)
        try:
            try:
                yield process
                if process.stdin:
                    process.stdin.close()
                code = process.wait()
            except BrokenPipeError:  # it has ended, and said why
                code = process.wait() or 1
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        if code:
            messages.seek(0)
            raise VideoError(f"{path}: {failure}: {_reason(messages.read(), path)}")


def _read_ppm(stream: IO[bytes]) -> np.ndarray | None:
    """The next image of a stream of binary PPM as ffmpeg writes it; None at its end."""
    if stream.readline() == b"":
        return None
    width, height = map(int, stream.readline().split())
    dtype = np.dtype(">u2" if int(stream.readline()) > 255 else np.uint8)
    data = stream.read(height * width * 3 * dtype.itemsize)
    if len(data) < height * width * 3 * dtype.itemsize:
        return None  # ffmpeg was stopped; its exit code says so
    return np.frombuffer(data, dtype).reshape(height, width, 3).astype(dtype.newbyteorder("="), copy=False)


def _program(name: str, path: str | os.PathLike[str]) -> str:
    if (program := shutil.which(name)) is None:
        raise VideoError(f"{path}: videos need the program {name}, and it is not on the path; install ffmpeg")
    return program


def _input(path: str | os.PathLike[str]) -> list[str]:
    """Options that have a file read as a video of the known containers.

    Others are lists of more files, such as HLS and concat, which a file can be whatever its suffix: a list would have
    frames of any video on this machine restored.
    """
    return ["-format_whitelist", _CONTAINERS, "-protocol_whitelist", "file", "-i", _url(path)]


def _url(path: str | os.PathLike[str]) -> str:
    """A path that ffmpeg takes for nothing else, such as an option or a protocol."""
    return f"file:{os.path.abspath(path)}"


def _reason(messages: bytes, path: str | os.PathLike[str]) -> str:
    lines = [line.strip() for line in os.fsdecode(messages).splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{_url(path)}: ") if lines else "ffmpeg does not say why"


def _fraction(value: Any) -> Fraction:
    """ffprobe's "30000/1001", or 0 for "0/0" and nothing."""
    try:
        return Fraction(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return Fraction(0)
