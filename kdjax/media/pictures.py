"""Reads and writes pictures as their owners keep them: 8 or 16 bits, grey or colour, alpha, colour profile, EXIF.

`kdjax.data.images` gives training 8 bits and three channels. Here, a file goes in and a file of the same kind comes
out.

The EXIF orientation is applied to the pixels and its tag set to 1; the rest of the EXIF is kept byte for byte. The ICC
profile is written back unchanged, without converting colours. CMYK is converted to sRGB, through its own profile if it
has one. Palettes become RGB, one bit becomes grey, a transparent colour becomes alpha. Files with several pictures are
rejected, except those from phones (MPO), where the first is the photograph. Damaged metadata is dropped with a note;
the picture is kept.

Pillow handles 8 bits, and 16-bit grey. 16-bit colour or grey with alpha goes through libvips (the package `pyvips`), as
do TIFF variants that Pillow does not know. It is imported only for such files.

Not handled: XMP, IPTC and resolution, the EXIF inside TIFF files, colours that AVIF names without a profile (HDR), and
16-bit PPM.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import os
import struct
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms

from kdjax.data import containers
from kdjax.data.images import (
    UPRIGHT,
    ImageError,
    UnknownTiff,
    bytes_to_decode,
    deep_grey,
    is_deep_colour,
    opened,
    orientation_of,
    tiff_tags,
    to_8_bits,
)
from kdjax.files import printable, whole_file
from kdjax.memory import host_memory

_UNKNOWN_MEMORY = 8 << 30  # free memory assumed for a machine that does not report it

_TIFF_EXTRA_SAMPLES = 338
# EXIF tags that describe the picture, and pointers to the EXIF and GPS directories. Other tags, such as those for
# compression and colours, would change the meaning of the TIFF file they are written to.
_TIFF_EXIF = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298, 0x8769, 0x8825)

_DAMAGED_EXIF = "damaged EXIF dropped"
_SEVERAL = "has several pages; split it into one file per page, for example with tiffsplit"
_ANIMATION = "is an animation; convert it to images or a video first (GIF and PNG: ffmpeg -i FILE frame_%04d.png)"

_PNG_END = bytes.fromhex("00000000 49454e44 ae426082")  # the IEND chunk


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture, upright.

    Attributes:
      pixels: uint8 or uint16 (height, width, 1, 2, 3 or 4): grey, grey and alpha, RGB, RGB and alpha.
      icc: the colour profile; None means sRGB.
      exif: the EXIF block, without orientation.
      notes: what of the file was not kept, for the user.
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
    """What a file format can store."""

    longest_side: float = math.inf
    most_bytes: float = math.inf  # of pixels
    alpha: bool = False
    sixteen_bits: bool = False
    most_icc: float = 0  # bytes of a colour profile
    most_exif: float = 0


_4_GB = 2**32 - 2**16  # the 32-bit limit, minus headers
# A JPEG segment has 65,533 bytes. A colour profile may take 255 segments, each with a header of 14 bytes.
_JPEG = Format(longest_side=65_500, most_icc=255 * (65_533 - 14), most_exif=65_533)
_PNG = Format(alpha=True, sixteen_bits=True, most_icc=_4_GB, most_exif=2**31 - 1)
_TIFF = Format(most_bytes=_4_GB, alpha=True, sixteen_bits=True, most_icc=_4_GB, most_exif=_4_GB)
_PPM = Format()
FORMATS = {
    ".png": _PNG,
    ".apng": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".jpe": _JPEG,
    ".jfif": _JPEG,
    ".webp": Format(longest_side=16_383, alpha=True, most_icc=_4_GB, most_exif=_4_GB),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": Format(most_bytes=_4_GB),
    ".ppm": _PPM,
    ".pgm": _PPM,
    ".pnm": _PPM,
}  # by suffix; suffixes of one format share an object


def read_picture(path: str | os.PathLike[str], *, scale: int = 1, max_pixels: float | None = None) -> Picture:
    """Reads a picture.

    Args:
      scale: how many times it will be enlarged, which takes memory too.
      max_pixels: larger pictures are rejected; see `too_large` for the default.

    Raises:
      ImageError: the file is missing, damaged, truncated, not a picture, several pictures, an animation, or too large;
        or it needs libvips, which is not installed.
    """

    def check(image: Image.Image) -> None:
        if image.info.get("is_animated"):
            raise ImageError(_SEVERAL if image.format == "TIFF" else _ANIMATION)
        depth = 2 if image.mode.startswith("I") or is_deep_colour(image) else 1
        channels = 4 if image.mode == "P" else len(image.getbands()) + ("transparency" in image.info)
        refuse_large(image.width, image.height, channels * depth, decoding=bytes_to_decode(image, channels, depth))

    def refuse_large(width: int, height: int, bytes_per_pixel: int, decoding: int = 0) -> None:
        if reason := too_large(width, height, bytes_per_pixel, decoding, scale=scale, max_pixels=max_pixels):
            raise ImageError(reason)

    try:
        with opened(path, check) as image:
            return _read_deep(image) if is_deep_colour(image) else _read_with_pillow(image)
    except UnknownTiff as error:
        try:
            vips = _import_vips()
        except ImageError:
            raise error from None
        try:
            with open(path, "rb") as file:
                decoded = _decoded(vips, file)
                if decoded.get("n-pages") > 1:
                    raise ImageError(_SEVERAL)
                refuse_large(decoded.width, decoded.height, decoded.bands * (1 if decoded.format == "uchar" else 2))
                return _picture_of(vips, decoded, None, None)
        except ImageError as reason:
            raise ImageError(f"{path}: {reason}") from reason.__cause__


def too_large(
    width: int, height: int, bytes_per_pixel: int, decoding: int = 0, *, scale: int = 1, max_pixels: float | None = None
) -> str | None:
    """Returns why a picture is too large to restore, or None.

    Args:
      bytes_per_pixel: of the decoded picture.
      decoding: bytes needed to decode it.
      max_pixels: the limit. By default, a picture may take half of the free memory, from decoding to writing.
    """
    if max_pixels is not None:
        if width * height <= max_pixels:
            return None
        return (
            f"too many pixels: {width}x{height}, and --max-megapixels is {max_pixels / 1e6:g};"
            f" {math.ceil(width * height / 1e6)} would be enough"
        )
    there, free = host_memory()
    free = free or there // 2 or _UNKNOWN_MEMORY
    stored = bytes_per_pixel if bytes_per_pixel < 3 else 4  # Pillow's bytes per pixel for writing
    pixels, restored = width * height, width * height * scale**2
    needed = max(decoding, (pixels + restored) * bytes_per_pixel, restored * (bytes_per_pixel + stored))
    if needed <= free // 2:
        return None
    return (
        f"too many pixels: {width}x{height} would take about {needed / 2**30:.1f} GB of memory, more than half of the"
        f" {free / 2**30:.1f} GB that are free; with --max-megapixels {math.ceil(width * height / 1e6)} it is tried"
        " anyway"
    )


def check_target(path: str | os.PathLike[str], picture: Picture, scale: int = 1) -> tuple[str, ...]:
    """Checks that the format given by `path`'s suffix can hold `picture`, enlarged `scale` times.

    Returns:
      What the format cannot store and so will not be kept, for the user.

    Raises:
      ImageError: the format cannot hold this picture, or cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ImageError(f"{path}: cannot write the suffix {suffix!r}; use one of {', '.join(FORMATS)}")
    target = FORMATS[suffix]
    height, width = (side * scale for side in picture.pixels.shape[:2])
    if max(height, width) > target.longest_side:
        raise ImageError(
            f"{path}: {width}x{height} pixels, and {suffix} files can have at most {target.longest_side} a side;"
            " write png or"
            " tif"
        )
    if picture.pixels.nbytes * scale**2 > target.most_bytes:
        raise ImageError(
            f"{path}: {width}x{height} pixels are more than the 4 GB that {suffix} files can hold; write png"
        )
    if picture.has_alpha and not target.alpha and (picture.pixels[..., -1] != _full(picture.pixels)).any():
        raise ImageError(f"{path}: {suffix} files have no alpha channel; write png, webp or tif")
    notes = []
    if picture.pixels.dtype == np.uint16 and not target.sixteen_bits:
        notes.append(f"16 bits became 8: {suffix} files have no more")
    for what, metadata, most in (
        ("colour profile", picture.icc, target.most_icc),
        ("EXIF", picture.exif, 0 if target is _TIFF and _needs_vips(picture) else target.most_exif),
    ):
        if metadata and len(metadata) > most:
            holds = f"hold {most:,} bytes, and it has {len(metadata):,}" if most else "hold none"
            kind = " of 16-bit colour" if target is _TIFF else ""
            notes.append(f"{what} dropped: {suffix} files{kind} {holds}")
    return tuple(notes)


