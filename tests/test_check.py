"""The preflight reads every image once, names everything that is wrong, and is never stopped by a bad file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import programs
import pytest
from PIL import Image

from kdjax.data import check as program
from kdjax.data import write_image
from kdjax.data.pack import pack
from kdjax.data.pairs import survey


def random_image(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_folder(folder: Path, count: int = 4, height: int = 40, width: int = 50, seed: int = 0) -> Path:
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i}.png", random_image(height, width, seed + i))
    return folder


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return programs.run("kdjax.data.check", *arguments)


def names(lines: list[str]) -> list[str]:
    """The file names of the images that lines of a report are about."""
    return [os.path.basename(line.split(": ")[0]) for line in lines]


def test_a_clean_data_set(tmp_path: Path) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", height=20, width=25)
    result = run("--gt", gt, "--lq", lq, "--scale", 2, "--crop", 40, "--json", tmp_path / "r.json")
    assert result.returncode == 0 and result.stderr == "", result.stdout + result.stderr
    assert "gt: 4 images, 0.01 megapixels" in result.stdout and "lq: 4 images" in result.stdout
    assert "smallest 50x40, median 50x40, largest 50x40" in result.stdout and "stored as RGB (4)" in result.stdout
    assert result.stdout.splitlines()[-2] == "clean"
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["clean"] and found["images"] == {"gt": 4, "lq": 4} and found["modes"]["lq"] == {"RGB": 4}
    assert found["sizes"]["lq"]["largest"] == "25x20"


def test_everything_that_is_wrong_is_in_one_report(tmp_path: Path) -> None:
    gt, lq = make_folder(tmp_path / "gt", 9), make_folder(tmp_path / "lq", 8, seed=50)
    clean = make_folder(tmp_path / "clean", 2, seed=80)
    (gt / "0.png").write_bytes(b"")
    (lq / "1.png").write_bytes((lq / "1.png").read_bytes()[:300])
    write_image(gt / "2.png", random_image(20, 50, 70))
    write_image(lq / "2.png", random_image(20, 50, 71))
    (gt / "4.png").write_bytes((gt / "3.png").read_bytes())
    (clean / "1.png").write_bytes((gt / "3.png").read_bytes())
    (lq / "4.png").write_bytes((gt / "3.png").read_bytes())  # no duplicate, but the same as its gt
    write_image(lq / "5.png", random_image(40, 49, 72))
    write_image(lq / "only.png", random_image(40, 50, 73))
    (clean / "folder.png").mkdir()
    (clean / "link.png").symlink_to(tmp_path / "nowhere")
    result = run("--gt", gt, "--lq", lq, "--unpaired", clean, "--crop", 32, "--json", tmp_path / "r.json")
    assert result.returncode == 1 and result.stderr == "", result.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert not found["clean"] and found["images"] == {"gt": 9, "lq": 9, "unpaired": 3}
    assert names(found["damaged"]) == ["0.png", "link.png", "1.png"]
    assert names(found["tiny"]) == ["2.png", "2.png"] and "50x20, smaller than the crop of 32" in found["tiny"][0]
    assert names(found["duplicate"]) == ["4.png", "1.png"]
    assert all(line.endswith(f"the same pixels as {gt / '3.png'}") for line in found["duplicate"])
    assert names(found["mismatched"]) == ["5.png"] and "with scale 1 gt should be 49x40" in found["mismatched"][0]
    assert names(found["identical"]) == ["4.png"] and "has the same pixels" in found["identical"][0]
    assert names(found["missing"]) == ["8.png", "only.png"]
    for kind in ("damaged", "tiny", "duplicate", "mismatched", "identical", "missing"):
        assert f"{kind}: {len(found[kind])}\n  {found[kind][0]}\n" in result.stdout
    assert "11 problems" in result.stdout


def test_every_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", seed=9)
    (tmp_path / "list.txt").write_text("1.png\n2.png\n1.png, 3.png\n9.png\n")
    read: Counter[str] = Counter()
    inspect = program.inspect_image

    def counted(path: str) -> tuple[np.ndarray, str]:
        read[path] += 1
        return inspect(path)

    monkeypatch.setattr(program, "inspect_image", counted)
    report = program.check({"gt": survey(gt=str(gt), lq=str(lq))}, crop=8)
    assert report.clean and len(read) == 8 and set(read.values()) == {1}
    listed = survey(gt=str(gt), lq=str(lq), meta_info=str(tmp_path / "list.txt"))
    report = program.check({"gt": listed}, crop=8)
    assert report.images == {"gt": 2, "lq": 3} and report.missing == ["meta_info, line 4: no gt '9.png'"]
    assert not report.duplicate


def test_what_need_not_be_wrong_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", seed=9)
    for path in (gt / "scan.heic", gt / "scan.psd", lq / "notes.txt", lq / "more.txt"):
        path.touch()
    options = ("--gt", gt, "--lq", lq, "--unlabelled", lq, "--crop", 8, "--json", tmp_path / "r.json")
    result = main(capsys, *options)
    assert result[0] == 0 and "note: 4 other files are not images that kdjax reads: " in result[1]
    found = json.loads((tmp_path / "r.json").read_text())
    assert names(found["left_out"]) == ["scan.heic", "scan.psd", "more.txt", "notes.txt"]
    (tmp_path / "list.txt").write_text("1.png\n2.png, 1.png\n1.png\n1.png, 3.png\n")
    code, text, _ = main(capsys, *options, "--meta-info", tmp_path / "list.txt")
    assert (
        code == 0
        and f"note: 1 lq with several gt\n  {lq}/1.png: is the lq of 2 gt images, such as {gt}/1.png and" in text
    )


def test_pairs_of_one_image_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", seed=9)
    (lq / "1.png").write_bytes((gt / "1.png").read_bytes())
    (lq / "2.png").unlink()
    (lq / "2.png").hardlink_to(gt / "2.png")
    code, text, _ = main(capsys, "--gt", gt, "--lq", lq, "--crop", 8)
    assert code == 1 and "identical: 2\n" in text and "2 problems" in text
    assert f"{gt}/1.png: its lq {lq}/1.png has the same pixels\n" in text
    assert f"{gt}/2.png: its lq {lq}/2.png is the same file\n" in text


def test_names_that_are_not_text_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_folder(tmp_path / "gt")
    bad = [os.fsdecode(name) for name in (b"caf\xe9.png", b"a\nb.png", b"\x1b[31m.png")]
    for name in bad:
        (folder / name).touch()
    (folder / os.fsdecode(b"\xff.psd")).touch()
    code, text, _ = main(capsys, "--gt", folder, "--crop", 8, "--json", tmp_path / "r.json")
    assert code == 1 and "damaged: 3\n" in text and "3 problems" in text
    for shown in ("caf\\xe9.png: the file is empty", "a\\nb.png: the file", "\\x1b[31m.png: the file", "\\xff.psd"):
        assert shown in text
    found = json.loads((tmp_path / "r.json").read_text())
    assert sorted(line.split(": ")[0] for line in found["damaged"]) == sorted(str(folder / name) for name in bad)


def main(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[object, str, str]:
    """The program in this process: its exit code, and what it said."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["check", *map(str, arguments)])
        program.main()
    return ended.value.code, *capsys.readouterr()


