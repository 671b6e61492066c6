"""Evaluates models on folders of images, any number of each in one table:

    python -m kdjax.evaluate --model FILE --data DIR --sigma 25
    python -m kdjax.evaluate --model ours=a.pth theirs=b.pth --data kodak cbsd68 --sigma 15 25 50 --output results
    python -m kdjax.evaluate --model FILE --pairs sidd sidd/gt sidd/noisy --metrics psnr_y ssim_y

Clean images get the benchmark's noise (`kdjax.validation`: seed 0 per image, not clipped); with `--pairs` the degraded
images come from files. Outputs are rounded to 8 bits, metrics are those of `kdjax.metrics.named`, and a result is the
mean over the images. `docs/evaluating.md` explains the options.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import assets, commandline, cost, data, models, sharding, validation
from kdjax.files import finite, write_json, write_text
from kdjax.markdown import literal, table
from kdjax.metrics import named
from kdjax.metrics.named import METRICS
from kdjax.models.ensemble import self_ensemble
from kdjax.names import named_paths, png_name
from kdjax.ops import to_uint8
from kdjax.progress import Progress
from kdjax.report import page
from kdjax.tiles import Restorer
from kdjax.validation import Restore, Sample, Score, Values
from kdjax.weights import Loaded, load_weights, weights_options

_NAME = r"\w[\w.+-]*"  # of a model or a set; also used as a folder name


def evaluate(
    model: models.Model, samples: Sequence[Sample], *, show_progress: bool = False
) -> tuple[Score, dict[str, Score]]:
    """Returns a model's mean PSNR and SSIM, and those of every image by name, in the order of `samples`."""
    progress = Progress(len(samples), sum(sample.gt.size for sample in samples), silent=not show_progress)
    each = lambda position, *_: progress.advance(samples[position].gt.size)  # noqa: E731
    values = validation.measure(make_restore(model), samples, ("psnr", "ssim"), named.MetricInputs(), each=each)
    by_name = {sample.name: Score(**scores) for sample, scores in zip(samples, values, strict=True)}
    return validation.mean_score(list(by_name.values())), by_name


def make_restore(
    model: models.Model, *, tile: int = 0, tile_pad: int = 16, x8: bool = False, dtype: jnp.dtype = jnp.float32
) -> Restore:
    """Makes a function from float32 (h, w, c) images to (position, restored uint8 image), in any order.

    Args:
      tile: 0 runs a whole image per device at a time, compiling once per size; otherwise the side of the tiles into
        which an image is split to spread it over the devices.
      tile_pad: context around a tile, in pixels.
      x8: averages over the eight flips and rotations.
      dtype: of the computation inside the network.

    Raises:
      ValueError: if tile or tile_pad is out of range.
    """
    if tile:
        restorer = Restorer(model, tile=tile, tile_pad=tile_pad, x8=x8, dtype=dtype)
        return lambda images, sigmas: (
            (i, np.asarray(to_uint8(jnp.asarray(restorer(image, sigma)))))
            for i, (image, sigma) in enumerate(zip(images, sigmas, strict=True))
        )
    apply = model.network.make_apply(dtype=dtype)
    apply = self_ensemble(apply) if x8 else apply
    return lambda images, sigmas: validation.restore(apply, model.params, images, sigmas)