def write_picture(path: str | os.PathLike[str], picture: Picture, *, quality: int | None = None) -> tuple[str, ...]:
    """Writes a picture in the format given by the suffix, atomically.

    Args:
      quality: 1 to 100, for JPEG and WebP. By default, JPEG uses 95 and WebP is lossless. JPEG chroma is not
        subsampled.

    Returns:
      What was not kept, for the user: the notes of `check_target`, and metadata that turned out to be damaged.

    Raises:
      ImageError: the format cannot hold it (`check_target`), libvips is needed and not installed, or the file cannot be
        written; its cause is then the `OSError`.
    """
    path = Path(path)
    notes = list(check_target(path, picture))
    target = FORMATS[path.suffix.lower()]
    pixels = picture.pixels
    if picture.has_alpha and not target.alpha:  # fully opaque here
        pixels = pixels[..., :-1]
    if pixels.dtype == np.uint16 and not target.sixteen_bits:
        pixels = to_8_bits(pixels)
    icc = picture.icc if picture.icc and len(picture.icc) <= target.most_icc else None
    exif = picture.exif if picture.exif and len(picture.exif) <= target.most_exif else None
    try:
        with whole_file(path) as temporary:
            if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
                notes += _write_deep(temporary, pixels, icc, exif)
            else:
                options = _options(path.suffix.lower(), quality) | ({"icc_profile": icc} if icc else {})
                image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
                notes += _save_with_exif(image, temporary, exif, options, is_tiff=target is _TIFF)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error.__cause__
    except MemoryError as error:
        raise ImageError(f"{path}: not enough memory to write it") from error
    except Exception as error:  # encoders raise almost any exception for a picture they cannot handle
        raise ImageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return tuple(notes)


