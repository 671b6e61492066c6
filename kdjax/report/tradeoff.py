"""The report of a comparison: quality against cost. Numbers in, Markdown and a picture out."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdjax import cost
from kdjax.cost import Cost
from kdjax.files import printable
from kdjax.markdown import literal, table

_COLUMNS = 120  # of a terminal; tables fit into it while names have at most 22 letters


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model in the comparison: its short name, where it comes from, what it is."""

    name: str
    is_teacher: bool
    path: str
    sha256: str
    key: str
    arch: str
    hparams: dict[str, Any]
    parameters: int
    scale: int
    channels: int


@dataclasses.dataclass(frozen=True)
class Quality:
    """A model's quality on a set of images.

    Attributes:
      psnr, ssim: means over the images, PSNR in dB.
      gap: PSNR of the first teacher - PSNR of this model, in dB.
      psnr_to_teacher: PSNR between this model's images and the first teacher's, in dB; infinite for the teacher itself.
    """

    model: str
    psnr: float
    ssim: float
    gap: float
    psnr_to_teacher: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All measurements of a comparison.

    Attributes:
      machine: from `cost.describe_machine`.
      subjects: starting with the first teacher, which all others are compared with.
      repeats: passes of each model at each size.
      costs: of every model at every size, batch size and precision; those measured together are adjacent.
      images: what quality was measured on, in a few words; "" if it was not.
      quality: of every model; empty if it was not measured.
      allocator_peak: from `cost.allocator_peak`, after all costs.
    """

    machine: dict[str, Any]
    subjects: list[Subject]
    repeats: int
    costs: list[Cost]
    images: str
    quality: list[Quality]
    allocator_peak: int | None


def markdown(comparison: Comparison) -> str:
    """Formats the conditions, and tables of the models, their costs at each size, and their quality."""
    machine, peak = comparison.machine, comparison.allocator_peak
    load = machine["load_average"]
    busy = "" if load is None else f", load average {load:.1f} at the start"
    where = (
        f"{machine['device']} ({machine['platform']}, {machine['cores']} CPU cores{busy}), jax {machine['jax']}, "
        f"{machine['date']}."
    )
    how = (
        f"Times are medians (and quartiles) of {comparison.repeats} passes, the models in turns; speed-up is against "
        f"the first model, turn by turn. GMAC: multiply-accumulates of one image, in 1e9. MiB: the peak "
        "that XLA plans, weights, input, output and all in between. MP/s: megapixels of input."
    )
    parts = [
        "# Comparison",
        textwrap.fill(where, _COLUMNS),
        _models_table(comparison.subjects),
        *(f"## {name}\n\n{_costs_table(rows)}" for name, rows in _groups(comparison.costs).items()),
        textwrap.fill(how, _COLUMNS),
    ]
    if peak is not None:
        parts.append(f"The device's allocator counted {_short(peak / 2**20)} MiB at most, over the whole run.")
    if comparison.quality:
        parts.append(f"## Quality: {literal(comparison.images)}\n\n{_quality_table(comparison.quality)}")
    return "\n\n".join(parts) + "\n"


def plot(comparison: Comparison, path: Path) -> None:
    """Draws quality against cost or, without quality, the latencies.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if no model has a latency.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["text.parse_math"] = False  # a $ in a model's name is a plain $
    groups = _groups([row for row in comparison.costs if row.timing])
    if not groups:
        raise ValueError("no model fitted into memory, so there is nothing to plot")
    draw = _draw_quality if comparison.quality else _draw_latency
    figure = draw(pyplot, comparison, groups)
    machine = comparison.machine
    figure.supxlabel(f"{machine['device']}, jax {machine['jax']}, {machine['date'][:10]}", fontsize=8, color="grey")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _groups(costs: Sequence[Cost]) -> dict[str, list[Cost]]:
    """Groups what was measured together, under a name for it."""
    groups: dict[str, list[Cost]] = {}
    for row in costs:
        groups.setdefault(f"{row.height}x{row.width}, batch {row.batch}, {row.dtype}", []).append(row)
    return groups


def _models_table(subjects: Sequence[Subject]) -> str:
    rows = [
        [
            literal(subject.name),
            "teacher" if subject.is_teacher else "student",
            literal(subject.arch),
            subject.sha256[:12],
            f"{subject.parameters:,}",
            _short(subjects[0].parameters / subject.parameters),
        ]
        for subject in subjects
    ]
    return table(["model", "role", "network", "sha256", "parameters", "times fewer"], rows, align="llllrr", pad=True)


def _costs_table(costs: Sequence[Cost]) -> str:
    rows = []
    for row in costs:
        timing = row.timing
        rows.append(
            [
                literal(row.model),
                _short(row.macs / 1e9),
                _short(row.memory.peak / 2**20) if row.memory else "",
                _spread(timing.milliseconds) if timing else literal(row.problem.partition(":")[0]),
                _short(timing.images_per_second) if timing else "",
                _short(timing.megapixels_per_second) if timing else "",
                _spread(timing.speed_up) if timing and timing.speed_up else "",
                _short(row.compile_seconds) if row.compile_seconds is not None else "",
            ]
        )
    header = ["model", "GMAC", "MiB", "latency, ms", "images/s", "MP/s", "speed-up", "compile, s"]
    return table(header, rows, align="lrrrrrrr", pad=True)


