"""Pictures keep their depth, alpha, profile and EXIF on the way through; what cannot be kept is told or refused."""

import dataclasses
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms

from kdjax.data import pictures, read_image
from kdjax.data.images import ImageError
from kdjax.data.pictures import Picture, check_target, read_picture, write_picture

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ORIENTATION, MAKE, EXIF_FOLDER, DATE = 0x0112, 0x010F, 0x8769, 0x9003


def make_exif(orientation: int = 1, endian: str = ">") -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[MAKE], exif[ORIENTATION] = "Maker", orientation
    exif.get_ifd(EXIF_FOLDER)[DATE] = "2020:01:01 00:00:00"
    return exif.tobytes()


def pixels(channels: int, dtype: type = np.uint8, size: tuple[int, int] = (17, 23)) -> np.ndarray:
    """Random ones, of which none is fully transparent: what is under those may change."""
    return np.random.default_rng(0).integers(1, np.iinfo(dtype).max + 1, (*size, channels), dtype=dtype)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, *more: tuple[bytes, bytes], size: tuple[int, int] | None = None) -> bytes:
    """A PNG file, with nothing of the code under test: (height, width, channels), and more chunks."""
    height, width = size or samples.shape[:2]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, samples.itemsize * 8, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in samples)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def same(picture: Picture, samples: np.ndarray) -> None:
    assert picture.pixels.dtype == samples.dtype
    np.testing.assert_array_equal(picture.pixels, samples)


# Both ways

KEPT = [
    *[(suffix, channels, np.uint8) for suffix in (".png", ".tif") for channels in (1, 3, 4)],
    *[(suffix, channels, np.uint16) for suffix in (".png", ".tif") for channels in (1, 3, 4)],
    *[(suffix, 2, np.uint8) for suffix in (".png", ".TIFF")],
    (".png", 2, np.uint16),
    *[(".webp", channels, np.uint8) for channels in (3, 4)],
    *[(".bmp", channels, np.uint8) for channels in (1, 3)],
    (".ppm", 3, np.uint8),
    (".pgm", 1, np.uint8),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "channels", "dtype"), KEPT)
def test_what_is_written_is_read(tmp_path: Path, suffix: str, channels: int, dtype: type) -> None:
    path = tmp_path / f"a [1] x=2{suffix}"  # libvips takes brackets for options
    samples = pixels(channels, dtype)
    written = Picture(samples, icc=ICC if channels > 2 else None, exif=make_exif())
    write_picture(path, written)
    back = read_picture(path)
    same(back, samples)
    keeps = suffix not in (".bmp", ".ppm", ".pgm")
    assert back.icc == (written.icc if keeps else None) and back.notes == ()
    if keeps and ".ti" not in suffix.lower():
        assert back.exif is not None
        exif = Image.Exif()
        exif.load(back.exif)
        assert exif[MAKE] == "Maker" and exif.get_ifd(EXIF_FOLDER)[DATE] == "2020:01:01 00:00:00"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_16_bits_are_read(tmp_path: Path, channels: int) -> None:
    samples = pixels(channels, np.uint16)
    (tmp_path / "a.png").write_bytes(png(samples))
    same(read_picture(tmp_path / "a.png"), samples)


