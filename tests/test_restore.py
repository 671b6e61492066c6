"""The program on files as people have them: many kinds, bad ones among them, stopped and started again."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax import models, restore
from kdjax.data import videos
from kdjax.data.pictures import Picture, read_picture, write_picture
from kdjax.restore import Job, plan
from kdjax.signals import StopSignals


def network(arch: str, **hparams: int) -> models.Model:
    """A network with random weights from NumPy: to initialise one compiles its layers one by one."""
    random = np.random.default_rng(0)
    fill = lambda leaf: random.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    hparams = models.complete_hparams(arch, hparams)
    return models.Model(arch, hparams, jax.tree.map(fill, models.abstract_params(arch, hparams)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models: same.pth for RGB, double.pth that enlarges, grey.pth."""
    folder = tmp_path_factory.mktemp("models")
    kdjax.save_model(network("srvggnetcompact", num_feat=4, num_conv=1, upscale=1), folder / "same.pth")
    kdjax.save_model(network("srvggnetcompact", num_feat=4, num_conv=1, upscale=2), folder / "double.pth")
    kdjax.save_model(network("dncnn", num_in_ch=1, num_feat=4, depth=3), folder / "grey.pth")
    return folder


def pixels(channels: int = 3, dtype: type = np.uint8, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (*size, channels), dtype=dtype)


def write(path: Path, samples: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, Picture(pixels() if samples is None else samples))
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def refused(*arguments: object, code: int | None = None) -> str:
    """The message with which the program ends; `code` in place of 1."""
    with pytest.raises(SystemExit) as caught:
        restore.main([str(argument) for argument in arguments])
    if code is None:
        assert isinstance(caught.value.code, str)  # which makes the exit code 1
        return caught.value.code
    assert caught.value.code == code
    return ""


def run(*arguments: object) -> None:
    restore.main([str(argument) for argument in arguments])


# What comes out


@pytest.mark.parametrize(("model", "scale"), [("same", 1), ("double", 2), ("grey", 1)])
def test_pictures_are_restored_as_arrays_are(folder: Path, tmp_path: Path, model: str, scale: int) -> None:
    kinds = {"rgb": (3, np.uint8), "deep": (3, np.uint16), "alpha": (4, np.uint8), "grey": (1, np.uint16)}
    for name, (channels, dtype) in kinds.items():
        write(tmp_path / "in" / f"{name}.png", pixels(channels, dtype))
    run("--model", folder / f"{model}.pth", tmp_path / "in", "--output", tmp_path / "out", "--tile", 16)
    for name, (channels, dtype) in kinds.items():
        restored = read_picture(tmp_path / "out" / f"{name}.png").pixels
        expected = kdjax.restore_image(folder / f"{model}.pth", pixels(channels, dtype), tile=16)
        assert restored.dtype == dtype and restored.shape == (24 * scale, 32 * scale, channels)
        np.testing.assert_array_equal(restored, expected)
    if scale == 1:
        np.testing.assert_array_equal(read_picture(tmp_path / "out" / "alpha.png").pixels[..., 3], pixels(4)[..., 3])


def test_profile_and_exif_stay_and_cameras_turns_are_applied(folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"a profile")
    run("--model", folder / "same.pth", tmp_path / "a.jpg", "--output", tmp_path / "out")
    with Image.open(tmp_path / "out" / "a.jpg") as image:
        assert image.size == (24, 32) and image.info["icc_profile"] == b"a profile"
        assert dict(image.getexif()) == {0x010F: "Maker", 0x0112: 1}


@pytest.mark.parametrize(("option", "argument"), [("--x8", "x8"), ("--bf16", "dtype")])
def test_options_reach_the_engine(folder: Path, tmp_path: Path, option: str, argument: str) -> None:
    write(tmp_path / "a.png")
    run("--model", folder / "same.pth", tmp_path / "a.png", "--output", tmp_path / "out", option)
    value = True if argument == "x8" else jax.numpy.bfloat16
    expected, plain = (kdjax.restore_image(folder / "same.pth", pixels(), **kw) for kw in ({argument: value}, {}))
    np.testing.assert_array_equal(read_picture(tmp_path / "out" / "a.png").pixels, expected)
    assert (expected != plain).any()


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_videos_are_restored_frame_by_frame(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=2", "-f", "lavfi", "-i", "sine=d=2"]
    subprocess.run([*make, "-c:v", "mpeg4", "-g", "1", tmp_path / "a.avi"], check=True)
    data = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "b.avi").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.mp4").write_bytes(b"hello")
    message = refused("--model", folder / "double.pth", tmp_path, "--output", tmp_path / "out", "--suffix", "_x2")
    assert "1 file could not be restored" in message and "c.mp4: cannot be read" in message
    assert files(tmp_path / "out") == ["a_x2.mkv", "b_x2.mkv"]
    before, after = videos.probe(tmp_path / "a.avi"), videos.probe(tmp_path / "out" / "a_x2.mkv")
    frames = list(videos.frames(after))
    assert after.rate == before.rate == 25 and len(frames) == before.length and frames[0].shape == (48, 64, 3)
    expected = kdjax.restore_image(folder / "double.pth", next(videos.frames(before)))
    luma = [0.299, 0.587, 0.114]  # of colour, H.264 keeps a quarter of the pixels
    assert np.abs(frames[0] @ luma - expected @ luma).mean() < 3
    output = capsys.readouterr().out
    assert f"{before.length} frames of 64x48" in output
    assert output.count(f"about {before.length} frames were expected: is it cut short?") == 1  # half of b.avi is there


