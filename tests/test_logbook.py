"""metrics.jsonl: what a killed run leaves behind, and what a resumed one makes of it."""

import json
from pathlib import Path

import pytest

from kdjax.training.logbook import Logbook


def open_logbook(workdir: Path, resume_step: int) -> Logbook:
    return Logbook(workdir, resume_step=resume_step, name="test", tensorboard=False, wandb="")


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("left", [b'{"step": 4, "lo', b"\0" * 100, b"\xff\xfe"])
def test_continuing_keeps_the_lines_up_to_its_step(tmp_path: Path, left: bytes) -> None:
    with open_logbook(tmp_path, 0) as logbook:
        for step in (1, 2, 3):
            logbook.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(left)  # killed while writing
    with open_logbook(tmp_path, 2) as logbook:
        assert logbook.has(2, "loss") and not logbook.has(3, "loss") and not logbook.has(2, "other")
        logbook.write(3, {"loss": 30.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]


def test_a_damaged_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.1}\n\0\0\xff\n[]\n{"step": 3, "loss": 0.3}\n')
    with open_logbook(tmp_path, 3) as logbook:
        assert logbook.has(3, "loss")
    assert rows(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 3, "loss": 0.3}]
    assert caplog.text.count("is damaged and was skipped") == 2


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    for _ in range(2):
        with open_logbook(tmp_path, 0) as logbook:
            logbook.write(1, {"loss": 1.0})
    assert len(rows(tmp_path)) == 1


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    with open_logbook(tmp_path, 0) as logbook:
        logbook.write(1, {"a": float("nan"), "b": float("inf")})
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None}]
