"""Pictures keep their depth, alpha, profile and EXIF on the way through; what cannot be kept is told or refused."""

import dataclasses
import io
import os
import struct
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import pyvips
import tifffile
from PIL import Image, ImageCms

from kdjax.data import read_image
from kdjax.data.images import ImageError
from kdjax.media import pictures
from kdjax.media.pictures import Picture, check_target, read_picture, write_picture

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


DAMAGED_EXIF = {
    "no place": b"Exif\0\0II*\0\xff\xff\xff\0",
    "nonsense": b"Exif\0\0hello",
    "many tags": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 50,
    "cut": make_exif()[:30],
}


def avif_with(exif: bytes) -> bytes:
    """An AVIF file with any EXIF: Pillow writes what it understands of it."""
    whole = Image.Exif()
    whole[0x010E] = "x" * 60_000
    file = io.BytesIO()
    Image.fromarray(pixels(3)).save(file, "AVIF", exif=whole.tobytes())
    place = file.getvalue().index(b"MM\0*")
    return file.getvalue()[:place] + exif[6:] + file.getvalue()[place + len(exif) - 6 :]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        (suffix, kind)
        for suffix in (".png", ".jpg", ".webp", ".avif")
        for kind in DAMAGED_EXIF
        if (suffix, kind) != (".avif", "cut")  # where other things follow
    ],
)
def test_damaged_exif_costs_the_exif_only(tmp_path: Path, suffix: str, kind: str) -> None:
    path, damaged = tmp_path / f"a{suffix}", DAMAGED_EXIF[kind]
    if suffix == ".avif":
        path.write_bytes(avif_with(damaged))
    else:
        Image.fromarray(pixels(3)).save(path, exif=damaged)
    picture = read_picture(path)
    assert picture.exif is None and picture.notes == ("damaged EXIF dropped",)
    assert picture.pixels.shape == (17, 23, 3) and read_image(path).shape == (17, 23, 3)


def test_damaged_exif_in_a_tiff_is_no_concern(tmp_path: Path) -> None:
    Image.fromarray(pixels(3)).save(tmp_path / "a.tif", exif=make_exif())
    data = (tmp_path / "a.tif").read_bytes()
    place = data.index(struct.pack("<HHI", EXIF_FOLDER, 4, 1)) + 8
    for where in (0xFFFFFF00, len(data) - 3, 2):
        (tmp_path / "a.tif").write_bytes(data[:place] + struct.pack("<I", where) + data[place + 4 :])
        same(read_picture(tmp_path / "a.tif"), pixels(3))


def test_exif_of_all_kinds_becomes_tiff(tmp_path: Path) -> None:
    """Also what Pillow cannot write there, and what would make the file another one."""
    path = tmp_path / "a.tif"
    exif = Image.Exif()
    exif[MAKE], exif[0x0106], exif[0x0103], exif[0x0111] = "Maker", 6, 7, 1  # YCbCr, JPEG, the place of the pixels
    assert write_picture(path, Picture(pixels(3), exif=exif.tobytes())) == ()
    same(read_picture(path), pixels(3))
    with Image.open(path) as image:
        assert image.tag_v2[MAKE] == "Maker" and image.tag_v2[0x0106] == 2
    notes = set()
    for number in range(60):
        damaged = bytearray(make_exif())
        for place in np.random.default_rng(number).integers(6, len(damaged), 4):
            damaged[place] ^= 0xFF
        notes |= set(write_picture(path, Picture(pixels(3), exif=bytes(damaged))))
        same(read_picture(path), pixels(3))
    assert notes == {"damaged EXIF dropped"}


def test_exif_of_16_bit_png_stays_byte_for_byte(tmp_path: Path) -> None:
    exif = make_exif() + bytes(100_000)
    write_picture(tmp_path / "a.png", Picture(pixels(3, np.uint16), icc=ICC, exif=exif))
    back = read_picture(tmp_path / "a.png")
    same(back, pixels(3, np.uint16))
    assert back.exif == exif and back.icc == ICC
    notes = write_picture(tmp_path / "a.png", Picture(pixels(3, np.uint16), icc=b"not a profile"))
    assert notes == ("damaged colour profile dropped",)


