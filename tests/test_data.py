"""Reading images, finding them, and the promises of the training stream.

Test images hold their own coordinates: pixel (row, column) of image i is (row, column, i). A crop then tells
which image it shows, from where, and how it was flipped.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from kdjax.data import (
    IMAGE_SUFFIXES,
    WRITTEN_SUFFIXES,
    DataError,
    ImageError,
    ImagePair,
    find_pairs,
    find_unlabelled,
    images,
    load_images,
    open_cache,
    read_image,
    shards,
    training_batches,
    write_image,
)
from kdjax.data.pack import pack
from kdjax.data.samples import ImageCache, Samples
from kdjax.streams import Kind
from kdjax.training import agreement


def coordinates(height: int, width: int, number: int) -> np.ndarray:
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = np.arange(height)[:, None] % 256
    image[..., 1] = np.arange(width) % 256
    image[..., 2] = number
    return image


def make_images(folder: Path, count: int, height: int = 40, width: int = 56) -> list[ImagePair]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        write_image(folder / f"{i}.png", coordinates(height, width, i))
    return find_pairs(gt=str(folder))


def take(steps: int, pairs: list[ImagePair], **options) -> list[dict[str, np.ndarray]]:
    options = {"crop": 16, "batch_size": 4, "seed": 5} | options
    with training_batches(pairs, **options) as data:
        return [next(data) for _ in range(steps)]


def joined(batches: list[dict[str, np.ndarray]], key: str = "gt") -> np.ndarray:
    return np.concatenate([batch[key] for batch in batches])


def shown(batches: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The number of the image that each sample shows."""
    return joined(batches)[:, 0, 0, 2]


