"""Checkpoints: the latest and the best stay, states come back bit for bit, and other states are refused."""

import dataclasses
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore

from kdjax import commandline, distill, models
from kdjax.schedules import make_schedule
from kdjax.terms import make_terms
from kdjax.training.checkpoint import CheckpointError, Checkpoints


def make_state(step: int, optimizer: str = "adam", **options: float) -> distill.State:
    model = models.network("dncnn", dict(num_feat=2, depth=2)).init(jax.random.key(step))
    schedule = make_schedule(1.0)
    apply = model.network.make_apply()
    setting = distill.make_setting(apply, model.params, None, None, (1, 8, 8, 3), jax.random.key(0))
    terms = make_terms({"task": dict(criterion="l1", weight=1.0)}, setting)
    recipe = distill.Recipe(
        student=apply,
        teacher=None,
        terms=terms,
        optimizer=distill.make_optimizer(optimizer, schedule, **options),
        learning_rate=schedule,
        ema_decay=0.9,
    )
    state = distill.init_state(recipe, model.params)
    return dataclasses.replace(state, step=state.step + step)


def test_latest_and_best_stay(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest is None and checkpoints.best is None
        for step, psnr in [(1, 20.0), (2, 30.0), (3, None), (4, 25.0), (5, None)]:
            checkpoints.save(step, make_state(step), psnr=psnr)
    with Checkpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (5, 2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4", "5"}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = make_state(7)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(7, saved)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        restored = checkpoints.restore(make_state(0))
    assert int(restored.step) == 7
    jax.tree.map(np.testing.assert_array_equal, saved, restored)


def test_what_a_killed_run_left_half_written_is_not_taken(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest == 1


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1))
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(CheckpointError, match="does not fit this run"),
    ):
        checkpoints.restore(make_state(0, "adamw", weight_decay=0.1))


@pytest.mark.parametrize("file", ["default/manifest.ocdbt", "default/d/*", "default/_METADATA", "metrics/metrics"])
def test_a_damaged_checkpoint_is_put_aside_for_the_one_before(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step), psnr=20.0)
    damaged = next((tmp_path / "2").glob(file))
    os.truncate(damaged, damaged.stat().st_size // 2)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest == 1
        jax.tree.map(np.testing.assert_array_equal, make_state(1), checkpoints.restore(make_state(0)))
        checkpoints.save(2, make_state(2))
    assert "THE CHECKPOINT OF STEP 2 IS DAMAGED" in caplog.text and str(tmp_path / "2.damaged") in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged"}


def test_where_every_checkpoint_is_damaged_nothing_is_touched(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / step / "default" / "d")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read: .*to start over"):
        Checkpoints(tmp_path, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}


def test_a_checkpoint_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    """In a program of its own, since Orbax leaves coroutines behind, and a thread that waits for five minutes."""
    folder = tmp_path / "checkpoints"
    program = f"import pathlib, test_checkpoint as t; t.save_where_a_file_is_in_the_way(pathlib.Path({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 1
    message = result.stderr.splitlines()[0]
    assert (
        message.startswith(f"error: a checkpoint could not be written to {folder}: ") and "the same command" in message
    )


def test_checkpoints_leave_no_memory_behind(tmp_path: Path) -> None:
    """Counted in Python's memory blocks, since resident memory varies by megabytes.

    About 10 a checkpoint come from caches that fill; TensorStore's leaks would be 84 for the arrays and 270 besides.
    """

    def blocks_after(saves: int) -> int:
        with Checkpoints(tmp_path / next(names), keep=1) as checkpoints:
            for step in range(saves):
                checkpoints.save(step, dataclasses.replace(state, step=state.step + step), psnr=20.0 + step)
        gc.collect()
        return sys.getallocatedblocks()

    state, names = make_state(0), iter("abc")
    for _ in range(2):
        before = blocks_after(5)
    assert (blocks_after(20) - before) / 20 < 40


def test_tensorstore_describes_files_as_before(tmp_path: Path) -> None:
    """What does not leak gives the answers of what does, for files and for everything else."""
    with Checkpoints(tmp_path, keep=1):
        pass
    folder = "/tmp/ünï 'quoted'/"
    for spec in (
        {"driver": "file", "path": folder},
        {"driver": "file", "path": folder, "file_io_concurrency": {"limit": 3}},
        {"driver": "memory", "path": "a/../b"},
        {"driver": "ocdbt", "base": {"driver": "file", "path": folder}},
    ):
        described = tensorstore.KvStore.Spec(spec).to_json()
        assert described.items() >= spec.items(), spec


def save_where_a_file_is_in_the_way(folder: Path) -> None:
    """What the test above runs; ends as `kdjax.train` does."""
    try:
        with Checkpoints(folder, keep=1) as checkpoints:
            shutil.rmtree(folder)
            folder.write_text("in the way")
            checkpoints.save(1, make_state(1))
    except CheckpointError as error:
        commandline.fail(str(error), alone=True)
