"""Packs a folder of images, so that training reads pixels instead of decoding files:

    python -m kdjax.data.pack FOLDER OUT [--shard-mb N]

OUT is then given wherever FOLDER was (`data.gt`, `data.lq`, `data.unpaired`, `val.gt`, ...), and gives the same batches
bit for bit; pairs are two folders and become two packs. What a pack is: `kdjax.data.shards`.

The program can be killed at any moment. Started again with the same arguments it continues after the last complete
shard, as long as the files of that shard are what they were (name, size and time), and ends with the same bytes as an
unbroken run. Damaged images do not stop it: they are reported, stay in the index with their reason, which training
treats as it treats a damaged file, and the exit code is 1. Stopped by Ctrl-C it is 130.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdjax import commandline
from kdjax.data import shards
from kdjax.data.images import ImageError, inspect_image
from kdjax.data.sources import DataError, ImagePair, left_out_line, shortened, survey
from kdjax.files import locked
from kdjax.names import brief
from kdjax.progress import Pace
from kdjax.signals import Stopped

Facts = tuple[str, int, int]  # of a file: name, bytes, time of the last change


@dataclass(frozen=True)
class Summary:
    """What a pack holds."""

    images: int  # without the damaged ones
    damaged: dict[str, str]  # name: reason
    shards: int
    bytes: int  # of all shards
    kept: int  # shards that an earlier run had written


def pack(
    folder: str, out: str, *, shard_mb: int = 512, threads: int | None = None, tell: Callable[[str], None] = print
) -> Summary:
    """Makes a pack of a folder, or continues with it.

    Args:
      shard_mb: a shard ends with the image with which it reaches this size, in megabytes of pixels.
      threads: that decode; by default one for each core, at most eight.
      tell: called with a line of progress every few seconds.

    Raises:
      DataError: the folder cannot be used, no image in it can be read, or `out` is something else already.
      FolderInUse: another process is packing into `out`.
      PackError: ArrayRecord is not installed, or `out` cannot be written.
    """
    if shard_mb < 1:
        raise DataError(f"shard_mb is {shard_mb}; it must be 1 or more")
    found = survey(gt=folder, what="packing")
    folder = os.path.expanduser(folder)
    if os.path.isfile(folder):
        raise DataError(f"images to pack: {folder!r} is a file; give a folder")
    if shards.is_pack(folder):
        raise DataError(f"images to pack: {folder!r} is a pack already; give the folder it was made from")
    images = found.pairs
    if found.left_out:
        tell(left_out_line(found.left_out))
    threads = threads or min(8, os.cpu_count() or 1)
    with _journal(out) as journal:
        written, finished = _usable_shards(journal, images, shard_mb)
        done = sum(_count(shard) for shard in written)
        kept = len(written)
        if not finished:
            journal.keep(written)
            if kept:
                tell(f"{done} of {len(images)} images are there already")
            for shard in _new_shards(journal.out, images, done, kept, shard_mb, threads, tell):
                journal.append(shard)
                written.append(shard)
            if not any(shard["images"] for shard in written):
                reasons = shortened([f"{name}: {why}" for name, why in written[0]["damaged"].items()])
                raise DataError("\n".join([f"none of the {len(images)} images in {folder!r} can be read:", *reasons]))
            _write_index(journal.out, written)
        journal.remove()
    damaged = {name: reason for shard in written for name, reason in shard["damaged"].items()}
    size = sum(shard["bytes"] for shard in written)
    return Summary(len(images) - len(damaged), damaged, len(written), size, kept)


class _Journal:
    """The shards of an unfinished pack: one line of JSON each, written after the shard has its name."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._path = out / shards.JOURNAL
        self._file = self._path.open("ab+")

    def read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        found = []
        for line in self._file:
            with contextlib.suppress(ValueError):  # half a line, from a process that was killed
                found.append(json.loads(line))
        return found

    def append(self, shard: dict[str, Any]) -> None:
        self._file.write(_line(shard))
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, written: Sequence[dict[str, Any]]) -> None:
        """Keeps these shards, the first ones of the journal, and removes the lines and the files of others."""
        self._file.truncate(sum(len(_line(shard)) for shard in written))
        names = {shard["file"] for shard in written}
        for path in self.out.glob(f"*{shards.SUFFIX}"):
            if path.name not in names:
                path.unlink()

    def remove(self) -> None:
        self._path.unlink()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def _journal(folder: str) -> Iterator[_Journal]:
    """Opens a folder to pack into, which no other process may do meanwhile."""
    try:
        out = Path(os.path.expanduser(folder))
        with contextlib.suppress(OSError):
            os.lstat(out)
    except ValueError as error:  # a NUL, or a character that no path can have
        raise DataError(f"cannot pack into {brief(folder, 300)}: {error}") from None
    try:
        if out.exists() and not out.is_dir():
            raise DataError(f"cannot pack into {str(out)!r}: it is a file; give a folder that does not exist yet")
        out.mkdir(parents=True, exist_ok=True)
        if not shards.is_pack(str(out)) and any(not path.name.startswith(".") for path in out.iterdir()):
            raise DataError(f"cannot pack into {str(out)!r}: it holds other files; give a folder that is empty or new")
        stack = contextlib.ExitStack()
        stack.enter_context(locked(out))
        journal = stack.enter_context(contextlib.closing(_Journal(out)))
    except OSError as error:
        raise shards.PackError(f"cannot pack into {brief(str(out), 300)}: {error.strerror}") from None
    with stack:
        yield journal


