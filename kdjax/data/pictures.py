"""Reading and writing one picture as its owner keeps it: 8 or 16 bits, grey or colour, alpha, colour profile, EXIF.

`kdjax.data.images` gives training 8 bits of three channels; here a file goes in and a file of the same kind comes out.

The EXIF orientation is applied to the pixels and its tag set to 1; the rest of the EXIF stays byte for byte. The ICC
profile is written back as it was: colours are not converted. CMYK is, to sRGB, through its own profile where it has
one. Palettes become RGB, one bit becomes grey, a transparent colour becomes alpha. Of a file with several pictures none
is taken, except of what phones write (MPO), where the first is the photograph.

Pillow does 8 bits, and 16 bits of grey. Colour, or grey with alpha, of 16 bits goes through libvips (the package
`pyvips`), which is imported for such files only.

Left out: XMP, IPTC and resolution, the EXIF inside TIFF files, and 16-bit PPM.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from kdjax.data.images import UPRIGHT, ImageError, is_deep_colour, is_deep_grey, opened, orientation_of, to_8_bits
from kdjax.files import whole_file

# A header of a few bytes can claim any size. Cameras reach 150 megapixels, and few panoramas have more than this.
MAX_PIXELS = 1 << 30

_ORIENTATION = 0x0112
_TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, upright.

    Attributes:
      pixels: uint8 or uint16 (height, width, 1, 2, 3 or 4): grey, grey and alpha, RGB, RGB and alpha.
      icc: the colour profile that says what the numbers mean; None for none, which is sRGB.
      exif: the EXIF block, without orientation.
      notes: for the user, what of the file was not kept.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None
    notes: tuple[str, ...] = ()

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


@dataclasses.dataclass(frozen=True, eq=False)
class Format:
    """What a file format can hold."""

    longest_side: float = math.inf
    most_bytes: float = math.inf  # of pixels
    alpha: bool = False
    sixteen_bits: bool = False
    metadata: bool = False  # colour profile and EXIF


_4_GB = 2**32 - 2**16  # what 32 bits can count, less headers
_JPEG = Format(longest_side=65_500, metadata=True)
_TIFF = Format(most_bytes=_4_GB, alpha=True, sixteen_bits=True, metadata=True)
_PPM = Format()
FORMATS = {
    ".png": Format(alpha=True, sixteen_bits=True, metadata=True),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": Format(longest_side=16_383, alpha=True, metadata=True),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format(most_bytes=_4_GB),
    ".ppm": _PPM,
    ".pgm": _PPM,
}  # by suffix; those of one format are one object


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """The picture in a file.

    Raises:
      ImageError: the file is missing, damaged, cut short, no picture, several pictures, an animation, or larger than
        `MAX_PIXELS`; or libvips is needed for it and is not installed.
    """
    with opened(path, MAX_PIXELS) as image:
        _refuse_several(image)
        if is_deep_colour(image):
            return _read_with_vips(path, image)
        image.load()
        deep = is_deep_grey(image)
        icc, exif, notes = image.info.get("icc_profile"), image.info.get("exif"), ()
        orientation = orientation_of(image)
        if image.mode == "CMYK":
            image, icc, notes = _cmyk_to_rgb(image, icc), None, ("CMYK converted to sRGB",)
        pixels = np.asarray(image if deep else _without_palette(image))
        if deep:
            pixels = pixels.astype(np.uint16, copy=False)
            if image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
                pixels = 65535 - pixels  # Pillow does so for 8 bits only
        return _upright(pixels, icc, exif, orientation, notes)


def check_target(path: str | os.PathLike[str], picture: Picture, scale: int = 1) -> tuple[str, ...]:
    """Whether the format that the suffix of `path` names can hold `picture`, enlarged `scale` times.

    Returns:
      For the user, what it cannot hold and will not be kept.

    Raises:
      ImageError: it cannot hold this picture, or is none that can be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ImageError(f"{path}: cannot write the suffix {suffix!r}; use one of {', '.join(FORMATS)}")
    target = FORMATS[suffix]
    height, width = (side * scale for side in picture.pixels.shape[:2])
    if max(height, width) > target.longest_side:
        raise ImageError(
            f"{path}: {width}x{height} pixels, and {suffix} files hold {target.longest_side} a side; write png or tif"
        )
    if picture.pixels.nbytes * scale**2 > target.most_bytes:
        raise ImageError(f"{path}: {width}x{height} pixels are more than the 4 GB that {suffix} files hold; write png")
    if picture.has_alpha and not target.alpha and (picture.pixels[..., -1] != _full(picture.pixels)).any():
        raise ImageError(f"{path}: {suffix} files hold no alpha channel; write png, webp or tif")
    notes = []
    if picture.pixels.dtype == np.uint16 and not target.sixteen_bits:
        notes.append(f"16 bits became 8: {suffix} files hold no more")
    if (picture.icc or picture.exif) and not target.metadata:
        notes.append(f"colour profile and EXIF dropped: {suffix} files hold none")
    return tuple(notes)


