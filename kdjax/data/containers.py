"""Image containers and EXIF, parsed where decoders cannot be trusted with a hostile file.

EXIF is a TIFF directory: a list of tags, each with the offset and length of its value. A thousand tags can point at the
same megabyte, and Pillow copies the value of each, in some formats as soon as it opens a file. So the claims of a
directory are added up first. EXIF is also hidden from Pillow, because decoding does not need it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

EXIF = b"Exif\0\0"
_HIDDEN = b"hidden"  # replaces the EXIF marker

_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}  # by type
_MOST_TAGS = 1 << 16  # there are no more tag numbers
_SLACK = 1 << 16  # bytes by which values may overlap: small ones often do
_ORIENTATION, _SUBFILE, _SUBDIRECTORIES, _DNG_VERSION = 0x0112, 0x00FE, 0x014A, 0xC612
_DIRECTORIES = (0x8769, 0x8825, 0xA005)  # tags that point to another directory: EXIF, GPS, interoperability

_DIRECTORY_STARTS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0")  # Pillow also accepts the mixed-up byte orders
_JPEG_EXIF = re.compile(rb"(\xff\xe1..)" + EXIF, re.DOTALL)
_AVIF_EXIF = re.compile(rb"(infe.{8}(?:..)?)Exif", re.DOTALL)  # infe box: version, ID, protection, type of an item

_MOST_STARTS = 100  # in a file; by chance there is less than one per gigabyte

Read = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end of the file


class _Directory:
    """The first directory of a TIFF file or EXIF block.

    Raises:
      struct.error: it is damaged.
    """

    def __init__(self, read: Read) -> None:
        start = read(0, 16)
        self._read, self.order = read, {b"II": "<", b"MM": ">"}.get(start[:2], "")
        if not self.order:
            raise struct.error("no byte order")
        self.is_big = 43 in start[2:4]
        self.place = self.unpack("Q", start, 8) if self.is_big else self.unpack("I", start, 4)

    def unpack(self, kind: str, data: bytes, place: int = 0) -> int:
        return struct.unpack_from(f"{self.order}{kind}", data, place)[0]

    def entries(self, directory: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields tag, type, number of values and offset of each entry, up to the end of the file."""
        count, entry = (8, 20) if self.is_big else (2, 12)
        number = self.unpack("Q" if self.is_big else "H", self._read(directory, count))
        if number > _MOST_TAGS:
            raise OverflowError
        for place in range(directory + count, directory + count + number * entry, entry):
            data = self._read(place, entry)
            if len(data) < entry:
                raise struct.error("cut short")
            tag, kind, values = struct.unpack_from(f"{self.order}HH{'Q' if self.is_big else 'I'}", data)
            yield tag, kind, values, place

    def value(self, place: int) -> int:
        """Returns the entry's value, or the offset of its values."""
        return (
            self.unpack("Q", self._read(place + 12, 8)) if self.is_big else self.unpack("I", self._read(place + 8, 4))
        )


def _claims_too_much(read: Read, length: int, inner: Collection[int] = ()) -> bool:
    """Whether the values in a TIFF file or EXIF block of `length` bytes add up to more than that.

    Args:
      inner: tags that point to another directory, whose values count too.
    """
    total, seen = 0, set()
    try:
        tiff = _Directory(read)
        left = [tiff.place]
        while left:
            if (place := left.pop()) in seen:
                continue
            seen.add(place)
            for tag, kind, values, entry in tiff.entries(place):
                total += _SIZES.get(kind, 0) * values
                if tag in inner:
                    left.append(tiff.value(entry))
    except struct.error:
        pass  # a decoder gets no further either
    except OverflowError:
        return True
    return total > length + _SLACK


def exif_claims_too_much(data: bytes, start: int = 0) -> bool:
    """Whether the tags of an EXIF block, from `start` to the end of `data`, claim more bytes than it has."""
    read = lambda place, number: data[start + place : start + place + number]  # noqa: E731
    return _claims_too_much(read, len(data) - start, _DIRECTORIES)


def tiff_claims_too_much(file: BinaryIO) -> bool:
    """The same for a TIFF file, without its EXIF, which Pillow is not asked for. The file position is restored."""
    before, length = file.tell(), file.seek(0, 2)

    def read(place: int, number: int) -> bytes:
        if place > length:  # which seek() does not always accept
            return b""
        file.seek(place)
        return file.read(number)

    too_much = _claims_too_much(read, length)
    file.seek(before)
    return too_much


