"""Reading and writing an image file.

In memory, an image is uint8, height x width x channels, RGB or one grey channel, as it is meant to be viewed: EXIF
orientation applied, palettes resolved, CMYK converted, and only the first frame of an animation. An alpha channel is
dropped, not blended with a background. Grey becomes RGB by repetition; RGB becomes grey by ITU-R 601 luma.

16-bit samples become 8-bit by round(v / 257), so 0 stays 0 and 65535 becomes 255. That holds for grey. For 16-bit
colour, Pillow returns only the high byte, which is off by at most one level. Floating-point and 32-bit integer images
have no agreed range and are rejected. `kdjax.media.pictures` keeps all 16 bits, alpha and metadata.

A path may also point into a pack (`kdjax.data.shards`), which holds the files' decoded pixels.

Files are not trusted: a header's claims are checked against the machine's memory before decoding, and metadata
(`kdjax.data.containers`) costs no more than its bytes.

Not handled: colour profiles, which are ignored, and damage that decoders cannot detect, such as wrong bytes inside JPEG
data.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from kdjax.data import containers, shards
from kdjax.files import printable, whole_file
from kdjax.memory import host_memory

# The suffixes searched for in folders. Files are decoded by content, so a PNG named .jpg works.
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".gif"),
    *(".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
)

# Pillow supports more formats, but some of them start other programs (EPS runs Ghostscript), and none belongs in an
# image folder.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "PPM", "GIF")

_HEIC = "convert HEIC to JPEG or PNG first, for example with heif-convert"
_RAW = "develop raw camera files first, for example with darktable"
_EXPORT = "save it as PNG or TIFF first"
# Formats that are often stored beside pictures but cannot be read, by suffix.
CONVERSIONS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), _HEIC),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".crw", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".raw"), _RAW),
    **dict.fromkeys((".psd", ".xcf", ".jxl", ".jp2", ".j2k", ".exr", ".hdr", ".tga", ".svg", ".eps", ".pdf"), _EXPORT),
}

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),  # clockwise
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}  # by EXIF orientation; all return views

_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANAR, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 258, 262, 284, 322, 323
_WHITE_IS_ZERO = 0

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')

_MOST_SCANS = 200  # of a progressive JPEG; each is a pass over all pixels, and cameras and browsers write ten
_MOST_TEXT = 1 << 24  # decompressed bytes of a text or colour profile in a PNG

# Bytes per pixel in Pillow's memory, where not four, and the decoders' own overhead.
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_DECODING = {"WEBP": 14, "AVIF": 12}
_UNKNOWN_MEMORY = 16 << 30  # assumed for a machine that does not report its memory

_JPEG = {"quality": 95, "subsampling": 0}
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), _JPEG),
    ".webp": {"lossless": True},
}  # by suffix
WRITTEN_SUFFIXES = (*(".png", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"), *_SAVE_OPTIONS)

Check = Callable[[Image.Image], None]


class ImageError(ValueError):
    """An image file that cannot be read or written; the message starts with its path."""


class UnknownTiff(ImageError):
    """A TIFF variant that Pillow cannot read."""


def read_image(path: str | os.PathLike[str], channels: int = 3) -> np.ndarray:
    """Reads `path` as uint8 (height, width, channels); `channels` is 3 for RGB or 1 for grey.

    Raises `ImageError` if the file is missing, damaged, truncated, not an image, or too large for this machine.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; it must be 3 (RGB) or 1 (grey)")
    pixels, _ = inspect_image(path)
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.array(Image.fromarray(pixels).convert("L"))[:, :, None]


