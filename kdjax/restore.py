"""Restores pictures and videos with a trained model:

    python -m kdjax.restore --model student.pth photographs --output restored
    python -m kdjax.restore --model realesr-animevideov3.pth "scans/*.tif" clip.mp4 --output enlarged --suffix _x4

Files of any size, in tiles (`kdjax.tiles`). Pictures keep their format, depth, alpha, colour profile and EXIF
(`kdjax.data.pictures`), videos their sound and frame rate (`kdjax.data.videos`). A file whose output exists is done:
the same command again continues. `docs/restoring.md` explains the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import functools
import glob
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import assets, cost, data, models, sharding
from kdjax.data import pictures, videos
from kdjax.data.sources import shortened
from kdjax.progress import Progress
from kdjax.signals import StopSignals
from kdjax.tiles import restore_image
from kdjax.weights import load_weights, parse_hparams

_FORMATS = ("png", "jpg", "webp", "tif", "bmp", "ppm")
_PICTURE_SUFFIXES = (*data.IMAGE_SUFFIXES, ".gif")  # that a folder is searched for

Told = Callable[[int, int], None]  # how many parts are done, of how many
Restore = Callable[..., np.ndarray]  # (image, progress=Told) -> the restored image, of the same type


@dataclasses.dataclass(frozen=True)
class Job:
    """One file to restore, and where the result goes."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        return self.source.suffix.lower() in videos.VIDEO_SUFFIXES


class Stopped(Exception):
    """SIGINT or SIGTERM came."""


# ---- what is to be done ------------------------------------------------------------------------------------------


def plan(inputs: Sequence[str], output: Path, *, suffix: str = "", format: str | None = None) -> list[Job]:
    """The files that `inputs` name, each with its target below `output`.

    Args:
      inputs: files, folders with all that is below them, or patterns such as "scans/**/*.tif". The target of a file of
        a folder is in the same sub-folder. Names with a dot in front, and `output` itself, are left out of folders.
      suffix: is put between the name of a file and its suffix.
      format: "png", "jpg", ... for pictures; by default they keep theirs, or become png where that is not written.

    Raises:
      ValueError: an input does not exist, or a target is an input or the target of another one.
      OSError: a folder cannot be read.
    """
    jobs: dict[Path, Job] = {}  # by the real path of the source, which may be given twice
    for source, name in _files(inputs, output):
        jobs.setdefault(source.resolve(), Job(source, output / _target_name(name, suffix, format)))
    if suffix:  # results of an earlier run that lie beside the inputs
        targets = {job.target.resolve() for job in jobs.values()}
        jobs = {path: job for path, job in jobs.items() if path not in targets or not job.source.stem.endswith(suffix)}
    by_target: dict[Path, Job] = {}
    for job in jobs.values():
        if job.target.resolve() in jobs:
            raise ValueError(
                f"{job.source}: the output {job.target} would overwrite an input; give another --output, or a --suffix"
            )
        if (other := by_target.setdefault(job.target.resolve(), job)) is not job:
            raise ValueError(
                f"{other.source} and {job.source} would both become {job.target}; restore them in two runs into two"
                " folders" + (", or without --format" if format else "")
            )
    return list(jobs.values())


def _files(inputs: Sequence[str], output: Path) -> Iterator[tuple[Path, Path]]:
    """Every file, and its name relative to what was given."""
    for text in inputs:
        found = [text] if os.path.exists(text) else sorted(glob.glob(text, recursive=True))
        if not found:
            raise ValueError(f"{text}: there is no file or folder of this name, and none that fits it as a pattern")
        for path in map(Path, found):
            if path.is_dir():
                yield from ((path / name, name) for name in _names_in(path, output))
            else:
                yield path, Path(path.name)


def _names_in(folder: Path, output: Path) -> list[Path]:
    """The pictures and videos below a folder, relative to it."""

    def fail(error: OSError) -> None:
        raise error

    suffixes = (*_PICTURE_SUFFIXES, *videos.VIDEO_SUFFIXES)
    names: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        is_output = lambda name, parent=parent: Path(parent, name).resolve() == output.resolve()  # noqa: E731
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not is_output(name))
        here = Path(parent).relative_to(folder)
        names += [here / name for name in sorted(files) if name.lower().endswith(suffixes) and name[0] != "."]
    if not names:
        raise ValueError(f"{folder}: no pictures or videos in this folder; looked for {', '.join(suffixes)}")
    return names


