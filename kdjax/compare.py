"""Compares what models cost and how good they are: a teacher, and the students meant to replace it.

    python -m kdjax.compare --teacher teacher.pth --student runs/denoise/student.pth
    python -m kdjax.compare --teacher teacher.pth --student small=a.pth tiny=b.pth --size 256 720x1280 --batch 1 4 \\
        --bf16 --data photographs/test --sigma 25 --output comparison

Reports parameters, multiply-accumulates, memory, latency, throughput and speed-up (`kdjax.cost`) at every size and
batch size; with --data also PSNR, SSIM and the gap to the teacher (`kdjax.evaluate`). With --output the numbers are
written to compare.json, compare.md and compare.png. `docs/comparing.md` explains them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import assets, commandline, cost, data, metrics, models, validation
from kdjax.files import finite, whole_file, write_json, write_text
from kdjax.models import Model
from kdjax.names import named_paths, pick
from kdjax.report import tradeoff
from kdjax.report.tradeoff import Comparison, Quality, Subject
from kdjax.validation import Sample
from kdjax.weights import Loaded, load_weights, parse_hparams


def load_files(paths: Sequence[str], keys: Sequence[str], hparams: Sequence[str]) -> dict[str, Loaded]:
    """Loads the files of a command line, by short name.

    Args:
      paths: PATH or NAME=PATH.
      keys: KEY, or MODEL:KEY for one model only; what `load_weights` calls `key`.
      hparams: NAME=VALUE, or MODEL:NAME=VALUE for one model only.

    Raises:
      ValueError, OSError: if a file cannot be read, two have the same short name, or an option names no model.
    """
    named = named_paths(paths, "--student")
    options: dict[str, dict[str, Any]] = {name: {} for name in named}
    for text in keys:
        owner, _, key = text.rpartition(":")
        for each in _of_owner(options, owner):
            each["key"] = key
    for text in hparams:
        left, equals, value = text.partition("=")  # the value may contain a colon: arch=my_package.my_net:MyNet
        owner, _, name = left.rpartition(":")
        for each in _of_owner(options, owner):
            each.update(parse_hparams([f"{name}{equals}{value}"]))
    return {name: load_weights(path, **options[name]) for name, path in named.items()}


def describe(name: str, loaded: Loaded, *, is_teacher: bool) -> Subject:
    """Describes a model for the tables."""
    model = loaded.model
    return Subject(
        name=name,
        is_teacher=is_teacher,
        path=loaded.path,
        sha256=loaded.sha256,
        key=loaded.key,
        arch=model.arch,
        hparams=model.hparams,
        parameters=models.count_params(model.params),
        scale=model.network.scale,
        channels=model.network.channels,
    )


def check_same_task(networks: dict[str, Model]) -> None:
    """Checks that the models do the same task; otherwise their quality cannot be compared.

    Raises:
      ValueError: if they differ in scale or in colour channels.
    """
    for what, attribute in (("scale", "scale"), ("colour channels", "channels")):
        values = {name: getattr(model.network, attribute) for name, model in networks.items()}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"the quality of these models cannot be compared, since they differ in {what} "
                f"({', '.join(f'{name}: {value}' for name, value in values.items())}); without --data the costs are"
            )


def measure_quality(networks: dict[str, Model], samples: list[Sample]) -> list[Quality]:
    """Measures every model's quality in float32, like `kdjax.evaluate`; the first model is the teacher."""
    rows: list[Quality] = []
    teacher_outputs: list[np.ndarray] = []
    for name, model in networks.items():
        apply = model.network.make_apply()
        images, sigmas = [sample.lq for sample in samples], [sample.sigma for sample in samples]
        restored = dict(validation.restore(apply, model.params, images, sigmas))
        outputs = [restored[position] for position in range(len(samples))]
        teacher_outputs = teacher_outputs or outputs
        pairs = zip(outputs, samples, strict=True)
        score = validation.mean_score([validation.score(output, sample.gt) for output, sample in pairs])
        like = statistics.fmean(map(metrics.psnr, outputs, teacher_outputs))
        gap = rows[0].psnr - score.psnr if rows else 0.0
        rows.append(Quality(name, score.psnr, score.ssim, gap, like))
    return rows


def main() -> None:
    options = _parse_options()
    jax.config.update("jax_enable_compilation_cache", False)  # measure compiling, not reading the cache
    try:
        files = load_files([*options.teacher, *options.student], options.key, options.hparam)
        networks = {name: loaded.model for name, loaded in files.items()}
        samples = []
        if options.data is not None:
            check_same_task(networks)
            samples = _load_samples(options, next(iter(networks.values())))
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
        comparison = _compare(options, files, networks, samples)
        text = tradeoff.markdown(comparison)
        print(text, end="")
        if options.output:
            write_all(comparison, text, options.output)
    except (ValueError, OSError) as error:  # caused by the user's input; a traceback would hide the message
        commandline.fail(str(error))


def write_all(comparison: Comparison, text: str, folder: Path) -> None:
    """Writes compare.json, compare.md and, if matplotlib is installed, compare.png."""
    values = dataclasses.asdict(comparison)
    values["quality"] = [finite(row) for row in values["quality"]]
    write_json(folder / "compare.json", values)
    write_text(folder / "compare.md", text)
    try:
        with whole_file(folder / "compare.png") as temporary:
            tradeoff.plot(comparison, temporary)
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'kdjax[plot]')", file=sys.stderr)
    except ValueError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print(f"\nwritten to {folder}")