def test_tiffs_of_scanners(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    colour, grey = pixels(3, np.uint16), pixels(1, np.uint16)
    tifffile.imwrite(path, np.moveaxis(colour, 2, 0), photometric="rgb", planarconfig="separate")
    same(read_picture(path), colour)
    with pytest.raises(ImageError, match=r"a\.tif: 16-bit colour in separate planes"):
        read_image(path)  # Pillow decodes noise
    tifffile.imwrite(path, grey[..., 0], photometric="miniswhite")
    same(read_picture(path), 65535 - grey)


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_pictures_are_turned_upright_once(tmp_path: Path, suffix: str, endian: str) -> None:
    stored = np.kron(np.array([[0, 80, 0], [160, 0, 240]], np.uint8), np.ones((16, 16), np.uint8))
    exif = make_exif(6, endian)
    Image.fromarray(stored).convert("RGB").save(tmp_path / f"a{suffix}", exif=exif, lossless=True, quality=95)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert np.abs(picture.pixels[..., 0].astype(int) - np.rot90(stored, -1)).max() < 8
    if suffix != ".tif":  # all but two bytes are the same
        assert picture.exif == make_exif(1, endian)
    write_picture(tmp_path / f"b{suffix}", picture)
    assert np.abs(read_picture(tmp_path / f"b{suffix}").pixels.astype(int) - picture.pixels).max() < 8


def test_16_bit_pictures_are_turned_upright_once(tmp_path: Path) -> None:
    samples = pixels(3, np.uint16)
    (tmp_path / "a.png").write_bytes(png(samples, (b"eXIf", make_exif(6)[6:])))
    tifffile.imwrite(tmp_path / "a.tif", samples, photometric="rgb", extratags=[(ORIENTATION, "H", 1, 6)])
    for name in ("a.png", "a.tif"):
        picture = read_picture(tmp_path / name)
        same(picture, np.rot90(samples, -1))
        write_picture(tmp_path / f"again_{name}", picture)
        same(read_picture(tmp_path / f"again_{name}"), np.rot90(samples, -1))


def test_damaged_exif_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(pixels(3)).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff\xff\xff\0")
    assert read_picture(tmp_path / "a.png").exif is None


# What is converted


def test_cmyk_becomes_srgb(tmp_path: Path) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0] = 255  # cyan
    image = Image.fromarray(inks, mode="CMYK")
    profile = pyvips.Image.profile_load("cmyk")
    cyans = {}
    for name, icc in (("naive", None), ("profile", profile), ("damaged", profile[:200])):
        image.save(tmp_path / "a.jpg", quality=95, icc_profile=icc)
        picture = read_picture(tmp_path / "a.jpg")
        assert picture.icc is None and picture.notes == ("CMYK converted to sRGB",)
        cyans[name] = picture.pixels[8, 8].astype(int)
    assert np.abs(cyans["naive"] - [0, 255, 255]).max() <= 3
    assert 100 < cyans["profile"][1] < 230  # printed cyan is darker than that of a screen
    np.testing.assert_array_equal(cyans["damaged"], cyans["naive"])
    tifffile.imwrite(tmp_path / "a.tif", inks.astype(np.uint16) * 257, photometric="separated", iccprofile=profile)
    deep = read_picture(tmp_path / "a.tif")
    assert deep.pixels.dtype == np.uint16 and deep.pixels.shape == (16, 16, 3) and deep.notes and deep.icc is None
    assert deep.pixels[8, 8, 0] < 20000 and 100 * 257 < deep.pixels[8, 8, 1] < 230 * 257


def test_palettes_bits_and_transparent_colours(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    indices = np.random.default_rng(0).integers(0, 3, (9, 11), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 200, 10], [7, 8, 9]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(path)
    same(read_picture(path), palette[indices])
    image.save(path, transparency=b"\x00\x80\xff")
    same(read_picture(path), np.dstack([palette[indices], np.uint8([0, 128, 255])[indices]]))
    image.save(tmp_path / "a.gif")
    same(read_picture(tmp_path / "a.gif"), palette[indices])
    Image.fromarray(indices > 0).save(path)
    same(read_picture(path), np.uint8(255) * (indices > 0)[..., None])
    Image.fromarray(palette[indices]).save(path, transparency=(255, 0, 0))
    same(read_picture(path), np.dstack([palette[indices], np.uint8(255) * (indices > 0)]))


def test_of_what_phones_write_the_photograph_counts(tmp_path: Path) -> None:
    photograph, depth = (Image.new("RGB", size, (value, 0, 0)) for size, value in (((32, 24), 200), ((16, 12), 9)))
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[depth])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.n_frames == 2
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (24, 32, 3)


# What is refused


def test_animations_and_pages_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for suffix, reason in (
        (".gif", "animation of 2"),
        (".webp", "animation"),
        (".png", "animation"),
        (".tif", "2 pages"),
    ):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match=rf"a\{suffix}: .*{reason}"):
            read_picture(path)


