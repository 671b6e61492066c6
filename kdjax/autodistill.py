"""Distils a teacher of yours in one command: looks at it, plans, shrinks, trains, evaluates and exports.

    python -m kdjax.autodistill teacher.pth --data photographs --output distilled --speedup 4 --hours 2
    python -m kdjax.autodistill teacher.pth --lq noisy_photographs --output distilled --speedup 4 --hours 2

With clean photographs it finds out which noise the teacher is for, by trying; a teacher that upscales is given what
Real-ESRGAN's degradation makes of them. With degraded ones (--lq), the student learns what the teacher makes of those:
no clean image is needed, and nothing is assumed about how they were degraded. The student starts as a smaller version
of the teacher, and learns for about the time given. What was decided is in OUTPUT/config.py, which `kdjax train` takes,
too. Run the same command again to continue.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kdjax import commandline, cost, data, models, shrink, validation
from kdjax.assets import MODEL_HELP, MODELS, TRAIN_PHOTOGRAPHS, locate
from kdjax.data.cache import CACHE
from kdjax.data.sources import existing, one_line
from kdjax.degradations import make_degrade, make_sigma
from kdjax.files import write_bytes, write_text
from kdjax.models import Model
from kdjax.noise_level import estimate_sigma
from kdjax.training.task import Task, find_task
from kdjax.weights import load_weights, save_model, weights_options

_TRIED, _TRIED_SIDE = 6, 160  # images for finding the noise, and their side
_HELD_OUT = 8  # images at most that are kept for validation
_TIMED_STEPS = 12
# What a plan that was not finished leaves in the folder of the result, and the next one replaces.
_UNFINISHED = {"train.txt", "val", "answered", "start.pth", "plan.json"}
_BATCH, _CROP = 8, 64
# The teacher answers crops of degraded images before the training: for this part of its time, and within these numbers.
_ANSWERED_PART, _LEAST_ANSWERED, _MOST_ANSWERED, _ANSWERED_SIDE = 0.1, 64, 4000, 128
# Samples of clean images that it answers before the training, if there are then so many times as many steps.
_LEAST_CACHED, _MOST_CACHED, _LEAST_GAIN = 4096, 40_000, 1.25


def split(folder: str, output: Path) -> tuple[list[str], list[str]]:
    """Sets some images of a folder aside for validation, and lists all others in output/train.txt.

    Returns:
      The paths of the images to train on, and those for validation, which are spread over the folder and can be read.

    Raises:
      DataError: the folder cannot be used, or has fewer than four images.
    """
    pairs = data.find_pairs(gt=folder, what="training")
    if len(pairs) < 4:
        raise data.DataError(f"{folder} has {len(pairs)} images; at least 4 are needed, one of them for validation")
    chosen = data.spread(pairs, min(_HELD_OUT, max(1, len(pairs) // 10)))
    rest = [pair for pair in pairs if pair not in chosen]
    while not (held_out := [pair for pair in chosen if _read(pair.gt) is not None]):
        if len(rest) < 2:
            raise data.DataError(f"{folder}: too few of its {len(pairs)} images can be read")
        chosen = [rest.pop()]
    write_bytes(output / "train.txt", b"".join(os.fsencode(f"{pair.name}\n") for pair in rest))
    return [pair.gt for pair in rest], [pair.gt for pair in held_out]


def _read(path: str, channels: int = 3) -> np.ndarray | None:
    """Returns an image, or tells why it is left out: one damaged file does not end the plan, nor the training."""
    try:
        return data.read_image(path, channels)
    except data.ImageError as error:
        _tell_once(f"  left out: {error}")
        return None


@functools.cache
def _tell_once(line: str) -> None:
    print(line, flush=True)


def _readable(paths: Sequence[str], channels: int, most: int) -> list[np.ndarray]:
    """Returns the first images that can be read, so many at most.

    Raises:
      DataError: none can.
    """
    images = (image for path in paths if (image := _read(path, channels)) is not None)
    if found := list(itertools.islice(images, most)):
        return found
    raise data.DataError(f"none of {len(paths)} images can be read")


def answer(teacher: Model, paths: Sequence[str], folder: Path, seconds: float, least: int) -> list[np.ndarray]:
    """Cuts crops out of degraded images and writes them to folder/lq, and what the teacher makes of them to folder/gt.

    It stops after so many seconds, but not before there are `least` of them.

    Returns:
      The crops, uint8 (h, w, c).

    Raises:
      ImageError: an image cannot be read.
    """
    apply, started = teacher.network.make_apply(), time.monotonic()
    crops: list[np.ndarray] = []
    for name in ("lq", "gt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    endless = _crops(paths, teacher.network.channels)
    while batch := list(itertools.islice(endless, _BATCH)):
        images = [crop / np.float32(255) for crop in batch]
        sigmas = [estimate_sigma(image) for image in images] if teacher.network.takes_sigma else [0.0] * len(images)
        answers = dict(validation.restore(apply, teacher.params, images, sigmas))
        for i, crop in enumerate(batch):
            data.write_image(folder / "lq" / f"{len(crops):04d}.png", crop)
            data.write_image(folder / "gt" / f"{len(crops):04d}.png", answers[i])
            crops.append(crop)
        late = time.monotonic() - started > seconds
        if len(crops) >= (least if late else _MOST_ANSWERED):
            return crops
    return crops


def _crops(paths: Sequence[str], channels: int) -> Iterator[np.ndarray]:
    """Yields a crop of each image, in random order, then another one of each, without end.

    Crops are as large as half of the images allow; smaller images are left out.
    """
    random = np.random.default_rng(0)
    order = list(random.permutation(list(paths)))
    sides = [min(image.shape[:2]) for image in _readable(order, channels, _TRIED)]
    side = min(_ANSWERED_SIDE, statistics.median_low(sides))
    while order:
        used, small = [], 0
        for path in order:
            if (image := _read(path, channels)) is None:
                continue
            if min(image.shape[:2]) < side:
                small += 1
                continue
            used.append(path)
            top, left = (int(random.integers(extent - side + 1)) for extent in image.shape[:2])
            yield image[top : top + side, left : left + side]
        if small:
            print(f"  left out: {small} images that are smaller than {side}x{side}", flush=True)
        order = used


class Look(NamedTuple):
    """What was found out about a task."""

    images: shrink.Images  # to shrink the teacher with
    words: str
    config: dict[str, Any]  # what a config says about it, by key
    evaluation: list[str]  # arguments for `kdjax.evaluate` besides the student, or none


def look_at_clean(teacher: Model, options: argparse.Namespace, output: Path, count: int) -> Look:
    """Finds out what the teacher is for from clean images, some of which are copied to output/val.

    Raises:
      ValueError: the images cannot be used, or the teacher neither denoises nor upscales.
    """
    folder = existing(locate(options.data, TRAIN_PHOTOGRAPHS), "--data")
    scale = teacher.network.scale
    paths, held_out = split(folder, output)
    (output / "val").mkdir(exist_ok=True)
    for number, path in enumerate(held_out):
        shutil.copyfile(path, output / "val" / f"{number}_{Path(path).name}")
    some = paths[:: max(1, len(paths) // _TRIED)]
    images = _readable(some, teacher.network.channels, _TRIED)
    tried = [image[:_TRIED_SIDE, :_TRIED_SIDE] for image in images]
    task = find_task(teacher, tried)
    config: dict[str, Any] = {
        "terms": dict(task=dict(criterion="l1", weight=1.0), output=dict(criterion="l1", weight=1.0)),
        "degrade": task.degrade,
        "data.gt": str(Path(folder).expanduser().absolute()),
        "data.meta_info": str(output / "train.txt"),
        "val.gt": str(output / "val"),
    }
    if scale > 1:
        config["data.canvas"] = _canvas(tried, 2 * _CROP * scale, scale)
        config["val.degrade"] = task.degrade
        return Look(degraded_crops(paths, task, teacher, count), task.words, config, [])
    config["val.sigma"] = task.sigmas[len(task.sigmas) // 2]
    model = options.teacher if options.teacher in MODELS else str(Path(options.teacher).absolute())
    measured = [f"teacher={model}", "--data", f"val={output / 'val'}", "--sigma", *(f"{s:g}" for s in task.sigmas)]
    return Look(degraded_crops(paths, task, teacher, count), task.words, config, measured)


def look_at_degraded(teacher: Model, options: argparse.Namespace, output: Path, count: int) -> Look:
    """Lets the teacher answer crops of degraded images, in output/answered/train and val, with folders lq and gt each.

    Raises:
      ValueError: the images cannot be used.
    """
    paths, held_out = split(existing(options.lq, "--lq"), output)
    shutil.rmtree(output / "answered", ignore_errors=True)
    train, val = output / "answered" / "train", output / "answered" / "val"
    crops = answer(teacher, paths, train, _ANSWERED_PART * 3600 * options.hours, _LEAST_ANSWERED)
    kept = answer(teacher, held_out, val, 0.0, 2 * _HELD_OUT)
    side = min(shrink.SIDE, *crops[0].shape[:2])
    fitted = np.stack([crops[i % len(crops)][:side, :side] for i in range(count)]) / np.float32(255)
    measured = [crop / np.float32(255) for crop in kept[: shrink.MEASURED]]
    config = {
        "terms": dict(task=dict(criterion="l1", weight=1.0)),
        "data.crop": min(_CROP, side) * teacher.network.scale,
        "data.gt": str(train / "gt"),
        "data.lq": str(train / "lq"),
        "val.gt": str(val / "gt"),
        "val.lq": str(val / "lq"),
    }
    words = f"learns what the teacher makes of {len(crops)} crops of {crops[0].shape[0]}x{crops[0].shape[1]} pixels"
    pairs = ["--pairs", "against_teacher", str(val / "gt"), str(val / "lq")]
    return Look(shrink.Images.of_lq(fitted, measured), words, config, pairs)


def degraded_crops(paths: Sequence[str], task: Task, teacher: Model, count: int) -> shrink.Images:
    """Returns crops of the images and some larger ones, degraded as the task says, for `kdjax.shrink`."""
    scale, channels = teacher.network.scale, teacher.network.channels
    random = np.random.default_rng(0)
    degrade = jax.jit(make_degrade(task.degrade, scale=scale))
    side = shrink.SIDE * scale
    images = _readable(list(random.permutation(list(paths))), channels, 64)
    images = [image for image in images if min(image.shape[:2]) >= 2 * side] or images
    side = min(side, *(min(image.shape[:2]) // scale * scale for image in images))

    sigma_of = make_sigma(task.degrade)
    keys = [jax.random.fold_in(jax.random.key(0), number) for number in range(count + shrink.MEASURED)]

    def crop(number: int) -> np.ndarray:
        image = images[number % len(images)]
        top, left = (random.integers(extent - side + 1) for extent in image.shape[:2])
        clean = image[top : top + side, left : left + side] / np.float32(255)
        return np.asarray(degrade(keys[number], clean))

    crops = [crop(number) for number in range(len(keys))]
    fitted, measured = np.stack(crops[:count]), crops[count:]
    if sigma_of is None:
        return shrink.Images.of_lq(fitted, measured)
    sigmas = [float(sigma_of(key)) for key in keys]
    return shrink.Images(jax.numpy.asarray(fitted), jax.numpy.asarray(sigmas[:count]), measured, sigmas[count:], None)


def config_text(command: str, values: Mapping[str, Any]) -> str:
    """Returns the source of a config file with these values, by key."""
    lines = [f"    config.{key} = {value!r}" for key, value in values.items()]
    return "\n".join(
        [
            f"# Written by: {one_line(command)}",
            "# Train with it: kdjax train --config THIS_FILE",
            "",
            "from ml_collections import ConfigDict",
            "",
            "from kdjax.config import defaults",
            "",
            "",
            'def get_config(variant: str = "") -> ConfigDict:',
            "    config = defaults()",
            *lines,
            "    return config",
            "",
        ]
    )


def plan(options: argparse.Namespace, output: Path) -> None:
    """Looks at the teacher, shrinks it and writes output/config.py, with everything that it names.

    Raises:
      ValueError, OSError: something cannot be used; the message is meant for the user.
    """
    given = weights_options(options)
    loaded = load_weights(options.teacher, **given)
    teacher = loaded.model
    print(f"{loaded.path}: {teacher.arch}, {models.count_params(teacher.params):,} parameters", flush=True)
    count = shrink.shrinking.num_images(teacher, shrink.SIDE)
    count = min(count, options.crops or count)
    look = look_at_degraded if options.lq else look_at_clean
    images, words, task, measured = look(teacher, options, output, count)
    print(f"  {words}", flush=True)
    budget = shrink.Budget(latency=1 / options.speedup)
    blind = teacher.network.takes_sigma and (options.blind or bool(options.lq))  # of pairs, no level is known
    tell = lambda line: print(f"  {line}", flush=True)  # noqa: E731
    student, _ = shrink.shrink(teacher, images, budget, blind=blind, tell=tell)
    save_model(student, output / "start.pth")
    scale = teacher.network.scale
    hparams = {name: value for name, value in given.items() if name not in ("key", "arch")}
    values: dict[str, Any] = {
        "name": output.name or "distilled",
        "student.arch": student.arch,
        "student.hparams": dict(student.hparams),
        "student.weights": str(output / "start.pth"),
        "teacher.weights": options.teacher if options.teacher in MODELS else str(Path(options.teacher).absolute()),
        "teacher.key": given.get("key", "auto"),
        "teacher.hparams": hparams | ({"arch": given["arch"]} if given.get("arch") else {}),
        "data.crop": _CROP * scale,
        "data.batch_size": _BATCH,
        "data.workers": 0,
        "val.crop": 256 * min(scale, 2),
        "val.save_images": 2,
        "train.ema_decay": 0.99,
        "train.grad_clip": 0.1,
        "log.diagnose": False,
    } | task
    seconds, cached = 3600 * options.hours, 0
    per_step = _seconds_per_step(values, output)
    if "output" in values["terms"]:
        without = {**values, "terms": dict(task=values["terms"]["task"])}
        with_teacher, per_step = per_step, _seconds_per_step(without, output)
        room = shutil.disk_usage(output).free // 10 // (6 * teacher.network.channels * values["data.crop"] ** 2)
        cached = min(samples_to_cache(seconds, with_teacher, per_step), room)
        if cached:
            values["teacher.cache"] = str(output / "answers")
            seconds -= cached / _BATCH * (with_teacher - per_step)
            does = f"writes {cached:,} answers down first"
        elif scale == 1 and with_teacher > _LEAST_GAIN * per_step:
            # More steps are worth more (docs/results.md). An upscaler's images are what its student is for.
            values, does = without, "takes no part in the training"
        else:
            per_step, does = with_teacher, "answers in every step"
        print(f"  the teacher {does}", flush=True)
    steps = max(50, round(seconds / per_step))
    print(f"  {per_step:.2f} s a step: {steps:,} steps in {options.hours:g} hours", flush=True)
    every = max(1, steps // 10)
    values |= {
        "train.steps": steps,
        "train.lr": dict(name="cosine", value=1e-4, steps=steps, warmup=min(100, steps // 10)),
        "val.every": every,
        "checkpoint.every": every,
        "log.every": max(1, min(100, steps // 20)),
    }
    about = {"command": _command(options), "words": words, "evaluate": measured, "cache": cached}
    write_text(output / "plan.json", json.dumps(about, indent=1))
    write_text(output / "config.py", config_text(_command(options), values))


def samples_to_cache(seconds: float, with_teacher: float, without: float) -> int:
    """Returns how many samples the teacher should answer before the training; 0 if it had better answer in every step.

    Writing answers down pays where it allows for more steps, and where there are enough of them: the student sees the
    same crops with the same noise again and again.

    Args:
      seconds: for answers and training together.
      with_teacher, without: seconds of a step with the teacher in it, and without.
    """
    in_turns = seconds / with_teacher
    batches = math.floor(_ANSWERED_PART * seconds / max(with_teacher - without, 1e-9))
    beforehand = (1 - _ANSWERED_PART) * seconds / without
    pays = beforehand > _LEAST_GAIN * in_turns and batches * _BATCH >= _LEAST_CACHED
    return min(batches * _BATCH, _MOST_CACHED) if pays else 0


def _command(options: argparse.Namespace) -> str:
    """Returns the command that this folder belongs to."""
    images = ("--lq", options.lq) if options.lq else ("--data", options.data)
    flags = (*images, "--speedup", f"{options.speedup:g}", "--hours", f"{options.hours:g}")
    return shlex.join(["kdjax", "distill", options.teacher, *flags])


def _canvas(images: Sequence[np.ndarray], wanted: int, scale: int) -> int:
    return max(_CROP * scale, min(wanted, *(min(image.shape[:2]) for image in images)) // scale * scale)


def _seconds_per_step(values: Mapping[str, Any], output: Path) -> float:
    """Trains for a few steps in a folder that is removed again, which also fills the cache of compiled programs."""
    changes = {"train.steps": _TIMED_STEPS, "val.every": 10**6, "val.limit": 1, "val.crop": 32 * 4, "log.every": 1}
    with tempfile.TemporaryDirectory(prefix=".timing-", dir=output) as folder:
        timed = Path(folder) / "config.py"
        write_text(timed, config_text("kdjax distill, to measure", {**values, **changes}))
        result = _start(
            "kdjax.train", "--config", timed, "--workdir", Path(folder) / "run", capture_output=True, text=True
        )
        if result.returncode:
            raise ValueError(f"training does not start: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    return values["data.batch_size"] / statistics.median(rates[len(rates) // 2 :])


def _start(program: str, *arguments: object, **how: Any) -> subprocess.CompletedProcess:
    """Runs a program of kdjax in a process of its own, which decides about its devices by itself."""
    return subprocess.run([sys.executable, "-m", program, *map(str, arguments)], check=False, **how)


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.autodistill", __doc__)
    add = parser.add_argument
    add("teacher", metavar="TEACHER", help=MODEL_HELP)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--data", help='folder of clean photographs, or "embedded"')
    images.add_argument("--lq", help="folder of degraded ones, of which no clean version is needed")
    add("--output", type=Path, default=Path("distilled"), help="folder of the result")
    add("--speedup", type=float, default=4.0, help="how many times faster, measured on this device")
    add("--hours", type=float, default=1.0, help="about how long to train")
    add("--blind", action="store_true", help="a student that is not told the noise level, of a teacher that is")
    add("--crops", type=int, default=0, help="fit the start to at most this many crops; 0 takes enough")
    parser.add_weights_options("the teacher")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 1 < options.speedup < 1000:
        parser.error(f"--speedup {options.speedup:g} must be more than 1 and less than 1000")
    if not 0 < options.hours < 10_000:
        parser.error(f"--hours {options.hours:g} must be more than 0")
    if options.crops < 0:
        parser.error(f"--crops {options.crops} must be 0 or more")
    output = options.output.absolute()
    started = time.monotonic()
    if (output / "config.py").exists():
        before = json.loads((output / "plan.json").read_text())["command"]
        if before != _command(options):
            commandline.fail(
                f"--output={options.output} belongs to another command: {before}; repeat that to continue it, or choose"
                " another --output"
            )
        print(f"{output / 'config.py'} is there; continuing")
    else:
        present = {path.name for path in output.glob("[!.]*")}
        if present and ("train.txt" not in present or not present <= _UNFINISHED):
            commandline.fail(f"--output={options.output} holds other files; give a folder that is new or empty")
        try:
            output.mkdir(parents=True, exist_ok=True)
            with cost.telling_out_of_memory():
                plan(options, output)
        except (ValueError, OSError, cost.OutOfMemory) as error:
            commandline.fail(str(error))
    about = json.loads((output / "plan.json").read_text())
    run, student = output / "run", output / "run" / "student.pth"
    if about.get("cache") and not (output / "answers" / CACHE.index).exists():
        written = "--output", output / "answers", "--samples", about["cache"]
        _go_on("kdjax.cache", "--config", output / "config.py", *written)
    _go_on("kdjax.train", "--config", output / "config.py", "--workdir", run)
    if about["evaluate"]:
        _go_on("kdjax.evaluate", "--model", f"student={student}", *about["evaluate"], "--output", output / "results")
    has_onnx = find_spec("onnxruntime") and find_spec("onnx")
    formats = () if has_onnx else ("--format", "pth", "safetensors", "stablehlo")
    _go_on("kdjax.export", "--model", student, "--run", run, "--output", output / "exported", *formats)
    print(f"{output}: config.py, run/student.pth, results/, exported/; {(time.monotonic() - started) / 60:.0f} minutes")


def _go_on(program: str, *arguments: object) -> None:
    if code := _start(program, *arguments).returncode:
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    commandline.run(main)
