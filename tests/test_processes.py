"""Many devices and many processes: the numbers of one, one all-reduce a step, and an end in order when one is lost.

Run as a program, this file is what the tests start: with a folder it is one of several processes that try the ways of
agreeing, with `devices` it compares the step on one and on eight devices.
"""

import contextlib
import json
import math
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from programs import ROOT, Program, run, started

from kdjax import sharding
from kdjax.weights import load_model

GONE = ("another process of this run ended", "another task died")  # ours, and JAX's when it is faster


Start = Callable[..., list[Program]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command as so many processes with so many devices each; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def start_all(command: list[str], count: int, *, devices: int = 1, cwd: Path = ROOT) -> list[Program]:
            address = f"localhost:{random.SystemRandom().randint(20_000, 32_000)}"  # below the ports systems hand out
            variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
            variables["JAX_NUM_CPU_DEVICES"] = str(devices)
            return [
                stack.enter_context(started(*command, cwd=cwd, **variables, JAX_PROCESS_ID=str(i)))
                for i in range(count)
            ]

        yield start_all


def training(workdir: Path, *flags: str) -> list[str]:
    """The command for the debug recipe."""
    command = ["kdjax.train", "--config", "configs/denoise.py:debug", "--workdir", str(workdir)]
    options = ["--config.terms.output.weight=0.0", "--config.val.limit=3", "--config.val.every=4"]  # without teacher
    return [*command, "--config.log.diagnose=False", *options, *flags]


def outputs(processes: list[Program]) -> list[str]:
    """Waits for all of them and returns what each printed."""
    for process in processes:
        process.wait(timeout=200)
    return [process.printed for process in processes]


def rows(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: v for name, v in json.loads(line).items() if name != "images_per_second"} for line in lines]


@pytest.mark.once
def test_killed_stopped_and_continued_by_other_numbers_of_processes(tmp_path: Path, start: Start) -> None:
    """Four processes, one of which is killed; then two with two devices each, one of which is told to stop; then one:
    the numbers and the student are those of a run that was never broken.
    """
    workdir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    long = training(workdir, "--config.train.steps=100000")
    processes = start(long, 4)
    processes[0].wait_for("step 6/")  # the checkpoint of step 2 is whole before that of step 4 is begun
    processes[2].kill()
    killed = time.monotonic()
    printed = outputs(processes)
    assert time.monotonic() - killed < 60
    assert all(process.returncode != 0 for process in processes)
    assert GONE[0] in "".join(printed)
    for i in (0, 1, 3):
        assert any(text in printed[i] for text in GONE) and "Traceback" not in printed[i], printed[i]

    processes = start(long, 2, devices=2)
    processes[0].wait_for("  loss ")
    assert "continuing at step " in processes[0].printed
    processes[1].send_signal(signal.SIGTERM)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, first + second
    assert "stopped by SIGTERM at step " in first.splitlines()[-1] and "Traceback" not in first + second
    assert "loss " not in second  # only the first process talks
    step = int(first.splitlines()[-1].split("at step ")[1].split(" ")[0].replace(",", ""))
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == step

    steps = f"--config.train.steps={step + 2}"
    [output] = outputs(start(training(workdir, steps), 1))
    assert f"continuing at step {step}" in output and "saved as" in output, output
    outputs(start(training(unbroken, steps), 1))
    for ours, theirs in zip(rows(workdir), rows(unbroken), strict=True):
        for name, value in ours.items():
            assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (ours["step"], name)
    for name, leaf in leaves(workdir).items():
        np.testing.assert_allclose(leaf, leaves(unbroken)[name], atol=1e-5, err_msg=name)


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    import jax

    params = load_model(workdir / "student.pth").params
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_what_processes_must_agree_on(tmp_path: Path, start: Start) -> None:
    """See `as_one_of_several`, which two processes run."""
    processes = start(["test_processes", str(tmp_path)], 2, devices=2, cwd=Path(__file__).parent)
    first, second = (json.loads(text.splitlines()[-1]) for text in outputs(processes))
    assert first["exchanged"] == second["exchanged"] == [[0, 0.1 + 0.2], [1, 0.1 + 0.2]]
    assert first["nan"] and [first["share"], second["share"]] == [[0, 1], [2, 3, 4]]
    # Raised by the second process at its third step.
    assert first["flags"] == second["flags"] == [False] * 4 + [True]
    for name, wanted in {
        "problem": r"process 1 \(.*\): no images here",
        "facts": r"process 1 \(.*\) differs from process 0 \(.*\): config.data.crop: 128 -> 64\. Start the same",
        "unshared": r"process 1 \(.*\) does not see what process 0 \(.*\) writes to .*--workdir",
    }.items():
        assert re.match(wanted, first[name]) and re.match(wanted, second[name]), (first[name], second[name])
    assert first["agreed"] == second["agreed"] == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def as_one_of_several(folder: Path) -> dict[str, object]:
    """What this process learns from the others."""
    import jax

    from kdjax.training import agreement

    sharding.connect()
    index = jax.process_index()

    def failure(problem: str = "", facts: dict | None = None, workdir: Path = folder / "shared") -> str:
        try:
            agreement.check(problem, lambda: facts or {}, workdir)
        except sharding.AgreedError as error:
            return str(error)
        return ""

    agreement._PATIENCE = 0.0
    flag = sharding.SharedFlag(sharding.data_mesh())
    crops = {"config": {"data": {"crop": (128, 64)[index]}, "seed": 0}}
    return {
        "exchanged": sharding.exchange([index, 0.1 + 0.2]),
        "nan": all(math.isnan(value) for value in sharding.exchange(float("nan"))),
        "share": list(sharding.share(5)),
        "flags": [flag.update(index == 1 and step >= 2) for step in range(5)],
        "problem": failure(problem=("", "no images here")[index]),
        "facts": failure(facts=crops),
        "unshared": failure(workdir=folder / str(index)),
        "agreed": failure(facts={"same": [1, 2]}),
    }