def random_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(width: int, height: int, depth: int, colour_type: int, samples: np.ndarray) -> bytes:
    """A PNG file of big-endian samples, written out because Pillow cannot write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Reading and writing


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".jpg", ".jpeg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, suffix: str, channels: int) -> None:
    image = random_image(17, 23, channels)
    write_image(tmp_path / f"a{suffix}", image)
    back = read_image(tmp_path / f"a{suffix}", channels)
    assert back.dtype == np.uint8 and back.shape == image.shape and back.flags.c_contiguous
    if "jp" not in suffix:
        np.testing.assert_array_equal(back, image)
    assert os.listdir(tmp_path) == [f"a{suffix}"]


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    write_image(tmp_path / "a.png", random_image(*size))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), random_image(*size))


def test_grey_and_colour(tmp_path: Path) -> None:
    colour = random_image(9, 11)
    write_image(tmp_path / "a.png", colour)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read_image(tmp_path / "a.png", 1)[..., 0] - luma).max() < 0.51
    write_image(tmp_path / "b.png", colour[..., :1])
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), np.repeat(colour[..., :1], 3, axis=2))
    with pytest.raises(ValueError, match="channels is 4"):
        read_image(tmp_path / "a.png", 4)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    pixels = random_image(9, 11, 4)
    pixels[..., 3] //= 2
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), pixels[..., :3])
    Image.fromarray(pixels[..., [0, 3]]).save(tmp_path / "la.png")
    with Image.open(tmp_path / "la.png") as opened:
        assert opened.mode == "LA"
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), np.repeat(pixels[..., :1], 3, axis=2))
    np.testing.assert_array_equal(read_image(tmp_path / "la.png", 1), pixels[..., :1])


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(tmp_path: Path, transparency: int | bytes | None) -> None:
    indices = np.random.default_rng(0).integers(0, 3, (9, 11), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 200, 10], [7, 8, 9]], np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(palette.tobytes())
    picture.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode == "P"
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), palette[indices])
    assert read_image(tmp_path / "a.png", 1).shape == (9, 11, 1)


def test_bilevel_cmyk_and_animation(tmp_path: Path) -> None:
    bits = random_image(9, 11, 1)[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png", 1)[..., 0], bits * np.uint8(255))

    cmyk = np.zeros((16, 16, 4), np.uint8)
    cmyk[..., 0] = 255  # full cyan
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    with Image.open(tmp_path / "cmyk.jpg") as opened:
        assert opened.mode == "CMYK"
    assert np.abs(read_image(tmp_path / "cmyk.jpg").astype(int) - [0, 255, 255]).max() <= 3

    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for suffix in (".gif", ".webp", ".png"):
        path = tmp_path / f"frames{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if "w" in suffix else {}))
        assert (read_image(path) == 10).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation(tmp_path: Path, suffix: str) -> None:
    # Blocks of one colour survive JPEG; the four corners tell the eight orientations apart.
    upright = np.kron(np.array([[0, 80, 0], [160, 0, 240]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {  # how a camera stores `upright` under each tag: the inverse of what the reader has to do
        1: upright,
        2: upright[:, ::-1],
        3: np.rot90(upright, 2),
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }
    for tag, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = tag
        path = tmp_path / f"{tag}{suffix}"
        Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").save(path, exif=exif, quality=95, lossless=True)
        image = read_image(path, 1)
        assert image.shape == (32, 48, 1) and image.flags.c_contiguous
        assert np.abs(image[..., 0].astype(int) - upright).max() < 8, tag


def test_sixteen_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, 4)).astype(">u2")
    values[0, 0], values[0, 1] = 0, 65535
    rounded = np.round(values / 257.0)

    (tmp_path / "grey.png").write_bytes(png(9, 7, 16, 0, values[..., 0]))
    (tmp_path / "grey.pgm").write_bytes(b"P5 9 7 65535\n" + values[..., 0].tobytes())
    (tmp_path / "colour.ppm").write_bytes(b"P6 9 7 65535\n" + values[..., :3].tobytes())
    Image.fromarray(values[..., 0].astype("<u2")).save(tmp_path / "little.tif")
    Image.fromarray(values[..., 0]).save(tmp_path / "big.tif")
    for name in ("grey.png", "grey.pgm", "little.tif", "big.tif"):
        np.testing.assert_array_equal(read_image(tmp_path / name), rounded[..., [0, 0, 0]], err_msg=name)
        np.testing.assert_array_equal(read_image(tmp_path / name, 1), rounded[..., :1], err_msg=name)
    np.testing.assert_array_equal(read_image(tmp_path / "colour.ppm"), rounded[..., :3])

    # Of 16-bit colour PNG Pillow gives the high byte only. If this fails, Pillow gives more: use it, and say
    # so.
    for colour_type, channels in ((2, 3), (4, 2), (6, 4)):
        path = tmp_path / f"{colour_type}.png"
        path.write_bytes(png(9, 7, 16, colour_type, np.ascontiguousarray(values[..., :channels])))
        kept = [0, 0, 0] if channels == 2 else [0, 1, 2]
        np.testing.assert_array_equal(read_image(path), (values >> 8)[..., kept])
        assert np.abs(read_image(path) - rounded[..., kept]).max() <= 1


@pytest.mark.parametrize(("dtype", "kind"), [("f4", "floating-point"), ("i4", "32-bit integer")])
def test_images_without_a_range_are_refused(tmp_path: Path, dtype: str, kind: str) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=rf"a\.tif: {kind}"):
        read_image(tmp_path / "a.tif")


def test_damaged_files_name_path_and_reason(tmp_path: Path) -> None:
    whole = {}
    for suffix in ("png", "jpg", "webp", "bmp", "tif"):
        write_image(tmp_path / f"whole.{suffix}", random_image(40, 40))
        whole[suffix] = (tmp_path / f"whole.{suffix}").read_bytes()
    cases = {f"cut.{suffix}": data[: len(data) // 2] for suffix, data in whole.items()}
    cases |= {"empty.png": b"", "text.png": b"hello", "header.png": whole["png"][:20]}
    cases["bytes.png"] = whole["png"][:60] + b"\xff" * 20 + whole["png"][80:]
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        reason = str(caught.value).removeprefix(f"{tmp_path / name}: ")
        assert reason != str(caught.value) and len(reason) > 10 and "ImageError" not in reason, name
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in {
        "empty.png": "0 bytes",
        "text.png": "not a readable image",
        "cut.jpg": "truncated",
        "missing.png": "No such file",
        "folder.png": "is a folder",
        "pipe.png": "not a regular file",
    }.items():
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / name)


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", random_image(8, 8))
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), random_image(8, 8))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", random_image(8, 8))
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".gif"])
def test_the_limit_follows_the_memory_and_pillows_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(random_image(10, 10)[..., 0]).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(path).shape == (10, 10, 3) and Image.MAX_IMAGE_PIXELS == 10
    images.most_bytes.cache_clear()
    monkeypatch.setattr(images, "host_memory", lambda: (4000, 0))
    with pytest.raises(ImageError, match=rf"a\{suffix}: too many pixels: 10x10 .* an eighth .* cut it into smaller"):
        read_image(path)
    images.most_bytes.cache_clear()
    monkeypatch.setattr(images, "host_memory", lambda: (0, 0))  # not known
    read_image(path)
    images.most_bytes.cache_clear()


def test_pillows_limit_is_lifted_while_any_thread_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.tif", random_image(10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with ThreadPoolExecutor(4) as pool:
        assert all(image.shape == (10, 10, 3) for image in pool.map(read_image, [tmp_path / "a.tif"] * 200))
    assert Image.MAX_IMAGE_PIXELS == 10


def test_every_suffix_of_a_format_that_is_read_is_found(tmp_path: Path) -> None:
    Image.init()
    known = {suffix for suffix, format in Image.EXTENSION.items() if format in images._FORMATS}
    assert known - {".pfm", ".avifs"} <= set(IMAGE_SUFFIXES)  # of floats, of moving pictures
    for suffix in IMAGE_SUFFIXES:
        Image.fromarray(random_image(8, 8)).save(tmp_path / f"{suffix[1:]}{suffix.upper()}", "JPEG")
    assert len(find_pairs(gt=str(tmp_path))) == len(IMAGE_SUFFIXES)
    assert set(WRITTEN_SUFFIXES) < set(IMAGE_SUFFIXES) and ".gif" not in WRITTEN_SUFFIXES


def test_avif(tmp_path: Path) -> None:
    image = np.kron(random_image(4, 5), np.ones((16, 16, 1), np.uint8))
    Image.fromarray(image).save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    assert np.abs(read_image(tmp_path / "a.avif").astype(int) - image).max() < 4


def test_sixteen_bits_of_scanners(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (7, 9), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "white_is_zero.tif", values * 16, photometric="miniswhite")
    np.testing.assert_array_equal(
        read_image(tmp_path / "white_is_zero.tif", 1)[..., 0], np.round((65535 - values * 16.0) / 257)
    )
    (tmp_path / "twelve_bits.tif").write_bytes(twelve_bits(values))
    np.testing.assert_array_equal(
        read_image(tmp_path / "twelve_bits.tif", 1)[..., 0], np.round((values << 4 | values >> 8) / 257)
    )


def twelve_bits(values: np.ndarray) -> bytes:
    """A TIFF file of 12 bits a sample, two in three bytes."""
    height, width = values.shape
    rows = [int("".join(f"{value:012b}" for value in row).ljust(-(-width * 12 // 8) * 8, "0"), 2) for row in values]
    data = b"".join(row.to_bytes(-(-width * 12 // 8), "big") for row in rows)
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_what_pillow_warns_of_is_no_concern(tmp_path: Path) -> None:
    Image.fromarray(random_image(8, 8)).save(tmp_path / "a.tif", tiffinfo={305: "x" * 99})
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data.replace(struct.pack("<I", 100), struct.pack("<I", 400)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.tif").shape == (8, 8, 3)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "a.png", random_image(8, 8))
    before = (tmp_path / "a.png").read_bytes()

    def full_disk(self: Image.Image, path: Path, **options) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written: No space left"):
        write_image(tmp_path / "a.png", random_image(9, 9))
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_writing_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    for image in (np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)):
        with pytest.raises(ValueError, match="must be uint8 of shape"):
            write_image(tmp_path / "a.png", image)
    with pytest.raises(ImageError, match=r"suffix '\.txt'"):
        write_image(tmp_path / "a.txt", random_image(4, 4))
    with pytest.raises(ImageError, match="No such file"):
        write_image(tmp_path / "nowhere" / "a.png", random_image(4, 4))
    assert os.listdir(tmp_path) == []


# Finding files: the content does not matter here


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def partners(pairs: list[ImagePair]) -> dict[str, str]:
    return {pair.name: os.path.basename(pair.lq or "") for pair in pairs}


def test_clean_folder(tmp_path: Path) -> None:
    names = ["10.png", "2.PNG", "1.jpg", "b/1.webp", "a1/2.tif", ".hidden.png", ".cache/1.png", "notes.txt"]
    folder = touch(tmp_path, *names)
    (tmp_path / "b" / "circle").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a1")
    pairs = find_pairs(gt=folder)
    assert [pair.name for pair in pairs] == ["1.jpg", "2.PNG", "10.png", "a1/2.tif", "b/1.webp", "link/2.tif"]
    assert all(pair.lq is None and pair.gt == os.path.join(folder, pair.name) for pair in pairs)
    assert [pair.name for pair in find_pairs(gt=folder, recursive=False)] == ["1.jpg", "2.PNG", "10.png"]


def test_single_files(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.png", "b.png")
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    assert find_pairs(gt=a) == [ImagePair("a.png", a, None)]
    assert find_pairs(gt=a, lq=b) == [ImagePair("a.png", a, b)]
    with pytest.raises(DataError, match="lq must be a file too"):
        find_pairs(gt=a, lq=folder)
    with pytest.raises(DataError, match="lq must be a folder too"):
        find_pairs(gt=folder, lq=a)
    with pytest.raises(DataError, match="needs a folder as gt"):
        find_pairs(gt=a, meta_info=b)


def test_paired_folders(tmp_path: Path) -> None:
    gt = touch(tmp_path / "gt", "1.png", "sub/2.png", "sub/2.jpg", "3.jpg", "4.x.png")
    lq = touch(tmp_path / "lq", "1.png", "1.jpg", "sub/2.png", "sub/2.jpg", "3.png", "4.x.png")
    (tmp_path / "lq" / "1.jpg").unlink()
    pairs = find_pairs(gt=gt, lq=lq)
    assert partners(pairs) == {"1.png": "1.png", "3.jpg": "3.png", "4.x.png": "4.x.png", "sub/2.jpg": "2.jpg",
                               "sub/2.png": "2.png"}  # fmt: skip
    assert pairs[-1].lq == os.path.join(lq, "sub/2.png")
    x4 = touch(tmp_path / "x4", "1x4.png", "sub/2x4.png", "sub/2x4.jpg", "3x4.bmp", "4.xx4.png")
    assert partners(find_pairs(gt=gt, lq=x4, filename_tmpl="{}x4"))["3.jpg"] == "3x4.bmp"


def test_files_without_partner_are_one_error(tmp_path: Path) -> None:
    gt = touch(tmp_path / "gt", "both.png", *(f"{i}.png" for i in range(25)))
    lq = touch(tmp_path / "lq", "bothx2.png", "alone.png", "0x2.jpg", "0x2.bmp")
    with pytest.raises(DataError) as caught:
        find_pairs(gt=gt, lq=lq, filename_tmpl="{}x2", what="validation")
    message = str(caught.value)
    assert message.startswith("validation images: ") and "'{}x2'" in message
    assert "25 of 26 in gt have no lq" in message and "... and 15 more" in message and "  9.png" in message
    assert "  10.png" not in message and "both" not in message
    assert "3 of 4 in lq have no gt" in message and "  alone.png" in message
    assert "for '0.png' the lq would be '0x2.png'" in message and "there are 2: 0x2.bmp, 0x2.jpg" in message


def test_one_lq_does_not_serve_two_gt(tmp_path: Path) -> None:
    gt, lq = touch(tmp_path / "gt", "a.png", "a.jpg"), touch(tmp_path / "lq", "a.png")
    with pytest.raises(DataError, match=r"1 of 2 in gt have no lq:\n  a\.jpg"):
        find_pairs(gt=gt, lq=lq)
    gt = touch(tmp_path / "gt2", "a.bmp", "a.jpg")
    with pytest.raises(DataError, match="2 of 2 in gt have no lq"):
        find_pairs(gt=gt, lq=lq)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training images \(gt\): '.*nowhere' does not exist"):
        find_pairs(gt=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no path given"):
        find_pairs(gt="")
    folder = touch(tmp_path / "gt", "a.txt", "b.npy", "deep/c.png")
    with pytest.raises(DataError, match=r"not searched.*looked for \.png, .*saw 2 other files"):
        find_pairs(gt=folder, recursive=False)
    with pytest.raises(DataError, match="same folder"):
        find_pairs(gt=folder, lq=folder + "/.")


def test_meta_info(tmp_path: Path) -> None:
    gt = touch(tmp_path / "gt", "1.png", "2.jpg", "my photo, a.png", "sub/3.png", "4.png")
    lq = touch(tmp_path / "lq", "1.png", "2.png", "my photo, a.png", "sub/3.png", "other 4.png")
    meta = tmp_path / "meta.txt"

    meta.write_text(
        "\ufeff# comment\n\n1.png (480,480,3)\r\nsub/3.png (480, 480, 3) 1\n2.jpg\nmy photo, a.png (9,9,3)\n"
    )
    expected = ["1.png", "sub/3.png", "2.jpg", "my photo, a.png"]
    pairs = find_pairs(gt=gt, lq=lq, meta_info=str(meta))
    assert [pair.name for pair in pairs] == expected and partners(pairs)["2.jpg"] == "2.png"
    assert [pair.name for pair in find_pairs(gt=gt, meta_info=str(meta))] == expected

    meta.write_text("4.png, other 4.png\nmy photo, a.png, my photo, a.png\n1.png,2.png\nmy photo, a.png\n")
    pairs = find_pairs(gt=gt, lq=lq, meta_info=str(meta))
    assert [pair.name for pair in pairs] == ["4.png", "my photo, a.png", "1.png", "my photo, a.png"]
    assert partners(pairs)["4.png"] == "other 4.png" and partners(pairs)["1.png"] == "2.png"
    assert pairs[1].lq == pairs[3].lq == os.path.join(lq, "my photo, a.png")
    assert find_pairs(gt=gt, meta_info=str(meta))[0].lq is None


def test_meta_info_errors(tmp_path: Path) -> None:
    gt, lq = touch(tmp_path / "gt", "1.png", "2.png"), touch(tmp_path / "lq", "1.png")
    meta = tmp_path / "meta.txt"
    meta.write_text("1.png\n\n9.png (4,4,3)\n2.png\n1.png, 7.png\n")
    with pytest.raises(DataError) as caught:
        find_pairs(gt=gt, lq=lq, meta_info=str(meta))
    message = str(caught.value)
    assert "3 of 4 entries" in message and "line 3: no gt '9.png'" in message
    assert "line 4: no lq '2.png'" in message and "line 5: no lq '7.png'" in message
    meta.write_text("# nothing\n")
    with pytest.raises(DataError, match="names no image"):
        find_pairs(gt=gt, meta_info=str(meta))
    meta.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file"):
        find_pairs(gt=gt, meta_info=str(meta))
    with pytest.raises(DataError, match=r"\(meta_info\): '.*nowhere' does not exist"):
        find_pairs(gt=gt, meta_info=str(tmp_path / "nowhere"))


# Names that lead astray


def pair_folders(tmp_path: Path) -> tuple[Path, Path]:
    """gt and lq with two images each, which are not the same."""
    for folder, level in (("gt", 10), ("lq", 20)):
        write_folder(tmp_path / folder, level, count=2)
    return tmp_path / "gt", tmp_path / "lq"


def linked(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], dict]:
    """An lq folder whose images are those of gt, in a way."""

    def options(gt: Path, lq: Path) -> dict:
        for path in lq.iterdir():
            path.unlink()
            make(path, gt / path.name)
        return dict(gt=gt, lq=lq)

    return options


def one_folder_twice(name: str) -> Callable[[Path, Path], dict]:
    def options(gt: Path, lq: Path) -> dict:
        (gt.parent / "link").symlink_to(gt)
        (gt / "circle").symlink_to(gt)
        return dict(gt=gt, lq=gt.parent / name)

    return options


def single_files(make: Callable[[Path, Path], object], name: str = "link.png") -> Callable[[Path, Path], dict]:
    def options(gt: Path, lq: Path) -> dict:
        (gt / "sub").mkdir()
        make(gt / "link.png", gt / "0.png")
        return dict(gt=gt / "0.png", lq=gt / name)

    return options


def listed(line: str, *, one_folder: bool = True, **more: str) -> Callable[[Path, Path], dict]:
    def options(gt: Path, lq: Path) -> dict:
        (gt / "link.png").symlink_to("0.png")
        (gt / "sub").mkdir()
        (lq.parent / "list.txt").write_text(f"1.png, {'0.png' if one_folder else '1.png'}\n{line.format(gt=gt)}\n")
        return dict(gt=gt, lq=gt if one_folder else lq, meta_info=lq.parent / "list.txt") | more

    return options


def packs(one: str, other: str, **more: object) -> Callable[[Path, Path], dict]:
    """A pack, or a folder, and another pack of the same images."""

    def options(gt: Path, lq: Path) -> dict:
        pack(str(gt), f"{gt}.pack", tell=lambda line: None)
        pack(str(gt), f"{gt}.other", shard_mb=1, tell=lambda line: None)
        shutil.copytree(f"{gt}.pack", f"{gt}.copy")
        Path(f"{gt}.link").symlink_to(f"{gt}.pack")
        (gt.parent / "list.txt").write_text("0.png\n1.png, 1.png\n")
        if more:
            more["meta_info"] = gt.parent / "list.txt"
        return dict(gt=f"{gt}{one}", lq=f"{gt}{other}") | more

    return options


ONE_FILE = "gt and lq are the same file in"
ONE_FOLDER = "gt and lq are the same folder"
LEADS_OUT = "line 2: lq '.*' leads outside the folder"
OWN_PARTNERS = {
    "folder": (one_folder_twice("gt"), ONE_FOLDER),
    "folder, other spelling": (one_folder_twice("lq/../gt/"), ONE_FOLDER),
    "folder, link": (one_folder_twice("link"), ONE_FOLDER),
    "folder, link inside": (one_folder_twice("gt/circle"), ONE_FOLDER),
    "folder of links": (
        linked(lambda path, to: path.symlink_to(to)),
        f"{ONE_FILE} 2 of 2 pairs:\n  .*gt/0.png is also ",
    ),
    "folder of relative links": (linked(lambda path, to: path.symlink_to(f"../gt/{to.name}")), ONE_FILE),
    "folder of hard links": (linked(lambda path, to: path.hardlink_to(to)), ONE_FILE),
    "file": (single_files(Path.symlink_to, "0.png"), f"{ONE_FILE} 1 of 1 pairs:\n  .*gt/0.png\nan lq is the degraded"),
    "file, other spelling": (single_files(Path.symlink_to, "sub/../0.png"), ONE_FILE),
    "file, link": (single_files(Path.symlink_to), ONE_FILE),
    "file, hard link": (single_files(Path.hardlink_to), ONE_FILE),
    "list, one name": (listed("0.png"), f"{ONE_FILE} 1 of 2 pairs"),
    "list, name and size": (listed("0.png (20,24,3)"), ONE_FILE),
    "list, the name twice": (listed("0.png, 0.png"), ONE_FILE),
    "list, other spelling": (listed("0.png, .//0.png"), ONE_FILE),
    "list, link": (listed("link.png, 0.png"), ONE_FILE),
    "list, absolute": (listed("0.png, {gt}/0.png", one_folder=False), LEADS_OUT),
    "list, absolute gt": (listed("{gt}/0.png", one_folder=False), "line 2: gt '.*' leads outside the folder"),
    "list, upwards": (listed("0.png, ../gt/0.png", one_folder=False), LEADS_OUT),
    "list, upwards from a sub-folder": (listed("0.png, sub/../../gt/0.png", one_folder=False), LEADS_OUT),
    "list, home": (listed("0.png, ~/0.png", one_folder=False), "line 2: no lq '~/0.png'"),
    "list, backslashes": (listed("0.png, ..\\gt\\0.png", one_folder=False), "line 2: (no lq|lq '.*' leads out)"),
    "list, drive": (listed("0.png, C:\\gt\\0.png", one_folder=False), "line 2: (no lq|lq '.*' leads out)"),
    "template, upwards": (listed("0.png", one_folder=False, filename_tmpl="../gt/{}"), "it is for file names"),
    "template, absolute": (listed("0.png", one_folder=False, filename_tmpl="/tmp/{}"), "it is for file names"),
    "pack": (packs(".pack", ".pack"), ONE_FOLDER),
    "pack, link": (packs(".pack", ".link"), ONE_FOLDER),
    "pack, copy": (packs(".pack", ".copy"), "the same pixels in all of 2 pairs"),
    "pack, packed twice": (packs(".pack", ".other"), "the same pixels in all of 2 pairs"),
    "pack, list": (packs(".pack", ".link", meta_info=""), f"{ONE_FILE} 2 of 2 pairs"),
    "pack, copy and list": (packs(".pack", ".copy", meta_info=""), "the same pixels in all of 2 pairs"),
    "pack and its folder": (packs(".pack", ""), "the same pixels in all of 2 pairs"),
    "folder and its pack": (packs("", ".pack"), "the same pixels in all of 2 pairs"),
}


@pytest.mark.parametrize("case", OWN_PARTNERS)
def test_no_image_is_its_own_partner(tmp_path: Path, case: str) -> None:
    make, message = OWN_PARTNERS[case]
    gt, lq = pair_folders(tmp_path)
    options = {name: str(value) for name, value in make(gt, lq).items()}
    with pytest.raises(DataError, match=f"(?s)^(validation images: |filename_tmpl is ).*{message}"):
        find_pairs(**options, what="validation")


def test_links_and_lists_that_lead_to_other_images_are_followed(tmp_path: Path) -> None:
    gt, lq = pair_folders(tmp_path)
    (gt / "2.png").symlink_to(lq / "0.png")  # out of the folder: its owner wants that
    (lq / "2.png").symlink_to(lq / "1.png")
    assert len(find_pairs(gt=str(gt), lq=str(lq))) == 3
    (tmp_path / "list.txt").write_text("0.png, 1.png\n1.png, 0.png\n")
    assert len(find_pairs(gt=str(gt), lq=str(gt), meta_info=str(tmp_path / "list.txt"))) == 2
    # Some pairs may have the same pixels; packs are read to see whether all have.
    shutil.copy(lq / "1.png", gt / "1.png")
    pack(str(gt), f"{gt}.pack", tell=lambda line: None)
    assert len(find_pairs(gt=f"{gt}.pack", lq=str(lq))) == 3


@pytest.mark.parametrize(
    "template",
    [
        *("", "x4", "{", "}", "{}{x", "{} {}", "{{}}", "{0}", "{name}", "{:d}", "{!r}", "{0.__class__}", "{:>9999999}"),
        *("../gt/{}", "/{}", "sub/{}", "{}/..", "{}\0"),
    ],
)
def test_templates_have_one_place_for_the_name_and_stay_in_the_folder(tmp_path: Path, template: str) -> None:
    gt, lq = pair_folders(tmp_path)
    with pytest.raises(DataError, match=r"^filename_tmpl is "):
        find_pairs(gt=str(gt), lq=str(lq), filename_tmpl=template)


# Names that are hard to handle

HARD = [
    b"caf\xe9.png",
    b"sub \xff/\xe9.png",
    b"caf\xc3\xa9.png",
    b"a\nb.png",
    b"a\tb\r.png",
    b"[x]*.png",
    b"{0.x}{}.png",
    b"%s%d.png",
    b"#1.png",
    b" lead.png",
    b"back\\slash.png",
    b"\x1b[31m.png",
    b"x" * 251 + b".png",
]


@pytest.fixture
def hard(tmp_path: Path) -> tuple[str, str]:
    """gt, and lq named NAME_x4."""
    for number, name in enumerate(HARD):
        for folder, end in ((b"gt", b".png"), (b"lq", b"_x4.png")):
            path = os.path.join(os.fsencode(tmp_path), folder, name.removesuffix(b".png")[: 255 - len(end)] + end)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_image(os.fsdecode(path), np.full((8, 8, 3), number + 100 * (folder == b"lq"), np.uint8))
    os.rename(tmp_path / "lq" / ("x" * 248 + "_x4.png"), tmp_path / "lq" / ("x" * 247 + "_x4.png"))
    os.rename(tmp_path / "gt" / ("x" * 251 + ".png"), tmp_path / "gt" / ("x" * 247 + ".png"))
    return str(tmp_path / "gt"), str(tmp_path / "lq")


def test_every_name_that_a_file_can_have_forms_pairs(hard: tuple[str, str], tmp_path: Path) -> None:
    gt, lq = hard
    pairs = find_pairs(gt=gt, lq=lq, filename_tmpl="{}_x4")
    assert len(pairs) == len(HARD)
    for pair in pairs:
        assert (read_image(pair.lq) == read_image(pair.gt) + 100).all()
    # A list has the bytes of the names.
    names = [pair.name for pair in pairs if not {"\n", "\r"} & set(pair.name)]
    (tmp_path / "list.txt").write_bytes(b"# a comment\n" + b"\n".join(map(os.fsencode, names)))
    pack(gt, f"{gt}.pack", tell=lambda line: None)
    for source in (gt, f"{gt}.pack"):
        found = find_pairs(gt=source, lq=lq, filename_tmpl="{}_x4", meta_info=str(tmp_path / "list.txt"))
        assert [pair.name for pair in found] == names and len(names) == len(HARD) - 2
        assert [pair.lq for pair in found] == [pair.lq for pair in pairs if pair.name in names]
    assert [pair.name for pair in find_pairs(gt=f"{gt}.pack")] == [pair.name for pair in pairs]


def test_damage_to_such_a_file_is_a_line_that_can_be_printed(
    hard: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    pairs = find_pairs(gt=hard[0])
    for pair in pairs[1:]:
        Path(pair.gt).write_bytes(b"")
    with caplog.at_level(logging.WARNING, "kdjax"), training_batches(pairs, crop=8, batch_size=8, seed=5) as data:
        for _ in range(4):
            next(data)
    assert len(data.damaged) == len(caplog.records) == len(HARD) - 1
    with pytest.raises(DataError) as caught:
        load_images(pairs)
    for text in [*(record.getMessage() for record in caplog.records), *str(caught.value).splitlines()[1:]]:
        assert text.isprintable() and text.encode() and "the file is empty" in text
    assert len({pair.name for pair in pairs}) == agreement_of(pairs)


def agreement_of(pairs: list[ImagePair]) -> int:
    """How many of the names have a digest of their own."""
    return len({agreement.digest([pair.name]) for pair in pairs})


def test_folders_of_links_and_pipes_come_to_an_end(tmp_path: Path) -> None:
    gt = Path(touch(tmp_path / "gt", "a/1.png", "b/2.png"))
    for i in range(3):
        (gt / "a" / f"to{i}").symlink_to("../b")
        (gt / "b" / f"to{i}").symlink_to("../a")
    os.mkfifo(gt / "pipe.png")
    (gt / "loop.png").symlink_to("loop.png")
    names = [pair.name for pair in find_pairs(gt=str(gt))]
    assert len(names) == 2 + 3 + 3 + 2 and "a/to2/2.png" in names and "pipe.png" in names
    for i in range(20):  # which spell a million paths
        (tmp_path / f"maze{i}").mkdir()
        for name in ("x", "y"):
            (tmp_path / f"maze{i}" / name).symlink_to(f"../maze{i + 1}")
    touch(tmp_path / "maze20", "1.png")
    with pytest.raises(DataError, match="cannot be read: links lead to it in more than 1,000 ways"):
        find_pairs(gt=str(tmp_path / "maze0"))
    deep = f"{tmp_path}/deep"
    for _ in range(1100):  # more than functions can be nested
        os.mkdir(deep)
        deep += "/d"
    touch(Path(deep).parent, "1.png")
    try:
        assert find_pairs(gt=str(tmp_path / "deep"))[0].name == "d/" * 1099 + "1.png"
    finally:  # what pytest cannot remove
        Path(deep).with_name("1.png").unlink()
        os.removedirs(Path(deep).parent)


def test_files_that_are_left_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gt = touch(tmp_path / "gt", "1.png", "1.heic", ".hidden.psd")
    lq = touch(tmp_path / "lq", "1.png", "sub/notes.txt", "a.txt", "b.psd")
    with caplog.at_level(logging.INFO, "kdjax"):
        find_pairs(gt=gt, lq=lq, what="validation")
        find_unlabelled(gt, degraded=True)
        find_pairs(gt=gt, lq=lq, recursive=False, meta_info=listing(tmp_path, "1.png"))
    assert [record.getMessage() for record in caplog.records] == [
        "validation images: 4 other files are not images that kdjax reads: "
        f"{gt}/1.heic, {lq}/b.psd, {lq}/a.txt and 1 more",
        f"unlabelled images: 1 other file is not an image that kdjax reads: {gt}/1.heic",
    ]


def listing(folder: Path, *lines: str) -> str:
    (folder / "list.txt").write_text("\n".join(lines))
    return str(folder / "list.txt")


PATHS: dict[str, Callable[[Path, str], object]] = {  # every option that takes a path, by its name in messages
    r"training images \(gt\)": lambda folder, path: find_pairs(gt=path),
    r"training images \(lq\)": lambda folder, path: find_pairs(gt=str(folder / "gt"), lq=path),
    r"val images \(gt\)": lambda folder, path: find_pairs(gt=path, lq=str(folder / "lq"), what="val"),
    r"training images \(meta_info\)": lambda folder, path: find_pairs(gt=str(folder / "gt"), meta_info=path),
    r"unlabelled images": lambda folder, path: find_unlabelled(path, degraded=True),
    r"packing images \(gt\)": lambda folder, path: pack(path, str(folder / "out")),
    r"cannot pack into": lambda folder, path: pack(str(folder / "gt"), path),
    r"cached teacher": lambda folder, path: open_cache(path),
}


@pytest.mark.parametrize("option", PATHS)
def test_a_path_that_cannot_be_is_one_message(tmp_path: Path, option: str) -> None:
    pair_folders(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("a\0b", "~\0", "\ud800", "x" * 5000, f"{tmp_path}/pipe", f"{tmp_path}/loop", f"{tmp_path}/gt/0.png/x"):
        with pytest.raises((DataError, shards.PackError), match=f"^{option}") as caught:
            PATHS[option](tmp_path, path)
        assert len(str(caught.value)) < 2500 and not (tmp_path / "out").exists()


# Training


def test_schema(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 3)
    batch = take(1, pairs, batch_size=6)[0]
    assert sorted(batch) == ["gt", "index"]
    assert batch["gt"].shape == (6, 16, 16, 3) and batch["gt"].dtype == np.uint8 and batch["index"].dtype == np.int32
    for value in batch.values():
        assert type(value) is np.ndarray and value.flags.c_contiguous and value.flags.writeable
    assert take(1, pairs, channels=1)[0]["gt"].shape == (4, 16, 16, 1)
    np.testing.assert_array_equal(joined(take(3, pairs, start_step=7), "index"), np.arange(28, 40))


def test_every_epoch_shows_every_image_once(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 7)
    batches = take(21, pairs)  # 12 epochs of 7; epochs end inside batches
    epochs = shown(batches).reshape(12, 7)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(7), (12, 1)))
    assert len({tuple(epoch) for epoch in epochs}) > 9  # orders differ
    crops = joined(batches)
    for number in range(7):
        assert len({crop.tobytes() for crop in crops[shown(batches) == number]}) > 9  # and so do crops
    assert (shown(take(21, pairs, seed=6)) != shown(batches)).any()


def test_crops_are_uniform_and_all_eight_symmetries_appear(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 1, 19, 21)
    crops = joined(take(150, pairs)).astype(int)
    tops, lefts = crops[..., 0].min(axis=(1, 2)), crops[..., 1].min(axis=(1, 2))
    counts = np.bincount(tops * 6 + lefts, minlength=24)
    assert len(counts) == 24 and counts.min() >= 8 and counts.max() <= 50  # 25 expected at each of 4 x 6 places

    def symmetries(crops: np.ndarray) -> dict[tuple[int, ...], int]:
        # The steps of (row, column) along both axes of the crop name the symmetry.
        steps = np.concatenate([crops[:, 1, 0, :2] - crops[:, 0, 0, :2], crops[:, 0, 1, :2] - crops[:, 0, 0, :2]], 1)
        kinds, counts = np.unique(steps, axis=0, return_counts=True)
        return dict(zip(map(tuple, kinds.tolist()), counts.tolist(), strict=True))

    found = symmetries(crops)
    assert len(found) == 8 and min(found.values()) > 45 and max(found.values()) < 110  # 75 expected of each
    assert set(symmetries(joined(take(20, pairs, rot=False)).astype(int))) == {(1, 0, 0, 1), (1, 0, 0, -1)}
    assert len(symmetries(joined(take(60, pairs, hflip=False)).astype(int))) == 4
    assert set(symmetries(joined(take(20, pairs, hflip=False, rot=False)).astype(int))) == {(1, 0, 0, 1)}


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_pairs_stay_aligned(tmp_path: Path, scale: int) -> None:
    gt, lq = tmp_path / "gt", tmp_path / "lq"
    # The second image is smaller than the crop: the extension has to keep gt and lq aligned too.
    for i, (height, width) in enumerate([(10, 14), (3, 5), (10, 2)]):
        lq.mkdir(exist_ok=True)
        gt.mkdir(exist_ok=True)
        small = coordinates(height, width, i)
        write_image(lq / f"{i}.png", small)
        write_image(gt / f"{i}.png", small.repeat(scale, axis=0).repeat(scale, axis=1))
    batches = take(30, find_pairs(gt=str(gt), lq=str(lq)), crop=8 * scale, scale=scale)
    assert batches[0]["lq"].shape == (4, 8, 8, 3) and batches[0]["gt"].shape == (4, 8 * scale, 8 * scale, 3)
    expected = joined(batches, "lq").repeat(scale, axis=1).repeat(scale, axis=2)
    np.testing.assert_array_equal(joined(batches, "gt"), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 200), (15, 16), (16, 5)])
def test_small_images_are_reflected(tmp_path: Path, size: tuple[int, int]) -> None:
    pairs = make_images(tmp_path, 1, *size)
    crops = joined(take(2, pairs, hflip=False, rot=False)).astype(int)

    def reflected(length: int) -> list[int]:  # 0 1 2 1 0 1 2 ...
        period = max(1, 2 * (length - 1))
        return [min(i % period, period - i % period) if length > 1 else 0 for i in range(16)]

    for crop in crops:
        if size[0] < 16:
            np.testing.assert_array_equal(crop[:, 0, 0], reflected(size[0]))
        if size[1] < 16:
            np.testing.assert_array_equal(crop[0, :, 1], reflected(size[1]))


def test_stream_does_not_depend_on_start_processes_or_cache(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 7)
    reference = take(6, pairs, batch_size=8)
    for options in ({"cache_mb": 0}, {"start_step": 4}):
        skipped = options.get("start_step", 0)
        for batch, other in zip(reference[skipped:], take(6 - skipped, pairs, batch_size=8, **options), strict=True):
            for key in batch:
                np.testing.assert_array_equal(batch[key], other[key])
    for count in (2, 4):
        shards = [take(6, pairs, batch_size=8, process_count=count, process_index=i) for i in range(count)]
        assert shards[0][0]["gt"].shape[0] == 8 // count
        for step, batch in enumerate(reference):
            for key in batch:
                np.testing.assert_array_equal(np.concatenate([shard[step][key] for shard in shards]), batch[key])


def test_workers_give_the_same_batches_and_end(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 7)
    Path(pairs[3].gt).write_bytes(b"")
    with training_batches(pairs, crop=16, batch_size=4, seed=5) as one:
        reference = [next(one) for _ in range(9)]
    with training_batches(pairs, crop=16, batch_size=4, seed=5, start_step=2, workers=2) as data:
        for batch in reference[2:]:
            other = next(data)
            assert sorted(other) == sorted(batch)
            for key in batch:
                assert type(other[key]) is np.ndarray
                np.testing.assert_array_equal(other[key], batch[key])
        assert data.damaged == one.damaged and list(data.damaged) == ["3.png"]
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    data.close()
    with pytest.raises(ValueError, match="closed"):
        next(data)


def test_damaged_images_are_replaced_and_move_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = make_images(tmp_path, 10)
    intact = take(30, pairs)
    Path(pairs[2].gt).write_bytes(Path(pairs[2].gt).read_bytes()[:80])
    Path(pairs[6].gt).unlink()
    with caplog.at_level(logging.WARNING, "kdjax"), training_batches(pairs, crop=16, batch_size=4, seed=5) as data:
        batches = [next(data) for _ in range(30)]
    concerned = np.isin(shown(intact), [2, 6])
    np.testing.assert_array_equal(joined(batches)[~concerned], joined(intact)[~concerned])
    assert not np.isin(shown(batches), [2, 6]).any()
    np.testing.assert_array_equal(joined(batches, "index"), np.arange(120))
    # Many images take turns as replacements, and they are the same in every run.
    assert len(set(shown(batches)[concerned].tolist())) > 3
    assert data.replaced == concerned.sum() == 24
    assert sorted(data.damaged) == ["2.png", "6.png"]
    assert "6.png: No such file" in data.damaged["6.png"] and "2.png" in data.damaged["2.png"]
    assert len(caplog.records) == 2 and all(record.name == "kdjax" for record in caplog.records)
    np.testing.assert_array_equal(joined(take(30, pairs)), joined(batches))


def test_pairs_of_wrong_sizes_are_replaced(tmp_path: Path) -> None:
    pairs = make_images(tmp_path / "gt", 4)
    make_images(tmp_path / "lq", 4, 20, 28)
    write_image(tmp_path / "lq" / "1.png", coordinates(20, 27, 1))
    pairs = find_pairs(gt=str(tmp_path / "gt"), lq=str(tmp_path / "lq"))
    with training_batches(pairs, crop=16, batch_size=4, seed=5, scale=2) as data:
        batches = [next(data) for _ in range(4)]
    assert 1 not in shown(batches) and list(data.damaged) == ["1.png"]
    assert "gt is 56x40" in data.damaged["1.png"] and "is 27x20" in data.damaged["1.png"]
    assert "scale 2 gt should be 54x40" in data.damaged["1.png"]


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 3)
    with training_batches(pairs, crop=16, batch_size=4, seed=5, workers=1) as data:
        next(data)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(DataError, match=r"was killed \(.*exit code -9\)"):
            for _ in range(10):  # some batches are here already
                next(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_of_damaged_files_stops(tmp_path: Path, workers: int) -> None:
    pairs = make_images(tmp_path, 3)
    for pair in pairs:
        Path(pair.gt).write_bytes(b"")
    with pytest.raises(DataError, match=r"in a row could not be used; some of them:\n.*\.png: the file is empty"):
        take(1, pairs, workers=workers)


def test_bad_arguments(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 2)
    mixed = [pairs[0], ImagePair("1", pairs[1].gt, pairs[1].gt)]
    for options, message in [
        ({"pairs": []}, "list of pairs is empty"),
        ({"pairs": mixed}, "some do not"),
        ({"crop": 0}, "crop is 0"),
        ({"crop": 15, "scale": 2}, "multiple of the scale 2"),
        ({"scale": 0}, "scale is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 6, "process_count": 4}, "batch_size is 6 for 4 processes"),
        ({"process_index": 1}, "process_index is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"start_step": -1}, "start_step is -1"),
        ({"workers": -1}, "workers is -1"),
    ]:
        with pytest.raises(DataError, match=message):
            take(1, **({"pairs": pairs} | options))


_KILLED = """
import multiprocessing, sys, time
from kdjax.data import find_pairs, training_batches