def _compare(
    options: argparse.Namespace, files: dict[str, Loaded], networks: dict[str, Model], samples: list[Sample]
) -> Comparison:
    machine = cost.describe_machine()
    dtypes = ["float32", "bfloat16"] if options.bf16 else ["float32"]
    sizes, batches = dict.fromkeys(options.size), dict.fromkeys(options.batch)  # without duplicates
    settings = [(size, batch, dtype) for size in sizes for batch in batches for dtype in dtypes]
    costs = []
    for number, (size, batch, dtype) in enumerate(settings, 1):
        print(f"{number}/{len(settings)}: {size[0]}x{size[1]}, batch {batch}, {dtype}", file=sys.stderr, flush=True)
        costs += cost.measure(networks, size=size, batch=batch, dtype=dtype, repeats=options.repeats)
    peak = cost.allocator_peak()
    images, quality = "", []
    if samples:
        degraded = f"sigma {options.sigma:g}" if options.lq is None else f"degraded in {options.lq}"
        images = f"{options.data}, {len(samples)} images, {degraded}"
        print(images, file=sys.stderr, flush=True)
        try:
            with cost.telling_out_of_memory():
                quality = measure_quality(networks, samples)
        except cost.OutOfMemory as error:  # keep what has been measured
            print(f"no quality: out of memory: {error}", file=sys.stderr)
    subjects = [
        describe(name, loaded, is_teacher=place < len(options.teacher))
        for place, (name, loaded) in enumerate(files.items())
    ]
    return Comparison(machine, subjects, options.repeats, costs, images, quality, peak)


def _load_samples(options: argparse.Namespace, model: Model) -> list[Sample]:
    """Loads the images of --data, like `kdjax.evaluate`."""
    scale = model.network.scale
    if options.lq is None and scale != 1:
        raise ValueError(f"these models upscale {scale}x; give the small images with --lq")
    pairs = data.find_pairs(
        gt=assets.locate(options.data, assets.VAL_PHOTOGRAPHS),
        lq=options.lq,
        filename_tmpl=options.filename_tmpl,
        what="comparison",
    )
    images = data.load_images(pairs, channels=model.network.channels, scale=scale, limit=options.limit)
    return [validation.make_sample(image.name, image.gt, image.lq, options.sigma or 0.0) for image in images]


def _of_owner(options: dict[str, dict[str, Any]], owner: str) -> list[dict[str, Any]]:
    """Returns the options of the model `owner`, or those of all models if it is ""."""
    return [pick(options, owner, "model before the colon")] if owner else list(options.values())


def _parse_size(text: str) -> tuple[int, int]:
    """Parses "256" or "720x1280" to height and width."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; wanted a side (256) or HEIGHTxWIDTH (720x1280)")
    return int(match[1]), int(match[2] or match[1])


def _parse_count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 99999")
    return int(text)


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.compare", __doc__)
    what = f"[NAME=]PATH of a {assets.MODEL_HELP}"
    add = parser.add_argument
    add("--teacher", nargs="+", required=True, metavar="MODEL", help=f"{what}; the others are compared with the first")
    add("--student", nargs="+", required=True, metavar="MODEL", help=what)
    add(
        "--key",
        action="append",
        default=[],
        metavar="[MODEL:]KEY",
        help="which state dict of a file to take, such as params",
    )
    add("--hparam", action="append", default=[], metavar="[MODEL:]NAME=VALUE", help="what a file does not say")
    add(
        "--size",
        nargs="+",
        type=_parse_size,
        default=[(64, 64), (256, 256)],
        help="input sizes, 256 or HEIGHTxWIDTH; default: 64 256",
    )
    add("--batch", nargs="+", type=_parse_count, default=[1], help="images per pass; default: 1")
    add("--repeats", type=_parse_count, default=20, help="timed passes of each model; default: 20")
    add("--bf16", action="store_true", help="also measure the costs in bfloat16")
    add("--data", help='folder of clean images to measure quality on, or "embedded"')
    add("--sigma", type=float, help="standard deviation of the noise to add to them, on the scale of 0 to 255")
    add("--lq", help="folder of the degraded images, instead of --sigma")
    add("--filename-tmpl", default="{}", help='lq file stem from the gt stem, e.g. "{}_noisy"')
    add("--limit", type=int, default=0, help="at most this many images, spread over the folder; 0 takes all")
    add("--output", type=Path, help="folder for compare.json, compare.md and compare.png")
    return parser


def _parse_options() -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args()
    degraded = (options.sigma is not None) + (options.lq is not None)
    if options.data is not None and degraded != 1:
        parser.error("--data needs either --sigma or --lq")
    if options.data is None and degraded:
        parser.error("--sigma and --lq need --data")
    if options.sigma is not None and not 0 <= options.sigma <= 255:
        parser.error(f"--sigma {options.sigma:g} must be from 0 to 255")
    if options.limit < 0:
        parser.error(f"--limit {options.limit} must be 0 or more")
    return options


if __name__ == "__main__":
    commandline.run(main)