def _target_name(name: Path, suffix: str, format: str | None) -> Path:
    kind = name.suffix
    if kind.lower() in videos.VIDEO_SUFFIXES:
        kind = videos.target_suffix(kind)
    elif format and pictures.FORMATS.get(kind.lower()) is not pictures.FORMATS[f".{format}"]:
        kind = f".{format}"
    elif kind.lower() not in pictures.FORMATS:
        kind = ".png"
    return name.with_name(f"{name.stem}{suffix}{kind}")


# ---- doing it ----------------------------------------------------------------------------------------------------


def run(jobs: Sequence[Job], restore: Restore, scale: int, quality: int | None, stop: StopSignals) -> list[str]:
    """Restores the files one after the other and tells of each.

    Args:
      restore: a function of an image, as `kdjax.tiles.restore_image` takes it, and of `progress`.
      scale: how much it enlarges.
      quality: of JPEG and WebP (`kdjax.data.pictures.write_picture`).
      stop: ends the work after the tile at hand.

    Returns:
      For every file that could not be restored, why.

    Raises:
      Stopped: a signal came.
      OSError: the disk is full.
    """
    # The size of a file stands for the work that it is.
    sizes = [max(1, job.source.stat().st_size) if job.source.exists() else 1 for job in jobs]
    progress, failures = Progress(len(jobs), sum(sizes), "files"), []
    for number, (job, size) in enumerate(zip(jobs, sizes, strict=True)):

        def told(done: int, total: int, job: Job = job, size: int = size) -> None:
            if stop.requested:
                raise Stopped
            progress.show(size * done / total, f"{done / total:.0%} of {job.source.name}")

        started = time.monotonic()
        try:
            with cost.telling_out_of_memory():
                job.target.parent.mkdir(parents=True, exist_ok=True)
                if job.is_video:
                    what, notes = restore_video(job, restore, told)
                else:
                    what, notes = restore_picture(job, restore, scale, quality, told)
        except (ValueError, OSError, cost.OutOfMemory) as error:
            failures.append(_failure(job, error))
            print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
            if os.strerror(errno.ENOSPC) in failures[-1]:
                raise OSError(
                    f"the disk is full; {len(jobs) - number} of {len(jobs)} files are left: the same command continues"
                ) from None
        else:
            lines = [f"{job.source} -> {job.target}: {what}, {time.monotonic() - started:.1f} s"]
            print("\n  note: ".join([*lines, *notes]), flush=True)
        progress.advance(size)
    return failures


def restore_picture(
    job: Job, restore: Restore, scale: int, quality: int | None, told: Told
) -> tuple[str, Sequence[str]]:
    """Restores a picture; returns what was done, and notes, for the user."""
    picture = pictures.read_picture(job.source)
    notes = picture.notes + pictures.check_target(job.target, picture, scale)
    before = _size(*picture.pixels.shape)
    picture = dataclasses.replace(picture, pixels=restore(picture.pixels, progress=told))
    pictures.write_picture(job.target, picture, quality=quality)
    return f"{before} to {_size(*picture.pixels.shape)}", notes


def restore_video(job: Job, restore: Restore, told: Told) -> tuple[str, Sequence[str]]:
    """As `restore_picture`, of a video."""
    video = videos.probe(job.source)

    def restored() -> Iterator[np.ndarray]:
        for number, frame in enumerate(videos.frames(video)):
            length = max(video.length, number + 1)
            yield restore(frame, progress=lambda done, total, n=number, all=length: told(n * total + done, all * total))

    number, *size = videos.write_video(job.target, video, restored())
    missing = [f"about {video.length} frames were expected: is it cut short?"] if number < 0.9 * video.length else []
    return f"{number} frames of {_size(*size)}", missing


def _size(height: int, width: int, *_: int) -> str:
    return f"{width}x{height}"