if __name__ == "__main__":
    data = training_batches(find_pairs(gt=sys.argv[1]), crop=16, batch_size=4, seed=5, workers=2)
    next(data)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux about processes")
def test_workers_end_with_a_killed_program(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 3)
    (tmp_path / "program.py").write_text(_KILLED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, tmp_path / "program.py", tmp_path / "images"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    ) as program:  # fmt: skip
        workers = [int(word) for word in program.stdout.readline().split()]
        assert len(workers) == 2 and all(map(_runs, workers))
        program.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def test_no_accelerator_is_taken(tmp_path: Path) -> None:
    # Grain imports jax; but nothing may start a backend, after which jax refuses this setting.
    make_images(tmp_path, 2)
    code = (
        "import sys, jax; from kdjax.data import find_pairs, training_batches\n"
        "next(training_batches(find_pairs(gt=sys.argv[1]), crop=8, batch_size=2, seed=0))\n"
        "jax.config.update('jax_num_cpu_devices', 3)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parent.parent, check=True)


# Validation


def test_validation_images(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 11, 21, 33)
    images = load_images(pairs)
    assert [image.name for image in images] == [pair.name for pair in pairs]
    np.testing.assert_array_equal(images[4].gt, coordinates(21, 33, 4))
    assert images[4].lq is None
    assert [image.name for image in load_images(pairs, limit=3)] == ["0.png", "5.png", "10.png"]
    assert [image.name for image in load_images(pairs, limit=1)] == ["0.png"]
    assert len(load_images(pairs, limit=12)) == 11
    centre = load_images(pairs, crop=10)[0].gt
    assert centre.shape == (10, 10, 3) and centre.flags.c_contiguous and tuple(centre[0, 0]) == (5, 11, 0)
    assert load_images(pairs, crop=30)[0].gt.shape == (30, 30, 3)
    assert load_images(pairs, scale=4)[0].gt.shape == (20, 32, 3)
    assert load_images(pairs, channels=1)[0].gt.shape == (21, 33, 1)


def test_validation_pairs(tmp_path: Path) -> None:
    make_images(tmp_path / "lq", 2, 10, 14)
    for i, spare in enumerate([0, 1]):  # the second gt has a row and a column more than 2 * lq, as in Set14
        small = coordinates(10, 14, i)
        big = np.pad(small.repeat(2, axis=0).repeat(2, axis=1), ((0, spare), (0, spare), (0, 0)))
        (tmp_path / "gt").mkdir(exist_ok=True)
        write_image(tmp_path / "gt" / f"{i}.png", big)
    pairs = find_pairs(gt=str(tmp_path / "gt"), lq=str(tmp_path / "lq"))
    for options in ({}, {"crop": 8}, {"crop": 60}):
        for image in load_images(pairs, scale=2, **options):
            np.testing.assert_array_equal(image.gt, image.lq.repeat(2, axis=0).repeat(2, axis=1))
    with pytest.raises(DataError, match="2 of 2 validation images cannot be used"):
        load_images(pairs, scale=1)


def test_damaged_validation_images_are_one_error(tmp_path: Path) -> None:
    pairs = make_images(tmp_path, 4)
    Path(pairs[1].gt).write_bytes(b"")
    Path(pairs[3].gt).unlink()
    with pytest.raises(DataError) as caught:
        load_images(pairs)
    assert "2 of 4 validation images" in str(caught.value)
    assert "1.png: the file is empty" in str(caught.value) and "3.png: No such file" in str(caught.value)


def write_folder(folder: Path, level: int, count: int = 5) -> None:
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i}.png", np.full((20, 24, 3), level + i, np.uint8))


