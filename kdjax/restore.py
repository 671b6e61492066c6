"""Restores images and videos with a trained model:

    python -m kdjax.restore photo.jpg
    python -m kdjax.restore --model student.pth photographs --output restored
    python -m kdjax.restore --model realesr-animevideov3.pth "scans/*.tif" clip.mp4 --output enlarged --suffix _x4

Handles files of any size, in tiles (`kdjax.tiles`). Images keep their format, bit depth, alpha, colour profile and EXIF
(`kdjax.media.pictures`), videos their sound and frame rate (`kdjax.media.videos`). Files whose output exists are
skipped, so running the same command again resumes. `docs/restoring.md` explains the options.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import glob
import os
import stat
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import assets, commandline, cost, data, models, sharding
from kdjax.data.images import CONVERSIONS
from kdjax.data.sources import shortened
from kdjax.files import printable
from kdjax.media import pictures, videos
from kdjax.progress import Progress
from kdjax.signals import Stopped, StopSignals
from kdjax.tiles import Told, restore_image
from kdjax.weights import load_weights, weights_options

_FORMATS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "bmp", "ppm")
_SUFFIXES = (*data.IMAGE_SUFFIXES, *videos.VIDEO_SUFFIXES)  # what to look for in folders
_LISTED = 8  # maximum number of suffixes listed in a message

RestoreImage = Callable[..., np.ndarray]  # (image, progress=Told) -> the restored image, of the same type


@dataclasses.dataclass(frozen=True)
class Job:
    """One file to restore, and the target to write."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in videos.VIDEO_SUFFIXES


# ---- planning ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to restore, and what to leave out.

    Attributes:
      ignored: files in folders whose suffix is not that of an image or video.
      hidden: number of names in folders that start with a dot.
      repeated: files given more than once.
      results: files left out because this run, with this suffix, would write them.
      unread: unreadable folders, with the reason.
    """

    jobs: list[Job] = dataclasses.field(default_factory=list)
    ignored: list[Path] = dataclasses.field(default_factory=list)
    hidden: list[Path] = dataclasses.field(default_factory=list)
    repeated: list[Path] = dataclasses.field(default_factory=list)
    results: list[Path] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)


def plan(inputs: Sequence[str], output: Path, *, suffix: str = "", format: str | None = None) -> Plan:
    """Finds the files that `inputs` name, each with its target below `output`.

    Every name gets its own target, even if several names are links to the same file.

    Args:
      inputs: files, folders (searched recursively, following links), or patterns such as "scans/**/*.tif". Targets keep
        the sub-folder structure. Names that start with a dot, and `output` itself, are skipped in folders.
      suffix: inserted between a file's stem and its suffix.
      format: "png", "jpg", ... for images; by default they keep their format, or become png if it cannot be written.

    Raises:
      ValueError: if an input does not exist, a target is an input or another file's target, or there is nothing to do.
      OSError: if a given folder cannot be read.
    """
    found = Plan()
    jobs: dict[str, Job] = {}  # by the absolute name of the source
    by_target: dict[str, Job] = {}
    for source, name in _files(inputs, output, found):
        job = Job(source, output / _target_name(name, suffix, format))
        other = jobs.get(os.path.abspath(source)) or by_target.get(_place(job.target))
        if other is None:
            jobs[os.path.abspath(source)] = by_target[_place(job.target)] = job
        elif _is_same(other.source, source):
            found.repeated.append(source)
        else:
            raise ValueError(
                f"{other.source} and {job.source} would both become {job.target}; restore them in two runs into two"
                " folders" + (", or without --format" if format else "")
            )
    for job in jobs.values():
        if suffix and _place(job.source) in by_target and job.source.stem.endswith(suffix):
            found.results.append(job.source)
        else:
            found.jobs.append(job)
    sources = {path for job in found.jobs for path in (_place(job.source), os.path.realpath(job.source))}
    for job in found.jobs:
        if _place(job.target) in sources:
            raise ValueError(
                f"{job.source}: the output {job.target} would overwrite an input; give another --output, or a --suffix"
            )
    if not found.jobs:
        what = "\n".join([f"no images or videos in {', '.join(inputs)}", *left_out(found), *found.unread])
        raise ValueError(f"{what}\nlooked for {', '.join(_SUFFIXES)}")
    return found


def _place(path: Path) -> str:
    """Resolves the folders of a name, but not a link at its end: writing replaces the link itself."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # dangling links
        return _place(one) == _place(other)