def test_damaged_files_name_path_and_reason(tmp_path: Path) -> None:
    deep = png(pixels(3, np.uint16))
    Image.fromarray(pixels(3)).save(tmp_path / "a.jpg")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.png").mkdir()
    for name, data in {
        "cut16.png": deep[: len(deep) // 2],
        "cut.jpg": (tmp_path / "a.jpg").read_bytes()[:-300],
        "empty.png": b"",
        "text.png": b"hello",
        "deep.ppm": b"P6 2 1 65535\n" + bytes(12),
        "absurd.png": png(pixels(3), size=(60_000, 60_000)),
    }.items():
        (tmp_path / name).write_bytes(data)
    for name, reason in {
        "cut16.png": "cannot be decoded",
        "cut.jpg": "truncated",
        "empty.png": "0 bytes",
        "text.png": "not a readable image",
        "deep.ppm": "16-bit PPM cannot be read",
        "absurd.png": "too many pixels: 60000x60000",
        "float.tif": "floating-point",
        "folder.png": "is a folder",
        "missing.png": "No such file",
    }.items():
        with pytest.raises(ImageError) as caught:
            read_picture(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and reason in str(caught.value)


def test_the_limit_is_ours_and_pillows_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "a.png", Picture(pixels(3)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    same(read_picture(tmp_path / "a.png"), pixels(3))
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(pictures, "MAX_PIXELS", 17 * 23 - 1)
    with pytest.raises(ImageError, match="too many pixels: 23x17"):
        read_picture(tmp_path / "a.png")


def test_without_libvips_only_deep_colour_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    (tmp_path / "a.png").write_bytes(png(pixels(3, np.uint16)))
    with pytest.raises(
        ImageError, match=r"a\.png: colour of 16 bits needs the package pyvips.*pip install 'kdjax\[16bit\]'"
    ):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"b\.png: colour of 16 bits needs"):
        write_picture(tmp_path / "b.png", Picture(pixels(3, np.uint16)))
    write_picture(tmp_path / "c.png", Picture(pixels(1, np.uint16)))
    same(read_picture(tmp_path / "c.png"), pixels(1, np.uint16))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "c.png"]


def test_targets_that_cannot_hold_a_picture() -> None:
    deep, alpha = Picture(pixels(3, np.uint16), icc=ICC), Picture(pixels(4))
    assert check_target("a.png", deep) == check_target("a.TIFF", alpha) == ()
    assert check_target("a.jpg", deep) == ("16 bits became 8: .jpg files hold no more",)
    assert [note[:14] for note in check_target("a.bmp", deep)] == ["16 bits became", "colour profile"]
    for path, picture, scale, reason in (
        ("a.jpg", alpha, 1, "hold no alpha channel; write png, webp or tif"),
        ("a.xyz", deep, 1, "cannot write the suffix '.xyz'; use one of .png"),
        ("a.webp", Picture(np.zeros((4096, 1, 3), np.uint8)), 4, "4x16384 pixels, and .webp files hold 16383 a side"),
        ("a.jpg", Picture(np.zeros((1, 65501, 1), np.uint8)), 1, "65501x1 pixels, and .jpg files hold 65500"),
        (
            "a.tif",
            Picture(np.broadcast_to(np.uint8(0), (10**4, 10**4, 3))),
            4,
            "40000x40000 pixels are more than the 4 GB",
        ),
    ):
        with pytest.raises(ImageError, match=reason):
            check_target(path, picture, scale)


def test_what_a_format_does_not_hold_is_left_out(tmp_path: Path) -> None:
    opaque = pixels(4)
    opaque[..., 3] = 255
    write_picture(tmp_path / "a.bmp", Picture(opaque))
    same(read_picture(tmp_path / "a.bmp"), opaque[..., :3])
    deep = pixels(3, np.uint16)
    write_picture(tmp_path / "b.webp", Picture(deep))
    same(read_picture(tmp_path / "b.webp"), np.round(deep / 257).astype(np.uint8))


def test_quality(tmp_path: Path) -> None:
    smooth = np.uint8(np.linspace(0, 255, 64 * 64).reshape(64, 64, 1) * [1, 0.5, 0.2])
    picture = Picture(smooth)
    error, size = {}, {}
    for suffix in (".jpg", ".webp"):
        for quality in (None, 30):
            path = tmp_path / f"{quality}{suffix}"
            write_picture(path, picture, quality=quality)
            error[path.name] = np.abs(read_picture(path).pixels.astype(int) - smooth).mean()
            size[path.name] = path.stat().st_size
    assert error["None.webp"] == 0 < error["None.jpg"] < 1.5 < min(error["30.jpg"], 3)
    assert error["30.webp"] > 0 and size["30.jpg"] < size["None.jpg"]
    with Image.open(tmp_path / "None.jpg") as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # no subsampling


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.jpg", Picture(pixels(3)))
    before = (tmp_path / "a.jpg").read_bytes()
    huge = dataclasses.replace(Picture(pixels(3)), exif=make_exif() + bytes(70_000))
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be written: .*EXIF data is too long"):
        write_picture(tmp_path / "a.jpg", huge)
    assert (tmp_path / "a.jpg").read_bytes() == before and os.listdir(tmp_path) == ["a.jpg"]
    for picture in (Picture(pixels(3)), Picture(pixels(3, np.uint16))):
        with pytest.raises(ImageError, match=r"a\.png: cannot be written"):
            write_picture(tmp_path / "nowhere" / "a.png", picture)