@pytest.fixture
def unlabelled_sources(tmp_path: Path) -> dict[str, list[ImagePair]]:
    write_folder(tmp_path / "clean", 10)
    write_folder(tmp_path / "noisy", 20)
    write_folder(tmp_path / "more", 100)
    return {
        "clean": find_pairs(gt=str(tmp_path / "clean")),
        "paired": find_pairs(gt=str(tmp_path / "clean"), lq=str(tmp_path / "noisy")),
        "to degrade": find_unlabelled(str(tmp_path / "more"), degraded=False),
        "degraded": find_unlabelled(str(tmp_path / "more"), degraded=True),
    }


def take_crops(count: int, *args: object, **options: object) -> list[dict[str, np.ndarray]]:
    with training_batches(*args, **(dict(crop=8, batch_size=8, seed=3) | options)) as stream:
        return [next(stream) for _ in range(count)]


@pytest.mark.parametrize(("first", "second"), [("clean", "to degrade"), ("paired", "degraded")])
def test_unlabelled_images_fill_their_part_of_every_batch(unlabelled_sources: dict, first: str, second: str) -> None:
    batches = take_crops(4, unlabelled_sources[first], unlabelled=unlabelled_sources[second], unlabelled_part=0.25)
    seen = set()
    for number, batch in enumerate(batches):
        assert batch["labelled"].sum() == 6
        np.testing.assert_array_equal(batch["index"], np.arange(8) + 8 * number)
        for row, labelled in enumerate(batch["labelled"]):
            level = int(batch["gt"][row].max())
            assert (level < 15) == labelled
            seen.add(level)
            if first == "paired":
                assert (batch["lq"][row] == batch["gt"][row] + (10 if labelled else 0)).all()
    assert ("lq" in batches[0]) == (first == "paired")
    assert seen >= {100, 101, 102, 103, 104}  # 8 unlabelled samples show all five images