# ---- parsing the command line ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the table: its file, how it restores images, and its multiply-accumulates per pixel of lq."""

    loaded: Loaded
    restore: Restore
    macs: float


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A set of images in memory: clean ones, or pairs if `lq` names a folder."""

    name: str
    gt: str
    lq: str | None
    images: list[data.ValidationImage]


@dataclasses.dataclass(frozen=True)
class Request:
    """The whole request, loaded and checked; `settings` describes in words what the numbers depend on."""

    models: dict[str, Entry]
    datasets: list[Dataset]
    sigmas: list[float]
    metrics: list[str]
    context: named.MetricInputs
    settings: dict[str, str]

    def conditions(self) -> list[tuple[Dataset, float | None]]:
        """Every set with every noise level; None for pairs."""
        return [(one, sigma) for one in self.datasets for sigma in (self.sigmas if one.lq is None else [None])]


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.evaluate", __doc__)
    add = parser.add_argument
    add("--model", required=True, action="extend", nargs="+", metavar="[NAME=]FILE",
        help=assets.MODEL_HELP)  # fmt: skip
    add("--data", default=[], action="extend", nargs="+", metavar="[NAME=]DIR",
        help='folders of clean images, or "embedded"')  # fmt: skip
    add(
        "--sigma",
        type=float,
        nargs="+",
        default=[],
        help="standard deviations of the noise to add, on the scale of 0 to 255",
    )
    add("--pairs", default=[], action="append", nargs=3, metavar=("NAME", "GT", "LQ"),
        help="a set of clean and degraded images in two folders; repeatable")  # fmt: skip
    add("--lq", metavar="DIR", help="folder of the degraded images of --data, instead of --sigma")
    add("--filename-tmpl", default="{}", help='lq file stem from the gt stem, e.g. "{}_noisy"')
    add("--limit", type=int, default=0, help="at most this many images, spread over each folder; 0 takes all")
    add("--metrics", nargs="+", default=["psnr", "ssim"], choices=list(METRICS), help="what to measure")
    add("--crop-border", type=int, default=0, metavar="N", help="pixels that metrics leave out on each side")
    for name, metric in METRICS.items():
        if metric.source:
            add(f"--{name}", metavar=metric.source.metavar, help=f"for {name}: {metric.source.about}")
    add("--tile", type=int, default=0, help="side of the tiles; 0, the default, takes images whole")
    add("--tile-pad", type=int, default=16, help="pixels of context around a tile; default: 16")
    add("--x8", action="store_true", help="average over the eight flips and rotations")
    add("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_weights_options("the files")
    add("--output", type=Path, metavar="DIR", help="folder for results.json, results.md and report.html")
    add("--report-images", type=int, default=24, metavar="N", help="images in the report, worst first; default: 24")
    add("--save-images", action="store_true", help="also writes every restored image to DIR/images")
    add("--json", type=Path, metavar="FILE", help="writes the contents of results.json to this file")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the options; exits with a message and code 2 if they do not fit together."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not options.data and not options.pairs:
        parser.error("no images given: give --data DIR with --sigma, or --pairs NAME GT LQ")
    if options.data and bool(options.sigma) == (options.lq is not None):
        parser.error("give either --sigma or --lq with --data")
    if not options.data and (options.sigma or options.lq is not None):
        parser.error("--sigma and --lq need --data")
    if options.lq is not None and len(options.data) > 1:
        parser.error(f"--lq goes with one --data, and {len(options.data)} are given; use --pairs NAME GT LQ for each")
    if wrong := [sigma for sigma in options.sigma if not 0 <= sigma <= 255]:
        parser.error(f"--sigma {wrong[0]:g} must be from 0 to 255")
    for name in options.metrics:
        if METRICS[name].source and getattr(options, name) is None:
            parser.error(f"the metric {name} needs a file: --{name}")
    for name in ("limit", "crop_border", "tile", "tile_pad", "report_images"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be 0 or more")
    if options.save_images and options.output is None:
        parser.error("--save-images needs --output DIR")
    return options


def prepare(options: argparse.Namespace) -> Request:
    """Loads models, images and metric files first, so that problems surface before anything is computed.

    Raises:
      ValueError, OSError: if something cannot be used.
    """
    chosen = weights_options(options)
    loaded = {
        name: load_weights(path, **chosen)
        for name, path in named_paths(options.model, "--model", reserved=(page.INPUT, page.CLEAN)).items()
    }
    channels, scale = _common_kind(loaded)
    if scale != 1 and options.sigma:
        raise ValueError(f"{options.model[0]} upscales {scale}x; give its small images with --pairs or --lq")
    if channels != 3 and (on_luma := [name for name in options.metrics if name.endswith("_y")]):
        raise ValueError(f"the metric {on_luma[0]} needs RGB, and the models are grey; use {on_luma[0][:-2]}")
    dtype = jnp.bfloat16 if options.bf16 else jnp.float32
    engine = dict(tile=options.tile, tile_pad=options.tile_pad, x8=options.x8, dtype=dtype)
    entries = {
        name: Entry(one, make_restore(one.model, **engine), _macs_per_pixel(one.model)) for name, one in loaded.items()
    }
    context, sources = _context(options)
    datasets = _datasets(options, channels, scale)
    settings = {f"model {name}": f"{one.path}, sha256 {one.sha256}" for name, one in loaded.items()}
    settings |= {f"images {one.name}": f"{one.gt}, {one.lq}" if one.lq else one.gt for one in datasets}
    return Request(
        models=entries,
        datasets=datasets,
        sigmas=list(dict.fromkeys(options.sigma)),
        metrics=list(dict.fromkeys(options.metrics)),
        context=context,
        settings=settings | _settings(options) | sources,
    )


def _common_kind(loaded: Mapping[str, Loaded]) -> tuple[int, int]:
    """Returns the channels and the scale that all models share."""
    kinds = {name: (one.model.network.channels, one.model.network.scale) for name, one in loaded.items()}
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: {channels} channels, scale {scale}" for name, (channels, scale) in kinds.items())
        raise ValueError(f"the models do not read and write the same images ({listed}); measure them in separate runs")
    return next(iter(kinds.values()))


def _macs_per_pixel(model: models.Model) -> float:
    side = 64
    return model.network.count_macs(side, side) / side**2


def _datasets(options: argparse.Namespace, channels: int, scale: int) -> list[Dataset]:
    folders = [(name, path, options.lq) for name, path in named_paths(options.data, "--data", folders=True).items()]
    folders += [tuple(pair) for pair in options.pairs]
    names = [name for name, _, _ in folders]
    if wrong := [name for name, _, _ in options.pairs if not re.fullmatch(_NAME, name)]:
        raise ValueError(f"--pairs {wrong[0]}: wanted NAME GT LQ, with a name of letters, digits and . + - _ only")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two sets of images are called {repeated[0]!r}; give them different names")
    datasets = []
    for name, gt, lq in folders:
        pairs = data.find_pairs(
            gt=assets.locate(gt, assets.VAL_PHOTOGRAPHS), lq=lq, filename_tmpl=options.filename_tmpl, what="evaluation"
        )
        images = data.load_images(pairs, channels=channels, scale=scale, limit=options.limit)
        datasets.append(Dataset(name, gt, lq, images))
    return datasets


def _context(options: argparse.Namespace) -> tuple[named.MetricInputs, dict[str, str]]:
    """Returns what the metrics need, and where it came from."""
    contents, sources = {}, {}
    for name in options.metrics:
        if source := METRICS[name].source:
            contents[name], sources[name] = source.load(getattr(options, name))
    return named.MetricInputs(options.crop_border, contents), sources


def _settings(options: argparse.Namespace) -> dict[str, str]:
    whole = f"tiles of {options.tile} pixels, {options.tile_pad} around them" if options.tile else "whole images"
    ensemble = ", mean over eight flips and rotations" if options.x8 else ""
    noise = {"noise": "Gaussian, seed 0 for every image, not clipped"} if options.sigma else {}
    limit = {"limit": f"{options.limit} images of each set, spread over it"} if options.limit else {}
    return (
        noise
        | limit
        | {
            "restored": f"{whole}{ensemble}, {'bfloat16' if options.bf16 else 'float32'}",
            "measured": f"on 8 bit, {options.crop_border} pixels left out on each side, mean over the images",
            "devices": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        }
    )


# ---- measuring and writing -------------------------------------------------------------------------------------


class Gallery:
    """The images of one set and noise level that the first model restored worst, as restored by every model.

    Args:
      count: how many to keep.
      metric: what to rank by.
    """

    def __init__(self, count: int, metric: str) -> None:
        self._count, self._metric = count, metric
        self._first: str | None = None
        self._quality: dict[int, float] = {}
        self.outputs: dict[int, dict[str, np.ndarray]] = {}  # position -> model -> image

    def add(self, model: str, position: int, output: np.ndarray, values: Values) -> None:
        """Adds an output; the first model's outputs select the images, so add them before all others."""
        self._first = self._first or model
        if model != self._first:
            if position in self.outputs:
                self.outputs[position][model] = output
            return
        quality = values[self._metric] if METRICS[self._metric].higher_is_better else -values[self._metric]
        self._quality[position] = math.inf if math.isnan(quality) else quality
        self.outputs[position] = {model: output}
        if len(self.outputs) > self._count:
            del self.outputs[max(self.outputs, key=self._quality.__getitem__)]


