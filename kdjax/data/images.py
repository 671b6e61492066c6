"""Reading and writing one image file.

An image in memory is uint8, height x width x channels, RGB or one grey channel, as a person would see it: the
EXIF orientation is applied, palettes are resolved, CMYK is converted, and of an animation the first frame
counts. An alpha channel is dropped, not blended with a background. Grey becomes RGB by repetition; RGB
becomes grey by the ITU-R 601 luma.

Samples of 16 bits become 8 by round(v / 257), so 0 stays 0 and 65535 becomes 255. That holds for grey; of
16-bit colour Pillow hands out only the high byte, which is at most one level away. Floating-point and 32-bit
integer images have no agreed range and are refused. `kdjax.data.pictures` keeps all 16 bits, alpha and metadata.

A path may also lead into a pack (`kdjax.data.shards`), which holds the pixels that its files gave.

Left out: colour profiles, which are ignored, and damage that a decoder cannot see, such as wrong bytes inside
JPEG data.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from kdjax.data import shards
from kdjax.files import whole_file

# What a folder is searched for. The content decides how a file is decoded, so a PNG named .jpg can be read.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

# Pillow knows more formats, and some of them start other programs (EPS runs Ghostscript): an image folder
# needs none.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

_ORIENTATION_TAG = 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),  # clockwise
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}  # by EXIF orientation; all give views

_TIFF_BITS, _TIFF_PLANAR = 258, 284
_pillows_limit = threading.Lock()  # it is one for the whole process

_SAVE_OPTIONS = {
    ".jpg": {"quality": 95, "subsampling": 0},
    ".jpeg": {"quality": 95, "subsampling": 0},
    ".webp": {"lossless": True},
}


class ImageError(ValueError):
    """An image file that cannot be read or written; the message starts with its path."""


def read_image(path: str | os.PathLike[str], channels: int = 3) -> np.ndarray:
    """The image in `path` as uint8 (height, width, channels); `channels` is 3 for RGB or 1 for grey.

    Every file that is missing, damaged, cut short, too large or not an image ends in an `ImageError`.
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
    """The image in `path` as uint8 (height, width, 1 if it is grey and else 3), and how the file stores it.

    That is Pillow's name of the mode ("RGB", "L", "RGBA", "P", "I;16", ...), with "16-bit " before it for colour of 16
    bits. Raises `ImageError` as `read_image`.
    """
    if (place := shards.split_path(os.fspath(path))) is not None:
        try:
            pixels = shards.read_record(*place)
        except shards.PackError as error:
            raise ImageError(f"{path}: {error}") from None
        return pixels, "L" if pixels.shape[2] == 1 else "RGB"
    with opened(path) as image:
        mode = f"16-bit {image.mode}" if is_deep_colour(image) else image.mode
        if mode.startswith("16-bit") and image.format == "TIFF" and image.tag_v2.get(_TIFF_PLANAR) == 2:
            raise ImageError("16-bit colour in separate planes cannot be read; save it interleaved or with 8 bits")
        image.load()
        upright = UPRIGHT.get(orientation_of(image))
        pixels = _to_uint8(image)
    return pixels if upright is None else np.ascontiguousarray(upright(pixels)), mode


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], max_pixels: int | None = None) -> Iterator[Image.Image]:
    """The image in a file, not decoded yet; whatever goes wrong with it in the `with` block ends in an `ImageError`.

    Args:
      max_pixels: images that claim more are refused; by default Pillow's limit for the process holds.
    """
    try:
        with open(path, "rb", opener=_open_regular) as file, _identified(file, max_pixels) as image:
            yield image
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except UnidentifiedImageError:
        if os.path.getsize(path) == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes)") from None
        raise ImageError(f"{path}: not a readable image ({', '.join(_FORMATS)} were tried)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: too many pixels: {error}") from error
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly every kind of exception
        raise ImageError(f"{path}: cannot be decoded ({type(error).__name__}: {error})") from error


def _identified(file: BinaryIO, max_pixels: int | None) -> Image.Image:
    if max_pixels is None:
        return Image.open(file, formats=_FORMATS)
    with _pillows_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"too many pixels: {image.width}x{image.height}, the limit is {max_pixels / 1e6:.0f} megapixels"
        )
    return image


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes uint8 (height, width, 1 or 3) in the format that the suffix names.

    The file appears whole or not at all: it is written under a temporary name in the same folder, then
    renamed. JPEG is written at quality 95 without chroma subsampling, WebP without loss.
    """
    path = Path(path)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(
            f"{path}: the image is {image.dtype} of shape {image.shape}; it must be uint8 of shape "
            "(height, width, 1 or 3)"
        )
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise ImageError(f"{path}: cannot write the suffix {suffix!r}; use one of {', '.join(IMAGE_SUFFIXES)}")
    picture = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0]))
    try:
        with whole_file(path) as temporary:
            picture.save(temporary, **_SAVE_OPTIONS.get(suffix, {}))
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format can hold
        raise ImageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _open_regular(path: str, flags: int) -> int:
    """Opens regular files only: a folder has no clear message otherwise, and a pipe would block for ever."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(0, "is a folder, not an image file")
    if not stat.S_ISREG(mode):
        raise OSError(0, "is not a regular file")
    return os.open(path, flags)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image: 1 when there is none, or when Pillow has applied it (TIFF)."""
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def is_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has 16 bits a sample, which the mode that Pillow gives it hides."""
    if image.mode.startswith("I"):
        return False
    if image.format == "TIFF":
        return image.mode != "F" and max(image.tag_v2.get(_TIFF_BITS, (1,))) > 8
    if image.format == "PPM":  # args: mode and the largest value
        return any(isinstance(value, int) and value > 255 for tile in image.tile for value in tile[3])
    return ";16" in str(getattr(image, "tile", ""))


def is_deep_grey(image: Image.Image) -> bool:
    """Whether a loaded image is grey with 16 bits.

    Raises:
      ImageError: it has floats or 32-bit integers.
    """
    sixteen_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode == "F" or (image.mode == "I" and not sixteen_bit):
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise ImageError(f"{kind} images have no agreed range; convert the file to 8 or 16 bits")
    return sixteen_bit


def to_8_bits(samples: np.ndarray) -> np.ndarray:
    """uint8 from integers in 0..65535: round(v / 257)."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_uint8(image: Image.Image) -> np.ndarray:
    """The pixels of a loaded image as uint8 (height, width, 1 if it is grey and else 3)."""
    if is_deep_grey(image):
        return to_8_bits(np.asarray(image))[:, :, None]
    # Otherwise convert() would blend a transparent palette entry, or warn about it.
    image.info.pop("transparency", None)
    if image.mode in ("RGBa", "La"):  # colour was multiplied by alpha: undo that before dropping alpha
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
