"""The parts of the endurance benchmark that decide: which events come, and whether two runs are equal."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from test_checkpoint import make_state

from kdjax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.once

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import soak

    return soak


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What matters of a finished run."""
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    rows = [{"step": 1, "loss/total": 0.5, "images_per_second": 9.0}, {"step": 2, "loss/total": 0.25}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run" / "student.pth").write_bytes(b"weights")
    return tmp_path / "run"


def test_events_follow_from_the_seed_and_every_kind_comes(soak: ModuleType) -> None:
    first, again, other = (list(itertools.islice(soak.schedule(seed, 3.0), 16)) for seed in (0, 0, 1))
    assert first == again != other
    assert {event.kind for event in first[:8]} == {event.kind for event in first[8:]} == set(soak.KINDS)
    assert all(0 <= event.delay < 6 for event in first)


def speed(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("9.0", "8.0"))


def loss(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace("0.25", "0.2500001"))


def twice(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + text.splitlines(keepends=True)[-1])


def state(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with Checkpoints(run / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(2, make_state(2, "adamw", weight_decay=0.1))


def student(run: Path) -> None:
    (run / "student.pth").write_bytes(b"Weights")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (speed, None),
        (loss, "metrics.jsonl: step 2 differs in loss/total"),
        (twice, r"other lines in metrics.jsonl: .*only in the second \[\(False, 2\)\]"),
        (state, "the last checkpoints"),
        (student, "student.pth differs"),
    ],
)
def test_differences_are_found(
    soak: ModuleType, run: Path, tmp_path: Path, change: Callable[[Path], None], found: str | None
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    change(other)
    differences = soak.differences(run, other)
    assert (differences == []) if found is None else re.search(found, "; ".join(differences))