def run(request: Request, options: argparse.Namespace) -> None:
    """Measures everything: prints rows as they come, rewrites the table after every set and level, then the report."""
    conditions = request.conditions()
    images = [image for dataset, _ in conditions for image in dataset.images]
    macs = sum(entry.macs for entry in request.models.values())
    progress = Progress(len(images) * len(request.models), sum(image.gt.size for image in images) * macs)
    pictures_each = -(-options.report_images // len(conditions)) if options.output else 0
    rows: list[dict[str, Any]] = []
    pictures: list[page.Restored] = []
    for dataset, sigma in conditions:
        degraded = "pairs" if sigma is None else f"sigma {sigma:g}"
        samples = [validation.make_sample(image.name, image.gt, image.lq, sigma or 0.0) for image in dataset.images]
        number = f"{len(samples)} image{'' if len(samples) == 1 else 's'}"
        print(f"{dataset.name}, {degraded}, {number}", flush=True)
        gallery = Gallery(pictures_each, request.metrics[0])
        folder = options.output / "images" / dataset.name / degraded.replace(" ", "_") if options.save_images else None
        measured: dict[str, list[Values]] = {}
        if samples[0].lq.shape == samples[0].gt.shape:
            measured[page.INPUT] = [
                validation.values(validation.input_picture(sample), sample.gt, request.metrics, request.context)
                for sample in samples
            ]
            print(f"  {_line(_means(measured[page.INPUT]))}   {page.INPUT}", flush=True)
        for name in request.models:
            started = time.monotonic()
            measured[name] = _measure_model(request, name, samples, gallery, progress, folder)
            seconds = f"{time.monotonic() - started:.0f} s"
            print(f"  {_line(_means(measured[name]))}   {name}, {seconds}", flush=True)
        for name, values in measured.items():
            row = {"model": name, "data": dataset.name, "degraded": degraded, "images": len(samples)} | _means(values)
            by_image = {sample.name: one for sample, one in zip(samples, values, strict=True)}
            rows.append(row | {"by_image": by_image})
        for position, outputs in sorted(gallery.outputs.items()):
            sample, scores = samples[position], {name: values[position] for name, values in measured.items()}
            lq = validation.input_picture(sample)
            pictures.append(page.Restored(sample.name, dataset.name, degraded, lq, sample.gt, outputs, scores))
        _write_table(request, rows, options)
    if options.output:
        table = [{name: value for name, value in row.items() if name != "by_image"} for row in rows]
        path = options.output / "report.html"
        page.write_report(path, title="Evaluation", table=table, images=pictures, settings=request.settings)
        print(f"{options.output}: results.json, results.md, report.html")


def _measure_model(
    request: Request, name: str, samples: list[Sample], gallery: Gallery, progress: Progress, folder: Path | None
) -> list[Values]:
    """Returns one model's metrics on every sample; outputs go to the gallery and, if given, into the folder."""
    entry = request.models[name]

    def take(position: int, output: np.ndarray, values: Values) -> None:
        sample = samples[position]
        gallery.add(name, position, output, values)
        progress.advance(sample.gt.size * entry.macs)
        if folder is not None:
            path = folder / name / png_name(sample.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            data.write_image(path, output)

    return validation.measure(entry.restore, samples, request.metrics, request.context, each=take)


def _means(values: list[Values]) -> Values:
    return {metric: named.mean([one[metric] for one in values]) for metric in values[0]}


def _line(means: Values) -> str:
    """Formats the means: "PSNR 31.33 dB   SSIM 0.8852"."""
    parts = [f"{METRICS[name].title} {METRICS[name].text(value)} {METRICS[name].unit}" for name, value in means.items()]
    return "   ".join(part.rstrip() for part in parts)


def _write_table(request: Request, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Writes results.json and results.md atomically, with the rows so far."""
    entries = {
        name: {
            "file": entry.loaded.path,
            "sha256": entry.loaded.sha256,
            "key": entry.loaded.key,
            "arch": entry.loaded.model.arch,
            "hparams": entry.loaded.model.hparams,
            "parameters": models.count_params(entry.loaded.model.params),
            "macs_per_pixel": entry.macs,
        }
        for name, entry in request.models.items()
    }
    content = {"settings": request.settings, "models": entries, "results": [finite(row) for row in rows]}
    for path in filter(None, [options.json, options.output and options.output / "results.json"]):
        write_json(path, content)
    if options.output:
        write_text(options.output / "results.md", markdown(rows, request.metrics, request.settings))


def markdown(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], settings: Mapping[str, str]) -> str:
    """Formats the table, the best model of every set and level in bold, and what the numbers depend on."""
    lines = []
    for row in rows:
        rivals = [
            other for other in rows
            if (other["data"], other["degraded"]) == (row["data"], row["degraded"]) and other["model"] != page.INPUT
        ]  # fmt: skip
        cells = [literal(row["data"]), literal(row["degraded"]), str(row["images"]), literal(row["model"])]
        for name in metrics:
            text, sign = METRICS[name].text(row[name]), 1 if METRICS[name].higher_is_better else -1
            best = max((sign * other[name] for other in rivals if not math.isnan(other[name])), default=None)
            wins = len(rivals) > 1 and row["model"] != page.INPUT and sign * row[name] == best
            cells.append(f"**{text}**" if wins else text)
        lines.append(cells)
    headings = ["data", "degraded", "images", "model", *(METRICS[name].heading for name in metrics)]
    about = [f"- {literal(name)}: {literal(value)}" for name, value in settings.items()]
    return "\n".join([table(headings, lines, align="llrl" + "r" * len(metrics)), "", *about]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sharding.use_all_cores()
    try:
        request = prepare(options)
        for folder in filter(None, [options.output, options.json and options.json.parent]):
            folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:  # caused by the user's input; a traceback would hide the message
        commandline.fail(str(error))
    for name, entry in request.models.items():
        one, size = entry.loaded, models.count_params(entry.loaded.model.params)
        print(f"{name}: {one.path}, {one.model.arch}, {size:,} parameters, {one.layout} layout,")
        print(f"  weights under {one.key!r}, sha256 {one.sha256}")
    try:
        with cost.telling_out_of_memory():
            run(request, options)
    except (data.ImageError, OSError) as error:
        commandline.fail(str(error))
    except cost.OutOfMemory as error:
        advice = "give a smaller --tile" if options.tile else "give --tile 256, to restore images in tiles"
        commandline.fail(f"out of memory: {error}; {advice}")


if __name__ == "__main__":
    commandline.run(main)
