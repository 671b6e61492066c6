"""The account of a comparison: tables that fit a terminal, and pictures with every model in them."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from kdjax import cost
from kdjax.report import tradeoff
from kdjax.report.tradeoff import Comparison, Quality, Subject

NAMES = ("teachers_of_22_letters", "students_of_22_letters", "tiny")
MACHINE = dict(
    device="A processor", platform="cpu", cores=2, load_average=0.25, jax="0.10.2", date="2026-11-25T12:00:00"
)


def spread(median: float) -> cost.Quartiles:
    return cost.Quartiles(0.9 * median, median, 1.2 * median)


def row(name: str, milliseconds: float, *, side: int, dtype: str = "float32") -> cost.Cost:
    timing = cost.Timing([milliseconds / 1000], spread(milliseconds), 12345.6, 1234.5, spread(1234.5))
    memory = cost.Memory(1, 2, 3, 6 << 30)
    return cost.Cost(name, side, side, 1, dtype, 43_700_000_000, 12.3, memory, timing)


@pytest.fixture
def comparison() -> Comparison:
    latencies = dict(zip(NAMES, (12345.6, 1234.5, 0.0123), strict=True))
    costs = [row(name, value, side=side) for side in (64, 4096) for name, value in latencies.items()]
    costs.append(cost.Cost(NAMES[0], 8192, 8192, 16, "float32", 10**13, problem="out of memory: it takes 3 GiB"))
    costs.append(row(NAMES[1], 3.0, side=8192))
    quality = [Quality(NAMES[0], 31.33, 0.8852, 0.0, float("inf")), Quality(NAMES[1], 30.35, 0.8576, 0.98, 37.0)]
    quality.append(Quality(NAMES[2], 30.34, 0.8575, 0.99, 36.9))
    subjects = [
        Subject(n, n == NAMES[0], "x.pth", 64 * "f", "params", "srvggnetcompact", {}, 12_345_678, 1, 3) for n in NAMES
    ]
    return Comparison(MACHINE, subjects, 20, costs, "a set, 68 images, sigma 25", quality, 7 << 20)


def test_tables_fit_120_columns_and_say_everything(comparison: Comparison) -> None:
    text = tradeoff.markdown(comparison)
    assert max(map(len, text.splitlines())) <= 120
    assert "| 12,346 (11,111-14,815) |" in text and "1,234 (1,111-1,481)" in text and "0.0123 (0.0111-0.0148)" in text
    assert "A processor (cpu, 2 CPU cores, load average 0.2 at the start), jax 0.10.2" in text
    assert text.count("\n## ") == 5  # sizes and batches, quality
    assert "counted 7.00 MiB" in text
    (failed,) = (line for line in text.splitlines() if "out of memory" in line)
    cells = [cell.strip() for cell in failed.strip("|").split("|")]
    assert cells == [NAMES[0], "10,000", "", "out of memory", "", "", "", ""]
    quality = text.partition("## Quality: a set, 68 images, sigma 25\n")[2].splitlines()
    assert [cell.strip() for cell in quality[4].strip("|").split("|")] == [NAMES[1], "30.35", "0.8576", "0.98", "37.00"]
    assert quality[3].rstrip("| ").endswith("0.00")  # the teacher is not compared with itself


def test_columns_are_aligned(comparison: Comparison) -> None:
    blocks = tradeoff.markdown(comparison).split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 6
    for lines in tables:
        bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
        assert all(line == bars[0] for line in bars)


def test_nothing_is_said_about_what_was_not_measured(comparison: Comparison) -> None:
    text = tradeoff.markdown(dataclasses.replace(comparison, quality=[], images="", allocator_peak=None))
    assert "Quality" not in text and "counted" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1, "1.00"), (99.96, "100.0"), (1234.4, "1,234"), (0, "0")]
)
def test_three_digits(value: float, text: str) -> None:
    assert tradeoff._short(value) == text


def test_pictures(comparison: Comparison, tmp_path: Path) -> None:
    """With quality and without; the one with quality shows the largest size that all models ran at."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    groups = tradeoff._groups([each for each in comparison.costs if each.timing])
    figure = tradeoff._draw_quality(pyplot, comparison, groups)
    for axes in figure.axes:
        assert {text.get_text() for text in axes.texts} == set(NAMES)
        assert axes.get_xscale() == "log"
        heights = sorted(text.xy[1] for text in axes.texts)
        assert heights == [30.34, 30.35, 31.33]
    assert "4096x4096, batch 1, float32" in figure.axes[0].get_xlabel()
    latency = tradeoff._draw_latency(pyplot, comparison, groups)
    assert [label.get_text() for label in latency.axes[0].get_yticklabels()] == list(NAMES)
    assert len(latency.axes[0].get_legend().get_texts()) == 3
    pyplot.close("all")
    sizes = set()
    for quality in (comparison.quality, []):
        path = tmp_path / "picture.png"
        tradeoff.plot(dataclasses.replace(comparison, quality=quality), path)
        with Image.open(path) as picture:
            sizes.add(picture.size)
    assert len(sizes) == 2


def test_nothing_to_draw_is_an_error(comparison: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    costs = [dataclasses.replace(each, timing=None) for each in comparison.costs]
    with pytest.raises(ValueError, match="nothing to plot"):
        tradeoff.plot(dataclasses.replace(comparison, costs=costs), tmp_path / "picture.png")
