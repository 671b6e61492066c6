"""The program on files as people have them: many kinds, bad ones among them, stopped and started again."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from PIL import Image

import kdjax
from kdjax import models, restore
from kdjax.media import pictures, videos
from kdjax.media.pictures import Picture, read_picture, write_picture
from kdjax.restore import Job, Plan, left_out, plan
from kdjax.signals import StopSignals


def network(arch: str, **hparams: int) -> models.Model:
    """A network with random weights from NumPy: to initialise one compiles its layers one by one."""
    random = np.random.default_rng(0)
    fill = lambda leaf: random.uniform(-0.3, 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    net = models.network(arch, hparams)
    return models.Model(net, jax.tree.map(fill, net.abstract_params))


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
    assert (
        output.count(f"about {before.length} frames were expected; is the file truncated?") == 1
    )  # half of b.avi is there


# Which files


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def targets(found: Plan, folder: Path) -> dict[str, str]:
    return {job.source.relative_to(folder).as_posix(): job.target.as_posix() for job in found.jobs}


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
    jobs = plan([str(tmp_path / name) for name in ("e.jpeg", "scan", "sub/c.tif")], Path("out"), format="tiff")
    assert targets(jobs, tmp_path) == {"e.jpeg": "out/e.tiff", "scan": "out/scan.tiff", "sub/c.tif": "out/c.tif"}


def test_results_beside_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b_x.png")
    for done in ([], ["a_x.png", "b_x_x.png"]):
        found = plan([str(tmp_path)], tmp_path, suffix="_x")
        wanted = {"a.png": "a_x.png", "b_x.png": "b_x_x.png"}
        assert {job.source.name: job.target.name for job in found.jobs} == wanted
        assert [path.name for path in found.results] == done
        assert len(left_out(found)) == bool(done)
        touch(tmp_path, *wanted.values())


def test_every_name_has_an_output_of_its_own(tmp_path: Path) -> None:
    """As in folders of Hugging Face, DVC and git-annex, where names are links to blobs."""
    touch(tmp_path, "blobs/1f", "blobs/2e", "in/a.png", "elsewhere/sub/d.png")
    for name, blob in (("b.png", "1f"), ("c.png", "1f")):
        (tmp_path / "in" / name).symlink_to(tmp_path / "blobs" / blob)
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "hard.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "elsewhere")
    found = plan([str(tmp_path / "in")], tmp_path / "out")
    names = ["a.png", "again/sub/d.png", "b.png", "c.png", "hard.png", "linked/sub/d.png"]
    assert sorted(targets(found, tmp_path / "in")) == names
    assert sorted(job.target.relative_to(tmp_path / "out").as_posix() for job in found.jobs) == names
    assert left_out(found) == []


def test_links_do_not_lead_in_circles_or_to_the_output(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.png", "in/one/b.png", "in/two/c.png", "in/out/a.png")
    for link, to in (("one/two", "two"), ("two/one", "one"), ("up", ".."), ("loop", "loop"), ("results", "out")):
        (tmp_path / "in" / link).symlink_to(tmp_path / "in" / to)
    found = plan([str(tmp_path / "in")], tmp_path / "in" / "out")
    assert sorted(targets(found, tmp_path / "in")) == [
        "a.png",
        "one/b.png",
        "one/two/c.png",
        "two/c.png",
        "two/one/b.png",
    ]
    assert found.ignored == [tmp_path / "in" / "loop"]


def test_what_is_given_twice_is_restored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "in/a.png", "in/sub/b.png")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    found = plan(["in", "in/a.png", "./in/sub/../a.png", "link", "in/sub/b.png", "i*/*.png"], Path("out"))
    assert targets(found, Path()) == {"in/a.png": "out/a.png", "in/sub/b.png": "out/sub/b.png"}
    assert len(found.repeated) == 6
    assert left_out(found) == [
        "given more than once, restored once: 6 files: in/a.png, in/sub/../a.png, link/a.png, ..."
    ]


def test_what_is_not_taken_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heic = [f"in/{number}.HEIC" for number in range(4)]
    touch(tmp_path, "in/a.png", "in/b.JFIF", "in/c.avif", "in/sub/notes.txt", "in/README", "in/.cache/x.png", *heic)
    touch(tmp_path, *(f"in/x.{number}" for number in range(10)), "in/raw.dng", "empty/.x")
    monkeypatch.chdir(tmp_path)
    found = plan(["in", "empty"], Path("out"))
    assert targets(found, Path()) == {"in/a.png": "out/a.png", "in/b.JFIF": "out/b.JFIF", "in/c.avif": "out/c.png"}
    assert left_out(found) == [
        "skipped, since their suffixes are not those of images or videos: 17 files",
        "  4 .heic: in/0.HEIC, in/1.HEIC, in/2.HEIC, ...; convert HEIC to JPEG or PNG first,"
        " for example with heif-convert",
        "  1 without a suffix: in/README",
        *(f"  1 .{number}: in/x.{number}" for number in range(6)),
        "  6 others: in/x.6, in/x.7, in/x.8, ...",
        "skipped, since their names begin with a dot: 2 files: in/.cache, empty/.x",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
def test_a_folder_that_cannot_be_read_fails_alone(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "locked").mkdir(mode=0)
    message = refused("--model", folder / "same.pth", tmp_path / "in", "--output", tmp_path / "out")
    assert "locked: this folder cannot be read: Permission denied" in message
    assert files(tmp_path / "out") == ["a.png"]


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.jpg", "sub/a.png", "empty/notes.txt")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "sub" / "a.png")
    for inputs, output, options, reason in (
        ([a], tmp_path, {}, "would overwrite an input; give another --output, or a --suffix"),
        ([b], tmp_path / "sub", {}, "would overwrite an input"),
        ([a, b], tmp_path / "out", {}, "would both become"),
        ([a, a.replace("png", "jpg")], tmp_path / "out", {"format": "png"}, "or without --format"),
        ([str(tmp_path / "none.png")], tmp_path / "out", {}, "no file or folder has this name"),
        ([str(tmp_path / "none*.png")], tmp_path / "out", {}, "or matches it as a pattern"),
        ([str(tmp_path / "empty")], tmp_path / "out", {}, r"no images or videos in .*empty\n(.*\n)*.*notes\.txt"),
        (["a\0b.png"], tmp_path / "out", {}, "has a NUL character"),
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
        "  in/alpha.png -> out/alpha.jpg: .jpg files have no alpha channel; write png, webp or tif",
        "  in/cut.png: image file is truncated",
        "  in/empty.png: the file is empty (0 bytes)",
        "  in/link.png: No such file: is a link to nowhere.png",
        "  in/moving.gif: is an animation; convert it to images or a video first "
        "(GIF and PNG: ffmpeg -i FILE frame_%04d.png)",
    ]
    assert files(Path("out")) == ["cmyk.jpg", "one.jpg", "strip.jpg"]
    told = capsys.readouterr()
    assert "in/strip.png -> out/strip.jpg: 500x3 to 500x3, " in told.out
    assert "  note: CMYK converted to sRGB\n" in told.out
    assert told.err.count("failed: ") == 5
    assert told.out.splitlines()[-1] == "3 restored, 5 failed"


STRANGE = ("caf\udce9.png", "-dash.png", "new\nline.png", "[1] 50% a:b x=2.png", "x" * 251 + ".png", "a" * 225 + ".png")


def test_names_that_a_file_system_allows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number, dtype in enumerate((np.uint8, np.uint16)):  # through Pillow and through libvips
        write(tmp_path / "a.png", pixels(3, dtype))
        for name in STRANGE:
            shutil.copy(tmp_path / "a.png", tmp_path / "in" / name)
        out = tmp_path / f"out{number}"
        restored, failures = quietly(unchanged, [str(tmp_path / "in")], out)
        assert (restored, failures) == (sorted(STRANGE), [])
        restored, failures = quietly(unchanged, [str(tmp_path / "in")], out, suffix="_times_four")
        assert len(restored) == len(STRANGE) - 1 + len(STRANGE)
        assert len(failures) == 1 and failures[0].endswith(": File name too long") and "/in/xxx" in failures[0]
    if shutil.which("ffmpeg"):
        make = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=s=32x24:r=25:d=0.08", "-f", "matroska"]
        for name in STRANGE[:2]:
            video = tmp_path / "videos" / f"{name}.mkv"
            video.parent.mkdir(exist_ok=True)
            subprocess.run([*make, "file:" + str(video)], check=True)
        (tmp_path / "videos" / "b\udcff.mp4").write_bytes(b"no video")
        restored, failures = quietly(unchanged, [str(tmp_path / "videos")], tmp_path / "out")
        assert restored == sorted(f"{name}.mkv" for name in STRANGE[:2])
        assert len(failures) == 1 and "b\udcff.mp4: cannot be read" in failures[0]


def unchanged(image: np.ndarray, progress: restore.Told) -> np.ndarray:
    """What stands in for a network."""
    return image


def quietly(
    network: restore.RestoreImage, inputs: list[str], output: Path, **options: str
) -> tuple[list[str], list[str]]:
    """What is in the output after a run, and what failed."""
    with StopSignals() as stop, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        failures = restore.run(plan(inputs, output, **options).jobs, network, scale=1, quality=None, stop=stop)
    return files(output), failures


def test_whatever_is_raised_for_a_file_is_its_failure(tmp_path: Path) -> None:
    raised = [KeyError("x"), RecursionError("deep"), MemoryError(), AssertionError(), SyntaxError("tiff"), EOFError()]
    for number in range(len(raised) + 1):
        write(tmp_path / "in" / f"{number}.png")
    errors = iter(raised)

    def fails(image: np.ndarray, progress: restore.Told) -> np.ndarray:
        if (error := next(errors, None)) is not None:
            raise error
        return image

    restored, failures = quietly(fails, [str(tmp_path / "in")], tmp_path / "out")
    assert restored == ["6.png"] and len(failures) == 6
    assert all(f"in/{number}.png: " in failure for number, failure in enumerate(failures))


def test_targets_that_cannot_be_are_seen_before_the_work(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "sub/c.png", "No space left on device.png"):
        write(tmp_path / "in" / name)
    (tmp_path / "out" / "b.png").mkdir(parents=True)
    (tmp_path / "out" / "sub").touch()
    (tmp_path / "out" / "No space left on device.png").mkdir()
    (tmp_path / "out" / "a.png").symlink_to("nowhere/a.png")
    calls = []
    network = lambda image, progress: calls.append(1) or image  # noqa: E731
    restored, failures = quietly(network, [str(tmp_path / "in")], tmp_path / "out")
    assert len(calls) == 1 and restored == ["a.png", "sub"] and not (tmp_path / "out" / "a.png").is_symlink()
    assert [failure.rsplit(": ")[-1] for failure in failures] == ["Is a directory", "Is a directory", "File exists"]


def test_what_would_not_fit_into_memory_is_refused_and_the_flag_lifts_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.png", pixels(size=(40, 50)))
    arguments = ("--model", folder / "double.pth", tmp_path / "a.png", "--output", tmp_path / "out")
    monkeypatch.setattr(pictures, "host_memory", lambda: (10**9, 2 * 40 * 50 * 20))
    message = refused(*arguments)
    assert "a.png: too many pixels: 50x40 would take about" in message and "with --max-megapixels 1 it is" in message
    assert "--max-megapixels is 0.001; 1 would be enough" in refused(*arguments, "--max-megapixels", "0.001")
    run(*arguments, "--max-megapixels", "1")
    assert files(tmp_path / "out") == ["a.png"]
    refused(*arguments, "--max-megapixels", "0", code=2)


def test_bad_requests_are_refused(folder: Path, tmp_path: Path) -> None:
    picture, same = write(tmp_path / "a.png"), folder / "same.pth"
    (tmp_path / "cut.pth").write_bytes(same.read_bytes()[:300])
    kdjax.save_model(network("dncnn", num_in_ch=4, num_feat=2, depth=2), tmp_path / "4.pth")
    out = ("--output", tmp_path / "out")
    for arguments, reason in (
        ((picture, "--model", tmp_path / "cut.pth", *out), "cut.pth: the file is damaged"),
        ((picture, "--model", tmp_path / "4.pth", *out), "takes images of 4 channels; images have 1 or 3"),
        ((picture, "--model", same, "--hparam", "upscale=3", *out), "same.pth: "),
        ((picture, "--model", same, "--key", "params_ema", *out), "params_ema"),
        ((picture, "--model", same, "--output", picture / "out"), "this folder is not writable: Not a directory"),
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
    assert "locked: this folder is not writable: Permission denied" in message


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
    assert "2 files, 1 of them are already done" in capsys.readouterr().out
    assert read_picture(tmp_path / "out" / "a.png").pixels.shape == (2, 2, 1)
    assert read_picture(tmp_path / "out" / "b.png").pixels.shape == (24, 32, 3)
    run(*arguments, "--overwrite")
    assert read_picture(tmp_path / "out" / "a.png").pixels.shape == (24, 32, 3)


@pytest.mark.once
def test_a_killed_program_leaves_whole_files_and_continues(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.png")
    write(tmp_path / "in" / "b.png", np.zeros((3000, 3000, 1), np.uint8))
    command = ["kdjax.restore", "--model", folder / "same.pth", tmp_path / "in", "--output", tmp_path / "out"]
    command += ["--tile", 8, "--tile-pad", 1]
    with programs.started(*command, JAX_NUM_CPU_DEVICES="1") as process:
        until = time.monotonic() + 120
        while not (tmp_path / "out" / "a.png").exists() and time.monotonic() < until and process.returncode is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
        message = process.stderr
    assert (
        message.splitlines()[-1] == "stopped by SIGTERM; run the same command to continue"
        and "Traceback" not in message
    )
    assert files(tmp_path / "out") == ["a.png"]

    write(tmp_path / "in" / "b.png")
    result = programs.run(*command)
    assert result.returncode == 0, result.stderr
    assert "2 files, 1 of them are already done" in result.stdout and "b.png: 32x24 to 32x24" in result.stdout
    assert files(tmp_path / "out") == ["a.png", "b.png"]
