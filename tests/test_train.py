"""The training program as its users meet it: a subprocess with flags, files in, files and one line out."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import programs
import pytest
from PIL import Image
from test_config import load
from test_models import TINY

from kdjax import config, data, models, train
from kdjax.files import LOCK, locked, whole_file, write_json
from kdjax.training import folder as run_files
from kdjax.training import loop, preparation
from kdjax.training.logbook import Logbook
from kdjax.training.monitor import Monitor
from kdjax.weights import load_model, load_weights, save_model

RECIPE = (
    "--config=configs/denoise.py:debug",
    f"--config.teacher.weights={programs.SMALL_TEACHER}",
    "--config.log.diagnose=False",  # a second compilation; see test_methods.py
)
TIMES = ("images_per_second",)  # the only numbers that two equal runs may not share


def started(workdir: Path, *flags: str, **options: Any) -> contextlib.AbstractContextManager[programs.Program]:
    """The recipe in a process of its own; without `JAX_NUM_CPU_DEVICES` every core is one device."""
    return programs.started("kdjax.train", *RECIPE, "--workdir", workdir, *flags, **options)


def run(workdir: Path, *flags: str, code: int = 0, **options: Any) -> str:
    """Runs it to the end and returns what it printed."""
    with started(workdir, *flags, **options) as program:
        assert program.wait() == code, program.printed
        return program.printed


def rows(workdir: Path) -> list[dict]:
    """The numbers of a run, without those that measure time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole run of 12 steps, and its output."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    return workdir, run(workdir, "--config.train.steps=12", "--config.log.tensorboard=True")


@pytest.mark.once
def test_report_progress_and_result_are_printed(finished: tuple[Path, str]) -> None:
    workdir, output = finished
    teacher = load_weights(programs.SMALL_TEACHER)
    devices = max(n for n in range(1, min(len(os.sched_getaffinity(0)), 4) + 1) if 4 % n == 0)  # every core is one
    assert f"devices: {devices} x cpu" in output and f"batch 4 = {4 // devices} per device" in output
    assert f"sha256 {teacher.sha256}" in output and f"weights under '{teacher.key}'" in output
    assert "srvggnetcompact" in output and "GMAC at 256x256" in output
    assert "dB, its input" in output and "DOES NOT IMPROVE" not in output
    assert "step 12/12  loss " in output and "task " in output and "output " in output and "0:00:00 left" in output
    assert f"saved as {workdir / 'student.pth'}" in output.splitlines()[-1]
    assert "\r" not in output and "Traceback" not in output
    assert (workdir / "train.log").read_text().splitlines()[-1] in output


def test_numbers_are_written_by_step(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    training = [row for row in rows(workdir) if "loss/total" in row]
    validation = [row for row in rows(workdir) if "val/student_psnr" in row]
    assert [row["step"] for row in training] == [row["step"] for row in validation] == [2, 4, 6, 8, 10, 12]
    for row in training:
        total = sum(row[f"loss/{name}"] * row[f"weight/{name}"] for name in ("task", "output"))
        assert row["loss/total"] == pytest.approx(total, rel=1e-5)
    assert validation[-1]["val/teacher_psnr"] > validation[-1]["val/input_psnr"] + 3


def test_files_of_a_finished_run(finished: tuple[Path, str]) -> None:
    workdir, _ = finished
    model = load_model(workdir / "student.pth")
    same = load_model(workdir / "student.safetensors")
    assert (model.arch, model.hparams) == (same.arch, same.hparams)
    assert model.hparams["num_feat"] == 8
    with Image.open(next((workdir / "val" / "0000012").iterdir())) as picture:
        assert picture.size == (4 * 32 + 3 * 4, 32)  # input, student, teacher, clean
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 12
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} >= {10, 12}
    events = next((workdir / "tensorboard").iterdir()).read_bytes()
    assert b"loss/total" in events and b"val/student_psnr" in events