def inspect_image(path: str | os.PathLike[str]) -> tuple[np.ndarray, str]:
    """Reads `path` as uint8 (height, width, 1 if grey, else 3), and returns how the file stores it.

    The second value is Pillow's mode name ("RGB", "L", "RGBA", "P", "I;16", ...), prefixed with "16-bit " for 16-bit
    colour. Raises `ImageError` like `read_image`.
    """
    if (place := shards.split_path(os.fspath(path))) is not None:
        try:
            pixels = shards.read_record(*place)
        except shards.PackError as error:
            raise ImageError(f"{path}: {error}") from None
        return pixels, "L" if pixels.shape[2] == 1 else "RGB"
    with opened(path, _check_training_image) as image:
        mode = f"16-bit {image.mode}" if is_deep_colour(image) else image.mode
        if mode.startswith("16-bit") and image.format == "TIFF" and tiff_tags(image).get(_TIFF_PLANAR) == 2:
            raise ImageError("16-bit colour in separate planes cannot be read; save it interleaved or with 8 bits")
        image.load()
        upright = UPRIGHT.get(orientation_of(image))
        pixels = _to_uint8(image)
    return pixels if upright is None else np.ascontiguousarray(upright(pixels)), mode


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], check: Check) -> Iterator[Image.Image]:
    """Opens an image file without decoding it; any failure in the `with` block becomes an `ImageError`.

    `image.info["exif"]` is the file's raw EXIF, which may be damaged.

    Args:
      check: called with the image before decoding; raises `ImageError` to reject its size.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file, _pillow_without_limit():
            try:
                image = _identified(file)
            except UnidentifiedImageError:
                raise _unidentified(file, Path(path).suffix) from None
            with image:
                check(image)
                yield image
    except ImageError as error:
        raise type(error)(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or _said(error)}") from error
    except MemoryError as error:
        raise ImageError(f"{path}: not enough memory to decode it") from error
    except Exception as error:  # on damaged files, Pillow's decoders raise almost any exception
        raise ImageError(f"{path}: cannot be decoded ({type(error).__name__}: {_said(error)})") from error


def _said(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:300])  # it may quote text from the file


_png: Any = PngImagePlugin  # typed as Any: its type stubs declare the limits constant
_pillow = threading.Lock()
_readers, _limits, _quiet = 0, (0, 0), None


@contextlib.contextmanager
def _pillow_without_limit() -> Iterator[None]:
    """Lifts Pillow's process-wide limits until the last reader is done.

    The checks of `opened` replace its pixel limits, and a profile or text in a PNG may exceed Pillow's megabyte.
    Pillow's warnings are about damaged metadata, not worth a line on the terminal.
    """
    global _readers, _limits, _quiet
    with _pillow:
        if warnings.filters[:1] != [_quiet]:  # only once: a new filter makes Python forget past warnings
            warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)
            _quiet = warnings.filters[0]
        if _readers == 0:
            _limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
            Image.MAX_IMAGE_PIXELS, _png.MAX_TEXT_CHUNK = None, _MOST_TEXT
        _readers += 1
    try:
        yield
    finally:
        with _pillow:
            _readers -= 1
            if _readers == 0:
                Image.MAX_IMAGE_PIXELS, _png.MAX_TEXT_CHUNK = _limits


def tiff_tags(image: Image.Image) -> TiffImagePlugin.ImageFileDirectory_v2:
    """Returns the tags of a TIFF image."""
    assert isinstance(image, TiffImagePlugin.TiffImageFile), image.format
    return image.tag_v2


def _identified(file: BinaryIO) -> Image.Image:
    """Identifies the image in a file, hiding from Pillow whatever costs more than the file's size justifies."""
    start = file.read(12)
    file.seek(0)
    if start.startswith(b"\xff\xd8\xff"):
        return _identified_jpeg(file.read())
    if start[4:8] == b"ftyp":
        return _identified_avif(file.read())
    if start.startswith(b"GIF8"):
        data, is_animated = containers.first_frame(file.read())
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.info["is_animated"] = is_animated
        return image
    if start[:2] in (b"II", b"MM") and containers.tiff_claims_too_much(file):
        raise ImageError("is damaged: its tags reach beyond the end of the file")
    image = Image.open(file, formats=_FORMATS)
    if image.format == "TIFF" and (start[8:10] == b"CR" or containers.is_camera_raw(tiff_tags(image))):
        raise ImageError(f"is a raw camera file; {_RAW}")
    image.info["is_animated"] = getattr(image, "is_animated", False)
    if image.format == "TIFF":
        image.info["is_animated"] &= tiff_tags(image).next < os.fstat(file.fileno()).st_size
        # Then Pillow leaves the EXIF in TIFF files alone, which nobody asks for and which may be damaged.
        image.is_animated = True  # ty: ignore[missing-attribute] (for Pillow to read)
    return image