def _files(inputs: Sequence[str], output: Path, found: Plan) -> Iterator[tuple[Path, Path]]:
    """Yields every file with its name relative to the input; records in `found` what is left out."""
    for text in inputs:
        if "\0" in text:
            raise ValueError(f"{printable(text)!r} is not a file name: it has a NUL character")
        paths = [text] if os.path.lexists(text) else sorted(glob.glob(text, recursive=True))
        if not paths:
            raise ValueError(f"{text}: no file or folder has this name or matches it as a pattern")
        for path in map(Path, paths):
            if path.is_dir():
                os.listdir(path)  # an input must be readable; folders below it may be skipped
                yield from ((path / name, name) for name in _names_in(path, output, found))
            else:
                yield path, Path(path.name)


def _names_in(folder: Path, output: Path, found: Plan) -> Iterator[Path]:
    """Yields the images and videos below a folder, relative to it."""

    left = [(Path(), frozenset())]
    while left:
        here, above = left.pop()
        try:
            entries = sorted(os.scandir(folder / here), key=lambda entry: entry.name)
            above |= {_identity(folder / here)}
        except OSError as error:
            found.unread.append(f"{folder / here}: this folder cannot be read: {error.strerror}")
            continue
        folders = []
        for entry in entries:
            name = here / entry.name
            if entry.name.startswith("."):
                found.hidden.append(folder / name)
            elif _is_folder(entry):
                # Skip links back to a parent folder, and this program's own output.
                if _identity(entry.path) not in above and os.path.realpath(entry.path) != os.path.realpath(output):
                    folders.append((name, above))
            elif entry.name.lower().endswith(_SUFFIXES):
                yield name
            else:
                found.ignored.append(folder / name)
        left += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str | Path) -> tuple[int, int]:
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def left_out(found: Plan) -> list[str]:
    """Lists for the user what is left out."""
    lines = []
    if found.ignored:
        lines.append(f"skipped, since their suffixes are not those of images or videos: {_count(found.ignored)}")
        groups = defaultdict(list)
        for path in found.ignored:
            groups[path.suffix.lower()].append(path)
        largest = sorted(groups, key=lambda suffix: (-len(groups[suffix]), suffix))
        for suffix in largest[:_LISTED]:
            hint = f"; {CONVERSIONS[suffix]}" if suffix in CONVERSIONS else ""
            lines.append(f"  {len(groups[suffix])} {suffix or 'without a suffix'}: {_some(groups[suffix])}{hint}")
        if others := [path for suffix in largest[_LISTED:] for path in groups[suffix]]:
            lines.append(f"  {len(others)} others: {_some(others)}")
    for what, paths in (
        ("skipped, since their names begin with a dot", found.hidden),
        ("given more than once, restored once", found.repeated),
        ("skipped as results of an earlier run, since this one would write them", found.results),
    ):
        if paths:
            lines.append(f"{what}: {_count(paths)}: {_some(paths)}")
    return lines


def _count(things: Sequence[object], what: str = "file") -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def _target_name(name: Path, suffix: str, format: str | None) -> Path:
    kind = name.suffix
    if kind.lower() in videos.VIDEO_SUFFIXES:
        kind = videos.target_suffix(kind)
    elif format and pictures.FORMATS.get(kind.lower()) is not pictures.FORMATS[f".{format}"]:
        kind = f".{format}"
    elif kind.lower() not in pictures.FORMATS:
        kind = ".png"
    return name.with_name(f"{name.stem}{suffix}{kind}")


# ---- restoring ---------------------------------------------------------------------------------------------------


def run(
    jobs: Sequence[Job],
    restore: RestoreImage,
    scale: int,
    quality: int | None,
    stop: StopSignals,
    *,
    max_pixels: float | None = None,
) -> list[str]:
    """Restores the files one by one and reports on each. A file that fails does not stop the others.

    Args:
      restore: a function of an image, as `kdjax.tiles.restore_image` takes it, and of `progress`.
      scale: its scale factor.
      quality: of JPEG and WebP (`kdjax.media.pictures.write_picture`).
      stop: stops after the current tile.
      max_pixels: larger images and frames fail (`kdjax.media.pictures.too_large`).

    Returns:
      The reason for every file that could not be restored.

    Raises:
      Stopped: if a signal arrived.
      OSError: if the disk is full.
    """
    sizes = [_bytes_of(job.source) for job in jobs]  # file size is a proxy for the work
    progress, failures = Progress(len(jobs), sum(sizes), "files"), []
    for number, (job, size) in enumerate(zip(jobs, sizes, strict=True)):

        def told(done: int, total: int, job: Job = job, size: int = size) -> None:
            if stop.requested:
                raise Stopped(stop.name)
            progress.show(size * done / total, f"{done / total:.0%} of {job.source.name}")

        started = time.monotonic()
        try:
            with cost.telling_out_of_memory():
                _make_room(job.target)
                if job.is_video:
                    what, notes = restore_video(job, restore, scale, told, max_pixels)
                else:
                    what, notes = restore_picture(job, restore, scale, quality, told, max_pixels)
        except Stopped:
            raise
        except Exception as error:  # there are more ways for a file to be broken than exception types
            failures.append(_failure(job, error))
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
            if _is_disk_full(job, error):
                raise OSError(
                    f"the disk is full; {len(jobs) - number} of {len(jobs)} files are left; run the same command to"
                    " continue"
                ) from None
        else:
            lines = [f"{job.source} -> {job.target}: {what}, {time.monotonic() - started:.1f} s"]
            print("\n  note: ".join([*lines, *dict.fromkeys(notes)]), flush=True)
        progress.advance(size)
    return failures


