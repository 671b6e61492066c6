"""Shrinks a model: a smaller, faster one of the same architecture that approximates it, without training.

    python -m kdjax.shrink --model teacher.pth --data photographs --sigma 25 --speedup 4 --output student.pth
    python -m kdjax.shrink --model x4plus.pth --lq small_photographs --size num_block=12 --output student.pth
    python -m kdjax.shrink --model ffdnet.pth --data photographs --sigma 0 50 --blind --speedup 4 --output student.pth

A few images are needed: clean ones, which get noise, or degraded ones as they are. Without sizes, several ways to meet
the speed-up or the cost are tried, by measured time on this device, and the one nearest to the model is taken. The
result is an ordinary weight file; train it on with student.weights=student.pth.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import commandline, cost, data, metrics, models, validation
from kdjax.assets import MODEL_HELP, TRAIN_PHOTOGRAPHS, locate
from kdjax.models import Model, shrinking
from kdjax.models.shrinking import Trace
from kdjax.noise_level import estimate_sigma
from kdjax.weights import check_target, load_weights, save_model, weights_options
from kdjax.weights.hparams import parse_hparams

SIDE = 64  # of the crops that layers are fitted to, pixels of lq
MEASURED, _MEASURED_SIDE = 8, 128  # images kept for measuring, and the side of their centre crops
_LATENCY_SIDE = 128  # of the image whose time is measured
_REPEATS = 5
_WIDTHS = ("num_feat", "num_grow_ch")
_TRIAL = 4  # trials are fitted to this part of the images


class BudgetError(ValueError):
    """No smaller model meets the budget; the message names the nearest."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Crops (b, h, w, c) to fit layers to, and images for measuring: lq in about [0, 1], gt uint8 or None.

    `fitted_sigma` (b,) and `measured_sigma` are their noise levels, for models that are told.
    """

    fitted: jax.Array
    fitted_sigma: jax.Array
    measured: list[np.ndarray]
    measured_sigma: list[float]
    gt: list[np.ndarray] | None

    @classmethod
    def of_lq(cls, fitted: np.ndarray, measured: Sequence[np.ndarray]) -> Images:
        """Returns degraded images, float in about [0, 1], with their noise levels estimated."""
        sigma = jnp.array([estimate_sigma(image) for image in fitted])
        return cls(jnp.asarray(fitted), sigma, list(measured), [estimate_sigma(image) for image in measured], None)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a student may cost, as parts of the teacher's: multiply-accumulates, or measured time."""

    macs: float | None = None
    latency: float | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
    """A student, its time as a part of the teacher's, and its mean PSNR to the teacher's images, in dB."""

    model: Model
    part: float
    psnr: float