def _save_with_exif(
    image: Image.Image, path: Path, exif: bytes | None, options: dict[str, Any], *, is_tiff: bool
) -> list[str]:
    """Writes a file, without EXIF if TIFF cannot store it because it is damaged; returns notes on what was dropped."""
    if exif and is_tiff:
        try:
            image.save(path, exif=_tiff_exif(exif), **options)
            return []
        except OSError as error:
            if error.errno:  # a disk error, not the EXIF
                raise
        except Exception:
            pass
        image.save(path, **options)
        return [_DAMAGED_EXIF]
    image.save(path, **options, **(dict[str, Any](exif=exif) if exif else {}))
    return []


def _tiff_exif(exif: bytes) -> Image.Exif:
    """Returns the part of EXIF that belongs in a TIFF file; may raise anything if it is damaged."""
    if containers.exif_claims_too_much(exif.removeprefix(containers.EXIF)):
        raise ValueError("its tags reach beyond its end")
    kept = Image.Exif()
    kept.load(exif)
    for tag in list(kept):
        if tag not in _TIFF_EXIF:
            del kept[tag]
    return kept


def _options(suffix: str, quality: int | None) -> dict[str, Any]:
    if FORMATS[suffix] is _JPEG:
        return {"quality": 95 if quality is None else quality, "subsampling": 0}
    if suffix == ".webp":
        return {"lossless": True} if quality is None else {"quality": quality}
    return {}


def _full(pixels: np.ndarray) -> int:
    return np.iinfo(pixels.dtype).max


def _needs_vips(picture: Picture) -> bool:
    return picture.pixels.dtype == np.uint16 and picture.pixels.shape[2] > 1