def _bytes_of(path: Path) -> int:
    try:
        return max(1, path.stat().st_size)
    except OSError:  # it will fail and report why
        return 1


def _make_room(target: Path) -> None:
    """Creates the target's folder; raises an `OSError` early if no file of this name can be written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(target.lstat().st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(target))


def restore_picture(
    job: Job, restore: RestoreImage, scale: int, quality: int | None, told: Told, max_pixels: float | None = None
) -> tuple[str, Sequence[str]]:
    """Restores an image; returns what was done, and notes, for the user."""
    picture = pictures.read_picture(job.source, scale=scale, max_pixels=max_pixels)
    notes = picture.notes
    pictures.check_target(job.target, picture, scale)  # before any work
    before = _size(*picture.pixels.shape)
    picture = dataclasses.replace(picture, pixels=restore(picture.pixels, progress=told))
    notes += pictures.write_picture(job.target, picture, quality=quality)
    return f"{before} to {_size(*picture.pixels.shape)}", notes


def restore_video(
    job: Job, restore: RestoreImage, scale: int, told: Told, max_pixels: float | None = None
) -> tuple[str, Sequence[str]]:
    """Like `restore_picture`, for a video."""
    video = videos.probe(job.source)
    samples = 6 if video.deep else 3
    encoding = video.width * video.height * videos.BYTES_TO_CODE * scale**2
    if reason := pictures.too_large(video.width, video.height, samples, encoding, scale=scale, max_pixels=max_pixels):
        raise videos.VideoError(f"{job.source}: {reason}")

    def restored() -> Iterator[np.ndarray]:
        for number, frame in enumerate(videos.frames(video)):
            length = max(video.length, number + 1)
            yield restore(frame, progress=lambda done, total, n=number, all=length: told(n * total + done, all * total))

    number, *size = videos.write_video(job.target, video, restored())
    missing = (
        [f"about {video.length} frames were expected; is the file truncated?"] if number < 0.9 * video.length else []
    )
    return f"{number} frames of {_size(*size)}", missing


def _size(height: int, width: int, *_: int) -> str:
    return f"{width}x{height}"


def _failure(job: Job, error: Exception) -> str:
    if isinstance(error, cost.OutOfMemory):
        return f"{job.source}: out of memory ({error}); try a smaller --tile"
    if isinstance(error, data.ImageError | videos.VideoError):
        return str(error) if str(error).startswith(f"{job.source}: ") else f"{job.source} -> {error}"
    if isinstance(error, OSError) and error.strerror:
        return f"{job.source} -> {job.target}: {error.strerror}"
    return f"{job.source}: {type(error).__name__}: {error}"


def _is_disk_full(job: Job, error: Exception) -> bool:
    """Returns whether a write failed because the disk is full, judging by the OS error or by a program's message."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        chain = chain.__cause__
    said = str(error).replace(str(job.source), "").replace(str(job.target), "")
    return os.strerror(errno.ENOSPC) in said