def _identified_jpeg(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(containers.hide_exif(data)), formats=_FORMATS)
    if (exif := containers.hidden_exif(getattr(image, "applist", []))) is not None:
        image.info["exif"] = exif
    if image.info.get("progressive") and (scans := data.count(b"\xff\xda")) > _MOST_SCANS:
        raise ImageError(f"has {scans} scans and would take too long to decode; save it again as an ordinary JPEG")
    return image


def _identified_avif(data: bytes) -> Image.Image:
    """Identifies an AVIF image, hiding its EXIF if damaged: Pillow insists on valid EXIF."""
    if not containers.holds_claims(data):
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            return _described_avif(image, data)
        except Exception:  # EXIF may be the cause
            pass
    image = Image.open(io.BytesIO(containers.without_exif(data)), formats=_FORMATS)
    image.info["exif"] = b"damaged"
    return _described_avif(image, data)


def _described_avif(image: Image.Image, data: bytes) -> Image.Image:
    image.info |= {"is_animated": getattr(image, "is_animated", False), "is_deep": containers.is_deep_avif(data)}
    return image


def _unidentified(file: BinaryIO, suffix: str) -> ImageError:
    """Returns an error that explains why a file is not a readable image."""
    file.seek(0)
    start = file.read(12)
    if not start:
        return ImageError("the file is empty (0 bytes)")
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return UnknownTiff("is damaged, or an unusual kind of TIFF; save it with 8 or 16 bits, grey or RGB")
    if start[4:8] == b"ftyp":
        if start[8:11] in (b"hei", b"hev"):
            return ImageError(f"HEIC cannot be read; {_HEIC}")
        if start[8:10] == b"av" and not features.check("avif"):
            return ImageError("this Pillow cannot read AVIF; install Pillow 11.3 or newer: pip install -U pillow")
    hint = CONVERSIONS.get(suffix.lower())
    return ImageError(f"not a readable image ({', '.join(_FORMATS)} were tried)" + (f"; {hint}" if hint else ""))


def pixels_of(image: Image.Image) -> int:
    """Returns the pixel count that an undecoded image claims; a TIFF tile counts in full."""
    pixels = image.width * image.height
    if image.format == "TIFF":
        width, height = (tiff_tags(image).get(tag) for tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH))
        if isinstance(width, int) and isinstance(height, int):
            pixels = max(pixels, width * height)
    return pixels


def bytes_to_decode(image: Image.Image, channels: int, depth: int = 1) -> int:
    """Estimates the memory needed to decode an image into an array of samples of `depth` bytes."""
    stored = _STORED.get(image.mode, 4)
    converted = 0 if image.mode in ("L", "RGB") or image.mode.startswith("I") else 4
    decoding = 2 * len(image.getbands()) if image.info.get("progressive") else _DECODING.get(image.format, 0)
    # Pillow returns its pixels in pieces, which are joined and then copied.
    needed = max(stored + decoding, stored + converted + 2 * channels * depth)
    return needed * pixels_of(image)


@functools.cache
def most_bytes() -> int:
    """Returns the memory limit for decoding one image: an eighth of the machine's, since up to eight are read at once.

    Free memory is ignored: whether an image is usable must not depend on the moment.
    """
    return (host_memory()[0] or _UNKNOWN_MEMORY) // 8


