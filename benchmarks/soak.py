"""Soak test: a training run that is killed, stopped, starved and damaged at random, next to one left alone:

    python benchmarks/soak.py --teacher teacher.pth --gt FOLDER --val FOLDER --minutes 60 --seed 0 --workdir DIR

Both runs are `python -m kdjax.train` with one config: a real teacher, real photographs (two of them damaged), a tiny
student, tiny crops, two data workers. The first run is on its own small disk (a tmpfs, if root may mount one) and is
hit by the events below, in an order and at times drawn from the seed; after each event the same command is started
again. The second run makes the same number of steps undisturbed, while its memory is monitored. At the end both must
have the same parameters, EMA, metrics.jsonl and student.pth, bit for bit. After every event the exit code and the
message must be those promised, the newest checkpoint at most one interval old, and no process or temporary file left.

    sigkill           SIGKILL to the program                    sigterm, sigint   it saves, exits with 0
    worker            SIGKILL to a data worker: an error        nan               one batch is NaN: an error
    full_disk         the disk is filled: an error, also when started again; then freed
    checkpoint        SIGKILL, then a file of the newest checkpoint is truncated: it resumes from the one before
    strays            SIGKILL, then partial lines and files that are not images appear

Not covered: power loss (files that were never flushed), flipped bits, and more than one process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.files import whole_file

KINDS = ("sigkill", "sigterm", "sigint", "worker", "nan", "full_disk", "checkpoint", "strays")
# What may differ between equal runs: time, and what a process has seen since it was started.
OF_THE_PROCESS = {"images_per_second", "damaged_images"}
CHECKPOINT_EVERY, VAL_EVERY, LOG_EVERY = 200, 1_000, 10
DISK_MB = 48
PATIENCE = 300  # seconds without a reaction before a program counts as hung; other load may slow it down a lot
ISOLATED = False  # whether this process may mount filesystems
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Event:
    """An event to inflict, `delay` seconds after training started; `number` seeds its random choices."""

    kind: str
    delay: float
    number: int


@dataclasses.dataclass
class Outcome:
    """The outcome of an event; `violations` is empty if everything was as promised."""

    kind: str
    step: int  # the last one logged before the event
    checkpoint: int | None  # the newest one after it
    exit_code: int | None
    note: str
    violations: list[str]


def schedule(seed: int, mean_delay: float, kinds: Sequence[str] = KINDS) -> Iterator[Event]:
    """Yields events forever: every kind in random order, over and over; delays are uniform from 0 to twice the mean."""
    rng = np.random.default_rng(seed)
    while True:
        for kind in rng.permutation(kinds):
            yield Event(str(kind), float(rng.uniform(0, 2 * mean_delay)), int(rng.integers(2**31)))


def patiently(seconds: float) -> Iterator[None]:
    """Yields every so often until the time has passed; time in which this program was suspended does not count."""
    while seconds > 0:
        yield
        time.sleep(0.2)
        seconds -= 0.2


class Run:
    """A training run in `folder`, started or resumed by `start`; its output goes to `log`."""

    def __init__(self, folder: Path, log: Path, flags: list[str]) -> None:
        self.folder, self._log, self._flags = folder, log, flags
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, steps: int = 10**9, nan_after: int = 0) -> None:
        """Starts or resumes the run, up to that step; with `nan_after`, the batch that many steps later is NaN."""
        program = [str(Path(__file__).resolve()), "--nan-after", str(nan_after)] if nan_after else ["-m", "kdjax.train"]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        self._from = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, *self._flags, f"--config.train.steps={steps}", f"--workdir={self.folder}"],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """Returns what the run printed since it was started."""
        with self._log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")

    def wait_to_train(self) -> bool:
        """Waits until the run has started training; false if it ended before."""
        for _ in patiently(PATIENCE):
            if "first step after" in self.output():
                return True
            if self.process.poll() is not None:
                break
        return False

    def wait(self, seconds: float) -> int | None:
        """Waits for the run to end; returns its exit code, or None if it is still running after that time."""
        for _ in patiently(seconds):
            if self.process.poll() is not None:
                break
        return self.process.returncode

    def kill(self) -> None:
        """Kills the run if it is still there."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def members(self) -> dict[int, str]:
        """Returns the state (R, S, Z, ...) of every process in the run's session: itself, its workers, its orphans."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:  # it just ended
                    continue
                if int(fields[3]) == self.process.pid:
                    found[int(folder.name)] = fields[0]
        return found

    def workers(self) -> list[int]:
        """Returns the processes that load images."""
        return sorted(pid for pid in self.members() if b"spawn_main" in _command(pid))

    def left_over(self) -> str:
        """Returns which processes outlive the run after some seconds' grace; reaps orphans that have ended."""
        for _ in patiently(30):
            for pid, state in self.members().items():
                if state == "Z":
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
            if not self.members():
                return ""
        return ", ".join(f"{pid} {state} {_command(pid).decode()[:60]}" for pid, state in self.members().items())

    def checkpoints(self) -> list[int]:
        """Returns the steps of the complete checkpoints."""
        folder = self.folder / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit()) if folder.exists() else []

    def logged_step(self) -> int:
        """Returns the step of the last complete line of the metrics at this moment."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def temporaries(self) -> list[str]:
        """Returns the run's files that have a temporary name."""
        found = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return [str(path) for path in found if path.name.startswith(".") or "tmp" in path.name]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return b""


