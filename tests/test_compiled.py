"""What JAX compiles is read the next time, from a folder that is the user's alone; nothing in it can end a program."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdjax import compiled

pytestmark = pytest.mark.skipif(compiled._is_refused_by_xla(), reason="XLA loads no programs of its own on this CPU")

PROGRAM = """
import jax, sys
from kdjax import compiled
compiled._WORTH_SECONDS = 0
compiled.keep()
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
total = jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))
assert total == 512, total
print(found.count("/jax/compilation_cache/cache_hits"), found.count("/jax/compilation_cache/cache_misses"))
"""


def run(home: Path, **variables: str) -> tuple[int, int]:
    """How many programs were read, and how many compiled, by a process with this home."""
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def test_the_second_start_compiles_nothing_and_damaged_files_are_no_problem(tmp_path: Path) -> None:
    hits, misses = run(tmp_path)
    assert hits == 0 and misses > 0
    [folder] = (tmp_path / ".cache" / "kdjax" / "compiled").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run(tmp_path) == (misses, 0)
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(tmp_path)[0] == 0


@pytest.mark.once
def test_other_places_and_none(tmp_path: Path) -> None:
    run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "elsewhere"))
    assert list((tmp_path / "elsewhere" / "kdjax" / "compiled").glob("*/*"))
    run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "chosen"))
    run(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    (tmp_path / ".cache").write_text("no folder")
    run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "chosen", "elsewhere"]


@pytest.mark.once
def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    run(tmp_path)
    [folder] = (tmp_path / ".cache" / "kdjax" / "compiled").iterdir()
    folder.chmod(0o777)
    assert run(tmp_path)[0] == 0


def test_old_files_and_too_many_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "machine").mkdir()
    days = {"new": 0, "older": 10, "oldest": 20, "ancient": 31}
    for name, age in days.items():
        path = tmp_path / "machine" / name
        path.write_bytes(b"x" * 10)
        os.utime(path, (time.time() - age * 86_400,) * 2)
    compiled._clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*e*")) == ["machine", "new", "older", "oldest"]
    monkeypatch.setattr(compiled, "_KEPT_BYTES", 20)
    compiled._clean_up(tmp_path)
    assert sorted(path.name for path in (tmp_path / "machine").iterdir()) == ["new", "older"]
