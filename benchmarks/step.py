"""Measures how fast a distillation step is, compared with the same step in PyTorch:

    pip install -e . torch
    python benchmarks/step.py [--batch-size 4] [--crop 128] [--parts step cached teacher student inference]
        [--output FILE]

An RRDBNet 64x23 at scale 1 teaches an SRVGGNetCompact 32x8: noise of sigma 25, Charbonnier loss to the clean image and
L1 to the teacher's output, Adam, EMA. Both sides start from clean images on the device and run in one process, in turns
(A B A B). PyTorch has its usual tuning: channels_last, foreach Adam and EMA, on a GPU bf16 autocast and TF32; with
--compile also torch.compile. Its networks (torch_networks.py) are written as in BasicSR.

    step        the whole step
    cached      kdjax's step with cached teacher outputs (`kdjax.cache`) against PyTorch's whole step, teacher included:
                shows what caching saves, not a comparison of equal work
    teacher     the forward pass of the teacher alone
    student     the step without a teacher
    inference   the forward pass of the student alone
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import distill, models, sharding
from kdjax.degradations import make_degrade
from kdjax.files import whole_file
from kdjax.schedules import make_schedule
from kdjax.terms import make_terms

PARTS = ("step", "cached", "teacher", "student", "inference")
BARS = {"cpu": {"step": 1.0, "cached": 2.5}, "gpu": {"step": 1.2}}
TEACHER = dict(num_feat=64, num_block=23, num_grow_ch=32, scale=1)  # its body runs at a quarter of height and width
STUDENT = dict(num_feat=32, num_conv=8, upscale=1)
LEARNING_RATE, BETAS, EMA_DECAY, EPS = 2e-4, (0.9, 0.99), 0.999, 1e-3

Run = Callable[[int], None]


# ---- PyTorch ---------------------------------------------------------------------------------------------------


def torch_sides(gt: np.ndarray, parts: tuple[str, ...], *, with_compile: bool) -> dict[str, Run]:
    """Returns a function per part that runs it in PyTorch."""
    import torch
    from torch import nn
    from torch_networks import Compact, RRDBNet

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("error: jax has a GPU and this torch has none; install a CUDA build of torch beside jax")
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    build = lambda net: net.to(device, memory_format=torch.channels_last)  # noqa: E731
    teacher = build(RRDBNet(TEACHER["num_feat"], TEACHER["num_block"], TEACHER["num_grow_ch"])).eval()
    student = build(Compact(STUDENT["num_feat"], STUDENT["num_conv"]))
    ema = [parameter.detach().clone() for parameter in student.parameters()]
    optimizer = torch.optim.Adam(student.parameters(), LEARNING_RATE, BETAS, foreach=True)
    images = torch.tensor(gt, device=device).permute(0, 3, 1, 2).float() / 255
    images = images.contiguous(memory_format=torch.channels_last)
    run_teacher, run_student = (torch.compile(net) if with_compile else net for net in (teacher, student))
    autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=on_gpu)

    def teach(lq: Any) -> Any:
        with torch.no_grad(), autocast():
            return run_teacher(lq)

    def train(with_teacher: bool) -> None:
        lq = images + torch.randn_like(images) * (25 / 255)
        target = teach(lq).float() if with_teacher else None
        with autocast():
            output = run_student(lq)
        loss = torch.sqrt((output.float() - images) ** 2 + EPS**2).mean()
        if with_teacher:
            loss = loss + nn.functional.l1_loss(output.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, [parameter.detach() for parameter in student.parameters()], 1 - EMA_DECAY)

    def infer() -> None:
        with torch.no_grad(), autocast():
            run_student(images)

    work = {
        "step": lambda: train(True),
        "cached": lambda: train(True),  # live teacher: only the other side is cached
        "teacher": lambda: teach(images),
        "student": lambda: train(False),
        "inference": infer,
    }

    def run(part: str, seed: int) -> None:
        work[part]()
        if on_gpu:
            torch.cuda.synchronize()

    return {part: functools.partial(run, part) for part in parts}


# ---- kdjax -----------------------------------------------------------------------------------------------------


def kdjax_sides(gt: np.ndarray, parts: tuple[str, ...]) -> dict[str, Run]:
    """Returns a function per part that runs it in kdjax."""
    teacher_dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32  # as autocast on the other side
    teacher = models.network("rrdbnet", TEACHER).init(jax.random.key(0))
    student = models.network("srvggnetcompact", STUDENT).init(jax.random.key(1))
    apply = student.network.make_apply(dtype=teacher_dtype)
    teach = teacher.network.make_apply(dtype=teacher_dtype)
    mesh = sharding.data_mesh()
    batch = sharding.shard_batch({"gt": gt, "index": np.arange(len(gt))}, mesh)
    images = jax.device_put(np.float32(gt) / 255, sharding.split_batch(mesh))
    teacher, student = (dataclasses.replace(m, params=sharding.replicate(m.params, mesh)) for m in (teacher, student))
    # In the format of a cache; the values do not affect the time.
    answers = {"output": images.astype(jnp.float16), "features": {}}

    def train(with_teacher: bool, cached: bool = False) -> Run:
        recipe = recipe_of(apply, student, teach if with_teacher else None, teacher, gt.shape)
        recipe = dataclasses.replace(recipe, teacher=None) if cached else recipe
        state = sharding.replicate(distill.init_state(recipe, jax.tree.map(jnp.copy, student.params)), mesh)
        frozen = distill.make_frozen(recipe.terms, teacher.params if recipe.teacher else None)
        own_batch = batch | ({"teacher": answers} if cached else {})
        step = jax.jit(functools.partial(distill.train_step, recipe), donate_argnums=0)

        def run(seed: int) -> None:
            nonlocal state
            state, metrics = step(state, frozen, own_batch, jax.random.key(seed))
            jax.block_until_ready((state, metrics))

        return run

    def forward(apply: models.Apply, params: models.Params) -> Run:
        only_output = jax.jit(lambda params, x: apply(params, x)[0])
        return lambda seed: jax.block_until_ready(only_output(params, images))

    make = {
        "step": lambda: train(True),
        "cached": lambda: train(True, cached=True),
        "teacher": lambda: forward(teach, teacher.params),
        "student": lambda: train(False),
        "inference": lambda: forward(apply, student.params),
    }
    return {part: make[part]() for part in parts}


def recipe_of(
    apply: models.Apply, student: models.Model, teach: models.Apply | None, teacher: models.Model, shape: tuple
) -> distill.Recipe:
    specs = {"task": dict(criterion="charbonnier", weight=1.0)}
    specs |= {"output": dict(criterion="l1", weight=1.0)} if teach else {}
    setting = distill.make_setting(
        apply, student.params, teach, teacher.params if teach else None, (1, *shape[1:]), jax.random.key(0)
    )
    learning_rate = make_schedule(LEARNING_RATE)
    return distill.Recipe(
        student=apply,
        teacher=teach,
        terms=make_terms(specs, setting),
        optimizer=distill.make_optimizer("adam", learning_rate, betas=BETAS),
        learning_rate=learning_rate,
        ema_decay=EMA_DECAY,
        degrade=make_degrade(dict(name="awgn", sigma=25.0)),
    )


# ---- both sides ------------------------------------------------------------------------------------------------


def measure(ways: dict[str, Run], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Returns the seconds of each run, in turns, and those of each way's first run, which compiles."""
    first, seconds = {}, {name: [] for name in ways}
    for name, run in ways.items():
        started = time.perf_counter()
        run(0)
        first[name] = time.perf_counter() - started
        run(0)
    for seed in range(1, repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run(seed)
            seconds[name].append(time.perf_counter() - started)
    return seconds, first


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/step.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--crop", type=int, default=128, help="side of the images (default: 128)")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each side (default: 15)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--compile", action="store_true", help="torch.compile on the side of PyTorch")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    sharding.use_all_cores(options.batch_size)
    shape = (options.batch_size, options.crop, options.crop, 3)
    gt = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # the values do not affect the time
    parts = tuple(options.parts)
    sides = {"kdjax": kdjax_sides(gt, parts), "torch": torch_sides(gt, parts, with_compile=options.compile)}
    device = jax.devices()[0]
    report = {
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} cores",
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "numpy")},
        "batch_size": options.batch_size,
        "crop": options.crop,
        "torch_compile": options.compile,
        "parts": {},
    }
    print(f"{report['device']}, jax {report['versions']['jax']}, torch {report['versions']['torch']}")
    print(f"batch {options.batch_size} of {options.crop}x{options.crop}, {options.repeats} runs each, in turns\n")
    print("| | kdjax | PyTorch | PyTorch / kdjax | first run of kdjax |\n| --- | --- | --- | --- | --- |")
    for part in parts:
        seconds, first = measure({name: side[part] for name, side in sides.items()}, options.repeats)
        ratios = [b / a for a, b in zip(seconds["kdjax"], seconds["torch"], strict=True)]
        middle = {name: statistics.median(times) for name, times in seconds.items()}
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        bar = BARS.get(device.platform, {}).get(part)
        print(
            f"| {part} | {middle['kdjax'] * 1e3:.0f} ms | {middle['torch'] * 1e3:.0f} ms"
            f" | {ratio:.2f} ({low:.2f} to {high:.2f}){f', bar {bar:g}' if bar else ''} | {first['kdjax']:.1f} s |",
            flush=True,
        )
        report["parts"][part] = {"seconds": seconds, "first_run_seconds": first, "ratio": [low, ratio, high]}
    if options.output:
        with whole_file(options.output) as path:
            Path(path).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