def _read_with_pillow(image: Image.Image) -> Picture:
    tile = getattr(image, "tile", None)
    raw_mode = str(tile[0][3]) if image.format == "PNG" and tile else ""
    image.load()
    icc, notes = image.info.get("icc_profile"), []
    if (samples := deep_grey(image)) is not None:
        if (value := image.info.get("transparency")) is not None:
            samples = np.dstack([samples, np.where(samples == value, 0, 65535).astype(np.uint16)])
        return _upright(samples, icc, image, notes)
    if "icc_profile" in image.info and not icc:
        notes.append("damaged colour profile dropped")
    if image.format == "TIFF" and (extra := _extra_channels(image)):
        notes.append(f"{extra} extra channel{'' if extra == 1 else 's'} of unknown meaning dropped")
    if image.mode in ("CMYK", "LAB"):
        notes.append(f"{image.mode} converted to sRGB")
        image, icc = _to_srgb(image, icc), None
    elif (bits := {"L;2": 2, "L;4": 4}.get(raw_mode)) and "transparency" in image.info:
        # Pillow scales the samples to 8 bits, but not the transparent value.
        most = 2**bits - 1
        image.info["transparency"] = (image.info["transparency"] & most) * (255 // most)
    return _upright(np.asarray(_without_palette(image)), icc, image, notes)


def _extra_channels(image: Image.Image) -> int:
    """Returns the number of a TIFF file's channels that Pillow drops."""
    return max(0, len(tiff_tags(image).get(_TIFF_EXTRA_SAMPLES, ())) - image.mode.endswith("A"))


def _without_palette(image: Image.Image) -> Image.Image:
    """Converts a loaded 8-bit image to L, LA, RGB or RGBA."""
    colour = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    mode = f"{colour}A" if image.has_transparency_data else colour
    return image if image.mode == mode else image.convert(mode)


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    if icc is None:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted or image.convert("RGB")  # None only for in-place conversion
    except (OSError, ImageCms.PyCMSError):  # a damaged profile
        return image.convert("RGB")


def _upright(pixels: np.ndarray, icc: bytes | None, image: Image.Image, notes: list[str]) -> Picture:
    """Builds the upright picture from a loaded image and its pixels."""
    return _turned(pixels, icc, image.info.get("exif"), orientation_of(image), notes)


def _turned(pixels: np.ndarray, icc: bytes | None, exif: bytes | None, orientation: int, notes: list[str]) -> Picture:
    pixels = UPRIGHT.get(orientation, lambda pixels: pixels)(pixels)
    kept = containers.upright(exif) if exif else None
    if exif and not kept:
        notes = [*notes, _DAMAGED_EXIF]
    return Picture(np.atleast_3d(pixels), icc or None, kept, tuple(notes))


def _import_vips() -> ModuleType:
    try:
        import pyvips
    except (ImportError, OSError) as error:  # OSError: pyvips without libvips
        raise ImageError(
            "colour of 16 bits needs the package pyvips with libvips, and it cannot be imported; install it:"
            " pip install 'kdjax[16bit]'"
        ) from error
    logging.getLogger("pyvips").setLevel(logging.ERROR)  # it repeats libvips' warnings; real failures raise
    return pyvips


def _decoded(vips: ModuleType, file: BinaryIO) -> Any:
    """Opens a file with libvips, without decoding it yet."""
    if isinstance(file, io.BytesIO):
        source = vips.Source.new_from_memory(file.getvalue())
    else:  # not by name, which may not be UTF-8, and where brackets mean options
        file.seek(0)
        source = vips.Source.new_from_descriptor(file.fileno())
    try:
        return vips.Image.new_from_source(source, "", access="sequential", fail_on="error")
    except vips.Error as error:
        raise ImageError(f"cannot be decoded: {_vips_says(error)}") from error


def _picture_of(vips: ModuleType, decoded: Any, icc: bytes | None, exif: bytes | None) -> Picture:
    """Builds the picture from a libvips image, which may carry further metadata."""
    try:
        about = {name: decoded.get(name) for name in decoded.get_fields()}
        notes = []
        if decoded.interpretation == "cmyk":
            decoded = decoded.colourspace("srgb" if decoded.format == "uchar" else "rgb16")
            notes.append("CMYK converted to sRGB")
        pixels = decoded.numpy()
    except vips.Error as error:
        raise ImageError(f"cannot be decoded: {_vips_says(error)}") from error
    pixels = np.atleast_3d(pixels)
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.shape[2] > 4:
        raise ImageError(f"holds {pixels.dtype} samples in {decoded.bands} channels; convert it to RGB of 8 or 16 bits")
    icc = None if notes else icc or about.get("icc-profile-data")
    return _turned(pixels, icc, exif or about.get("exif-data"), about.get("orientation", 1), notes)


def _read_deep(image: Image.Image) -> Picture:
    """Reads 16-bit colour from a file whose header Pillow has read."""
    if image.format == "PPM":
        raise ImageError("16-bit PPM cannot be read; convert it to PNG or TIFF")
    vips = _import_vips()
    file: Any = getattr(image, "fp", None)  # still open, because the image is not loaded
    exif = containers.png_exif(file) if image.format == "PNG" else image.info.get("exif")
    return _picture_of(vips, _decoded(vips, file), image.info.get("icc_profile"), exif)


def _write_deep(path: Path, pixels: np.ndarray, icc: bytes | None, exif: bytes | None) -> list[str]:
    """Writes 16-bit colour; returns notes on dropped metadata, beyond those of `check_target`."""
    vips = _import_vips()
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    image = vips.Image.new_from_memory(pixels.data, width, height, channels, "ushort")
    image = image.copy(interpretation="grey16" if channels == 2 else "rgb16")
    if icc:
        image.set_type(vips.GValue.blob_type, "icc-profile-data", icc)
    is_png = FORMATS[path.suffix.lower()] is _PNG
    try:
        with open(path, "w+b") as file:
            target = vips.Target.new_to_descriptor(file.fileno())
            (image.pngsave_target if is_png else image.tiffsave_target)(target, keep="icc")
        if is_png and exif:
            _append_exif(path, exif)
        with open(path, "rb") as file:
            written = _decoded(vips, file)
            is_kept = not icc or ("icc-profile-data" in written.get_fields() and written.get("icc-profile-data") == icc)
    except vips.Error as error:
        raise ImageError(f"cannot be written: {_vips_says(error)}") from error
    return [] if is_kept else ["damaged colour profile dropped"]


def _append_exif(path: Path, exif: bytes) -> None:
    """Appends EXIF to a PNG unchanged: libvips would write only what it understands of it."""
    content = b"eXIf" + exif.removeprefix(containers.EXIF)
    with open(path, "r+b") as file:
        file.seek(-len(_PNG_END), os.SEEK_END)
        file.write(struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content)) + _PNG_END)


def _vips_says(error: Exception) -> str:
    return printable(" ".join(str(error).split())[:300])