def _usable_shards(journal: _Journal, images: Sequence[ImagePair], shard_mb: int) -> tuple[list[dict[str, Any]], bool]:
    """The shards of an earlier run up to the first that does not fit the folder, and whether they are a whole pack."""
    out = journal.out
    finished = (out / shards.INDEX).exists()
    written = shards.PACK.read_index(str(out))["shards"] if finished else journal.read()
    fits: list[dict[str, Any]] = []
    position = 0
    for number, shard in enumerate(written):
        try:
            shards.parse_shard(shard, number)
        except shards.MALFORMED:
            break
        end = position + _count(shard)
        sources = _sources(shard_mb, [_facts(image) for image in images[position:end]])
        path = out / shard["file"]
        same = shard.get("sources") == sources and path.exists() and path.stat().st_size == shard["bytes"]
        if not same or end > len(images):
            break
        fits.append(shard)
        position = end
    if finished and (len(fits) < len(written) or position < len(images)):
        journal.remove()
        raise DataError(
            f"{str(out)!r} is a finished pack, of other images, of another --shard-mb or with damaged shards; remove it"
            " or give another folder"
        )
    return fits, finished


def _new_shards(
    out: Path,
    images: Sequence[ImagePair],
    done: int,
    number: int,
    shard_mb: int,
    threads: int,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Writes the shards from `number` on, with the images after the first `done`; yields what the index says of each.

    Raises:
      PackError: a shard cannot be written.
    """
    pace = Pace(len(images), done)
    decoded = _decoded(images[done:], threads)
    while done < len(images):
        records: list[list[Any]] = []
        damaged: dict[str, str] = {}
        sources: list[Facts] = []
        size = 0
        path = out / shards.file_name(number)
        with shards.new_shard(path) as write:
            while done < len(images) and size < shard_mb * 2**20:
                image, facts, pixels = next(decoded)
                done += 1
                sources.append(facts)
                if isinstance(pixels, str):
                    damaged[image.name] = pixels
                else:
                    write(pixels.tobytes())
                    records.append([image.name, len(records), *pixels.shape])
                    size += pixels.nbytes
                pace.advance()
                if pace.is_due(5):
                    tell(f"{done} of {len(images)} images, {pace.rate:.0f} images/s, shard {path.name}")
        yield {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sources": _sources(shard_mb, sources),
            "images": records,
            "damaged": damaged,
        }
        number += 1


def _decoded(images: Sequence[ImagePair], threads: int) -> Iterator[tuple[ImagePair, Facts, np.ndarray | str]]:
    """Every image in order with its pixels, or with the reason why it has none; a few are decoded ahead of time."""
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque = deque()
        for image in images:
            waiting.append(pool.submit(_decode, image))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, what has not begun is not waited for


def _decode(image: ImagePair) -> tuple[ImagePair, Facts, np.ndarray | str]:
    facts = _facts(image)  # first: a file that changes meanwhile has to look changed
    try:
        return image, facts, inspect_image(image.gt)[0]
    except ImageError as error:
        return image, facts, str(error).removeprefix(f"{image.gt}: ")


def _write_index(out: Path, written: Sequence[dict[str, Any]]) -> None:
    index = {
        "total": sum(len(shard["images"]) for shard in written),
        "damaged": sum(len(shard["damaged"]) for shard in written),
        "columns": ["name", "record", "height", "width", "channels"],  # of `images`
        "shards": list(written),
    }
    shards.PACK.write_index(out, index)


def _count(shard: dict[str, Any]) -> int:
    return len(shard["images"]) + len(shard["damaged"])


def _facts(image: ImagePair) -> Facts:
    """What tells whether a file has changed: name, size and time."""
    try:
        state = os.stat(image.gt)
    except OSError:
        return image.name, -1, 0
    return image.name, state.st_size, state.st_mtime_ns


def _sources(shard_mb: int, facts: Sequence[Facts]) -> str:
    """A hash of all that the bytes of a shard depend on."""
    return hashlib.sha256(json.dumps([shards.PACK.version, shard_mb, *facts]).encode()).hexdigest()


def _line(shard: dict[str, Any]) -> bytes:
    return json.dumps(shard).encode() + b"\n"


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.data.pack", __doc__)
    parser.add_argument("folder", help="folder of images, sub-folders included")
    parser.add_argument("out", help="folder of the pack: new, empty, or of the same command before")
    parser.add_argument("--shard-mb", type=int, default=512, help="size of a shard in megabytes (default: 512)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    started = time.monotonic()
    try:
        summary = pack(options.folder, options.out, shard_mb=options.shard_mb)
    except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
        commandline.fail(str(error))
    except KeyboardInterrupt:
        raise Stopped("SIGINT") from None
    total = summary.images + len(summary.damaged)
    print(
        f"{options.out}: {summary.images} of {total} images, shards: {summary.shards}, {summary.bytes / 2**20:,.0f} MB"
        f" ({summary.kept} were there), {time.monotonic() - started:.0f} s"
    )
    if summary.damaged:
        print(f"damaged: {len(summary.damaged)}")
        print("\n".join(shortened([f"{name}: {reason}" for name, reason in summary.damaged.items()])))
        print("they stay in the pack by name only, and training replaces them; repair them and pack again to have them")
        sys.exit(1)


if __name__ == "__main__":
    commandline.run(main)