# ---- the command line --------------------------------------------------------------------------------------------


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.restore", __doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, or patterns in quotes")
    add("--model", default=assets.BEST, metavar="FILE", help=f"{assets.MODEL_HELP}; default: {assets.BEST}")
    add(
        "--output", default=Path("restored"), type=Path, metavar="DIR", help="folder for the results; default: restored"
    )
    add("--suffix", default="", help="added to file names, such as _x4")
    add("--format", choices=_FORMATS, help="format of images; by default they keep theirs")
    add("--quality", type=int, metavar="N", help="quality of JPEG and WebP, 1 to 100; default: JPEG 95, lossless WebP")
    add("--overwrite", action="store_true", help="also restore files whose output exists")
    add("--tile", type=int, default=256, help="side of the tiles; 0 takes images whole; default: 256")
    add("--tile-pad", type=int, default=16, help="pixels of context around a tile; default: 16")
    add(
        "--max-megapixels",
        type=float,
        metavar="N",
        help="refuse larger images; default: those that would take more than half of the free memory",
    )
    add(
        "--sigma",
        type=float,
        help="noise level from 0 to 255, for a model that is told it; by default it is estimated for each image",
    )
    add(
        "--strength",
        type=float,
        default=1.0,
        help="how much of the noise to remove, from 0 to 1, by blending; default: 1",
    )
    add("--x8", action="store_true", help="average over the eight flips and rotations, at eight times the cost")
    add("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_weights_options()
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the options; exits with a message and code 2 if one is out of range."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("tile", "tile_pad"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be 0 or more")
    if options.max_megapixels is not None and not options.max_megapixels > 0:
        parser.error(f"--max-megapixels {options.max_megapixels:g} must be more than 0")
    if options.sigma is not None and not 0 <= options.sigma <= 255:
        parser.error(f"--sigma {options.sigma:g} must be from 0 to 255")
    if not 0 <= options.strength <= 1:
        parser.error(f"--strength {options.strength:g} must be from 0 to 1")
    if options.quality is not None and not 1 <= options.quality <= 100:
        parser.error(f"--quality {options.quality} must be from 1 to 100")
    if os.path.basename(options.suffix) != options.suffix:
        parser.error(f"--suffix {options.suffix!r} must not contain slashes")
    if options.output.suffix.lower() in (*pictures.FORMATS, *videos.VIDEO_SUFFIXES) and not options.output.is_dir():
        parser.error(f"--output {options.output} looks like a file; it must be a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sharding.use_all_cores()
    with StopSignals() as stop:
        try:
            failures = restore_all(options, stop)
        except (ValueError, OSError) as error:  # caused by the user's input; a traceback would hide the message
            commandline.fail(str(error))
    if failures:
        commandline.fail("\n".join([f"{_count(failures)} could not be restored:", *shortened(failures)]))


def restore_all(options: argparse.Namespace, stop: StopSignals) -> list[str]:
    """Does everything the command line asks for; returns and raises as `run`, plus ValueError for invalid requests."""
    found = plan(options.inputs, options.output, suffix=options.suffix, format=options.format)
    loaded = load_weights(options.model, **weights_options(options))
    model, scale, channels = loaded.model, loaded.model.network.scale, loaded.model.network.channels
    if channels not in (1, 3):
        raise ValueError(f"{loaded.path} takes images of {channels} channels; images have 1 or 3")
    if options.sigma is not None and not model.network.takes_sigma:
        raise ValueError(
            f"--sigma {options.sigma:g}: {loaded.path} is not told the noise level; use --strength to remove less of it"
        )
    if options.strength != 1 and scale > 1:
        raise ValueError(
            f"--strength {options.strength:g}: {loaded.path} enlarges images, so there is nothing to blend"
        )
    print(f"{loaded.path}: {model.arch}, {models.count_params(model.params):,} parameters, scale {scale},")
    print(f"  weights under {loaded.key!r}, sha256 {loaded.sha256}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        raise OSError(f"--output {options.output}: this folder is not writable: {error.strerror}") from None
    jobs = found.jobs
    left = [job for job in jobs if options.overwrite or not os.path.isfile(job.target)]
    done = f", {len(jobs) - len(left)} of them are already done" if len(left) < len(jobs) else ""
    print(f"{_count(jobs)}{done}", flush=True)
    on_devices = dataclasses.replace(model, params=jax.device_put(model.params))
    dtype = jnp.bfloat16 if options.bf16 else jnp.float32
    restore = functools.partial(
        restore_image,
        on_devices,
        tile=options.tile,
        tile_pad=options.tile_pad,
        x8=options.x8,
        dtype=dtype,
        sigma=options.sigma,
        strength=options.strength,
    )
    max_pixels = None if options.max_megapixels is None else options.max_megapixels * 1e6
    failures = run(left, restore, scale, options.quality, stop, max_pixels=max_pixels)
    counts = {"restored": len(left) - len(failures), "done before": len(jobs) - len(left), "failed": len(failures)}
    print(", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "restored"))
    print("\n".join(left_out(found)), end="\n" if left_out(found) else "", flush=True)
    return [*failures, *found.unread]


if __name__ == "__main__":
    commandline.run(main)
