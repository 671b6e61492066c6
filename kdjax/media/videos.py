"""Videos as frames, through ffmpeg and ffprobe.

    video = probe("in.mp4")
    write_video("out.mp4", video, (restore(frame) for frame in frames(video)))

Frames are RGB, uint8, or uint16 if the video has more than 8 bits, with rotation applied. Frame rate, sound, subtitles,
colour tags and pixel aspect ratio are kept. For variable frame rates, frames are dropped or repeated to keep the sound
in sync. Colours are converted to RGB and back with the same matrix: the tagged one, or ffmpeg's default.
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
_KEPT_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # containers that hold H.264

_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,asf,flv"  # ffmpeg's names
_CRF = "16"  # of x264, from 0 (lossless) to 51; below 18 is visually lossless
BYTES_TO_CODE = 20  # rough memory per pixel of decoder and encoder: some tens of frames
_SCALER = "flags=bicubic+accurate_rnd+full_chroma_int"
_COLOUR_TAGS = {"color_space": "-colorspace", "color_primaries": "-color_primaries", "color_transfer": "-color_trc"}
# The scaler's names for each color_space it can convert to.
_MATRICES = {name: name for name in ("bt709", "smpte170m", "bt470bg", "smpte240m", "fcc")} | {"bt2020nc": "bt2020"}


class VideoError(ValueError):
    """A video that cannot be read or written; the message starts with its path."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file's first video stream.

    Attributes:
      width, height: of a frame, before rotation.
      rate: frames per second.
      length: approximate number of frames; 0 if the file does not say.
      deep: more than 8 bits per sample.
      tags: colour tags, under ffprobe's names.
      pixel_shape: pixel aspect ratio, such as "64:45"; "" for square pixels.
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
    """Returns the suffix for output made from a video: the same if the container can hold H.264, else .mkv."""
    return suffix if suffix.lower() in _KEPT_SUFFIXES else ".mkv"


def probe(path: str | os.PathLike[str]) -> Video:
    """Reads a video's metadata.

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
        raise VideoError(f"{path}: cannot be read: the output of ffprobe makes no sense ({error})") from error


def _described(path: Path, about: dict[str, Any]) -> Video:
    if not about.get("streams"):
        raise VideoError(f"{path}: has no video stream")
    stream = about["streams"][0]
    # The nominal rate is exact for constant frame rates, but too high for variable ones.
    nominal, average = (_fraction(stream.get(name)) for name in ("r_frame_rate", "avg_frame_rate"))
    rate = nominal if average == 0 or abs(nominal / average - 1) < 0.01 else average
    if rate == 0:
        raise VideoError(f"{path}: does not say its frame rate")
    seconds = float(stream.get("duration") or about.get("format", {}).get("duration") or 0)
    shape = stream.get("sample_aspect_ratio", "1:1")
    return Video(
        path=path,
        width=int(stream["width"]),
        height=int(stream["height"]),
        rate=rate,
        length=int(stream.get("nb_frames") or seconds * rate),
        deep=stream.get("pix_fmt", "").endswith(("le", "be")),  # single-byte samples have no byte order
        tags={name: stream[name] for name in (*_COLOUR_TAGS, "color_range") if name in stream},
        pixel_shape="" if shape in ("1:1", "0:1", "N/A") else shape,
    )


def frames(video: Video) -> Iterator[np.ndarray]:
    """Yields the frames in order, uint8 or uint16 (height, width, 3).

    Raises:
      VideoError: they cannot be decoded, there are none, or ffmpeg is not installed.
    """
    # start_time: the sound may begin before the pictures do.
    filters = f"fps={video.rate}:start_time=0,scale={_SCALER},format={'rgb48be' if video.deep else 'rgb24'}"
    # PPM, because its header gives the frame size after rotation.
    output = ["-map", "0:V:0", "-vf", filters, "-f", "image2pipe", "-c:v", "ppm", "pipe:1"]
    with _ffmpeg([*_input(video.path), *output], video.path, "cannot be decoded", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        number = 0
        while (frame := _read_ppm(process.stdout)) is not None:
            number += 1
            yield frame
    if number == 0:
        raise VideoError(f"{video.path}: no frame could be decoded")


def write_video(path: str | os.PathLike[str], video: Video, frames: Iterable[np.ndarray]) -> tuple[int, int, int]:
    """Writes frames made from `video` as H.264, with the sound and subtitles of `video`. The write is atomic.

    Args:
      frames: uint8 or uint16 (height, width, 3), all alike, at least one.

    Returns:
      The number of frames written, their height and their width.

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
    chroma = "420" if height % 2 == 0 == width % 2 else "444"  # chroma cannot be halved for odd sizes
    arguments += ["-vf", f"{_scaling(video)},format=yuv{chroma}p{bits}"]
    with whole_file(path) as temporary:
        # Without -xerror, ffmpeg exits with 0 when the disk is full.
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
    """Returns the options that copy the source video's colour tags to the new one."""
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
    """Runs ffmpeg for the duration of the block and stops it at the end; its errors become a `VideoError`."""
    command = [_program("ffmpeg", path), "-v", "error", "-nostdin", "-y", *arguments]
    with tempfile.TemporaryFile() as messages:
        # Its own session: Ctrl-C is for this program, which may still have something to finish.
        process = subprocess.Popen[bytes](command, stderr=messages, start_new_session=True, **pipes)
        try:
            try:
                yield process
                if process.stdin:
                    process.stdin.close()
                code = process.wait()
            except BrokenPipeError:  # ffmpeg has exited, and said why
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
    """Returns the next image of ffmpeg's binary PPM stream; None at the end."""
    if stream.readline() == b"":
        return None
    width, height = map(int, stream.readline().split())
    dtype = np.dtype(">u2" if int(stream.readline()) > 255 else np.uint8)
    data = stream.read(height * width * 3 * dtype.itemsize)
    if len(data) < height * width * 3 * dtype.itemsize:
        return None  # ffmpeg was stopped; its exit code tells
    return np.frombuffer(data, dtype).reshape(height, width, 3).astype(dtype.newbyteorder("="), copy=False)


def _program(name: str, path: str | os.PathLike[str]) -> str:
    if (program := shutil.which(name)) is None:
        raise VideoError(f"{path}: videos need the program {name}, which is not on the PATH; install ffmpeg")
    return program


def _input(path: str | os.PathLike[str]) -> list[str]:
    """Returns options that read a file as a video in one of the known containers only.

    Other formats, such as HLS and concat, are lists of more files, and a file can be one whatever its suffix: such a
    list could pull in frames of any video on this machine.
    """
    return ["-format_whitelist", _CONTAINERS, "-protocol_whitelist", "file", "-i", _url(path)]


def _url(path: str | os.PathLike[str]) -> str:
    """Returns a path that ffmpeg cannot mistake for an option or a protocol."""
    return f"file:{os.path.abspath(path)}"


def _reason(messages: bytes, path: str | os.PathLike[str]) -> str:
    lines = [line.strip() for line in os.fsdecode(messages).splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{_url(path)}: ") if lines else "ffmpeg gave no reason"


def _fraction(value: Any) -> Fraction:
    """Parses ffprobe's "30000/1001"; 0 for "0/0" or nothing."""
    try:
        return Fraction(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return Fraction(0)