def _quality_table(quality: Sequence[Quality]) -> str:
    rows = [
        [
            literal(row.model),
            f"{row.psnr:.2f}",
            f"{row.ssim:.4f}",
            f"{row.gap:.2f}",
            "" if row is quality[0] else f"{row.psnr_to_teacher:.2f}",
        ]
        for row in quality
    ]
    return table(["model", "PSNR, dB", "SSIM", "gap, dB", "PSNR to the teacher, dB"], rows, align="lrrrr", pad=True)


def _short(value: float) -> str:
    """Formats to three significant digits, keeping all those before the point: 0.0123, 1.23, 12.3, 1,234."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(0, digits)}f}"


def _spread(values: cost.Quartiles) -> str:
    return f"{_short(values.median)} ({_short(values.low)}-{_short(values.high)})"


def _draw_quality(pyplot: Any, comparison: Comparison, groups: dict[str, list[Cost]]) -> Any:
    """Plots PSNR against latency and multiply-accumulates, at the largest size that most models ran at."""
    rank = lambda rows: (rows[0].dtype == "float32", len(rows), rows[0].height * rows[0].width, -rows[0].batch)  # noqa: E731
    name = max(groups, key=lambda name: rank(groups[name]))
    rows = groups[name]
    teachers = {subject.name for subject in comparison.subjects if subject.is_teacher}
    psnr = {quality.model: quality.psnr for quality in comparison.quality}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for number, row in enumerate(rows):
        role, marker = ("teacher", "s") if row.model in teachers else ("student", "o")
        style = dict(color=f"C{number % 10}", fmt=marker, markersize=8, alpha=0.8, capsize=3, label=role)
        left.errorbar([_latency(row).median], [psnr[row.model]], xerr=_bars([row]), **style)
        right.errorbar([row.macs / 1e9], [psnr[row.model]], **style)
    left.set_xlabel(f"latency, ms: median and quartiles ({name})")
    right.set_xlabel(f"GMAC of one image of {rows[0].height}x{rows[0].width}")
    left.set_ylabel("PSNR, dB")
    by_role = dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    right.legend(by_role.values(), by_role.keys(), loc="lower right")  # where cost is high and quality low
    for axes in (left, right):
        axes.margins(x=0.15, y=0.2)
        axes.grid(axis="y", alpha=0.3)
        _use_log_axis(axes)
    _label_points(left, [(_latency(row).median, psnr[row.model], row.model) for row in rows])
    _label_points(right, [(row.macs / 1e9, psnr[row.model], row.model) for row in rows])
    figure.suptitle(printable(comparison.images), fontsize=10)
    return figure


def _draw_latency(pyplot: Any, comparison: Comparison, groups: dict[str, list[Cost]]) -> Any:
    """Plots the latency of every model, one below the other, at every size, batch size and precision."""
    place = {subject.name: -number for number, subject in enumerate(comparison.subjects)}
    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 0.12 * len(place) * (len(groups) + 2)), layout="constrained")
    for number, (name, rows) in enumerate(groups.items()):
        medians = [_latency(row).median for row in rows]
        lane = 0.25 - 0.5 * (number + 0.5) / len(groups)  # offset, so that equal latencies all stay visible
        style = dict(color=f"C{number % 10}", fmt="o", capsize=3, label=name)
        axes.errorbar(medians, [place[row.model] + lane for row in rows], xerr=_bars(rows), **style)
    axes.set_yticks(list(place.values()), list(map(printable, place)))
    axes.set_ylim(min(place.values()) - 0.5, 0.5)
    axes.set_xlabel("latency, ms: median and quartiles")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    _use_log_axis(axes)
    return figure


def _latency(row: Cost) -> cost.Quartiles:
    """Returns the latency of a row; all rows that are drawn have one."""
    assert row.timing is not None, row.model
    return row.timing.milliseconds


def _bars(rows: Sequence[Cost]) -> list[list[float]]:
    """Returns the distances from the medians to the lower and upper quartiles, in ms."""
    spreads = [_latency(row) for row in rows]
    return [[each.median - each.low for each in spreads], [each.high - each.median for each in spreads]]


def _use_log_axis(axes: Any) -> None:
    """Makes the x axis logarithmic, with plain numbers at 1, 2, 5, 10 and so on."""
    from matplotlib import ticker

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(axis="x", alpha=0.3)


def _label_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Labels points (x, y, name) in colours C0, C1, ..., towards the middle and without overlap."""
    axes.autoscale_view()
    points = [(x, y, printable(name)) for x, y, name in points]
    middle = math.sqrt(math.prod(axes.get_xlim()))
    taken: list[tuple[float, float]] = []  # positions of labels, in points of 1/72 inch
    for number, (x, y, name) in enumerate(points):
        across, up = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        steps = (8, -15, 19, -26, 30, -37, 41)  # a line is 11 points
        free = (s for s in steps if all(abs(across - a) > 90 or abs(up + s - u) >= 10 for a, u in taken))
        step = next(free, steps[0])
        taken.append((across, up + step))
        align = dict(ha="left") if x < middle else dict(ha="right")
        shift = (8 if x < middle else -8, step)
        axes.annotate(
            printable(name), (x, y), shift, textcoords="offset points", fontsize=9, color=f"C{number % 10}", **align
        )