def _check_training_image(image: Image.Image) -> None:
    if (needed := bytes_to_decode(image, 3)) > most_bytes():
        raise ImageError(
            f"too many pixels: {image.width}x{image.height} would take {needed / 2**30:.1f} GB of memory, more than an"
            f" eighth of the {8 * most_bytes() / 2**30:.1f} GB of this machine; cut it into smaller images"
        )


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes uint8 (height, width, 1 or 3) in the format given by the suffix.

    The write is atomic: a temporary file in the same folder is renamed at the end. JPEG uses quality 95 without chroma
    subsampling; WebP is lossless.
    """
    path = Path(path)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"{path}: the image is {image.dtype} of shape {image.shape}; it must be uint8 of shape "
            "(height, width, 1 or 3)"
        )
    suffix = path.suffix.lower()
    if suffix not in WRITTEN_SUFFIXES:
        raise ImageError(f"{path}: cannot write the suffix {suffix!r}; use one of {', '.join(WRITTEN_SUFFIXES)}")
    picture = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0]))
    try:
        with whole_file(path) as temporary:
            picture.save(temporary, **_SAVE_OPTIONS.get(suffix, {}))
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format can hold
        raise ImageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _open_regular(path: str, flags: int) -> int:
    """Opens regular files only: folders would give an unclear error, and pipes would block forever."""
    if os.path.islink(path) and not os.path.exists(path):
        raise OSError(0, f"No such file: is a link to {printable(os.fsdecode(os.readlink(path)))}")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(0, "is a folder, not an image file")
    if not stat.S_ISREG(mode):
        raise OSError(0, "is not a regular file")
    return os.open(path, flags)


def orientation_of(image: Image.Image) -> int:
    """Returns a loaded image's EXIF orientation; 1 if there is none or Pillow has already applied it (TIFF)."""
    if image.format == "TIFF":
        return 1
    raw = image.info.get("Raw profile type exif")  # ImageMagick stores EXIF in a PNG as hexadecimal text
    if (exif := image.info.get("exif")) is None and raw:
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(str(raw).split("\n")[3:]))
    if exif and (orientation := containers.orientation(exif)) != 1:
        return orientation
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    match = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else str(xmp).encode(errors="replace"))
    return int(match[1]) if match else 1


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image not yet loaded has more than 8 bits per sample, which Pillow's mode does not show."""
    if image.mode.startswith("I"):
        return False
    if image.format == "TIFF":
        return image.mode != "F" and max(tiff_tags(image).get(_TIFF_BITS, (1,))) > 8
    if image.format == "PPM":  # args: mode and maximum value
        return any(isinstance(value, int) and value > 255 for tile in getattr(image, "tile", ()) for value in tile[3])
    return image.info.get("is_deep", False) or ";16" in str(getattr(image, "tile", ""))


def deep_grey(image: Image.Image) -> np.ndarray | None:
    """Returns a loaded image's samples, uint16 (height, width), if it is grey with more than 8 bits.

    Raises:
      ImageError: it has floats or 32-bit integers.
    """
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode == "F" or (image.mode == "I" and not sixteen_bit):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise ImageError(f"{kind} images have no agreed range; convert the file to 8 or 16 bits")
    if not sixteen_bit:
        return None
    samples = np.asarray(image).astype(np.uint16, copy=False)
    if image.format == "TIFF":
        if tiff_tags(image).get(_TIFF_BITS) == (12,):
            samples = samples << 4 | samples >> 8
        if tiff_tags(image).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts only 8-bit samples
            samples = 65535 - samples
    return samples


def to_8_bits(samples: np.ndarray) -> np.ndarray:
    """Returns uint8 from integers in 0..65535: round(v / 257)."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_uint8(image: Image.Image) -> np.ndarray:
    """Returns a loaded image's pixels as uint8 (height, width, 1 if grey, else 3)."""
    if (samples := deep_grey(image)) is not None:
        return to_8_bits(samples)[:, :, None]
    # Otherwise convert() would blend a transparent palette entry, or warn about it.
    image.info.pop("transparency", None)
    if image.mode in ("RGBa", "La"):  # colour is premultiplied by alpha: undo that before dropping alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
