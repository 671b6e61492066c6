"""Measures the time from starting the program to the end of the first step, compared with PyTorch:

    pip install -e . torch
    python benchmarks/startup.py [--repeats 2] [--compile] [--output FILE]

An RRDBNet 64x23 at scale 1, read from a .pth written for the purpose, teaches an SRVGGNetCompact 32x8; batches are 4
crops of 128 pixels. kdjax is `python -m kdjax.train` with the photographs in the package and one validation image, on
which it also measures the teacher before it starts; once with an empty compilation cache (JAX_COMPILATION_CACHE_DIR),
and once with the cache the first start left there. PyTorch imports torch, reads the file, builds the networks and takes
one step on random images; with --compile also with torch.compile, with empty caches. All run in turns, each in its own
process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEACHER = dict(num_feat=64, num_block=23, num_grow_ch=32, scale=1)
ROOT = Path(__file__).parent.parent
DONE = "first step after"


def time_to(line: str, command: list[str], environment: dict[str, str]) -> float:
    """Starts a program; returns the seconds until it prints something containing `line`, and ends it."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    printed = []
    for text in process.stdout:
        printed.append(text)
        if line in text:
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
            return seconds
    raise SystemExit(f"error: {' '.join(command)} ended without {line!r}:\n{''.join(printed[-20:])}")


def kdjax_command(teacher: Path, workdir: Path) -> list[str]:
    values = {
        "teacher.weights": teacher,
        "data.batch_size": 4,
        "data.workers": 0,
        "val.crop": 128,
        "val.limit": 1,
        "log.diagnose": False,
    }
    command = [sys.executable, "-m", "kdjax.train", "--config", "configs/denoise.py", "--workdir", str(workdir)]
    return command + [f"--config.{key}={value}" for key, value in values.items()]


def torch_step(teacher_file: str, with_compile: bool) -> None:
    """Takes one step in PyTorch, in this process."""
    import torch
    from torch_networks import Compact, RRDBNet

    teacher, student = RRDBNet(64, 23, 32).eval(), Compact(32, 8)
    teacher.load_state_dict(torch.load(teacher_file, weights_only=True)["params"])
    teacher, student = (net.to(memory_format=torch.channels_last) for net in (teacher, student))
    run_teacher, run_student = (torch.compile(net) if with_compile else net for net in (teacher, student))
    optimizer = torch.optim.Adam(student.parameters(), 2e-4, (0.9, 0.99), foreach=True)
    gt = torch.rand(4, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    lq = gt + torch.randn_like(gt) * (25 / 255)
    with torch.no_grad():
        target = run_teacher(lq)
    output = run_student(lq)
    loss = torch.sqrt((output - gt) ** 2 + 1e-12).mean() + torch.nn.functional.l1_loss(output, target)
    loss.backward()
    optimizer.step()
    print(DONE, float(loss), flush=True)


def ways(folder: Path, with_compile: bool) -> dict[str, Any]:
    """Returns the cases by name, each a function from the turn to a command and its environment."""
    teacher = folder / "teacher.pth"

    def with_kdjax(turn: int, what: str) -> tuple[list[str], dict[str, str]]:
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"cache{turn}"), "PYTHONUNBUFFERED": "1"}
        return kdjax_command(teacher, folder / f"{what}{turn}"), cache

    def with_torch(turn: int, compiled: bool) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, __file__, "--torch", str(teacher), *(["--compile"] if compiled else [])]
        return command, {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor{turn}")}

    found = {
        "kdjax, empty cache": lambda turn: with_kdjax(turn, "cold"),
        "PyTorch": lambda turn: with_torch(turn, False),
        "kdjax, from the cache": lambda turn: with_kdjax(turn, "warm"),
    }
    return found | ({"PyTorch, torch.compile": lambda turn: with_torch(turn, True)} if with_compile else {})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/startup.py", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2, help="turns (default: 2)")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--torch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        torch_step(options.torch, options.compile)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = write_teacher(folder / "teacher.pth")
        measured = ways(folder, options.compile)
        seconds: dict[str, list[float]] = {what: [] for what in measured}
        for turn in range(options.repeats):
            for what, make in measured.items():
                seconds[what].append(time_to(DONE, *make(turn)))
                print(f"{what}: {seconds[what][-1]:.1f} s", file=sys.stderr, flush=True)
    print(f"{machine['device']}, {machine['cores']} cores, jax {machine['jax']}, {machine['date']}\n")
    print("| | seconds to the end of the first step |\n| --- | --- |")
    for what, times in seconds.items():
        print(f"| {what} | {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) |")
    if options.output:
        options.output.write_text(json.dumps({"machine": machine, "seconds": seconds}, indent=1), encoding="utf-8")


def write_teacher(path: Path) -> dict[str, Any]:
    """Writes a teacher with random weights and describes the machine. Needs its own process: it starts JAX."""
    code = (
        "import json, sys, jax, kdjax; from kdjax import cost, models;"
        f"kdjax.save_model(models.network('rrdbnet', {TEACHER!r}).init(jax.random.key(0)), sys.argv[1]);"
        "print(json.dumps(cost.describe_machine()))"
    )
    finished = subprocess.run([sys.executable, "-c", code, path], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
