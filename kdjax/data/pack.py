"""Packs a folder of images, so that training reads pixels instead of decoding files:

    python -m kdjax.data.pack FOLDER OUT [--shard-mb N]

Use OUT wherever FOLDER was given (`data.gt`, `data.lq`, `data.unpaired`, `val.gt`, ...); the batches are bit-identical.
For pairs, pack both folders. `kdjax.data.shards` describes the format.

The program can be killed at any time. Run again with the same arguments, it continues after the last complete shard,
provided that shard's files are unchanged (name, size and time), and produces the same bytes as an uninterrupted run.
Damaged images do not stop it: they are reported and stay in the index with the reason, training treats them like
damaged files, and the exit code is 1. After Ctrl-C the exit code is 130.
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
from kdjax.data.pairs import ImagePair, left_out_line, survey
from kdjax.data.sources import DataError, shortened
from kdjax.files import locked
from kdjax.names import brief
from kdjax.progress import Pace
from kdjax.signals import Stopped

FileState = tuple[str, int, int]  # of a file: name, size, modification time


@dataclass(frozen=True)
class Summary:
    """What a pack contains."""

    images: int  # not counting damaged ones
    damaged: dict[str, str]  # name: reason
    shards: int
    bytes: int  # of all shards
    kept: int  # shards kept from an earlier run


def pack(
    folder: str, out: str, *, shard_mb: int = 512, threads: int | None = None, tell: Callable[[str], None] = print
) -> Summary:
    """Packs a folder, or resumes an unfinished pack.

    Args:
      shard_mb: a shard ends with the image that brings it to this size, in megabytes of pixels.
      threads: decoding threads; by default one per core, at most eight.
      tell: called with a line of progress every few seconds.

    Raises:
      DataError: the folder cannot be used, none of its images can be read, or `out` is something else already.
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
        raise DataError(f"images to pack: {folder!r} is already a pack; give the folder it was made from")
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
                tell(f"{done} of {len(images)} images are already packed")
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
    """The finished shards of an unfinished pack: one line of JSON each, written once the shard has its final name."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._path = out / shards.JOURNAL
        self._file = self._path.open("ab+")

    def read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        found = []
        for line in self._file:
            with contextlib.suppress(ValueError):  # a partial line, from a killed process
                found.append(json.loads(line))
        return found

    def append(self, shard: dict[str, Any]) -> None:
        self._file.write(_line(shard))
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, written: Sequence[dict[str, Any]]) -> None:
        """Keeps these shards, the first ones of the journal, and deletes the lines and files of the others."""
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
    """Opens and locks the folder to pack into."""
    try:
        out = Path(os.path.expanduser(folder))
        with contextlib.suppress(OSError):
            os.lstat(out)
    except ValueError as error:  # a NUL, or another character not allowed in paths
        raise DataError(f"cannot pack into {brief(folder, 300)}: {error}") from None
    try:
        if out.exists() and not out.is_dir():
            raise DataError(f"cannot pack into {str(out)!r}: it is a file; give a folder that does not exist yet")
        out.mkdir(parents=True, exist_ok=True)
        if not shards.is_pack(str(out)) and any(not path.name.startswith(".") for path in out.iterdir()):
            raise DataError(f"cannot pack into {str(out)!r}: it holds other files; give an empty or new folder")
        stack = contextlib.ExitStack()
        stack.enter_context(locked(out))
        journal = stack.enter_context(contextlib.closing(_Journal(out)))
    except OSError as error:
        raise shards.PackError(f"cannot pack into {brief(str(out), 300)}: {error.strerror}") from None
    with stack:
        yield journal


def _usable_shards(journal: _Journal, images: Sequence[ImagePair], shard_mb: int) -> tuple[list[dict[str, Any]], bool]:
    """Returns an earlier run's shards up to the first that no longer matches, and whether they form a complete pack."""
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
        sources = _sources(shard_mb, [_file_state(image) for image in images[position:end]])
        path = out / shard["file"]
        same = shard.get("sources") == sources and path.exists() and path.stat().st_size == shard["bytes"]
        if not same or end > len(images):
            break
        fits.append(shard)
        position = end
    if finished and (len(fits) < len(written) or position < len(images)):
        journal.remove()
        raise DataError(
            f"{str(out)!r} is a finished pack, but of other images, of another --shard-mb or with damaged shards;"
            " remove it or choose another folder"
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
    """Writes shards from `number` on, for the images after the first `done`; yields each shard's index entry.

    Raises:
      PackError: a shard cannot be written.
    """
    pace = Pace(len(images), done)
    decoded = _decoded(images[done:], threads)
    while done < len(images):
        records: list[list[Any]] = []
        damaged: dict[str, str] = {}
        sources: list[FileState] = []
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


def _decoded(images: Sequence[ImagePair], threads: int) -> Iterator[tuple[ImagePair, FileState, np.ndarray | str]]:
    """Yields every image in order with its pixels or the reason for failure; decodes a few images ahead."""
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
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not wait for images not yet started


def _decode(image: ImagePair) -> tuple[ImagePair, FileState, np.ndarray | str]:
    facts = _file_state(image)  # before decoding, so that a file changed meanwhile looks changed
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


def _file_state(image: ImagePair) -> FileState:
    """Returns what identifies a version of a file: name, size and time."""
    try:
        state = os.stat(image.gt)
    except OSError:
        return image.name, -1, 0
    return image.name, state.st_size, state.st_mtime_ns


def _sources(shard_mb: int, facts: Sequence[FileState]) -> str:
    """Returns a hash of everything that determines a shard's bytes."""
    return hashlib.sha256(json.dumps([shards.PACK.version, shard_mb, *facts]).encode()).hexdigest()


def _line(shard: dict[str, Any]) -> bytes:
    return json.dumps(shard).encode() + b"\n"


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.data.pack", __doc__)
    parser.add_argument("folder", help="folder of images, sub-folders included")
    parser.add_argument("out", help="folder of the pack: new, empty, or left by the same command")
    parser.add_argument("--shard-mb", type=int, default=512, help="size of a shard in megabytes (default: 512)")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    started = time.monotonic()
    try:
        summary = pack(options.folder, options.out, shard_mb=options.shard_mb)
    except (ValueError, OSError) as error:  # errors in the user's input; a traceback would hide the message
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
        print(
            "the pack has them by name only, and training substitutes others; to include them, repair them and pack"
            " again"
        )
        sys.exit(1)


if __name__ == "__main__":
    commandline.run(main)