def test_metadata_that_a_format_cannot_hold_is_told(tmp_path: Path) -> None:
    picture = Picture(pixels(3), icc=bytes(17_000_000), exif=make_exif() + bytes(70_000))
    notes = write_picture(tmp_path / "a.jpg", picture)
    assert notes == check_target("a.jpg", picture) and len(notes) == 2
    assert notes[1] == f"EXIF dropped: .jpg files hold 65,533 bytes, and it has {len(picture.exif):,}"
    assert read_picture(tmp_path / "a.jpg").icc is None
    for suffix in (".png", ".webp"):
        assert write_picture(tmp_path / f"a{suffix}", dataclasses.replace(picture, icc=ICC)) == ()
        back = read_picture(tmp_path / f"a{suffix}")
        assert back.exif == picture.exif and back.icc == ICC
    deep = Picture(pixels(3, np.uint16), exif=make_exif())
    assert check_target("a.tif", deep) == ("EXIF dropped: .tif files of 16-bit colour hold none",)


# What claims much: cost is bounded by the file, or it is refused


def amplifying_exif() -> bytes:
    """4,000 tags that all name the same 12 KB."""
    tags = b"".join(struct.pack("<HHII", 1000 + i, 7, 48_000, 8) for i in range(4000))
    return (b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 4000) + tags).ljust(50_000, b"\0")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tif"])
def test_tags_that_name_the_same_bytes_are_not_copied(tmp_path: Path, suffix: str) -> None:
    path, exif = tmp_path / f"a{suffix}", amplifying_exif()
    image = Image.fromarray(pixels(3))
    if suffix == ".tif":
        path.write_bytes(exif[6:])
    elif suffix == ".avif":
        path.write_bytes(avif_with(exif))
    elif suffix == ".jpg":  # without the header that tells the resolution, Pillow looks for it in EXIF
        image.save(path, exif=exif)
        data = path.read_bytes()
        path.write_bytes(data[:2] + data[data.index(b"\xff\xe1") :])
    else:
        image.save(path, exif=exif)
    tracemalloc.start()
    try:
        for read in (read_image, read_picture):
            if suffix == ".tif":
                with pytest.raises(ImageError, match="its tags reach beyond the end of the file"):
                    read(path)
            else:
                read(path)
        if suffix != ".tif":
            write_picture(tmp_path / "b.tif", read_picture(path))
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_pages_and_comments_are_not_counted(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(1)[..., 0])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    number = struct.unpack_from("<H", data, 8)[0]
    directory = bytes(data[8 : 10 + 12 * number])
    end = len(data) + len(data) % 2
    data = bytearray(data.ljust(end, b"\0"))
    struct.pack_into("<I", data, 10 + 12 * number, end)
    pages = b"".join(directory + struct.pack("<I", end + (i + 1) * (len(directory) + 4)) for i in range(50_000))
    (tmp_path / "a.tif").write_bytes(data + pages)
    Image.fromarray(pixels(1)[..., 0]).save(tmp_path / "a.gif")
    gif = (tmp_path / "a.gif").read_bytes()
    place = 13 + (3 << (gif[10] & 7) + 1)
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 40_000 + b"\0"
    (tmp_path / "a.gif").write_bytes(gif[:place] + comment + gif[place:])
    started = time.monotonic()
    with pytest.raises(ImageError, match=r"a\.tif: has several pages"):
        read_picture(tmp_path / "a.tif")
    same(read_picture(tmp_path / "a.gif"), pixels(1)[..., [0, 0, 0]])
    assert time.monotonic() - started < 2


def test_a_tiff_that_leads_back_to_itself_has_one_page(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(1)[..., 0])
    data = bytearray((tmp_path / "a.tif").read_bytes())
    first, number = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<H", data, 8)[0]
    for place in (first, 0xFFFFFF00):
        struct.pack_into("<I", data, first + 2 + 12 * number, place)
        (tmp_path / "a.tif").write_bytes(data)
        same(read_picture(tmp_path / "a.tif"), pixels(1))


def test_scans_without_end_are_refused(tmp_path: Path) -> None:
    Image.fromarray(pixels(1)[..., 0]).save(tmp_path / "a.jpg", progressive=True)
    data = (tmp_path / "a.jpg").read_bytes()
    scan = data.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(data[:-2] + data[scan:-2] * 1000 + data[-2:])
    for read in (read_image, read_picture):
        with pytest.raises(ImageError, match=r"has 1\d\d\d scans"):
            read(tmp_path / "a.jpg")


def test_profiles_and_texts_may_be_larger_than_pillow_has_it(tmp_path: Path) -> None:
    profile, text = ICC + bytes(3 << 20), b"a\0\0" + zlib.compress(bytes(3 << 20))
    chunks = [(b"iCCP", b"a\0\0" + zlib.compress(profile)), (b"zTXt", text)]
    (tmp_path / "a.png").write_bytes(png(pixels(3), *chunks))
    assert read_picture(tmp_path / "a.png").icc == profile
    (tmp_path / "a.png").write_bytes(png(pixels(3), (b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))))
    with pytest.raises(ImageError, match="cannot be decoded"):
        read_picture(tmp_path / "a.png")


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


