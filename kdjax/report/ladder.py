"""The report of a study: what each way of distilling gains over training without a teacher.

Numbers in, Markdown and a picture out. A result describes one run:

    {"column": "output", "seed": 0, "psnr": 30.41, "ssim": 0.871, "psnr_student_teacher": 38.2, "steps": 3000,
     "macs_per_step": 2.1e9, "curve": [[500, 29.8], ...]}

Differences are between runs of the same seed, which saw the same images in the same order and, unless a column starts
elsewhere, had the same initial weights. The spread is the standard deviation of those differences over the seeds.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdjax.files import finite, printable, whole_file, write_json, write_text
from kdjax.markdown import literal, table

log = logging.getLogger("kdjax")

SCRATCH = "scratch"  # the column that all others are compared with

Result = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One column of a study over its seeds; PSNR in dB. `gain` and `gap_closed` are None without a scratch run."""

    column: str
    seeds: tuple[int, ...]
    psnr: float
    psnr_spread: float
    ssim: float
    gain: float | None
    gain_spread: float | None
    gap_closed: float | None
    psnr_student_teacher: float
    steps: int
    gigamacs: float  # of the whole training: steps x multiply-accumulates per step, in 1e9


def write(name: str, results: Sequence[Result], workdir: Path) -> None:
    """Writes a study's `results.json` and `results.md`, and `results.png` if matplotlib is installed.

    Args:
      results: as above, plus `teacher_psnr`, `input_psnr`, `images`, and `student` and `teacher` in words.
    """
    teacher_psnr = statistics.fmean(result["teacher_psnr"] for result in results)
    input_psnr = statistics.fmean(result["input_psnr"] for result in results)
    rows = summarise(results, teacher_psnr)
    account = {
        "teacher_psnr": teacher_psnr,
        "input_psnr": input_psnr,
        "rows": [dataclasses.asdict(row) for row in rows],
        "results": results,
    }
    write_json(workdir / "results.json", finite(account))
    text = markdown(rows, teacher_psnr=teacher_psnr, input_psnr=input_psnr)
    student, teacher = literal(results[0]["student"]), literal(results[0]["teacher"])
    about = f"{student}; {results[0]['images']} validation images; teacher {teacher}."
    write_text(workdir / "results.md", f"# {literal(name)}\n\n{text}\nStudent: {about}\n")
    try:
        with whole_file(workdir / "results.png") as temporary:
            plot(rows, results, temporary, teacher_psnr=teacher_psnr)
    except ImportError:
        log.info("no plot: matplotlib is not installed (pip install 'kdjax[plot]')")


def summarise(results: Sequence[Result], teacher_psnr: float) -> list[Row]:
    """Returns a row per column, in order of first appearance.

    gap closed = (psnr - scratch) / (teacher - scratch): 0 is no gain, 1 matches the teacher.
    """
    scratch = {result["seed"]: result["psnr"] for result in results if result["column"] == SCRATCH}
    rows = []
    for column in dict.fromkeys(result["column"] for result in results):
        runs = sorted((r for r in results if r["column"] == column), key=lambda run: run["seed"])
        gains = [run["psnr"] - scratch[run["seed"]] for run in runs if run["seed"] in scratch]
        gaps = [teacher_psnr - scratch[run["seed"]] for run in runs if run["seed"] in scratch]
        mean = lambda name, runs=runs: statistics.fmean(run[name] for run in runs)  # noqa: E731
        rows.append(
            Row(
                column=column,
                seeds=tuple(run["seed"] for run in runs),
                psnr=mean("psnr"),
                psnr_spread=_spread([run["psnr"] for run in runs]),
                ssim=mean("ssim"),
                gain=statistics.fmean(gains) if gains else None,
                gain_spread=_spread(gains) if gains else None,
                gap_closed=statistics.fmean(gains) / statistics.fmean(gaps)
                if gains and statistics.fmean(gaps)
                else None,
                psnr_student_teacher=mean("psnr_student_teacher"),
                steps=runs[0]["steps"],
                gigamacs=mean("macs_per_step") * runs[0]["steps"] / 1e9,
            )
        )
    return rows