def write_picture(path: str | os.PathLike[str], picture: Picture, *, quality: int | None = None) -> None:
    """Writes a picture in the format that the suffix names. The file appears whole or not at all.

    Args:
      quality: 1 to 100, of JPEG and WebP. By default JPEG has 95, and WebP is without loss. Chroma is not subsampled in
        JPEG.

    Raises:
      ImageError: the format cannot hold it (`check_target`), libvips is needed and not installed, or the file cannot be
        written; the `OSError` is then its cause.
    """
    path = Path(path)
    check_target(path, picture)
    target = FORMATS[path.suffix.lower()]
    pixels = picture.pixels
    if picture.has_alpha and not target.alpha:  # it is opaque
        pixels = pixels[..., :-1]
    if pixels.dtype == np.uint16 and not target.sixteen_bits:
        pixels = to_8_bits(pixels)
    metadata = {"icc_profile": picture.icc, "exif": picture.exif} if target.metadata else {}
    metadata = {name: value for name, value in metadata.items() if value}
    try:
        with whole_file(path) as temporary:
            if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
                _write_with_vips(temporary, pixels, **metadata)
            else:
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                image.save(temporary, **metadata, **_options(path.suffix.lower(), quality))
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error.__cause__
    except (OSError, ValueError) as error:  # ValueError: what the format cannot hold, such as 64 KB of EXIF in a JPEG
        raise ImageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _options(suffix: str, quality: int | None) -> dict[str, Any]:
    if suffix in (".jpg", ".jpeg"):
        return {"quality": 95 if quality is None else quality, "subsampling": 0}
    if suffix == ".webp":
        return {"lossless": True} if quality is None else {"quality": quality}
    return {}


def _full(pixels: np.ndarray) -> int:
    return np.iinfo(pixels.dtype).max


def _refuse_several(image: Image.Image) -> None:
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and image.format == "TIFF":
        raise ImageError(f"holds {frames} pages; split it into one file for each, for example with tiffsplit")
    if frames > 1:
        raise ImageError(
            f"is an animation of {frames} frames; make single pictures or a video of it first "
            "(GIF and PNG: ffmpeg -i FILE frame_%04d.png)"
        )


def _without_palette(image: Image.Image) -> Image.Image:
    """A loaded 8-bit image as L, LA, RGB or RGBA."""
    colour = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode = f"{colour}A" if image.has_transparency_data else colour
    return image if image.mode == mode else image.convert(mode)


def _cmyk_to_rgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):  # a damaged profile
        return image.convert("RGB")


def _upright(
    pixels: np.ndarray, icc: bytes | None, exif: bytes | None, orientation: int, notes: tuple[str, ...]
) -> Picture:
    pixels = UPRIGHT.get(orientation, lambda pixels: pixels)(pixels)
    return Picture(np.atleast_3d(pixels), icc, _without_orientation(exif) if exif else None, notes)


def _without_orientation(exif: bytes) -> bytes | None:
    """EXIF that says the picture is upright, and is else the same; None if it is damaged.

    The layout is that of TIFF (6.0, section 2): byte order, the place of the first directory, its number of entries,
    and entries of 12 bytes: tag, type, count, value.
    """
    tiff = bytearray(exif.removeprefix(b"Exif\0\0"))
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
        (number,) = struct.unpack_from(f"{order}H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * number, 12):
            if struct.unpack_from(f"{order}H", tiff, entry) == (_ORIENTATION,):
                struct.pack_into(f"{order}HIHH", tiff, entry + 2, 3, 1, 1, 0)  # one short, 1
    except struct.error:
        return None
    return b"Exif\0\0" + bytes(tiff)


def _import_vips() -> ModuleType:
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips without libvips
        raise ImageError(
            "colour of 16 bits needs the package pyvips with libvips, and it cannot be imported; install it:"
            " pip install 'kdjax[16bit]'"
        ) from error
    return pyvips


def _read_with_vips(path: str | os.PathLike[str], image: Image.Image) -> Picture:
    """The picture of 16 bits in a file, of which Pillow has read the header."""
    if image.format == "PPM":
        raise ImageError("16-bit PPM cannot be read; convert it to PNG or TIFF")
    vips = _import_vips()
    try:
        # Not new_from_file, which takes brackets in a name for options.
        source = vips.Source.new_from_file(os.fspath(path))
        decoded = vips.Image.new_from_source(source, "", access="sequential", fail_on="error")
        about = {name: decoded.get(name) for name in decoded.get_fields()}
        notes = ()
        if decoded.interpretation == "cmyk":
            decoded, notes = decoded.colourspace("rgb16"), ("CMYK converted to sRGB",)
        pixels = decoded.numpy()
    except vips.Error as error:
        raise ImageError(f"cannot be decoded: {' '.join(str(error).split())}") from error
    if pixels.dtype != np.uint16 or pixels.shape[2:] not in ((2,), (3,), (4,)):
        raise ImageError(f"holds {pixels.dtype} samples in {decoded.bands} channels; convert it to RGB of 8 or 16 bits")
    icc = None if notes else about.get("icc-profile-data")
    return _upright(pixels, icc, about.get("exif-data"), about.get("orientation", 1), notes)


def _write_with_vips(
    path: Path, pixels: np.ndarray, icc_profile: bytes | None = None, exif: bytes | None = None
) -> None:
    vips = _import_vips()
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    image = vips.Image.new_from_memory(pixels.data, width, height, channels, "ushort")
    image = image.copy(interpretation="grey16" if channels == 2 else "rgb16")
    for name, value in (("icc-profile-data", icc_profile), ("exif-data", exif)):
        if value:
            image.set_type(vips.GValue.blob_type, name, value)
    try:
        # Not write_to_file, which takes brackets in a name for options.
        (image.pngsave if path.suffix.lower() == ".png" else image.tiffsave)(os.fspath(path))
    except vips.Error as error:
        raise ImageError(f"cannot be written: {' '.join(str(error).split())}") from error