def transparent_pngs() -> dict[str, bytes]:
    """Every kind of PNG in which a colour is transparent, or several entries of a palette are."""
    random, files = np.random.default_rng(0), {}
    for bits in (1, 2, 4, 8, 16):
        samples = random.integers(0, min(2**bits, 6), (9, 11, 1), dtype=np.uint16)
        for value in (int(samples[0, 0, 0]), int(samples[-1, -1, 0])):
            files[f"grey{bits}_{value}"] = small_png(samples, bits, 0, (b"tRNS", struct.pack(">H", value)))
        if bits < 16:
            colours = random.integers(0, 256, 3 * min(2**bits, 6), dtype=np.uint8).tobytes()
            for name, alphas in (("one", b"\xff\0"), ("some", b"\x0a"), ("all", bytes([0, 100, 200, 255, 7, 9]))):
                chunks = [(b"PLTE", colours), (b"tRNS", alphas[: len(colours) // 3])]
                files[f"palette{bits}_{name}"] = small_png(samples, bits, 3, *chunks)
        if bits >= 8:
            samples = random.integers(0, 2, (9, 11, 3), dtype=np.uint16)
            files[f"rgb{bits}"] = small_png(samples, bits, 2, (b"tRNS", struct.pack(">HHH", 1, 0, 1)))
            for colour_type, channels in ((4, 2), (6, 4)):
                samples = random.integers(0, 2**bits, (9, 11, channels), dtype=np.uint16)
                files[f"alpha{channels}_{bits}"] = small_png(samples, bits, colour_type)
    return files


def small_png(samples: np.ndarray, bits: int, colour_type: int, *more: tuple[bytes, bytes]) -> bytes:
    """As `png`, of samples with any number of bits."""
    texts = ["".join(format(value, f"0{bits}b") for value in row.ravel()) for row in samples]
    padded = [text + "0" * (-len(text) % 8) for text in texts]
    rows = b"".join(b"\0" + int(text, 2).to_bytes(len(text) // 8, "big") for text in padded)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


@pytest.mark.parametrize("kind", transparent_pngs())
def test_transparency_is_what_libvips_sees(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(transparent_pngs()[kind])
    picture, expected = read_picture(path), pyvips.Image.new_from_file(str(path)).numpy()
    same(picture, expected)
    assert picture.has_alpha and len(np.unique(expected[..., -1])) > 1
    colour = expected[..., :-1] if expected.shape[2] == 4 else expected[..., [0, 0, 0]]
    if expected.dtype == np.uint16:
        assert np.abs(read_image(path) - colour / 257).max() <= 1
    else:
        np.testing.assert_array_equal(read_image(path), colour)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_of_tiffs(tmp_path: Path, kind: str, channels: int, dtype: type) -> None:
    samples = pixels(channels, dtype)
    samples[..., -1] |= np.iinfo(dtype).max // 2 + 1  # under little alpha little is left of a multiplied colour
    stored = samples.copy()
    if kind == "assocalpha":
        alpha = samples[..., -1:].astype(np.uint64)
        stored[..., :-1] = (samples[..., :-1] * alpha + np.iinfo(dtype).max // 2) // np.iinfo(dtype).max
    photometric = "rgb" if channels == 4 else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, planarconfig="contig", extrasamples=[kind])
    picture = read_picture(tmp_path / "a.tif")
    assert picture.pixels.dtype == dtype and picture.pixels.shape == samples.shape
    assert np.abs(picture.pixels.astype(int) - samples).max() <= (2 if kind == "assocalpha" else 0)


def test_channels_of_no_meaning_are_told(tmp_path: Path) -> None:
    extra = {"extrasamples": ["unspecified"], "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "a.tif", pixels(4), **extra)
    picture = read_picture(tmp_path / "a.tif")
    same(picture, pixels(4)[..., :3])
    assert picture.notes == ("1 extra channel of unknown meaning dropped",)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_transparency_of_other_formats(tmp_path: Path, suffix: str) -> None:
    samples = np.kron(pixels(4, size=(3, 4)), np.ones((8, 8, 1), np.uint8))
    samples[..., 3] = np.where(samples[..., 3] > 127, 255, 0)
    Image.fromarray(samples).save(tmp_path / f"a{suffix}", lossless=True)
    picture, seen = read_picture(tmp_path / f"a{suffix}"), samples[..., 3] > 0
    np.testing.assert_array_equal(picture.pixels[..., 3], samples[..., 3])
    np.testing.assert_array_equal(picture.pixels[seen], samples[seen])
    if suffix == ".gif":  # grey, of which Pillow makes no palette where it is the usual one
        Image.fromarray(samples[..., 0]).save(tmp_path / "b.gif", transparency=int(samples[0, 0, 0]), optimize=False)
        alpha = read_picture(tmp_path / "b.gif").pixels[..., -1]
        np.testing.assert_array_equal(alpha == 0, samples[..., 0] == samples[0, 0, 0])


def test_avif_of_8_and_10_bits(tmp_path: Path) -> None:
    samples = np.kron(pixels(3, np.uint16, (3, 4)), np.ones((16, 16, 1), np.uint16))
    Image.fromarray((samples >> 8).astype(np.uint8)).save(tmp_path / "a.avif", quality=100, exif=make_exif(6))
    picture = read_picture(tmp_path / "a.avif")
    assert picture.pixels.dtype == np.uint8 and picture.pixels.shape == (64, 48, 3) and picture.exif
    image = pyvips.Image.new_from_array(samples).copy(interpretation="rgb16")
    image.heifsave(str(tmp_path / "b.avif"), bitdepth=10, compression="av1", Q=100, subsample_mode="off")
    picture = read_picture(tmp_path / "b.avif")
    assert picture.pixels.dtype == np.uint16
    assert np.abs(picture.pixels.astype(int) - samples).mean() < 300


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
        (".gif", "animation"),
        (".avif", "animation"),
        (".webp", "animation"),
        (".png", "animation"),
        (".tif", "several pages"),
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
    path = tmp_path / "a.png"
    with pytest.raises(ImageError, match=r"a\.png: too many pixels: 23x17, and --max-megapixels is 0\.00039"):
        read_picture(path, max_pixels=17 * 23 - 1)
    monkeypatch.setattr(pictures, "host_memory", lambda: (10**9, 17 * 23 * 30))
    same(read_picture(path), pixels(3))
    for changes in ({"scale": 3}, {}):
        if not changes:
            monkeypatch.setattr(pictures, "host_memory", lambda: (10**9, 17 * 23 * 10))
        with pytest.raises(
            ImageError, match=r"more than half of the .* free; with --max-megapixels 1 it is tried anyway"
        ):
            read_picture(path, **changes)
        assert read_picture(path, max_pixels=1e6, **changes).pixels.shape == (17, 23, 3)


def test_tiles_of_a_tiff_count_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile.imwrite(tmp_path / "a.tif", pixels(1)[..., 0], tile=(2048, 2048), compression="zlib")
    monkeypatch.setattr(pictures, "host_memory", lambda: (10**9, 10**6))
    with pytest.raises(ImageError, match="too many pixels"):
        read_picture(tmp_path / "a.tif")


def test_raw_files_and_heic_are_named(tmp_path: Path) -> None:
    tags = [(50706, "B", 4, (1, 4, 0, 0))]
    tifffile.imwrite(tmp_path / "a.dng", pixels(3), photometric="rgb", extratags=tags)
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "c.psd").write_bytes(b"8BPS" + bytes(50))
    for name, reason in (("a.dng", "raw camera file"), ("b.heic", "convert HEIC"), ("c.psd", "save it as PNG")):
        for read in (read_image, read_picture):
            with pytest.raises(ImageError, match=rf"{name}: .*{reason}"):
                read(tmp_path / name)


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
    assert check_target("a.jpg", deep) == ("16 bits became 8: .jpg files have no more",)
    assert [note[:14] for note in check_target("a.bmp", deep)] == ["16 bits became", "colour profile"]
    for path, picture, scale, reason in (
        ("a.jpg", alpha, 1, "have no alpha channel; write png, webp or tif"),
        ("a.xyz", deep, 1, "cannot write the suffix '.xyz'; use one of .png"),
        (
            "a.webp",
            Picture(np.zeros((4096, 1, 3), np.uint8)),
            4,
            "4x16384 pixels, and .webp files can have at most 16383 a side",
        ),
        (
            "a.jpg",
            Picture(np.zeros((1, 65501, 1), np.uint8)),
            1,
            "65501x1 pixels, and .jpg files can have at most 65500",
        ),
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
    (tmp_path / "a.jpg").chmod(0o444)
    with pytest.raises(ImageError, match=r"a\.jpg: cannot be written: .*quality"):
        write_picture(tmp_path / "a.jpg", Picture(pixels(3)), quality="best")
    assert (tmp_path / "a.jpg").read_bytes() == before and os.listdir(tmp_path) == ["a.jpg"]
    for picture in (Picture(pixels(3)), Picture(pixels(3, np.uint16))):
        with pytest.raises(ImageError, match=r"a\.png: cannot be written"):
            write_picture(tmp_path / "nowhere" / "a.png", picture)
