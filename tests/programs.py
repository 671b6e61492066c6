"""Runs the programs of kdjax as processes of their own, without the cost of starting Python for each.

Three of the four seconds of a short program go into importing JAX, Flax, Orbax and Grain. Here, a program is forked
from a process that has imported them (multiprocessing's fork server), with its own arguments, folder, environment,
streams and session. It imports kdjax itself. A real shell starts the commands of README.md, in test_docs.py.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A DnCNN of 8 channels, for noise of sigma 25; the embedded teacher takes 15 CPU seconds to compile. It was made by
#   python -m kdjax.train --config configs/denoise.py:quick --config.student.hparams.num_feat=8 \
#       --config.student.hparams.depth=6
SMALL_TEACHER = Path(__file__).parent / "weights" / "small_denoiser.pth"
# An RRDBNet of 16 channels and 2 blocks, random; for terms that read its blocks.
RANDOM_TEACHER = Path(__file__).parent / "golden" / "archs" / "rrdbnet_scale1.pth"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["jax", "flax.linen", "flax.nnx", "optax", "orbax.checkpoint", "grain", "scipy.ndimage", "PIL.Image", "yaml"]
)


class Program:
    """A running `python -m MODULE ARGUMENTS`, in a session of its own.

    Args:
      limits: by number, such as `resource.RLIMIT_FSIZE`.
      environment: by default that of this process.
      variables: added to the environment.
    """

    def __init__(
        self, module: str, *arguments: object, cwd: Path = ROOT, limits: Mapping[int, int] | None = None,
        environment: Mapping[str, str] = os.environ, **variables: str,
    ) -> None:  # fmt: skip
        self.arguments = [module, *map(str, arguments)]
        self._folder = Path(tempfile.mkdtemp(prefix="kdjax-program-"))
        for name in ("stdout", "stderr"):  # files: a program never waits for a reader
            (self._folder / name).touch()
        variables = {**environment, "PYTHONUNBUFFERED": "1", **variables}
        self._process = _context.Process(
            target=_become, args=(self.arguments, str(cwd), variables, limits or {}, str(self._folder))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text()

    @property
    def printed(self) -> str:
        """What it has written so far: to standard output, then to standard error."""
        return self.stdout + self.stderr

    def wait_for(self, text: str, *, seconds: float = 200) -> None:
        """Waits until it has printed this."""
        until = time.monotonic() + seconds
        while text not in self.printed:
            running = self.returncode is None and time.monotonic() < until
            assert running or text in self.printed, f"{text!r} never came:\n{self.printed}"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            if self.returncode is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 300) -> int:
        """Waits for its end; returns its exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.stdout, self.stderr)
        return self.returncode

    def close(self) -> None:
        """Kills it and all that it has started, and forgets what it has printed."""
        self.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        shutil.rmtree(self._folder)


@contextlib.contextmanager
def started(module: str, *arguments: object, **options: Any) -> Iterator[Program]:
    """A `Program` that does not outlive the block."""
    program = Program(module, *arguments, **options)
    try:
        yield program
    finally:
        program.close()


def run(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, as `subprocess.run` does."""
    with started(module, *arguments, **options) as program:
        program.wait()
        return subprocess.CompletedProcess(program.arguments, program.returncode, program.stdout, program.stderr)


def _become(arguments: list[str], cwd: str, environment: dict[str, str], limits: dict[int, int], folder: str) -> None:
    """Turns a process that was just forked into the program."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if count := environment.get("JAX_NUM_CPU_DEVICES"):  # JAX reads it when it is imported
        import jax

        jax.config.update("jax_num_cpu_devices", int(count))
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    sys.path[:] = [cwd, *(path for path in sys.path if path not in (cwd, str(Path(__file__).parent)))]
    sys.argv = arguments
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends without them before Python 3.14