def markdown(rows: Sequence[Row], *, teacher_psnr: float, input_psnr: float) -> str:
    """Formats the table, scratch first and then columns by decreasing gain, with notes on how to read it."""
    base = next((row.gigamacs for row in rows if row.column == SCRATCH), None)
    ordered = sorted(rows, key=lambda row: (row.column != SCRATCH, -(row.gain if row.gain is not None else row.psnr)))
    lines = []
    for row in ordered:
        is_other = row.column != SCRATCH and row.gain is not None
        lines.append(
            [
                literal(row.column),
                f"{row.psnr:.3f} ± {row.psnr_spread:.3f}",
                f"{row.gain:+.3f} ± {row.gain_spread:.3f}" if is_other else "",
                f"{100 * row.gap_closed:.1f} %" if is_other and row.gap_closed is not None else "",
                f"{row.ssim:.4f}",
                f"{row.psnr_student_teacher:.2f}",
                f"{row.steps:,}",
                f"{row.gigamacs / base:.2f}" if base else "",
            ]
        )
    header = ["column", "PSNR", "gain over scratch", "gap closed", "SSIM", "PSNR(student, teacher)", "steps", "compute"]
    seeds = sorted({seed for row in rows for seed in row.seeds})
    incomplete = [f"{literal(row.column)} ({len(row.seeds)})" for row in rows if len(row.seeds) < len(seeds)]
    text = (
        f"Teacher {teacher_psnr:.3f} dB, input {input_psnr:.3f} dB. Mean over the seeds {', '.join(map(str, seeds))} ±"
        " standard deviation; the gain's is that of the differences between runs of one seed. Compute is the"
        " multiply-accumulates of the whole training, 1 for scratch."
    )
    if base is None:
        text = f"Highest: {literal(ordered[0].column)}. {text}"
    if incomplete:
        text += f" Fewer seeds so far: {', '.join(incomplete)}."
    return f"{table(header, lines, align='lrrrrrrr')}\n\n{text}\n"


def plot(rows: Sequence[Row], results: Sequence[Result], path: Path, *, teacher_psnr: float) -> None:
    """Draws the gain of every run over scratch, and the mean PSNR by training step.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["text.parse_math"] = False  # a $ in a column's name is a plain $
    ordered = sorted(rows, key=lambda row: row.gain if row.gain is not None else row.psnr)
    scratch = {result["seed"]: result["psnr"] for result in results if result["column"] == SCRATCH}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.4 * len(rows) + 2.2), layout="constrained")
    for position, row in enumerate(ordered):
        runs = [result for result in results if result["column"] == row.column]
        values = [run["psnr"] - scratch.get(run["seed"], math.nan) if scratch else run["psnr"] for run in runs]
        left.plot(values, [position] * len(values), "o", color="C0", alpha=0.5)
        left.plot([statistics.fmean(values)], [position], "|", color="black", markersize=14, markeredgewidth=2)
    left.set_yticks(range(len(ordered)), [printable(row.column) for row in ordered])
    left.set_xlabel("PSNR - PSNR of scratch, dB: every seed, and their mean" if scratch else "PSNR, dB")
    left.axvline(0, color="grey", linewidth=1) if scratch else None
    left.grid(axis="x", alpha=0.3)
    for i, row in enumerate(reversed(ordered)):
        curves = [dict(map(tuple, result["curve"])) for result in results if result["column"] == row.column]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        means = [statistics.fmean(curve[step] for curve in curves) for step in steps]
        style = dict(color="black", linewidth=2) if row.column == SCRATCH else dict(color=f"C{i % 10}")
        right.plot(steps, means, marker=".", label=printable(row.column), **style)
    right.axhline(teacher_psnr, color="grey", linestyle="--", linewidth=1)
    right.annotate("teacher", (0, teacher_psnr), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    right.set_xscale("log")  # a column of equal compute can be many times as long as the others
    right.set_xlabel("training step")
    right.set_ylabel("PSNR of the EMA student, dB")
    right.grid(alpha=0.3)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _spread(values: Sequence[float]) -> float:
    """Returns the standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