# Which files


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def targets(jobs: list[Job], folder: Path) -> dict[str, str]:
    return {job.source.relative_to(folder).as_posix(): job.target.as_posix() for job in jobs}


def test_folders_files_and_patterns(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.PNG", "a.jpg", "sub/c.tif", "sub/deep/d.mp4", "e.gif", ".f.png", ".g/h.png", "notes.txt", "i.webm"
    )
    touch(tmp_path / "out", "old.png")
    assert targets(plan([str(tmp_path)], tmp_path / "out"), tmp_path) == {
        "a.jpg": f"{tmp_path}/out/a.jpg",
        "b.PNG": f"{tmp_path}/out/b.PNG",
        "e.gif": f"{tmp_path}/out/e.png",
        "i.webm": f"{tmp_path}/out/i.mkv",
        "sub/c.tif": f"{tmp_path}/out/sub/c.tif",
        "sub/deep/d.mp4": f"{tmp_path}/out/sub/deep/d.mp4",
    }
    patterns = [str(tmp_path / "*.jpg"), str(tmp_path / "**" / "*.tif"), str(tmp_path / "a.jpg")]
    jobs = plan(patterns, Path("out"), suffix="_x", format="jpg")
    assert targets(jobs, tmp_path) == {"a.jpg": "out/a_x.jpg", "sub/c.tif": "out/c_x.jpg"}
    touch(tmp_path, "e.jpeg", "scan")
    jobs = plan([str(tmp_path / name) for name in ("e.jpeg", "scan")], Path("out"), format="jpg")
    assert targets(jobs, tmp_path) == {"e.jpeg": "out/e.jpeg", "scan": "out/scan.jpg"}