def test_unlabelled_images_of_a_larger_scale_stand_for_their_gt(unlabelled_sources: dict, tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for i in range(5):
        write_image(tmp_path / "small" / f"{i}.png", np.full((10, 12, 3), 20 + i, np.uint8))
    pairs = find_pairs(gt=str(tmp_path / "clean"), lq=str(tmp_path / "small"))
    (batch,) = take_crops(1, pairs, unlabelled=unlabelled_sources["degraded"], scale=2)
    assert batch["gt"].shape == (8, 8, 8, 3) and batch["lq"].shape == (8, 4, 4, 3)


def test_an_unlabelled_image_of_scale_1_is_not_copied(unlabelled_sources: dict) -> None:
    options = dict(crop=8, seed=3, hflip=True, rot=True, read=ImageCache(3, 2**20))
    samples = Samples(unlabelled_sources["degraded"], Kind.UNLABELLED, scale=1, **options)
    gt, lq, _ = samples.load(samples.pairs[0])
    assert gt is lq


def test_processes_and_restarts_share_one_stream_of_unlabelled_images(unlabelled_sources: dict) -> None:
    options = dict(unlabelled=unlabelled_sources["to degrade"], unlabelled_part=0.5)
    whole = take_crops(3, unlabelled_sources["clean"], **options)
    for count in (2, 4):
        parts = [
            take_crops(3, unlabelled_sources["clean"], **options, process_index=i, process_count=count)
            for i in range(count)
        ]
        for step in range(3):
            for key, expected in whole[step].items():
                np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), expected)
            assert all(part[step]["labelled"].mean() == 0.5 for part in parts)
    (later,) = take_crops(1, unlabelled_sources["clean"], **options, start_step=2)
    for key, expected in whole[2].items():
        np.testing.assert_array_equal(later[key], expected)