def test_the_step_on_many_devices() -> None:
    """See `compare_devices`, which a process with eight devices runs."""
    done = run("test_processes", "devices", cwd=Path(__file__).parent, JAX_NUM_CPU_DEVICES="8")
    assert done.returncode == 0 and done.stdout.endswith("compared\n"), done.stdout + done.stderr


def compare_devices() -> None:
    """Equal numbers, one all-reduce and nothing else between devices, and the memory of one device."""
    import jax
    from test_distill import PAIR, TASK, Tiny, assert_trees_close

    from kdjax.degradations import cut

    tiny = Tiny()
    recipe = tiny.recipe()
    states, metrics, _ = tiny.run(recipe)
    many_states, many_metrics, _ = tiny.run(recipe, num_devices=8)
    assert_trees_close(many_states[-1].params, states[-1].params, 1e-5)
    assert_trees_close(many_metrics, metrics, 1e-5)

    # Noise and output loss; then what XLA alone would send around: loops and corners by sample, FFTs, bands.
    specs = {"task": TASK, "fft": dict(weight=0.1), "wavelet": dict(weight=0.1), "hint": dict(pairs=PAIR, weight=0.1)}

    def degrade(key: jax.Array, image: jax.Array, window: object = None) -> jax.Array:
        darker = jax.lax.fori_loop(0, jax.random.randint(key, (), 0, 4), lambda _, x: 0.9 * x, image)
        return cut(darker, window) if window else darker

    by_sample = tiny.recipe(specs, degrade=degrade, crop=8)
    compiled = {name: tiny.compiled(tried, 8) for name, tried in (("noise", recipe), ("by sample", by_sample))}
    trained = len(jax.tree.leaves(states[0].params["student"]))
    for name, step in compiled.items():
        sent = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", step.as_text())
        assert [kind for _, kind in sent] == ["all-reduce"], (name, sent)
        assert len(re.findall(r"f32\[[\d,]+\]", sent[0][0])) >= trained, name  # beside the scalars of the losses
    many, one = compiled["noise"].memory_analysis(), tiny.compiled(recipe, 1).memory_analysis()
    for kind in ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes"):
        assert getattr(many, kind) <= 1.02 * getattr(one, kind), kind
    print("compared")


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, ""),  # a shell of an allocation
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),  # a pod of its own
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
    ],
)
def test_launchers(variables: dict[str, str], launcher: str) -> None:
    assert sharding.launcher_of({"JAX_PLATFORMS": "cpu"} | variables) == launcher


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (("", 2, 0), {}, "coordinator address (missing)"),
        (("host:1", 2, None), {}, "number of this process (missing)"),
        (("host:1", None, None), {}, "no number of processes"),
        (("host:1", 2, 2), {}, "process_id=2 is not one of 0 ... 1"),
        (("host", 2, 0), {}, "'host' needs a port"),
        (("host:1", 2, None), {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first' is not a whole number"),
        (("", None, None), {"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI 5 does not tell its address"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple, variables: dict[str, str], message: str
) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # JAX itself refuses where a device was used before; so do these, before they get there.
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(sharding.ProcessError, match=re.escape(message)):
        sharding.connect(*arguments)


def test_alone_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    sharding.connect(count=1)
    assert sharding.is_first() and sharding.exchange({"a": 1}) == [{"a": 1}] and list(sharding.share(3)) == [0, 1, 2]
    assert sharding.SharedFlag(sharding.data_mesh()).update(True)
    assert not sharding.lost_another(ValueError("Gloo AllGather failed"))


if __name__ == "__main__":
    if sys.argv[1] == "devices":
        compare_devices()
    else:
        print(json.dumps(as_one_of_several(Path(sys.argv[1]))))