def test_results_beside_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b_x.png")
    for _ in range(2):
        jobs = plan([str(tmp_path)], tmp_path, suffix="_x")
        assert {job.source.name: job.target.name for job in jobs} == {"a.png": "a_x.png", "b_x.png": "b_x_x.png"}
        touch(tmp_path, "a_x.png", "b_x_x.png")


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg", "sub/a.png", "empty/notes.txt")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "sub" / "a.png")
    for inputs, output, options, reason in (
        ([a], tmp_path, {}, "would overwrite an input; give another --output, or a --suffix"),
        ([a, b], tmp_path / "sub", {}, "would overwrite an input"),
        ([a, b], tmp_path / "out", {}, "would both become"),
        ([a, a.replace("png", "jpg")], tmp_path / "out", {"format": "png"}, "or without --format"),
        ([str(tmp_path / "none.png")], tmp_path / "out", {}, "there is no file or folder of this name"),
        ([str(tmp_path / "none*.png")], tmp_path / "out", {}, "none that fits it as a pattern"),
        ([str(tmp_path / "empty")], tmp_path / "out", {}, "no pictures or videos in this folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan(inputs, output, **options)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="would overwrite an input"):
        plan([a], tmp_path / "link")


# Bad files, bad options


def test_bad_files_do_not_stop_the_rest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in/one.png"), pixels(size=(1, 1)))
    write(Path("in/strip.png"), pixels(size=(3, 500)))
    write(Path("in/alpha.png"), pixels(4))
    Image.fromarray(pixels(4), mode="CMYK").save("in/cmyk.jpg")
    Path("in/cut.png").write_bytes(Path("in/alpha.png").read_bytes()[:500])
    Path("in/empty.png").touch()
    Path("in/link.png").symlink_to("nowhere.png")
    frames = [Image.fromarray(pixels()), Image.fromarray(pixels()[::-1])]
    frames[0].save("in/moving.gif", save_all=True, append_images=frames[1:])
    message = refused("--model", folder / "same.pth", "in", "--output", "out", "--format", "jpg", "--tile", 64)
    assert message.splitlines() == [
        "error: 5 files could not be restored:",
        "  out/alpha.jpg: .jpg files hold no alpha channel; write png, webp or tif",
        "  in/cut.png: image file is truncated",
        "  in/empty.png: the file is empty (0 bytes)",
        "  in/link.png: No such file or directory",
        "  in/moving.gif: is an animation of 2 frames; make single pictures or a video of it first "
        "(GIF and PNG: ffmpeg -i FILE frame_%04d.png)",
    ]
    assert files(Path("out")) == ["cmyk.jpg", "one.jpg", "strip.jpg"]
    told = capsys.readouterr()
    assert "in/strip.png -> out/strip.jpg: 500x3 to 500x3, " in told.out
    assert "  note: CMYK converted to sRGB\n" in told.out
    assert told.err.count("failed: ") == 5


def test_bad_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    picture, same = write(tmp_path / "a.png"), folder / "same.pth"
    (tmp_path / "cut.pth").write_bytes(same.read_bytes()[:300])
    kdjax.save_model(network("dncnn", num_in_ch=4, num_feat=2, depth=2), tmp_path / "4.pth")
    out = ("--output", tmp_path / "out")
    for arguments, reason in (
        ((picture, "--model", tmp_path / "cut.pth", *out), "cut.pth: the file is damaged"),
        ((picture, "--model", tmp_path / "4.pth", *out), "takes images of 4 channels; pictures have 1 or 3"),
        ((picture, "--model", same, "--hparam", "upscale=3", *out), "same.pth: "),
        ((picture, "--model", same, "--key", "params_ema", *out), "params_ema"),
        ((picture, "--model", same, "--output", picture / "out"), "this folder cannot be written to: Not a directory"),
        ((picture, "--model", same, "--output", tmp_path), "would overwrite an input"),
    ):
        message = refused(*arguments)
        assert message.startswith("error: ") and reason in message
    for arguments in (("--tile", "-1"), ("--quality", "0"), ("--suffix", "../x"), ("--output", tmp_path / "b.png")):
        refused(picture, "--model", same, *out, *arguments, code=2)
    assert files(tmp_path) == ["4.pth", "a.png", "cut.pth"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_forbidden_files_and_folders(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.png").chmod(0)
    assert "a.png: Permission denied" in refused(
        "--model", folder / "same.pth", tmp_path / "a.png", "--output", tmp_path / "out"
    )
    (tmp_path / "locked").mkdir(mode=0o500)
    message = refused("--model", folder / "same.pth", tmp_path / "a.png", "--output", tmp_path / "locked")
    assert "locked: this folder cannot be written to: Permission denied" in message


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    jobs = [Job(write(tmp_path / f"{name}.png"), tmp_path / "out" / f"{name}.png") for name in "abc"]
    calls = []

    def fills_up(image: np.ndarray, progress: restore.Told) -> np.ndarray:
        calls.append(image)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return image

    with StopSignals() as stop, pytest.raises(OSError, match="the disk is full; 2 of 3 files are left"):
        restore.run(jobs, fills_up, scale=1, quality=None, stop=stop)
    assert files(tmp_path / "out") == ["a.png"] and len(calls) == 2


# Stopping and continuing


def test_done_files_are_skipped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write(tmp_path / "in" / f"{name}.png")
    write(tmp_path / "out" / "a.png", pixels(1, size=(2, 2)))
    arguments = ("--model", folder / "same.pth", tmp_path / "in", "--output", tmp_path / "out")
    run(*arguments)
    assert "2 files, 1 of them are done" in capsys.readouterr().out
    assert read_picture(tmp_path / "out" / "a.png").pixels.shape == (2, 2, 1)
    assert read_picture(tmp_path / "out" / "b.png").pixels.shape == (24, 32, 3)
    run(*arguments, "--overwrite")
    assert read_picture(tmp_path / "out" / "a.png").pixels.shape == (24, 32, 3)


def test_a_killed_program_leaves_whole_files_and_continues(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png")
    write(tmp_path / "in" / "b.png", np.zeros((3000, 3000, 1), np.uint8))
    arguments = ["--model", str(folder / "same.pth"), str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "kdjax.restore", *arguments, "--tile", "8", "--tile-pad", "1"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    )
    until = time.monotonic() + 120
    while not (tmp_path / "out" / "a.png").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert message.splitlines()[-1] == "stopped by SIGTERM; the same command continues" and "Traceback" not in message
    assert files(tmp_path / "out") == ["a.png"]

    write(tmp_path / "in" / "b.png")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "2 files, 1 of them are done" in result.stdout and "b.png: 32x24 to 32x24" in result.stdout
    assert files(tmp_path / "out") == ["a.png", "b.png"]