def test_without_unlabelled_images_batches_have_no_such_key(unlabelled_sources: dict) -> None:
    assert set(take_crops(1, unlabelled_sources["clean"])[0]) == {"gt", "index"}


def test_a_damaged_unlabelled_image_is_replaced_and_named(unlabelled_sources: dict, tmp_path: Path) -> None:
    (tmp_path / "more" / "2.png").write_bytes(b"no image")
    with training_batches(
        unlabelled_sources["clean"], unlabelled=unlabelled_sources["to degrade"], crop=8, batch_size=8, seed=3
    ) as stream:
        for _ in range(4):
            next(stream)
        assert list(stream.damaged) == ["2.png"] and "more" in stream.damaged["2.png"]


def test_bad_unlabelled_sources_are_refused(unlabelled_sources: dict, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        find_unlabelled(str(tmp_path / "nowhere"), degraded=True)
    with pytest.raises(DataError, match="0 of the 8 images of a batch would be unlabelled"):
        take_crops(1, unlabelled_sources["clean"], unlabelled=unlabelled_sources["to degrade"], unlabelled_part=0.01)
    with pytest.raises(DataError, match="unlabelled images are degraded images"):
        take_crops(1, unlabelled_sources["clean"], unlabelled=unlabelled_sources["degraded"])