def load_images(
    clean: str | None, lq: str | None, sigma: tuple[float, float], model: Model, *, limit: int = 0
) -> Images:
    """Reads images: `clean` with noise, or `lq` as they are. Some are kept for measuring.

    The noise's `sigma` (0..255 scale) is drawn for each crop between the two given, and is spread over them in the
    images that are kept.

    `limit` is the number of crops to fit layers to; 0 takes as many as memory and time allow.

    Raises:
      DataError: a folder or an image cannot be used, or there are fewer than two images.
    """
    pairs = data.find_pairs(gt=locate(lq or clean or "", TRAIN_PHOTOGRAPHS), what="shrinking")
    if len(pairs) < 2:
        raise data.DataError(f"shrinking needs at least two images, one of them for measuring; {pairs[0].gt} is one")
    images = [image.gt for image in data.load_images(data.spread(pairs, 400), channels=model.network.channels)]
    every = max(4 if len(images) >= 8 else 2, len(images) // MEASURED)
    held_out = images[::every][:MEASURED]
    rest = [image for i, image in enumerate(images) if i % every or i // every >= MEASURED]
    side = min(SIDE, *(min(image.shape[:2]) for image in images))
    random = np.random.default_rng(0)
    crops = []
    most = shrinking.num_images(model, side)
    for i in range(min(limit or most, most)):
        image = rest[i % len(rest)]
        top, left = (random.integers(extent - side + 1) for extent in image.shape[:2])
        crops.append(image[top : top + side, left : left + side] / np.float32(255))
    fitted = np.stack(crops)
    gt = [_centre(image) for image in held_out]
    if lq:
        return Images.of_lq(fitted, [image / np.float32(255) for image in gt])
    sigmas = random.uniform(*sigma, len(fitted)).astype(np.float32)
    fitted = fitted + random.normal(0, 1, fitted.shape).astype(np.float32) * (sigmas[:, None, None, None] / 255)
    levels = [float(level) for level in np.linspace(*sigma, len(gt))]
    noisy = [validation.add_noise(image, level) for image, level in zip(gt, levels, strict=True)]
    return Images(jnp.asarray(fitted), jnp.asarray(sigmas), noisy, levels, gt)


def _centre(image: np.ndarray) -> np.ndarray:
    top, left = (max(0, extent - _MEASURED_SIDE) // 2 for extent in image.shape[:2])
    return image[top : top + _MEASURED_SIDE, left : left + _MEASURED_SIDE]


def restored(model: Model, images: Images) -> list[np.ndarray]:
    """Returns the model's uint8 images of those for measuring, in order."""
    apply = model.network.make_apply()
    outputs = dict(validation.restore(apply, model.params, images.measured, images.measured_sigma))
    return [outputs[i] for i in range(len(images.measured))]


def psnr(images: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """Returns the mean PSNR of uint8 images, in dB."""
    return statistics.fmean(map(metrics.psnr, images, others))


class Clock:
    """Compares the time of smaller models with that of the teacher, in turns, so that other load affects both alike."""

    def __init__(self, teacher: Model) -> None:
        self._run = self._compiled(teacher)
        self._parts: dict[models.Network, float] = {}

    def part(self, model: Model) -> float:
        """Returns the model's time for one image as a part of the teacher's; the median over the turns.

        A network is timed once, whatever its weights.
        """
        if model.network not in self._parts:
            runs = {"teacher": self._run, "student": self._compiled(model)}
            seconds = cost.time_in_turns(runs, repeats=_REPEATS, warm_up=1)
            pairs = zip(seconds["student"], seconds["teacher"], strict=True)
            self._parts[model.network] = statistics.median(student / teacher for student, teacher in pairs)
        return self._parts[model.network]

    def _compiled(self, model: Model) -> Callable[[], object]:
        return cost.compile_model(model, (1, _LATENCY_SIDE, _LATENCY_SIDE, model.network.channels)).run


def shrink(
    teacher: Model,
    images: Images,
    budget: Budget,
    *,
    blind: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[Model, list[Trial]]:
    """Returns the student that is nearest to the teacher of those that meet the budget, and all that were tried.

    Each way of being smaller, alone and together with the others, is taken as large as the budget allows. With `blind`,
    the student is not told the noise level, even if the teacher is.

    Raises:
      BudgetError: none meets it.
      ValueError: the architecture cannot be shrunk.
    """
    trace = shrinking.trace(teacher, images.fitted, images.fitted_sigma)
    count = max(1, len(images.fitted) // _TRIAL)
    part = images.fitted[:count], images.fitted_sigma[:count]
    of_part = Trace({path: output[:count] for path, output in trace.outputs.items()}, trace.weights)
    wanted = restored(teacher, images)
    clock = Clock(teacher)
    trials: list[Trial] = []
    nearest = 1.0
    for sizes in ways(teacher):
        student, reached = _largest(teacher, trace, sizes, budget, clock, blind)
        nearest = min(nearest, reached)
        if student is None or any(student.hparams == trial.model.hparams for trial in trials):
            continue
        fitted = shrinking.fit(teacher, student.network, *part, known=of_part)
        trial = Trial(fitted, clock.part(fitted), psnr(restored(fitted, images), wanted))
        trials.append(trial)
        tell(f"{_sizes(teacher, trial.model)}: {1 / trial.part:.1f}x faster, {trial.psnr:.2f} dB to the model")
    if not trials:
        kind, asked = ("MACs", budget.macs) if budget.macs else ("time", budget.latency)
        raise BudgetError(
            f"no {teacher.arch} with smaller {', '.join(shrinking.structure_of(teacher).sizes)} takes {asked:.3g} of"
            f" the model's {kind}; the nearest takes {nearest:.3g}"
        )
    best = max(trials, key=lambda trial: trial.psnr)
    return shrinking.fit(teacher, best.model.network, images.fitted, images.fitted_sigma, known=trace), trials


def ways(teacher: Model) -> Iterator[tuple[str, ...]]:
    """Yields the sets of sizes that can be made smaller together.

    Not ranks with a width: both make the same convolutions narrower, and together they were always far behind.
    """
    structure = shrinking.structure_of(teacher)
    sizes = structure.sizes
    for count in range(len(sizes) if structure.is_joint else 1, len(sizes) + 1):
        for way in itertools.combinations(sizes, count):
            if "ranks" not in way or not {*_WIDTHS} & {*way}:
                yield way


def scaled(teacher: Model, trace: Trace, sizes: Sequence[str], part: float) -> dict[str, Any]:
    """Returns hyper-parameters with each of these sizes reduced to about `part` of the teacher's.

    Channels are multiples of 4. Of every level that has blocks, one stays. `ranks` are given to the inner convolutions
    of a stack by what they explain.
    """
    hparams = dict(teacher.hparams)
    for name in sizes:
        if name == "ranks":
            continue
        full = hparams[name]
        least = {"depth": 2}.get(name, 1)
        if isinstance(full, tuple):
            hparams[name] = tuple(min(count, max(1, round(part * count))) for count in full)
        elif name in _WIDTHS:
            hparams[name] = min(full, max(4, 4 * round(part * full / 4)))
        else:
            hparams[name] = min(full, max(least, round(part * full)))
    if "ranks" in sizes and part < 1:
        hparams["ranks"] = shrinking.spread_ranks(teacher, trace, hparams, part)
    return hparams


def blinded(teacher: Model) -> dict[str, Any]:
    """Returns the hyper-parameters of a network like the teacher that is not told the noise level.

    Raises:
      ValueError: the teacher is not told either.
    """
    if not teacher.network.takes_sigma:
        raise ValueError(f"this {teacher.arch} is blind already: it is not told the noise level")
    return dict.fromkeys(shrinking.structure_of(teacher).inputs, False)


def _largest(
    teacher: Model, trace: Trace, sizes: Sequence[str], budget: Budget, clock: Clock, blind: bool
) -> tuple[Model | None, float]:
    """Returns the largest student within the budget, untrained, or None; and the least part of the cost seen."""
    macs = _macs(teacher.network)
    limit = budget.macs or budget.latency or 1.0
    asked, best, nearest = limit, None, 1.0
    for _ in range(4):
        network = _by_macs(teacher, trace, sizes, asked * macs, blind)
        of_macs = _macs(network) / macs
        if budget.macs:
            return (network.init(jax.random.key(0)) if of_macs <= limit else None), of_macs
        model = network.init(jax.random.key(0))
        reached = clock.part(model)
        nearest = min(nearest, reached)
        if reached <= limit:
            best = model
            if reached > 0.9 * limit:
                break
        asked *= 0.98 * limit / reached
        if asked >= 1:
            break
    return best, nearest


def _by_macs(teacher: Model, trace: Trace, sizes: Sequence[str], limit: float, blind: bool) -> models.Network:
    """Returns the network of the largest part whose multiply-accumulates are within the limit, or the smallest one."""

    def network(part: float) -> models.Network:
        return shrinking.check(teacher, scaled(teacher, trace, sizes, part) | (blinded(teacher) if blind else {}))

    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        if _macs(network(middle)) <= limit:
            low = middle
        else:
            high = middle
    return network(low)


@functools.cache
def _macs(network: models.Network) -> int:
    return network.count_macs(_LATENCY_SIDE, _LATENCY_SIDE)  # traces it, and the same sizes are asked for repeatedly


def _sizes(teacher: Model, student: Model) -> str:
    changed = {name: value for name, value in student.hparams.items() if value != teacher.hparams[name]}
    return " ".join(f"{name}={_short(value)}" for name, value in changed.items()) or "all sizes kept"


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.shrink", __doc__)
    add = parser.add_argument
    add("--model", required=True, help=MODEL_HELP)
    add("--output", required=True, help="file to write: .pth or .safetensors")
    add("--data", help='folder of clean images, or "embedded"')
    add(
        "--sigma",
        type=float,
        nargs="+",
        metavar="SIGMA",
        help="standard deviation of the noise to add to them, on the scale of 0 to 255; two for a range",
    )
    add("--lq", help="folder of degraded images, instead of --data")
    add("--speedup", type=float, help="how many times faster, measured on this device")
    add("--macs", type=float, help="part of the multiply-accumulates, such as 0.25")
    add("--size", action="append", default=[], metavar="NAME=VALUE", help="a size of your own, such as num_block=12")
    add("--blind", action="store_true", help="a student that is not told the noise level, of a model that is")
    add("--crops", type=int, default=0, help=f"fit to at most this many crops of {SIDE} pixels; 0 takes enough")
    parser.add_weights_options()
    return parser


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (options.data is None) == (options.lq is None):
        parser.error("give either --data DIR, with --sigma, or --lq DIR")
    if (options.data is None) != (options.sigma is None):
        parser.error("--data and --sigma go together")
    if options.sigma is not None:
        levels = " ".join(f"{sigma:g}" for sigma in options.sigma)
        if len(options.sigma) > 2 or not all(0 <= sigma <= 255 for sigma in options.sigma):
            parser.error(f"--sigma {levels} must be one or two numbers from 0 to 255")
        options.sigma = min(options.sigma), max(options.sigma)
    if sum((options.speedup is not None, options.macs is not None, bool(options.size))) != 1:
        parser.error("give one of --speedup, --macs and --size")
    if options.crops < 0:
        parser.error(f"--crops {options.crops} must be 0 or more")
    if options.speedup is not None and not 1 < options.speedup < 1000:
        parser.error(f"--speedup {options.speedup:g} must be more than 1 and less than 1000")
    if options.macs is not None and not 0 < options.macs < 1:
        parser.error(f"--macs {options.macs:g} must be between 0 and 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse_options(arguments)
    started = time.monotonic()
    try:
        check_target(options.output)
        loaded = load_weights(options.model, **weights_options(options))
        teacher = loaded.model
        print(f"{loaded.path}: {teacher.arch}, {models.count_params(teacher.params):,} parameters")
        sizes = parse_hparams(options.size)
        network = shrinking.check(teacher, teacher.hparams | sizes | (blinded(teacher) if options.blind else {}))
        images = load_images(options.data, options.lq, options.sigma or (0.0, 0.0), teacher, limit=options.crops)
        if sizes:
            student = shrinking.fit(teacher, network, images.fitted, images.fitted_sigma)
        else:
            budget = Budget(options.macs, options.speedup and 1 / options.speedup)
            tell = lambda line: print(f"  {line}", flush=True)  # noqa: E731
            student, _ = shrink(teacher, images, budget, blind=options.blind, tell=tell)
        save_model(student, options.output)
    except (ValueError, OSError, cost.OutOfMemory) as error:
        commandline.fail(str(error))
    _report(teacher, student, images)
    print(f"{options.output}: {_sizes(teacher, student)}, {time.monotonic() - started:.0f} s")


def _report(teacher: Model, student: Model, images: Images) -> None:
    """Prints cost and quality of both, measured in turns."""
    rows = cost.measure({"model": teacher, "student": student}, size=(_LATENCY_SIDE, _LATENCY_SIDE), repeats=_REPEATS)
    wanted = restored(teacher, images)
    print(f"         parameters       GMAC  time at {_LATENCY_SIDE}x{_LATENCY_SIDE}  PSNR on {len(wanted)} images")
    for row, model in zip(rows, (teacher, student), strict=True):
        outputs = restored(model, images)
        quality = "" if images.gt is None else f"{psnr(outputs, images.gt):.2f} dB"
        if model is student:
            quality += f"{', ' if quality else ''}{psnr(outputs, wanted):.2f} dB to the model"
        timing = row.timing
        took = "out of memory" if timing is None else f"{timing.milliseconds.median:.1f} ms"
        if timing is not None and timing.speed_up is not None and model is student:
            took += f" ({timing.speed_up.median:.1f}x faster)"
        print(f"{row.model:<8} {models.count_params(model.params):>10,} {row.macs / 1e9:>10.2f}  {took}  {quality}")


if __name__ == "__main__":
    commandline.run(main)