def _rss_mb(pid: int) -> float | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS")), None)


class Memory:
    """Resident memory over time, of a run's main process and of its workers together, and its zombies."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []
        self.zombies = 0

    def sample(self, run: Run) -> None:
        workers = [size for pid in run.workers() if (size := _rss_mb(pid)) is not None]
        main = _rss_mb(run.process.pid)
        if main is not None and len(workers) == 2:
            self.samples.append((time.monotonic(), main, sum(workers)))
        if run.process.poll() is None:
            states = [state for pid, state in run.members().items() if pid != run.process.pid]
            self.zombies = max(self.zombies, states.count("Z"))

    def slopes(self) -> dict[str, float]:
        """Returns MB at the end, and MB/hour by least squares over all but the first quarter."""
        time_, main, workers = np.array(self.samples).T
        late = time_ > time_[0] + (time_[-1] - time_[0]) / 4
        hours = (time_[late] - time_[0]) / 3600
        result = {"fitted_minutes": float(hours[-1] - hours[0]) * 60}
        for name, sizes in (("main", main), ("workers", workers)):
            slope = float(np.polyfit(hours, sizes[late], 1)[0])
            result |= {f"{name}_mb": float(sizes[-1]), f"{name}_mb_per_hour": slope}
        return result


class Trouble:
    """Inflicts the events on a run and reports the outcome of each."""

    def __init__(self, run: Run, disk: Path | None, images: Path) -> None:
        self._run, self._disk, self._images = run, disk, images
        self._shared: list[str] = []  # shared memory segments that existed before
        self._cut = 0  # step of a checkpoint truncated since the last start

    def happen(self, event: Event) -> Outcome:
        """Starts the run, waits for the moment and inflicts the event.

        A third of the kills may come during start-up; everything else comes after the first step.
        """
        run, rng = self._run, np.random.default_rng(event.number)
        before = [step for step in run.checkpoints() if step != self._cut]
        was_cut, self._cut = self._cut, 0
        outcome = Outcome(event.kind, run.logged_step(), None, None, "", [])
        if event.kind == "full_disk" and self._disk is None:
            outcome.note = "skipped: no filesystem may be mounted here"
            outcome.checkpoint = before[-1] if before else None
            return outcome
        run.start(nan_after=1 + int(rng.integers(2 * CHECKPOINT_EVERY)) if event.kind == "nan" else 0)
        early = event.kind in ("sigkill", "checkpoint", "strays") and rng.random() < 1 / 3
        if not early:
            run.wait_to_train()
        ended = run.wait(PATIENCE if event.kind == "nan" else event.delay / 4 if early else event.delay)
        if event.kind == "nan":
            self._expect(outcome, ended, 1, "the loss or its gradient is not finite")
        elif ended is not None:
            outcome.violations.append(f"ended by itself with {ended}: {run.output()[-300:]!r}")
        else:
            outcome.step = run.logged_step()
            before = before if was_cut else run.checkpoints()
            getattr(self, f"_{event.kind}")(outcome, rng)
        if run.process.poll() is None:
            outcome.violations.append(f"it hangs, with processes in the states {run.members()}")
            run.process.kill()
            run.wait(PATIENCE)
        if left := run.left_over():
            outcome.violations.append(f"processes are left: {left}")
        before_that, self._shared = self._shared, _shared_memory()
        if shared := sorted(set(self._shared) - set(before_that)):
            outcome.violations.append(f"shared memory is left: {', '.join(shared)}")
        after = run.checkpoints()
        outcome.checkpoint = after[-1] if after else None
        oldest = before[-1] if before else 0
        if event.kind != "nan" and not was_cut:
            oldest = max(oldest, outcome.step - outcome.step % CHECKPOINT_EVERY - CHECKPOINT_EVERY)
        if (outcome.checkpoint or 0) < oldest:
            outcome.violations.append(f"the newest checkpoint is {outcome.checkpoint}, older than {oldest}")
        if event.kind == "checkpoint":
            self._cut_checkpoint(outcome, rng)
        return outcome

    def _expect(self, outcome: Outcome, code: int | None, wanted: int, message: str) -> None:
        outcome.exit_code = code
        said = self._run.output()
        if code != wanted:
            outcome.violations.append(f"exit code {code}, wanted {wanted}")
        if "Traceback" in said:
            outcome.violations.append(f"a traceback: {said[said.index('Traceback') :][:600]!r}")
        if message not in said:
            outcome.violations.append(f"{message!r} is not in {said[-300:]!r}")
        if wanted == 1:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            outcome.note = " ".join([outcome.note, *errors]).strip()
            if len(errors) != 1:
                outcome.violations.append(f"{len(errors)} lines of error")

    def _sigkill(self, outcome: Outcome, rng: np.random.Generator) -> None:
        self._run.process.kill()
        outcome.exit_code = self._run.wait(PATIENCE)

    def _sigterm(self, outcome: Outcome, rng: np.random.Generator) -> None:
        self._run.process.terminate()
        self._expect(outcome, self._run.wait(PATIENCE), 0, "stopped by SIGTERM at step")

    def _sigint(self, outcome: Outcome, rng: np.random.Generator) -> None:
        os.killpg(self._run.process.pid, signal.SIGINT)  # as Ctrl-C
        self._expect(outcome, self._run.wait(PATIENCE), 0, "stopped by SIGINT at step")

    def _worker(self, outcome: Outcome, rng: np.random.Generator) -> None:
        os.kill(int(rng.choice(self._run.workers())), signal.SIGKILL)
        self._expect(outcome, self._run.wait(PATIENCE), 1, "a process that loads training images was killed")

    def _full_disk(self, outcome: Outcome, rng: np.random.Generator) -> None:
        ballast = self._disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        try:
            self._expect(outcome, self._run.wait(PATIENCE), 1, "No space left on device")
            if self._run.process.poll() is not None:
                if left := self._run.left_over():
                    outcome.violations.append(f"processes are left: {left}")
                self._run.start()
                self._expect(outcome, self._run.wait(PATIENCE), 1, "No space left on device")
        finally:
            ballast.unlink()

    def _checkpoint(self, outcome: Outcome, rng: np.random.Generator) -> None:
        self._sigkill(outcome, rng)

    def _cut_checkpoint(self, outcome: Outcome, rng: np.random.Generator) -> None:
        """Truncates a file of the newest checkpoint, if there is another one to fall back to."""
        steps = self._run.checkpoints()
        if len(steps) < 2:
            outcome.note = "only one checkpoint: left alone"
            return
        folder = self._run.folder / "checkpoints" / str(steps[-1])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[rng.integers(len(files))]
        os.truncate(path, int(rng.integers(2)) * path.stat().st_size // 2)
        self._cut = steps[-1]
        outcome.note = f"cut {steps[-1]}/{path.relative_to(folder)} to {path.stat().st_size} bytes"

    def _strays(self, outcome: Outcome, rng: np.random.Generator) -> None:
        self._sigkill(outcome, rng)
        run = self._run.folder
        photograph = min(
            path for path in self._images.iterdir() if path.suffix in (".jpg", ".png") and path.stem[0] != "."
        )
        with (run / "train.log").open("ab") as file:
            file.write(b"12:34:56 step 1,2")
        if (run / "metrics.jsonl").exists():
            with (run / "metrics.jsonl").open("ab") as file:
                file.write([b'{"step": 99, "loss/to', b"\0" * 500, b"\xff\xfe\x80"][rng.integers(3)])
        half = photograph.read_bytes()[:1000]
        (self._images / f"{photograph.name}.part").write_bytes(half)  # a download in progress
        (self._images / f".{photograph.name}").write_bytes(half)
        (self._images / "notes.txt").write_text("no image")
        (run / "picture.png").write_bytes(half)
        (run / "checkpoints" / "notes.txt").write_text("no checkpoint")
        (run / "checkpoints" / "999999.orbax-checkpoint-tmp").mkdir(exist_ok=True)


def differences(left: Path, right: Path) -> list[str]:
    """Lists how two finished runs of one config differ, apart from speed; empty if they do not."""
    found = []
    if (left / "student.pth").read_bytes() != (right / "student.pth").read_bytes():
        found.append("student.pth differs")
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (left, right)]
    keys = [[("val/student_psnr" in row, row["step"]) for row in run] for run in rows]
    if keys[0] != keys[1]:
        counts = [Counter(run) for run in keys]
        only = {"only in the first": counts[0] - counts[1], "only in the second": counts[1] - counts[0]}
        found.append("other lines in metrics.jsonl: " + "; ".join(f"{n} {sorted(c)[:5]}" for n, c in only.items()))
    for one, two in zip(*rows, strict=False):
        names = [name for name in one | two if name not in OF_THE_PROCESS and one.get(name) != two.get(name)]
        if names:
            found.append(f"metrics.jsonl: step {one['step']} differs in {', '.join(names)}")
            break
    states = [_arrays(run) for run in (left, right)]
    if states[0].keys() != states[1].keys():
        found.append("the last checkpoints have other arrays")
    unequal = [name for name in states[0] if states[0][name] != states[1].get(name)]
    if unequal:
        found.append(f"the last checkpoints differ in {len(unequal)} arrays, first {unequal[0]}")
    return found


def _arrays(run: Path) -> dict[bytes, bytes]:
    """Returns the contents of a run's newest checkpoint, by name: step, parameters, EMA, optimizer."""
    import tensorstore

    newest = max((path for path in (run / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
    base = (newest / "default").resolve().as_uri() + "/"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    arrays = {name: store.read(name).result().value for name in store.list().result()}
    return {b"step": newest.name.encode()} | arrays


def photographs(source: Path, folder: Path, count: int) -> None:
    """Copies photographs evenly spread over the source, damaging two of them, as a user's might be."""
    files = sorted(path for path in source.iterdir() if path.suffix.lower() in (".jpg", ".png"))
    folder.mkdir(parents=True)
    for i in np.linspace(0, len(files) - 1, min(count, len(files))).round().astype(int):
        shutil.copyfile(files[i], folder / files[i].name)
    copied = sorted(folder.iterdir())
    copied[len(copied) // 3].write_bytes(copied[len(copied) // 3].read_bytes()[:2000])
    copied[len(copied) // 2].write_bytes(b"")


def isolate() -> bool:
    """Adopts the orphans of the runs, so that they can be seen and reaped; returns whether filesystems may be mounted.

    Mounts live in a private namespace of this process and its children and vanish with it. The runs get their own
    shared memory, free of other programs' segments.
    """
    libc, adopt, namespace = ctypes.CDLL(None, use_errno=True), 36, 0x20000  # PR_SET_CHILD_SUBREAPER, CLONE_NEWNS
    libc.prctl(adopt, 1, 0, 0, 0)
    if libc.unshare(namespace) != 0 or not shutil.which("mount"):
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    return private.returncode == 0 and mount_small(Path("/dev/shm"), 1024)


def mount_small(folder: Path, megabytes: int) -> bool:
    """Mounts an empty filesystem of that size on the folder."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _shared_memory() -> list[str]:
    """Lists the runs' shared memory; empty if it is shared with other programs."""
    return sorted(os.listdir("/dev/shm")) if ISOLATED else []


def train_with_nan(after: int, arguments: list[str]) -> None:
    """Runs `python -m kdjax.train` with one batch of NaN, `after` steps from its start."""
    from kdjax.data import TrainingData

    proper, count = TrainingData.__next__, 0

    def poisoned(self: TrainingData) -> dict[str, np.ndarray]:
        nonlocal count
        batch = proper(self)
        count += 1
        if count == after:
            batch["gt"] = np.full(batch["gt"].shape, np.nan, np.float32)
        return batch

    TrainingData.__next__ = poisoned
    sys.argv = ["kdjax.train", *arguments]
    runpy.run_module("kdjax.train", run_name="__main__", alter_sys=True)


def flags(options: argparse.Namespace, images: Path) -> list[str]:
    """Returns the command line of both runs, without the number of steps."""
    values = {
        "student.hparams.num_feat": 4,
        "student.hparams.num_conv": 2,
        "teacher.weights": options.teacher.resolve(),
        "data.gt": images,
        "data.crop": 16,
        "data.batch_size": 4,
        "data.workers": 2,
        "data.cache_mb": 64,
        "val.gt": options.val.resolve(),
        "val.crop": 64,
        "val.limit": 2,
        "val.save_images": 1,
        "val.every": VAL_EVERY,
        "train.lr.value": 1e-3,
        "log.every": LOG_EVERY,
        "log.diagnose": False,
        "checkpoint.every": CHECKPOINT_EVERY,
        "seed": options.seed,
    }
    return ["--config=configs/denoise.py:debug", *(f"--config.{name}={value}" for name, value in values.items())]


def unbroken(run: Run, memory: Memory, steps: int, every: float = 2.0) -> float:
    """Runs to the end, monitoring the memory; returns the seconds."""
    started = time.monotonic()
    run.start(steps=steps)
    while run.wait(every) is None:
        memory.sample(run)
    if run.process.returncode != 0 or "Traceback" in run.output():
        sys.exit(f"error: the unbroken run ended with {run.process.returncode}: {run.output()[-2000:]}")
    return time.monotonic() - started


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Performs both runs and returns the results."""
    begun = time.monotonic()
    workdir = options.workdir.resolve()
    workdir.mkdir(parents=True)
    images = workdir / "gt"
    photographs(options.gt, images, options.images)

    disk = workdir / "disk"
    disk.mkdir()
    small = ISOLATED and mount_small(disk, DISK_MB)
    violations: list[str] = []
    outcomes: list[Outcome] = []
    command = flags(options, images)
    broken = Run(disk / "broken", workdir / "broken.log", command)
    whole, memory = Run(workdir / "unbroken", workdir / "unbroken.log", command), Memory()
    try:
        trouble = Trouble(broken, disk if small else None, images)
        for event in schedule(options.seed, options.delay, options.kinds):
            outcome = trouble.happen(event)
            outcomes.append(outcome)
            state = "; ".join(outcome.violations) or "as promised"
            print(
                f"{len(outcomes):3} {outcome.kind:10} step {outcome.step:7,}  {outcome.note[:150]}  {state}", flush=True
            )
            if time.monotonic() - begun > 0.6 * options.minutes * 60:
                break
        # Only now is the number of steps known. The unbroken run has to make as many, without the restarts.
        steps = (broken.logged_step() // VAL_EVERY + 1) * VAL_EVERY
        broken.start(steps=steps)
        while broken.wait(1) is None:
            pass
        if broken.process.returncode != 0:
            violations.append(f"the last start ended with {broken.process.returncode}: {broken.output()[-500:]!r}")
        if left := broken.left_over():
            violations.append(f"processes are left: {left}")
        if left := broken.temporaries():
            violations.append(f"temporary files are left: {', '.join(left)}")
        taken = unbroken(whole, memory, steps)
        if memory.zombies:
            violations.append(f"up to {memory.zombies} zombies in the unbroken run")
        aside = sorted(path.name for path in (broken.folder / "checkpoints").glob("*.damaged"))
        violations += differences(whole.folder, broken.folder)
        shutil.copytree(broken.folder, workdir / "broken")
    finally:
        broken.kill()
        whole.kill()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    slopes = memory.slopes()
    for who in ("main", "workers"):
        if slopes[f"{who}_mb_per_hour"] > options.leak:
            violations.append(f"{who}: {slopes[f'{who}_mb_per_hour']:.0f} MB/hour, more than {options.leak:g}")
    return {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "grain", "numpy")}
        | {"python": platform.python_version()},
        "seed": options.seed,
        "minutes": (time.monotonic() - begun) / 60,
        "unbroken_minutes": taken / 60,
        "cpu_minutes": (used.ru_utime + used.ru_stime) / 60,
        "steps": steps,
        "memory": slopes,
        "put_aside": aside,
        "events": [dataclasses.asdict(outcome) for outcome in outcomes],
        "violations": violations,
    }


def table(result: dict[str, Any]) -> str:
    """Formats as Markdown how often each kind of event came and how often everything was as promised."""
    counts = Counter(event["kind"] for event in result["events"])
    good = Counter(event["kind"] for event in result["events"] if not event["violations"])
    lines = ["| event | times | as promised |", "| --- | --- | --- |"]
    lines += [f"| {kind} | {counts[kind]} | {good[kind]} |" for kind in KINDS]
    return "\n".join(lines)


def main() -> None:
    global ISOLATED
    if sys.argv[1:2] == ["--nan-after"]:
        return train_with_nan(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        prog="python benchmarks/soak.py", description="A run that meets all kinds of trouble."
    )
    parser.add_argument("--teacher", type=Path, required=True, help="weights of a denoiser for sigma 25")
    parser.add_argument("--gt", type=Path, required=True, help="folder of training photographs")
    parser.add_argument("--val", type=Path, required=True, help="folder of validation photographs")
    parser.add_argument("--minutes", type=float, default=60, help="for both runs together (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the events (default: 0)")
    parser.add_argument("--workdir", type=Path, required=True, help="a new folder")
    parser.add_argument("--output", type=Path, help="also write all of it to this JSON file")
    parser.add_argument("--images", type=int, default=60, help="photographs that are used (default: 60)")
    parser.add_argument("--delay", type=float, default=25, help="mean seconds until an event (default: 25)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of events (default: all)")
    parser.add_argument("--leak", type=float, default=100, help="MB/hour that are too much (default: 100)")
    options = parser.parse_args()
    for path in (options.teacher, options.gt, options.val):
        if not path.exists():
            sys.exit(f"error: {path} does not exist")
    if options.workdir.exists():
        sys.exit(f"error: --workdir {options.workdir} exists; give a new folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end with this program
    ISOLATED = isolate()
    result = soak(options)
    if options.output:
        with whole_file(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))
    broken = [
        f"{event['kind']} at {event['step']}: {fault}" for event in result["events"] for fault in event["violations"]
    ]
    for fault in broken + result["violations"]:
        print(f"VIOLATED: {fault}")
    if broken or result["violations"]:
        sys.exit(1)
    print(f"both runs of {result['steps']:,} steps are equal bit for bit; {result['minutes']:.0f} minutes")


if __name__ == "__main__":
    main()
