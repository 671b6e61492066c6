"""Measures a training step's memory, what `student.remat` and `train.accumulate` save, and what they cost in time:

    pip install -e .
    python benchmarks/memory.py [--batch-size 8] [--crop 128] [--accumulate 4] [--teacher] [--output FILE]

The student learns from clean images with noise of sigma 25, Charbonnier loss, Adam and EMA; with --teacher also from an
RRDBNet 64x23. Every case runs in its own process and reports what XLA plans, as the training program logs it at start,
the memory actually used, and the time of the fastest step. On a CPU the memory is weights, state and batch, plus the
growth of the process over a few steps, for all devices together; on an accelerator it is the peak of JAX's allocator.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import step as step_benchmark

from kdjax import cost, distill, models, sharding
from kdjax.files import whole_file

STUDENTS = {
    "RRDBNet 64x6": ("rrdbnet", dict(num_feat=64, num_block=6, num_grow_ch=32, scale=1)),
    "SRVGGNetCompact 32x8": ("srvggnetcompact", step_benchmark.STUDENT),
}


def measure(student: str, remat: bool, accumulate: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one case in this process."""
    sharding.use_all_cores(options.batch_size // accumulate)
    mesh = sharding.data_mesh()
    arch, hparams = STUDENTS[student]
    model = models.network(arch, hparams).init(jax.random.key(0))
    teacher = models.network("rrdbnet", step_benchmark.TEACHER).init(jax.random.key(1)) if options.teacher else None
    apply = models.network(arch, hparams).make_apply(remat=remat)
    teach = teacher and teacher.network.make_apply()
    shape = (options.batch_size, options.crop, options.crop, 3)
    recipe = step_benchmark.recipe_of(apply, model, teach, teacher, shape)
    recipe = dataclasses.replace(recipe, accumulate=accumulate)
    state = sharding.replicate(distill.init_state(recipe, model.params), mesh)
    frozen = sharding.replicate(distill.make_frozen(recipe.terms, teacher and teacher.params), mesh)
    gt = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    batch = sharding.shard_batch({"gt": gt, "index": np.arange(len(gt))}, mesh)
    key = sharding.replicate(jax.random.key(0), mesh)
    step = jax.jit(
        functools.partial(distill.train_step, recipe), donate_argnums=0, out_shardings=sharding.replicated(mesh)
    )
    started = time.perf_counter()
    compiled = step.lower(state, frozen, batch, key).compile()
    compile_seconds = time.perf_counter() - started
    memory = cost.planned_memory(compiled)
    before, seconds = start_counting(), []
    for _ in range(options.steps):
        started = time.perf_counter()
        state, metrics = compiled(state, frozen, batch, key)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    on_cpu = jax.default_backend() == "cpu"
    count = mesh.size if on_cpu else 1  # the devices of a CPU share its memory
    return {
        "student": student,
        "remat": remat,
        "accumulate": accumulate,
        "devices": mesh.size,
        "planned": count * memory.peak,
        "measured": count * memory.arguments + peak() - before if on_cpu else cost.allocator_peak(),
        "temporaries_per_device": memory.temporaries,
        "arguments_per_device": memory.arguments,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "machine": cost.describe_machine(),
    }


def start_counting() -> int:
    """Resets the peak and returns the bytes the process holds now (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed after compiling would be reused unnoticed
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Returns the peak bytes the process has held since `start_counting`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128, help="side of the images (default: 128)")
    parser.add_argument("--accumulate", type=int, default=4, help="parts of a batch (default: 4)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each case (default: 3)")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--teacher", action="store_true", help="also learn from an RRDBNet 64x23")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*json.loads(options.case), options)))
        return
    rows = []
    head = "| student | remat | parts | planned | measured | planned / measured | saved | a step | to the first |"
    print(head + "\n" + "| --- " * 9 + "|")
    for student in options.students:
        first = None
        for parts, remat in itertools.product(sorted({1, options.accumulate}), (False, True)):
            command = [sys.executable, *sys.argv, "--case", json.dumps([student, remat, parts])]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            first = first or row
            rows.append(row)
            took, its = min(row["seconds"]), min(first["seconds"])
            print(
                f"| {student} | {'yes' if remat else 'no'} | {parts} | {cost.amount(row['planned'])}"
                f" | {cost.amount(row['measured'])} | {row['planned'] / row['measured']:.2f}"
                f" | {1 - row['measured'] / first['measured']:.0%} | {took * 1e3:.0f} ms | {took / its:.2f} |",
                flush=True,
            )
    machine = rows[0].pop("machine")
    print(f"\n{rows[0]['devices']} x {machine['device']}, jax {machine['jax']}, {machine['date']}")
    if options.output:
        report = {"machine": machine, "batch_size": options.batch_size, "crop": options.crop, "cases": rows}
        with whole_file(options.output) as path:
            Path(path).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
