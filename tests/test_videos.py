"""Videos through ffmpeg: what goes in as frames comes out as frames, with the rate, the sound and the colours."""

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kdjax.media.videos import VideoError, frames, probe, target_suffix, write_video

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")

SOUND = ("-f", "lavfi", "-i", "sine=440:d=0.4", "-c:a", "aac")
BT709 = ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")


def make(path: Path, *options: str, size: str = "64x48", rate: str = "25", seconds: float = 0.4) -> Path:
    """A moving test picture."""
    source = f"testsrc2=s={size}:r={rate}:d={seconds}"
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source, *options, path], check=True)
    return path


def streams(path: Path) -> list[dict]:
    command = ["ffprobe", "-v", "error", "-show_streams", "-count_packets", "-of", "json", path]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["streams"]


def test_rate_length_sound_and_pictures_stay(tmp_path: Path) -> None:
    video = probe(make(tmp_path / "a.mp4", *SOUND, "-c:v", "libx264", "-pix_fmt", "yuv420p", rate="30000/1001"))
    assert (video.rate, video.length, video.deep) == (Fraction(30000, 1001), 12, False)
    before = list(frames(video))
    assert len(before) == 12 and before[0].shape == (48, 64, 3) and before[0].dtype == np.uint8
    assert write_video(tmp_path / "b.mp4", video, before) == (12, 48, 64)
    again = probe(tmp_path / "b.mp4")
    assert (again.rate, again.length) == (video.rate, 12)
    picture, sound = streams(tmp_path / "b.mp4")
    assert picture["codec_name"] == "h264" and sound["codec_name"] == "aac"
    assert sound["nb_read_packets"] == streams(tmp_path / "a.mp4")[1]["nb_read_packets"]
    assert np.abs(np.mean(before, (0, 1, 2)) - np.mean(list(frames(again)), (0, 1, 2))).max() < 2
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


def test_ten_bits_and_colour_tags_stay(tmp_path: Path) -> None:
    filters = ("-vf", "scale=out_color_matrix=bt709,format=yuv420p10le")
    video = probe(make(tmp_path / "a.mkv", *filters, *BT709, "-c:v", "libx264"))
    before = list(frames(video))
    assert video.deep and before[0].dtype == np.uint16
    assert np.unique(before[0]).size > 256
    write_video(tmp_path / "b.mkv", video, before)
    again = probe(tmp_path / "b.mkv")
    assert again.deep and again.tags == video.tags and again.tags["color_space"] == "bt709"
    # With the matrix of another standard, a strong colour would be off by a few percent.
    green = np.full((48, 64, 3), (10_000, 50_000, 10_000), np.uint16)
    write_video(tmp_path / "c.mkv", video, [green] * 3)
    for frame in frames(probe(tmp_path / "c.mkv")):
        assert np.abs(frame.astype(int) - green).max() < 0.01 * 65535


def test_sound_keeps_in_step(tmp_path: Path) -> None:
    late = probe(make(tmp_path / "late.mkv", *SOUND, "-vf", "setpts=PTS+0.2/TB", "-c:v", "libx264"))
    shown, stored = list(frames(late)), int(streams(late.path)[0]["nb_read_packets"])
    assert len(shown) - stored in (5, 6)  # sound may begin a little before 0
    assert all(np.array_equal(frame, shown[0]) for frame in shown[:6])
    # Of 50 steady frames, most of the second half are missing.
    some = ("-vf", "select='lt(n,25)+not(mod(n,5))'", "-fps_mode", "vfr", "-c:v", "libx264")
    uneven = probe(make(tmp_path / "uneven.mp4", *some, seconds=2))
    assert uneven.rate < 20 and abs(len(list(frames(uneven))) / uneven.rate - 2) < 0.2


def test_rotation_is_applied_and_pixel_shape_stays(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path / "a.mp4", "-c:v", "libx264", "-pix_fmt", "yuv420p").read_bytes())
    # The matrix of the track header (ISO/IEC 14496-12, 8.3.2): a quarter turn.
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    assert next(frames(probe(tmp_path / "turned.mp4"))).shape == (64, 48, 3)
    wide = probe(make(tmp_path / "wide.avi", "-vf", "setsar=64/45", "-c:v", "mpeg4"))
    write_video(tmp_path / "wide.mkv", wide, frames(wide))
    assert wide.pixel_shape == probe(tmp_path / "wide.mkv").pixel_shape == "64:45"


def test_odd_sizes_and_other_sizes_are_written(tmp_path: Path) -> None:
    video = probe(make(tmp_path / "a.mp4", "-c:v", "libx264"))
    for height, width in ((47, 63), (96, 128)):
        made = (np.full((height, width, 3), 10 * number, np.uint8) for number in range(5))
        assert write_video(tmp_path / "b.mp4", video, made) == (5, height, width)
        back = list(frames(probe(tmp_path / "b.mp4")))
        assert len(back) == 5 and back[0].shape == (height, width, 3) and abs(back[4].mean() - 40) < 2


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.mp4", "-c:v", "libx264").read_bytes()
    for name, data in (("cut.mp4", whole[: len(whole) // 2]), ("empty.mp4", b""), ("text.mkv", b"hello")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=rf"{name}: cannot be read: (?!file:)"):
            probe(tmp_path / name)
    subprocess.run(["ffmpeg", "-v", "error", *SOUND, tmp_path / "sound.mp4"], check=True)
    with pytest.raises(VideoError, match=r"sound\.mp4: has no video stream"):
        probe(tmp_path / "sound.mp4")
    with pytest.raises(VideoError, match=r"-i\.mp4: cannot be read: No such file"):
        probe("-i.mp4")


@pytest.mark.parametrize("name", ["list.mp4", "list.mkv", "list.ts"])
@pytest.mark.parametrize(
    "content",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:0.4,\na.ts\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile a.ts\n"],
    ids=["hls", "concat"],
)
def test_a_list_of_other_files_is_no_video(tmp_path: Path, name: str, content: str) -> None:
    make(tmp_path / "a.ts", "-c:v", "libx264")
    (tmp_path / name).write_text(content)
    with pytest.raises(VideoError, match=rf"{name}: cannot be read: "):
        probe(tmp_path / name)


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    video = probe(make(tmp_path / "a.mp4", "-c:v", "libx264"))

    def breaks() -> Iterator[np.ndarray]:
        yield np.zeros((48, 64, 3), np.uint8)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_video(tmp_path / "b.mp4", video, breaks())
    with pytest.raises(VideoError, match=r"b\.xyz: cannot be written: "):
        write_video(tmp_path / "b.xyz", video, [np.zeros((480, 640, 3), np.uint8)] * 5)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_without_ffmpeg_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = probe(make(tmp_path / "a.mp4", "-c:v", "libx264"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for use in (lambda: probe(video.path), lambda: next(frames(video))):
        with pytest.raises(VideoError, match=r"a\.mp4: videos need the program ff.*install ffmpeg"):
            use()


def test_containers() -> None:
    assert [target_suffix(suffix) for suffix in (".mp4", ".MOV", ".webm", ".avi")] == [".mp4", ".MOV", ".mkv", ".mkv"]
