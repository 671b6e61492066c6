"""Packs give what the folder gives, and packing survives kills, damage and bad input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import programs
import pytest
from PIL import Image

from kdjax import files
from kdjax.data import (
    DataError,
    ImageError,
    ImagePair,
    find_pairs,
    find_unlabelled,
    load_images,
    open_cache,
    read_image,
    shards,
    training_batches,
    write_image,
)
from kdjax.data import pack as program
from kdjax.data.cache import CACHE
from kdjax.signals import Stopped


def random_image(height: int, width: int, seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_folder(folder: Path, count: int = 6, height: int = 40, width: int = 50, seed: int = 0) -> str:
    for i in range(count):
        name = folder / ("sub" if i % 3 == 2 else "") / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        write_image(name, random_image(height, width, seed + i))
    return str(folder)


def packed(folder: str | Path, **options: object) -> str:
    out = f"{folder}.pack"
    program.pack(str(folder), out, tell=lambda line: None, **options)
    return out


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return programs.run("kdjax.data.pack", *arguments, **options)


def content(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != files.LOCK}


def assert_same_batches(one: list[ImagePair], other: list[ImagePair], steps: int = 5, **options: object) -> None:
    options = dict(crop=16, batch_size=4, seed=5) | options
    with training_batches(one, **options) as a, training_batches(other, **(options | dict(workers=0))) as b:
        for _ in range(steps):
            first, second = next(a), next(b)
            assert sorted(first) == sorted(second)
            for key, value in first.items():
                np.testing.assert_array_equal(value, second[key])


# The same as the folder


@pytest.mark.once
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(tmp_path: Path, workers: int) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", height=20, width=25)
    gt_pack, lq_pack = packed(gt), packed(lq, shard_mb=1)
    assert_same_batches(find_pairs(gt=gt_pack), find_pairs(gt=gt), workers=workers)
    options = dict(scale=2, workers=workers)
    assert_same_batches(find_pairs(gt=gt_pack, lq=lq_pack), find_pairs(gt=gt, lq=lq), **options)
    # A pack and a folder form pairs too, and packs serve as all the other sources.
    beside = dict(unlabelled=find_unlabelled(lq_pack, degraded=True), unpaired=find_pairs(gt=gt_pack))
    with training_batches(
        find_pairs(gt=gt_pack, lq=lq), crop=16, batch_size=8, seed=1, scale=2, unlabelled_part=0.25, **beside
    ) as batches:
        assert sorted(next(batches)) == ["gt", "index", "is_paired", "labelled", "lq"]


def test_names_lists_and_templates_work_as_with_folders(tmp_path: Path) -> None:
    gt, lq = make_folder(tmp_path / "gt"), make_folder(tmp_path / "lq", seed=50)
    for path in Path(lq).rglob("*.png"):
        path.rename(path.with_stem(path.stem + "_noisy"))
    gt_pack, lq_pack = packed(gt), packed(lq)
    (tmp_path / "list.txt").write_text("sub/2.png\n1.png (40,50,3)\n0.png, 4_noisy.png\n")
    (tmp_path / "bad.txt").write_text("9.png\n")
    for options in (dict(), dict(meta_info=str(tmp_path / "list.txt")), dict(recursive=False)):
        options = options | dict(filename_tmpl="{}_noisy")
        from_pack, from_folder = find_pairs(gt=gt_pack, lq=lq_pack, **options), find_pairs(gt=gt, lq=lq, **options)
        assert [pair.name for pair in from_pack] == [pair.name for pair in from_folder]
        assert [os.path.basename(pair.lq) for pair in from_pack] == [os.path.basename(pair.lq) for pair in from_folder]
    with pytest.raises(DataError, match=r"line 1: no gt '9\.png'"):
        find_pairs(gt=gt_pack, meta_info=str(tmp_path / "bad.txt"))
    with pytest.raises(DataError, match="6 of 6 in gt have no lq"):
        find_pairs(gt=gt_pack, lq=lq_pack)
    with pytest.raises(DataError, match="same folder"):
        find_pairs(gt=gt_pack, lq=gt_pack + "/")


def test_every_kind_of_file_gives_the_same_pixels_in_colour_and_in_grey(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    colour = random_image(12, 17, 0, 4)
    write_image(folder / "rgb.png", colour[..., :3])
    write_image(folder / "grey.png", colour[..., :1])
    write_image(folder / "photo.jpg", colour[..., :3])
    Image.fromarray(colour).save(folder / "alpha.png")
    Image.fromarray(colour[..., [0, 3]]).save(folder / "grey alpha.png")
    Image.fromarray(colour[..., :3]).quantize(7).save(folder / "palette.png")
    Image.fromarray(colour[..., 0].astype(np.uint16) * 200).save(folder / "16.png")
    Image.fromarray(colour, mode="CMYK").save(folder / "cmyk.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour[..., :3]).save(folder / "turned.jpg", exif=exif)
    pack = packed(folder)
    for pair, other in zip(find_pairs(gt=pack), find_pairs(gt=str(folder)), strict=True):
        for channels in (1, 3):
            image = read_image(pair.gt, channels)
            np.testing.assert_array_equal(image, read_image(other.gt, channels), err_msg=pair.name)
            assert image.flags.c_contiguous and image.flags.writeable
    for image, other in zip(load_images(find_pairs(gt=pack)), load_images(find_pairs(gt=str(folder))), strict=True):
        assert image.name == other.name
        np.testing.assert_array_equal(image.gt, other.gt)


def test_threads_share_a_pack_that_is_opened_when_it_is_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt", count=8, height=300, width=400)
    pack = packed(folder, shard_mb=1)
    assert len(list(Path(pack).glob("*.arrayrecord"))) == 3
    shards._reader.cache_clear()
    pairs, expected = find_pairs(gt=pack), [read_image(pair.gt) for pair in find_pairs(gt=folder)]
    assert shards._reader.cache_info().currsize == 0
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 8, 400).tolist()
        for i, image in zip(order, pool.map(lambda i: read_image(pairs[i].gt), order), strict=True):
            np.testing.assert_array_equal(image, expected[i])


# The program


@pytest.mark.once
def test_the_program_packs_and_is_done_when_started_again(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "gt"), tmp_path / "out"
    first = run(folder, out)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "6 of 6 images, shards: 1, 0 MB (0 were there)" in first.stdout
    before = content(out)
    assert sorted(before) == ["00000.arrayrecord", "pack.json"]
    index = json.loads(before["pack.json"])
    assert (index["format"], index["version"], index["total"], index["damaged"]) == ("kdjax pack", 1, 6, 0)
    assert index["shards"][0]["images"][0] == ["0.png", 0, 40, 50, 3]
    again = run(folder, out)
    assert again.returncode == 0 and "(1 were there)" in again.stdout and content(out) == before
    # A finished pack may be in use: it is never changed.
    write_image(Path(folder) / "new.png", random_image(8, 8, 9))
    for arguments in ([folder, out], [folder, out, "--shard-mb", "7"]):
        other = run(*arguments)
        assert other.returncode == 1 and "is a finished pack, but of other images" in other.stderr
        assert other.stderr.startswith("error: ") and "Traceback" not in other.stderr and content(out) == before


@pytest.mark.once
def test_a_killed_program_continues_with_the_same_bytes(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt", count=40, height=500, width=500)
    whole = content(packed(folder, shard_mb=2))
    out = tmp_path / "out"
    with programs.started("kdjax.data.pack", folder, out, "--shard-mb", 2) as process:
        deadline = time.monotonic() + 60
        while not (out / "00001.arrayrecord").exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
    killed = set(content(out))
    assert "pack.json" not in killed and "pack.unfinished.jsonl" in killed
    with pytest.raises(DataError, match=r"unfinished; run the same `python -m kdjax\.data\.pack` again"):
        find_pairs(gt=str(out))
    again = run(folder, out, "--shard-mb", 2)
    assert again.returncode == 0 and "of 40 images are already packed" in again.stdout, again.stderr
    assert content(out) == whole


@pytest.mark.parametrize("images", range(8))
def test_wherever_it_is_stopped_it_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    folder = make_folder(tmp_path / "gt", count=8, height=400, width=500)
    whole = content(packed(folder, shard_mb=1))
    inspect, seen = program.inspect_image, []

    def stops(path: object, *_: object) -> tuple[np.ndarray, str]:
        if len(seen) >= images:
            raise KeyboardInterrupt
        seen.append(path)
        return inspect(path)

    out = str(tmp_path / "out")
    monkeypatch.setattr(program, "inspect_image", stops)
    with pytest.raises(KeyboardInterrupt):
        program.pack(folder, out, shard_mb=1, threads=1, tell=lambda line: None)
    # What kills leave behind: half a line, half a shard, and a shard that the journal does not know.
    with open(f"{out}/pack.unfinished.jsonl", "a") as file:
        file.write('{"file": "0000')
    (Path(out) / ".00003.1.2.arrayrecord").write_bytes(b"half")
    with files.whole_file(Path(out) / "pack.json") as temporary:
        index_leftover = temporary
        temporary.touch()
    (Path(out) / "pack.json").rename(index_leftover)
    (Path(out) / "00007.arrayrecord").write_bytes(b"unknown")
    monkeypatch.setattr(program, "inspect_image", inspect)
    said: list[str] = []
    with monkeypatch.context() as patch:  # once more, at the very end
        patch.setattr(program, "_write_index", stops)
        seen += [""] * 8
        with pytest.raises(KeyboardInterrupt):
            program.pack(folder, out, shard_mb=1, tell=said.append)
    kept = images // 2  # two images make a shard
    assert said == ([f"{2 * kept} of 8 images are already packed"] if kept else [])
    assert program.pack(folder, out, shard_mb=1, tell=said.append).kept == 4
    assert content(out) == whole


def test_a_shard_of_other_files_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "gt", count=8, height=400, width=500)
    out = str(tmp_path / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(program, "_write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            program.pack(folder, out, shard_mb=1, tell=lambda line: None)
    write_image(Path(folder) / "3.png", random_image(300, 300, 99))
    said: list[str] = []
    assert program.pack(folder, out, shard_mb=1, tell=said.append).kept == 1
    assert said[0] == "2 of 8 images are already packed" and content(out) == content(packed(folder, shard_mb=1))


@pytest.mark.once
def test_two_processes_do_not_pack_into_one_folder(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "gt"), tmp_path / "out"
    out.mkdir()
    with files.locked(out):
        second = run(folder, out)
    assert second.returncode == 1 and f"{out} is being written by process {os.getpid()} on" in second.stderr
    assert content(out) == {} and run(folder, out).returncode == 0


@pytest.mark.once
def test_damaged_images_are_told_and_stay_by_name(tmp_path: Path) -> None:
    folder, out = Path(make_folder(tmp_path / "gt")), tmp_path / "out"
    (folder / "1.png").write_bytes(b"")
    (folder / "sub" / "5.png").write_bytes((folder / "sub" / "5.png").read_bytes()[:200])
    (folder / "link.png").symlink_to(folder / "nowhere")
    (folder / "folder.png").mkdir()
    result = run(folder, out)
    assert result.returncode == 1 and "4 of 7 images" in result.stdout and "damaged: 3\n" in result.stdout
    assert "1.png: the file is empty (0 bytes)" in result.stdout and "link.png: No such file" in result.stdout
    again = run(folder, out)
    assert again.returncode == 1 and "damaged: 3\n" in again.stdout
    pairs = find_pairs(gt=str(out))
    with pytest.raises(ImageError, match=r"out/pack\.json/1\.png: damaged when it was packed: the file is empty"):
        read_image(pairs[1].gt)
    assert_same_batches(pairs, find_pairs(gt=str(folder)), steps=10)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_missing_permissions(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt")
    (Path(folder) / "1.png").chmod(0)
    assert "1.png: Permission denied" in run(folder, tmp_path / "out").stdout
    tmp_path.chmod(0o500)
    try:
        result = run(folder, tmp_path / "other")
    finally:
        tmp_path.chmod(0o700)
    assert result.returncode == 1 and "Permission denied" in result.stderr


@pytest.mark.once
def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "gt", count=4, height=600, width=600), tmp_path / "out"
    result = run(folder, out, limits={resource.RLIMIT_FSIZE: 2000 << 10})
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.startswith("error: ") and "cannot be written: " in result.stderr
    assert sorted(content(out)) == ["pack.unfinished.jsonl"]
    assert run(folder, out).returncode == 0 and len(find_pairs(gt=str(out))) == 4


@pytest.mark.once
def test_bad_input_of_the_program(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    (tmp_path / "file").touch()
    pack, new = packed(folder), str(tmp_path / "new")
    for arguments, message in [
        (("nowhere", new), "'nowhere' does not exist"),
        ((str(tmp_path / "empty"), new), "no image in"),
        ((str(tmp_path / "file"), new), "is a file; give a folder"),
        ((pack, new), "is already a pack"),
        ((folder, folder), "it holds other files"),
        ((folder, str(tmp_path / "file")), "it is a file"),
        ((str(tmp_path / "bad"), str(tmp_path / "out")), "none of the 1 images .*\n.*the file is empty"),
    ]:
        with pytest.raises((DataError, shards.PackError), match=message):
            program.pack(*arguments, tell=lambda line: None)
    with pytest.raises(DataError, match="shard_mb is 0"):
        program.pack(folder, new, shard_mb=0)
    assert not Path(new).exists()
    assert run("nowhere", new).returncode == 1 and run(folder).returncode == 2


# Packs that cannot be used


def test_bad_packs_are_refused_with_what_to_do(tmp_path: Path) -> None:
    good = packed(make_folder(tmp_path / "gt", count=8, height=400, width=500), shard_mb=1)
    index = json.loads((Path(good) / "pack.json").read_text())
    whole = json.dumps(index)

    def spoilt(name: str, text: str | bytes | None) -> str:
        folder = tmp_path / f"bad{len(list(tmp_path.iterdir()))}"
        shutil.copytree(good, folder)
        path = folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text or b"")
        if text is None:
            path.unlink()
        return str(folder)

    half = (Path(good) / "00001.arrayrecord").read_bytes()[:70_000]
    for folder, message in [
        (spoilt("pack.json", whole[:300]), "damaged or cut short .* make it again"),
        (spoilt("pack.json", ""), "damaged or cut short"),
        (spoilt("pack.json", b"\xff\xfe"), "damaged or cut short"),
        (spoilt("pack.json", "[1]"), "is not the index of a pack"),
        (spoilt("pack.json", json.dumps(index | {"version": 2})), "has version 2 and this kdjax reads version 1; inst"),
        (spoilt("pack.json", json.dumps(index | {"shards": [{"file": "a"}]})), "is damaged .*KeyError"),
        (spoilt("pack.json", json.dumps(index | {"shards": 3})), "no list of shards"),
        (spoilt("00001.arrayrecord", None), r"not complete:\n  00001.arrayrecord: No such file.*\ncopy these files"),
        (spoilt("00001.arrayrecord", half), r"00001.arrayrecord: 70,000 bytes; it should have 1,"),
    ]:
        with pytest.raises(DataError, match=r"^training images \(gt\): ") as caught:
            find_pairs(gt=folder)
        assert caught.match(message)
        with pytest.raises(DataError, match=r"^unlabelled images: "):
            find_unlabelled(folder, degraded=True)

    # Bytes that changed are seen when the image is read; the other images of the shard are well.
    data = bytearray((Path(good) / "00001.arrayrecord").read_bytes())
    data[300_000:300_010] = bytes(10)
    pairs = find_pairs(gt=spoilt("00001.arrayrecord", bytes(data)))
    with pytest.raises(ImageError, match=r"pack\.json/\S+\.png: 00001\.arrayrecord is damaged or cannot be read"):
        for pair in pairs:
            read_image(pair.gt)
    with training_batches(pairs, crop=16, batch_size=4, seed=5) as batches:
        for _ in range(4):
            next(batches)
        assert len(batches.damaged) == 1
    with pytest.raises(ImageError, match="no such image in the pack"):
        read_image(os.path.join(good, "pack.json", "no.png"))


def crafted(folder: Path, *, images: object = (), damaged: object = None, **changes: object) -> str:
    """A pack of one shard, of which the index says what is given."""
    folder.mkdir(exist_ok=True)
    (folder / "00000.arrayrecord").write_bytes(bytes(1000))
    shard = {
        "file": "00000.arrayrecord",
        "bytes": 1000,
        "images": images,
        "damaged": {} if damaged is None else damaged,
        "sources": "",
    }
    shards.PACK.write_index(folder, {"shards": [shard | changes]})
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            (dict(images=[[name, 0, 1, 1, 1]]), f"the name .* {fault}")
            for name, fault in [
                ("../x.png", "leads out"),
                ("a/../../x.png", "leads out"),
                ("/x.png", "leads out"),
                ("", "is empty"),
                ("a\0b", "has a NUL"),
                ("\ud800", "has characters that file names cannot have"),
                ("x" * 5000, "is longer than any path"),
                ("9" * 5000, "is longer than any path"),
                (5, "is not text"),
            ]
        ),
        (dict(images=[[["a"], 0, 1, 1, 1]]), "unhashable"),
        (dict(damaged={"../x.png": "empty"}), "leads out"),
        (dict(damaged={"x.png": 5}), "not text"),
        (dict(damaged=[]), "is damaged"),
        (dict(images={}), "is damaged"),
        (dict(images=[["a", 0, 1, 1]]), "not enough values"),
        (dict(images=["a"]), "not enough values"),
        (dict(images=[["a", 0, 1, 1, 1], ["a", 1, 1, 1, 1]]), "a name appears twice"),
        (dict(images=[["a", 0, 1, 1, 1]], damaged={"a": ""}), "a name appears twice"),
        *((dict(images=[["a", number, 1, 1, 1]]), "is record") for number in (-1, 1, 10**30, 1.0, True, None, "0")),
        *(
            (dict(images=[["a", 0, *shape]]), r"has the shape|is record")
            for shape in [(0, 1, 1), (-1, -1, 1), (1, 1, 2), (10**9, 10**9, 3), (1000, 1, 3), (1.5, 1, 1), ("1", 1, 1)]
        ),
        *(
            (dict(file=file), "shard 0 is called")
            for file in ("../../x", "/etc/passwd", "00001.arrayrecord", "", 5, None)
        ),
        *((dict(bytes=size), "damaged|not complete") for size in (-1, 10**30, 1.5, "1000", None)),
    ],
)
def test_an_index_is_not_believed(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s)^training images .*{message}.*make it again") as caught:
        find_pairs(gt=crafted(tmp_path / "pack", **changes))
    assert len(str(caught.value)) < 1000


def test_an_index_nested_without_end_is_damaged(tmp_path: Path) -> None:
    folder = crafted(tmp_path / "pack")
    (tmp_path / "pack" / "pack.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="damaged or cut short"):
        find_pairs(gt=folder)


def test_an_index_costs_what_its_size_does(tmp_path: Path) -> None:
    # All of one stem, which pairing goes by.
    one, other = (
        crafted(tmp_path / name, images=[[f"a.{i}", i, 1, 1, 1] for i in range(10_000)]) for name in ("gt", "lq")
    )
    started = time.process_time()
    assert len(find_pairs(gt=one, lq=other)) == 10_000
    assert time.process_time() - started < 5  # it would be minutes if every name were compared with all


def test_a_folder_may_be_called_as_an_index_is(tmp_path: Path) -> None:
    folder = tmp_path / "pack.json" / "images"
    make_folder(folder)
    pairs = find_pairs(gt=packed(folder))
    for pair, other in zip(pairs, find_pairs(gt=str(folder)), strict=True):
        np.testing.assert_array_equal(read_image(pair.gt), read_image(other.gt))


# An index like the one of `kdjax.cache`, for records of 3 x 2 x 1 bytes and as many numbers of 2 bytes
FIELDS = [["gt", "uint8", [3, 2, 1]], ["output", "float16", [3, 2, 1]]]


def crafted_cache(folder: Path, **changes: object) -> str:
    folder.mkdir()
    with shards.new_shard(folder / "00000.arrayrecord") as write:
        for number in range(4):
            write(bytes([number]) * 18)
    size = (folder / "00000.arrayrecord").stat().st_size
    index = {"samples": 4, "shard_samples": 4, "fields": FIELDS, "settings": {}}
    CACHE.write_index(folder, index | {"shards": [{"file": "00000.arrayrecord", "bytes": size}]} | changes)
    return str(folder)


def test_a_crafted_cache_is_read(tmp_path: Path) -> None:
    assert open_cache(crafted_cache(tmp_path / "cache")).read(3)["gt"].tolist() == [[[3], [3]]] * 3


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(samples=samples) for samples in (0, -1, 5, 10**30, 4.0, True, None, "4")),
        *(dict(shard_samples=samples) for samples in (0, -1, 3, 1.5, None)),
        *(dict(shards=[{"file": file, "bytes": 1}]) for file in ("../00000.arrayrecord", "00001.arrayrecord", 5)),
        *(dict(shards=[{"file": "00000.arrayrecord", "bytes": size}]) for size in (-1, 17, 1.5, "1", None)),
        dict(shards=[]),
        dict(shards=[5]),
        dict(fields=FIELDS[:1]),
        dict(fields=[*FIELDS, FIELDS[0]]),
        dict(fields=[*FIELDS, ["../x", "uint8", [1]]]),
        *(dict(fields=[*FIELDS, ["feature a", *field]]) for field in (["object", [1]], ["bfloat16", [10**9] * 3], [5])),
        *(
            dict(fields=[FIELDS[0], ["output", "float16", shape]])
            for shape in ([3, -2, 1], [3, 2], 3, "abc", [3, 2, True])
        ),
        *(dict(fields=[FIELDS[0], ["output", dtype, [3, 2, 1]]]) for dtype in ("O", "V999999999", "float64", 5, ["f"])),
        dict(settings=[]),
        dict(settings=json.loads('{"a":' * 200 + "1" + "}" * 200)),
    ],
)
def test_the_index_of_a_cache_is_not_believed(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(DataError, match=r"cached teacher: .*cache\.json' is damaged.* make it again") as caught:
        open_cache(crafted_cache(tmp_path / "cache", **changes))
    assert len(str(caught.value)) < 1000


def test_what_an_earlier_run_left_is_not_believed_either(tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "gt", count=8, height=400, width=500), tmp_path / "out"
    whole = content(packed(folder, shard_mb=1))
    out.mkdir()
    for line in ('{"file": "../gt/0.png"}', "[]", "5", '{"images": []}', '{"file": "00000.arrayrecord", "bytes": "x"}'):
        (out / "pack.unfinished.jsonl").write_text(f"{line}\n")
        assert program.pack(folder, str(out), shard_mb=1, tell=lambda line: None).kept == 0
        assert content(out) == whole
        (out / "pack.json").unlink()


def test_stopped_by_ctrl_c_it_leaves_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = make_folder(tmp_path / "gt", count=8, height=400, width=500), tmp_path / "out"
    inspect, seen = program.inspect_image, []

    def stops(path: str) -> tuple[np.ndarray, str]:
        seen.append(path)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return inspect(path)

    monkeypatch.setattr(program, "inspect_image", stops)
    monkeypatch.setattr(sys, "argv", ["pack", folder, str(out), "--shard-mb", "1"])
    with pytest.raises(Stopped, match=r"^stopped by SIGINT; run the same command to continue$") as stopped:
        program.main()
    assert stopped.value.exit_code == 130
    assert {path.suffix for path in out.iterdir()} <= {".arrayrecord", ".jsonl", ".lock"}
    assert all(shards.count_records(path) == 2 for path in out.glob("*.arrayrecord"))


def test_what_is_not_packed_is_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "gt")
    (tmp_path / "gt" / "scan.psd").touch()
    said: list[str] = []
    program.pack(folder, str(tmp_path / "out"), tell=said.append)
    assert said == [f"1 other file is not an image that kdjax reads: {folder}/scan.psd"]


def test_without_the_library_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "gt")
    (pair, *_) = find_pairs(gt=packed(folder))
    shards._reader.cache_clear()
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(ImageError, match="packs and caches need the package array-record"):
        read_image(pair.gt)
    with pytest.raises(shards.PackError, match="packs and caches need the package array-record"):
        program.pack(folder, str(tmp_path / "out"), tell=lambda line: None)