def _failure(job: Job, error: Exception) -> str:
    if isinstance(error, cost.OutOfMemory):
        return f"{job.source}: out of memory ({error}); try a smaller --tile"
    return str(error) if isinstance(error, data.ImageError | videos.VideoError) else f"{job.source}: {error}"


# ---- the command line --------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.restore", description="Restores pictures and videos with a trained model."
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders, or patterns in quotes")
    add("--model", required=True, metavar="FILE", help='.pth or .safetensors file, or "embedded"')
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the results")
    add("--suffix", default="", help="what to add to the names of files, such as _x4")
    add("--format", choices=_FORMATS, help="of pictures; by default they keep theirs")
    add("--quality", type=int, metavar="N", help="of JPEG and WebP, 1 to 100; default: JPEG 95, WebP without loss")
    add("--overwrite", action="store_true", help="also restore files whose output exists")
    add("--tile", type=int, default=256, help="side of the tiles; 0 takes a picture whole; default: 256")
    add("--tile-pad", type=int, default=16, help="pixels around a tile that the network sees as well; default: 16")
    add("--x8", action="store_true", help="mean over the eight flips and rotations, at eight times the cost")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--key", default="auto", help="which state dict of the file, e.g. params; default: the best")
    add("--hparam", action="append", default=[], metavar="NAME=VALUE", help="what the file cannot tell")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program with a message and code 2 where one is out of range."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("tile", "tile_pad"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be 0 or more")
    if options.quality is not None and not 1 <= options.quality <= 100:
        parser.error(f"--quality {options.quality} must be from 1 to 100")
    if os.path.basename(options.suffix) != options.suffix:
        parser.error(f"--suffix {options.suffix!r} must not lead to another folder")
    if options.output.suffix.lower() in (*pictures.FORMATS, *videos.VIDEO_SUFFIXES) and not options.output.is_dir():
        parser.error(f"--output {options.output} looks like a file, and must be a folder")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    logging.getLogger("jax").setLevel(logging.WARNING)
    sharding.use_all_cores()
    with StopSignals() as stop:
        try:
            failures = restore_all(options, stop)
        except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
            sys.exit(f"error: {error}")
        except Stopped:
            print(f"stopped by {stop.name}; the same command continues", file=sys.stderr)
            sys.exit(128 + signal.Signals[stop.name])
    if failures:
        count = f"{len(failures)} file{'' if len(failures) == 1 else 's'}"
        sys.exit("\n".join([f"error: {count} could not be restored:", *shortened(failures)]))


def restore_all(options: argparse.Namespace, stop: StopSignals) -> list[str]:
    """Everything that the command line asks for; returns and raises as `run`, and ValueError for what cannot be."""
    jobs = plan(options.inputs, options.output, suffix=options.suffix, format=options.format)
    loaded = load_weights(
        assets.locate(options.model, assets.TEACHER), key=options.key, **parse_hparams(options.hparam)
    )
    model, scale, channels = loaded.model, models.scale_of(loaded.model), models.num_channels(loaded.model)
    if channels not in (1, 3):
        raise ValueError(f"{loaded.path} takes images of {channels} channels; pictures have 1 or 3")
    print(f"{loaded.path}: {model.arch}, {models.count_params(model.params):,} parameters, scale {scale},")
    print(f"  weights under {loaded.key!r}, sha256 {loaded.sha256}")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        raise OSError(f"--output {options.output}: this folder cannot be written to: {error.strerror}") from None
    left = [job for job in jobs if options.overwrite or not job.target.is_file()]
    done = f", {len(jobs) - len(left)} of them are done" if len(left) < len(jobs) else ""
    print(f"{len(jobs)} file{'' if len(jobs) == 1 else 's'}{done}", flush=True)
    on_devices = dataclasses.replace(model, params=jax.device_put(model.params))
    dtype = jnp.bfloat16 if options.bf16 else jnp.float32
    restore = functools.partial(
        restore_image, on_devices, tile=options.tile, tile_pad=options.tile_pad, x8=options.x8, dtype=dtype
    )
    return run(left, restore, scale, options.quality, stop)


if __name__ == "__main__":
    main()