def orientation(exif: bytes) -> int:
    """Returns the orientation in an EXIF block; 1 if there is none or the block is damaged."""
    block, found = exif.removeprefix(EXIF), 1
    with contextlib.suppress(struct.error):
        for kind, place, order in _orientations(block):
            found = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", block, place + 8)[0]
    return found


def upright(exif: bytes) -> bytes | None:
    """Returns the EXIF block with the orientation reset to upright and nothing else changed; None if it is damaged."""
    block = bytearray(exif.removeprefix(EXIF))
    try:
        for _, place, order in _orientations(bytes(block)):
            struct.pack_into(f"{order}HIHH", block, place + 2, 3, 1, 1, 0)  # one short, 1
    except (struct.error, OverflowError):
        return None
    return EXIF + bytes(block)


def _orientations(block: bytes) -> Iterator[tuple[int, int, str]]:
    """Yields type, offset and byte order of the orientation entries."""
    tiff = _Directory(lambda place, length: block[place : place + length])
    for tag, kind, _, place in tiff.entries(tiff.place):
        if tag == _ORIENTATION:
            yield kind, place, tiff.order


def is_camera_raw(image_tags: Mapping[int, Any]) -> bool:
    """Whether a TIFF image's tags are those of a camera raw file, whose first picture is a small preview."""
    return _DNG_VERSION in image_tags or (_SUBDIRECTORIES in image_tags and bool(image_tags.get(_SUBFILE, 0) & 1))


def hide_exif(data: bytes) -> bytes:
    """Returns a JPEG file with its EXIF segments renamed, so that only `hidden_exif` recognises them."""
    return _JPEG_EXIF.sub(rb"\1" + _HIDDEN, data)


def hidden_exif(segments: list[tuple[str, bytes]]) -> bytes | None:
    """Returns the EXIF block from the segments (name, content) of a file made by `hide_exif`."""
    parts = [content[len(EXIF) :] for name, content in segments if name == "APP1" and content.startswith(_HIDDEN)]
    return EXIF + b"".join(parts) if parts else None


def without_exif(data: bytes) -> bytes:
    """Returns an AVIF file with its EXIF item renamed."""
    return _AVIF_EXIF.sub(rb"\1none", data)


def png_exif(file: BinaryIO) -> bytes | None:
    """Returns a PNG file's EXIF, which may follow the pixels."""
    place = 8
    while True:
        file.seek(place)
        header = file.read(8)
        if len(header) < 8 or header[4:] == b"IEND":
            return None
        length = int.from_bytes(header[:4], "big")
        if header[4:] == b"eXIf":
            return file.read(length)
        place += 12 + length


def is_deep_avif(data: bytes) -> bool:
    """Whether an AVIF file has more than 8 bits per sample, according to its av1C box."""
    place = data.find(b"av1C")  # then: version; profile and level; tier, more than 8 bits, ...
    return place >= 0 and bool(data[place + 6 : place + 7] and data[place + 6] & 0x40)


def holds_claims(data: bytes) -> bool:
    """Whether anything in a file, read as EXIF, claims more bytes than the file has."""
    found = (match.start() for start in _DIRECTORY_STARTS for match in re.finditer(re.escape(start), data))
    starts = list(itertools.islice(found, _MOST_STARTS + 1))
    return len(starts) > _MOST_STARTS or any(exif_claims_too_much(data, start) for start in starts)


def first_frame(data: bytes) -> tuple[bytes, bool]:
    """Returns a GIF up to the end of its first frame, without comments, and whether it has more frames.

    Pillow concatenates the pieces of a comment one by one, in quadratic time.
    """

    def after_blocks(place: int) -> int:  # each is preceded by its length; the last has length 0
        while place < len(data) and data[place]:
            place += 1 + data[place]
        return place + 1

    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    place = 13 + colours(data[10]) if len(data) > 10 else len(data)
    kept, complete = [data[:place]], False
    while place < len(data):
        start, kind = place, data[place : place + 1]
        if kind == b"!":  # an extension: its label, its blocks
            place = after_blocks(place + 2)
            if data[start + 1 : start + 2] == b"\xf9":  # delay, transparent colour
                kept.append(data[start:place])
        elif kind == b",":
            if complete:
                return b"".join([*kept, b";"]), True
            flags = data[place + 9] if place + 9 < len(data) else 0
            place = after_blocks(place + 10 + colours(flags) + 1)
            kept.append(data[start:place])
            complete = True
        elif kind == b";":
            kept.append(kind)
            break
        else:
            place += 1
    return b"".join(kept), False