def test_what_is_stopped_does_not_wait_for_the_images_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def looks(path: str) -> str:
        read.append(path)
        time.sleep(0.01)
        return "damaged"

    monkeypatch.setattr(program, "_facts", looks)
    images = program._read_all([str(number) for number in range(60)], 2)
    assert next(images) == ("0", "damaged")
    images.close()
    assert len(read) < 20


def test_ctrl_c_leaves_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "gt")

    def stops(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "inspect_image", stops)
    monkeypatch.setattr(sys, "argv", ["check", "--gt", str(folder), "--json", str(tmp_path / "r.json")])
    with pytest.raises(KeyboardInterrupt):  # which `commandline.run` turns into exit code 130
        program.main()
    assert not (tmp_path / "r.json").exists()


def test_how_files_are_stored_is_told_and_is_no_fault(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt", 2)
    pixels = np.dstack([random_image(40, 50, 7), random_image(40, 50, 8)])
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels[..., :4]).save(folder / "alpha.png")
    Image.fromarray(pixels[..., :3]).quantize(9).save(folder / "palette.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    # Colour of 16 bits, which Pillow reads and does not write.
    (folder / "deep.ppm").write_bytes(b"P6 50 40 65535\n" + (pixels[..., :3].astype(">u2") * 200).tobytes())
    result = run("--gt", folder, "--crop", 32, "--json", tmp_path / "r.json")
    assert result.returncode == 0, result.stdout
    notes = {kind: names(paths) for kind, paths in json.loads((tmp_path / "r.json").read_text())["notes"].items()}
    assert notes["grey"] == ["deep.png", "grey.png"] and notes["alpha"] == ["alpha.png"]
    assert notes["palette"] == ["palette.png"] and notes["16 bit"] == ["deep.png", "deep.ppm"]
    assert "note: 1 stored as alpha\n" in result.stdout
    grey = tmp_path / "grey"
    grey.mkdir()
    Image.fromarray(pixels[..., 0]).save(grey / "a.png")
    assert "note" not in run("--gt", grey, "--crop", 32).stdout


def test_packs_are_checked_like_folders(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "gt"), tmp_path / "out"
    (folder / "1.png").write_bytes(b"")
    pack(str(folder), str(out), tell=lambda line: None)
    report = program.check({"gt": survey(gt=str(out))}, crop=8)
    assert names(report.damaged) == ["1.png"] and "damaged when it was packed" in report.damaged[0]
    assert report.images == {"gt": 4} and not report.duplicate


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_damaged(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt")
    (folder / "1.png").chmod(0)
    report = program.check({"gt": survey(gt=str(folder))}, crop=8)
    assert len(report.damaged) == 1 and "Permission denied" in report.damaged[0]


@pytest.mark.once
def test_what_cannot_be_checked_is_one_message(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt")
    for arguments, message in [
        (("--gt", tmp_path / "nowhere"), "does not exist"),
        (("--gt", folder, "--json", tmp_path / "no" / "r.json"), "No such file"),
    ]:
        result = run(*arguments, "--crop", 8)
        assert result.returncode == 1 and result.stderr.startswith("error: ") and message in result.stderr
        assert "Traceback" not in result.stderr
    assert run("--gt", folder, "--scale", 0).returncode == 2
    embedded = run("--gt", "embedded")
    assert embedded.returncode == 0, embedded.stdout
