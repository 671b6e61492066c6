"""Reads hundreds of damaged images, and prints what was not as it should be: a program of its own, whose memory counts.

    python mutate_images.py FOLDER COUNT

Every mutation follows from its number.
"""

from __future__ import annotations

import io
import resource
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms

from kdjax.data import images
from kdjax.data.images import ImageError
from kdjax.media import pictures

MEMORY = 256 << 20  # of the machine, as the readers are told
GROWTH = 200 << 20  # of this program: a picture may take half of what is free, and 8 bytes a pixel of vips besides


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tiff(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, bits: int, colour_type: int, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG file of (height, width, channels)."""
    height, width = samples.shape[:2]
    rows = b""
    for row in samples:
        text = "".join(format(value, f"0{bits}b") for value in row.ravel())
        text += "0" * (-len(text) % 8)
        rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def seeds() -> dict[str, bytes]:
    """A valid file of every kind."""
    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (19, 23, 4), dtype=np.uint8)
    deep = random.integers(0, 65536, (19, 23, 4), dtype=np.uint16)
    rgb, grey = Image.fromarray(colour[..., :3]), Image.fromarray(colour[..., 0])
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "Maker", 6
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    metadata = {"exif": exif.tobytes(), "icc_profile": icc}
    palette = rgb.quantize(16)
    files = {"grey": saved(grey, "JPEG"), "rgb": saved(rgb, "JPEG", progressive=True, **metadata)}
    files = {f"{name}.jpg": data for name, data in files.items()}
    files["cmyk.jpg"] = saved(Image.fromarray(colour, mode="CMYK"), "JPEG")
    files["mpo.jpg"] = saved(rgb, "MPO", save_all=True, append_images=[grey.convert("RGB")])
    for bits in (1, 2, 4, 8, 16):
        samples = deep[..., :1] >> (16 - bits)
        files[f"grey{bits}.png"] = png(samples, bits, 0, (b"tRNS", struct.pack(">H", 1)))
        if bits < 16:
            colours = random.integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes()
            files[f"palette{bits}.png"] = png(samples, bits, 3, (b"PLTE", colours), (b"tRNS", b"\x80\0"))
    for colour_type, channels in ((2, 3), (4, 2), (6, 4)):
        more = [(b"iCCP", b"a\0\0" + zlib.compress(icc)), (b"eXIf", metadata["exif"][6:])]
        files[f"deep{channels}.png"] = png(deep[..., :channels], 16, colour_type, *more)
        files[f"plain{channels}.png"] = png(colour[..., :channels], 8, colour_type, *more)
    files["interlaced.png"] = saved(rgb, "PNG", compress_level=1)
    files["rgb.webp"] = saved(rgb, "WEBP", **metadata)
    files["alpha.webp"] = saved(Image.fromarray(colour), "WEBP", lossless=True)
    files["rgb.avif"] = saved(rgb, "AVIF", speed=10, **metadata)
    files["rgb.bmp"], files["palette.bmp"] = saved(rgb, "BMP"), saved(palette, "BMP")
    files["palette.gif"] = saved(palette, "GIF", transparency=3, comment=b"a comment")
    files["moving.gif"] = saved(palette, "GIF", save_all=True, append_images=[palette.rotate(180)])
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"{compression}.tif"] = saved(rgb, "TIFF", compression=compression, icc_profile=icc)
    files["exif.tif"] = saved(rgb, "TIFF", **metadata)
    files["fax.tif"] = saved(grey.convert("1"), "TIFF", compression="group4")
    files["tiles.tif"] = tiff(colour[..., :3], tile=(16, 16), photometric="rgb")
    files["big.tif"] = tiff(deep[..., :3], bigtiff=True, photometric="rgb")
    files["planes.tif"] = tiff(np.moveaxis(deep[..., :3], 2, 0), planarconfig="separate", photometric="rgb")
    files["grey16.tif"] = tiff(deep[..., 0], photometric="miniswhite")
    files["pages.tif"] = tiff(np.stack([colour[..., 0]] * 2), photometric="minisblack")
    files["binary.ppm"] = b"P6 23 19 255\n" + colour[..., :3].tobytes()
    files["binary16.pgm"] = b"P5 23 19 65535\n" + deep[..., 0].tobytes()
    files["text.pgm"] = b"P2 23 19 255\n" + " ".join(map(str, colour[..., 0].ravel())).encode()
    files["bits.pbm"] = b"P4 23 19\n" + bytes(3 * 19)
    return files


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The file with damage of one or two kinds."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 3)):
        kind, place = random.integers(6), int(random.integers(len(changed)))
        if kind == 0:  # bits, mostly of the header
            for place in random.integers(0, min(len(changed), 300), random.integers(1, 8)):
                changed[place] ^= 1 << random.integers(8)
        elif kind == 1:
            changed[place : place + 4] = random.choice(
                [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"]
            )
        elif kind == 2:
            del changed[max(1, place) :]
        elif kind == 3:  # a part twice
            changed[place:place] = changed[place : place + int(random.integers(1, 400))]
        elif kind == 4:
            del changed[place : place + int(random.integers(1, 40))]
        else:  # a number as it may stand for a size, larger
            wanted = random.choice([struct.pack(kind, side) for kind in ("<H", ">H", "<I", ">I") for side in (19, 23)])
            found = changed.find(wanted)
            if found >= 0:
                changed[found : found + len(wanted)] = b"\x3f" * len(wanted)
        if not changed:
            break
    return bytes(with_checksums(changed))


def with_checksums(data: bytearray) -> bytearray:
    """A PNG with right checksums, so that damage gets past them."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4
    return data


def main(folder: Path, count: int) -> None:
    for module in (images, pictures):
        module.host_memory = lambda: (MEMORY, MEMORY)
    files = seeds()
    for name, data in files.items():  # all are read, but for what is refused on purpose
        (folder / name).write_bytes(data)
        read_both(folder / name, whole=name not in ("moving.gif", "pages.tif"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names, slowest = sorted(files), 0.0
    for number in range(count):
        random = np.random.default_rng(number)
        name = names[number % len(names)]
        path = folder / f"{number}_{name}"
        path.write_bytes(mutated(files[name], random))
        started = time.monotonic()
        read_both(path)
        slowest = max(slowest, time.monotonic() - started)
    growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if growth > GROWTH:
        print(f"memory grew by {growth >> 20} MB")
    if slowest > 3:
        print(f"one file took {slowest:.1f} s")


def read_both(path: Path, *, whole: bool = False) -> None:
    """Reads a file as training and as restoring does, and prints what is wrong with that."""
    for read in (images.read_image, pictures.read_picture):
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = read(path)
            pixels = getattr(result, "pixels", result)
            if pixels.ndim != 3 or pixels.dtype not in (np.uint8, np.uint16) or 0 in pixels.shape:
                print(f"{path.name}: {read.__name__} gives {pixels.dtype} {pixels.shape}")
            if caught:
                print(f"{path.name}: {read.__name__} warns: {caught[0].message}")
        except ImageError as error:
            if whole and (read is pictures.read_picture or "separate planes" not in str(error)):
                print(f"{path.name}: {read.__name__}: {error}")
            if not str(error).startswith(f"{path}: ") or not str(error).isprintable():
                print(f"{path.name}: {read.__name__}: no good message: {error!r}")
        except BaseException as error:
            print(f"{path.name}: {read.__name__} raises {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