@pytest.mark.once
def test_starting_a_finished_run_again_changes_nothing_and_writes_what_is_gone(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    before = {path: path.read_bytes() for path in workdir.glob("student.*")} | {"rows": rows(workdir)}
    (workdir / "student.pth").unlink()
    output = run(workdir, "--config.train.steps=12")
    assert "continuing at step 12" in output
    assert {path: path.read_bytes() for path in workdir.glob("student.*")} | {"rows": rows(workdir)} == before


@pytest.mark.once
def test_files_that_a_power_cut_emptied_are_written_again(finished: tuple[Path, str], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    small = ("run.json", "config.json", "result.json", "baseline.json")
    everything = (*small, "student.pth", "student.safetensors")
    before = {name: (workdir / name).read_bytes() for name in everything} | {"rows": rows(workdir)}
    for i, name in enumerate(small):
        (workdir / name).write_bytes(b"\0" * 100 * (i % 2))
    output = run(workdir, "--config.train.steps=12", "--config.log.tensorboard=True")
    assert all(f"WARNING: {workdir / name} is damaged" in output for name in small), output
    assert {name: (workdir / name).read_bytes() for name in everything} | {"rows": rows(workdir)} == before


def test_one_run_a_folder_and_no_files_of_others(finished: tuple[Path, str], tmp_path: Path) -> None:
    with locked(finished[0]):
        output = run(finished[0], "--config.train.steps=12", code=1)
    assert f"{finished[0]} is being written by process {os.getpid()} on " in output.splitlines()[-1]
    setup, _ = prepared()
    for name in run_files.RUN_FILES:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(config.ConfigError, match=rf"{name} holds {name}, which kdjax would overwrite"):
            run_files.claim(setup, folder)
        assert {path.name for path in folder.iterdir()} == {name}


@pytest.mark.once
def test_killed_and_started_again_gives_the_numbers_of_an_unbroken_run(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """SIGKILL at three moments: while compiling, after a few steps, during a validation or checkpoint."""
    workdir = tmp_path / "run"
    for seen in ("training 12 steps", "step 4/12", "validation at step 8"):
        with started(workdir, "--config.train.steps=12") as program:
            program.wait_for(seen)
            program.kill()
            program.wait()
    # What a kill in the middle of a line leaves behind.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss/to')
    (workdir / "val" / "0000012").mkdir(parents=True)
    with whole_file(workdir / "val" / "0000012" / "0.png") as temporary:
        temporary.touch()
    temporary.touch()
    run(workdir, "--config.train.steps=12")
    assert rows(workdir) == rows(finished[0])
    assert [path.name for path in workdir.rglob(".*")] == [LOCK]
    assert (workdir / "student.pth").read_bytes() == (finished[0] / "student.pth").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_in_order(finished: tuple[Path, str], tmp_path: Path, number: int) -> None:
    workdir = tmp_path / "run"
    # Steps of their own length, so that the signal comes before the end.
    flags = ("--config.train.steps=100000", "--config.val.every=100000", "--config.checkpoint.every=100000")
    with started(workdir, *flags) as program:
        program.wait_for("step 6/100,000")
        os.killpg(program.pid, number)  # as a terminal does
        assert program.wait(120) == 128 + number, program.printed
        output = program.printed
    assert "Traceback" not in output
    assert f"stopped by {signal.Signals(number).name} at step " in output.splitlines()[-1]
    step = int(output.splitlines()[-1].split("at step ")[1].split(" ")[0].replace(",", ""))
    assert (workdir / "checkpoints" / str(step)).is_dir()


def test_four_devices_train_like_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    output = run(workdir, "--config.train.steps=12", JAX_NUM_CPU_DEVICES="4")
    assert "devices: 4 x cpu" in output and "batch 4 = 1 per device" in output
    for ours, theirs in zip(rows(workdir), rows(finished[0]), strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def test_without_distillation_no_teacher_is_loaded(tmp_path: Path) -> None:
    output = run(tmp_path / "run", "--config.terms.output.weight=0.", "--config.teacher.weights=missing.pth")
    assert "teacher" not in output
    assert "weight/output" not in rows(tmp_path / "run")[0]


@pytest.mark.once
def test_a_diverging_run_stops_with_step_and_values_and_keeps_its_good_checkpoints(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    run(workdir)
    output = run(workdir, "--config.train.steps=8", "--config.train.lr.value=1e38", code=1)
    assert "config changed since the last start: train.lr.value: 0.0002 -> 1e+38" in output
    assert "error: step " in output and "loss or its gradient is not finite (" in output and "Traceback" not in output
    assert {path.name for path in (workdir / "checkpoints").iterdir()} <= {"2", "4", "6"}


@pytest.mark.once
def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"student": {}, "teacher": None})
    (tmp_path / "train.log").symlink_to("/dev/full")
    output = run(tmp_path, code=1)
    message = f"error: [Errno 28] No space left on device: make room in {tmp_path}; run the same command to continue"
    assert output.splitlines()[-1] == message and "Traceback" not in output


# The training program, on a disk that is full whenever a picture is written.
NO_ROOM_FOR_PICTURES = """
import os, runpy
from PIL import Image
def save(*_, **__): raise OSError(28, os.strerror(28))
Image.Image.save = save
runpy.run_module("kdjax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.once
def test_no_room_for_pictures_of_the_validation_is_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-c", NO_ROOM_FOR_PICTURES, *RECIPE, "--workdir", tmp_path]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {tmp_path}/val/0000002/[^/]+: cannot be written: No space left on device: .*", message
    )
    assert message.endswith(f": make room in {tmp_path}; run the same command to continue")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config.train.stpes=4",), "did you mean 'steps'"),
        (("--config.train.steps=many",), "many"),
        (("--config.data.batch_size=6",), "config.data.batch_size=6 does not divide by the 4 devices; use 4"),
        (
            ("--config.train.accumulate=3",),
            "batch_size=4 does not divide by the 4 devices and the 3 parts of config.train.accumulate; use 12",
        ),
        (("extra",), "unrecognized arguments: extra"),
        (("--config.seed=1", "extra"), "unrecognized arguments: extra"),
        (("--config.log.diagnose", "maybe"), "config.log.diagnose"),
        (("--config", "configs/denoise.py:quik"), "error: configs/denoise.py: there is no variant 'quik'"),
    ],
)
def test_refusals_are_one_message(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    with started(tmp_path / "run", *flags, JAX_NUM_CPU_DEVICES="4") as program:
        assert program.wait(120) in (1, 2)
        assert message in program.printed and "Traceback" not in program.printed
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_too_little_memory_is_one_message_with_what_helps(tmp_path: Path) -> None:
    """The step takes about twice what the process may have."""
    output = run(tmp_path / "run", "--config.data.crop=2048", limits={resource.RLIMIT_AS: 6 << 30}, code=1)
    assert "Traceback" not in output, output
    message = output.splitlines()[-1]
    assert re.match(r"error: out of memory: a step takes [\d.]+ GiB, the machine has 6.00 GiB; ", message), output
    assert "train.accumulate=2" in message and "student.remat=True" in message and "data.crop (now 2048)" in message


def prepared(**changes: dict) -> tuple[preparation.Setup, Monitor]:
    values = load("denoise", "debug").to_dict()
    values["teacher"]["weights"] = str(programs.SMALL_TEACHER)
    for section, entries in changes.items():
        values[section].update(entries)
    setup = preparation.prepare(config.parse(values))
    return setup, Monitor(setup.config.val, setup.student, setup.teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"weights": ""}}, "set config.teacher.weights"),
        ({"teacher": {"weights": "missing.pth"}}, "missing.pth"),
        ({"teacher": {"key": "parms"}}, "params"),
        ({"student": {"arch": "SRVGGNet"}}, "did you mean 'srvggnetcompact'"),
        ({"student": {"hparams": {"num_feats": 8}}}, "did you mean 'num_feat'"),
        ({"student": {"hparams": {"upscale": 2}}}, "enlarge"),
        ({"student": {"arch": "dncnn", "hparams": {"num_in_ch": 1}}}, "colour channels"),
        ({"terms": {"task": {"criterion": "l1", "weight": 1.0, "epsilon": 1}}}, "epsilon"),
        ({"degrade": {"name": "awgn", "sigma": 400.0}}, "from 0 to 255"),
        ({"data": {"gt": "no/such/folder"}}, "no/such/folder"),
        ({"val": {"gt": "no/such/folder"}}, "no/such/folder"),
        ({"train": {"accumulate": 0}}, r"config.train.accumulate=0 must be from 1 to"),
        ({"train": {"optimizer": "sgd"}}, "unknown optimizer 'sgd'"),
        ({"log": {"wandb": "project"}}, r"wandb, which is not installed: pip install 'kdjax\[wandb\]'"),
        ({"train": {"lr": {"name": "cosine", "value": 1.0}}}, "steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes: dict, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        prepared(**changes)


def test_a_teacher_that_does_not_denoise_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    untrained = models.network("dncnn", dict(num_feat=4, depth=2)).init(jax.random.key(0))
    save_model(untrained, tmp_path / "untrained.pth")
    _, monitor = prepared(teacher={"weights": str(tmp_path / "untrained.pth")})
    monitor.report()
    assert "DOES NOT IMPROVE ITS INPUT" in caplog.text


@pytest.mark.once
def test_a_student_that_is_stuck_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its zero last convolution returns the input; the teacher as a student is well above any linear filter."""
    setup, monitor = prepared(student={"arch": "dncnn", "hparams": {"num_feat": 4, "depth": 2}})
    params = jax.tree.map(np.zeros_like, setup.student.params)
    teacher = load_model("fast")
    changes = {"arch": teacher.arch, "hparams": teacher.hparams, "weights": "fast"}
    taught, its_monitor = prepared(student=changes)
    with Logbook(tmp_path, resume_step=0, name="run", tensorboard=False, wandb="") as logbook:
        for step, warns in ((499, False), (500, True)):
            caplog.clear()
            monitor.validate(step, params, tmp_path, logbook)
            assert ("THE STUDENT IS STUCK" in caplog.text) == warns
        assert re.search(r"improves its input by 0.00 dB, a linear filter of 5x5 pixels by [78]\.", caplog.text)
        caplog.clear()
        its_monitor.validate(500, taught.student.params, tmp_path, logbook)
        assert "STUCK" not in caplog.text


def test_another_student_or_teacher_does_not_continue_a_run(finished: tuple[Path, str]) -> None:
    setup, _ = prepared(student={"arch": "dncnn", "hparams": {"num_feat": 4, "depth": 3}})
    with pytest.raises(config.ConfigError, match=r"another student: .*srvggnetcompact.* before, .*dncnn"):
        run_files.check_same_run(setup, finished[0])


@pytest.mark.parametrize("arch", TINY)
def test_any_student_continues_its_run(arch: str, tmp_path: Path) -> None:
    """Its hyper-parameters may be lists, which JSON has in place of tuples, and may have become more since."""
    student = models.network(arch, TINY[arch]).init(jax.random.key(0))
    setup = SimpleNamespace(student=student, teacher=None, config=config.parse({}))
    run_files.claim(setup, tmp_path)
    run_files.check_same_run(setup, tmp_path)
    entry = json.loads((tmp_path / "run.json").read_text())
    given = entry["student"]["hparams"] = {name: entry["student"]["hparams"][name] for name in TINY[arch]}
    write_json(tmp_path / "run.json", entry)
    run_files.check_same_run(setup, tmp_path)
    given[next(name for name, value in given.items() if type(value) is int)] += 1
    write_json(tmp_path / "run.json", entry)
    with pytest.raises(config.ConfigError, match="another student"):
        run_files.check_same_run(setup, tmp_path)


def photographs(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        data.write_image(folder / f"{i}.png", rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))


@pytest.mark.once
def test_damaged_training_images_are_named_and_counted(tmp_path: Path) -> None:
    photographs(tmp_path / "gt", 5)
    (tmp_path / "gt" / "3.png").write_bytes((tmp_path / "gt" / "3.png").read_bytes()[:200])
    output = run(tmp_path / "run", f"--config.data.gt={tmp_path / 'gt'}", "--config.data.batch_size=8")
    assert output.count("damaged training image 3.png") == 1
    assert rows(tmp_path / "run")[-2]["damaged_images"] == 1


@pytest.mark.once
def test_paired_folders_train_and_validate(tmp_path: Path) -> None:
    photographs(tmp_path / "gt", 4)
    (tmp_path / "lq").mkdir()
    for path in (tmp_path / "gt").iterdir():
        shutil.copy(path, tmp_path / "lq" / f"{path.stem}_noisy.png")
    section = {"gt": str(tmp_path / "gt"), "lq": str(tmp_path / "lq"), "filename_tmpl": "{}_noisy"}
    setup, monitor = prepared(data=section, val=section)
    (tmp_path / "run").mkdir()
    summary = train.train(setup, monitor, tmp_path / "run")
    assert "input inf dB / 1.0000" in summary  # equal pairs


def test_a_run_can_start_from_a_file(tmp_path: Path, finished: tuple[Path, str]) -> None:
    setup, _ = prepared(student={"weights": str(finished[0] / "student.pth")})
    started = load_model(finished[0] / "student.pth").params
    jax.tree.map(np.testing.assert_array_equal, setup.student.params, started)
    with pytest.raises(ValueError, match="num_feat=4, but the file says 8"):
        prepared(student={"weights": str(finished[0] / "student.pth"), "hparams": {"num_feat": 4, "upscale": 1}})


def test_time_left_is_not_shown_before_a_step_was_timed() -> None:
    setup, _ = prepared(train={"steps": 250_000}, terms={"output": {"weight": 0.0}})
    timer = loop.StepTimer(setup.config, 0)
    values = {"loss/total": 0.5, "loss/task": 0.5, "weight/task": 1.0, "lr": 1e-3}
    timer.count()
    time.sleep(0.01)
    line = loop.describe(1, {"student": setup}, {"student": values}, timer.pace)
    assert line == "step 1/250,000  loss 0.50000  task 0.50000 x1  lr 1.00e-03"
    timer.count()
    timed = loop.describe(2, {"student": setup}, {"student": values}, timer.pace)
    assert re.search(r"lr 1.00e-03  [\d.]+ images/s  [\d:]+ left$", timed)
    both = loop.describe(2, {"a": setup, "b": setup}, {"a": values, "b": values}, timer.pace)
    assert re.match(r"step 2/250,000  a: loss 0.50000  b: loss 0.50000  [\d.]+ images/s", both)
