"""Measures how fast the Real-ESRGAN degradation is, compared with a plain PyTorch version of the same process:

    pip install -e . torch
    python benchmarks/degradations.py [--batch-size 16] [--canvas 400] [--crop 256] [--output FILE]

Both degrade the same photographs (those in the package) on the same device, in one run, in turns; both start from an
array on the device and end with one. PyTorch runs eagerly on all cores, as Real-ESRGAN does: one choice of factor, mode
and noise type per batch, with the kernels given, as its data loaders make them. kdjax draws everything, kernels
included, per sample. A batch's time depends on the random choices, so rates are over all batches together. Also
measured: a distillation step with and without degrading its input.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import assets, data, distill, models
from kdjax.degradations import make_degrade, preset
from kdjax.files import whole_file
from kdjax.schedules import make_schedule
from kdjax.terms import make_terms
from kdjax.weights import load_model

SETTINGS = preset("realesrgan")
BARS = {"cpu": 2.0, "gpu": 10.0}


# ---- PyTorch ---------------------------------------------------------------------------------------------------


class Plain:
    """Real-ESRGAN's degradation as in its training code: NCHW tensors, one choice for the batch."""

    def __init__(self, torch: object, device: str, seed: int) -> None:
        self.torch, self.device = torch, device
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        tensor = lambda values: torch.tensor(np.array(values, np.float32), device=device)  # noqa: E731
        from kdjax.degradations import jpeg

        self.tables = tensor(jpeg._LUMA), tensor(jpeg._CHROMA)
        self.dct, self.to_ycbcr, self.to_rgb = map(tensor, (jpeg._DCT, jpeg._TO_YCBCR, jpeg._TO_RGB))
        self.luma = tensor([0.2989, 0.587, 0.114]).view(1, 3, 1, 1)

    def uniform(self, count: int, low: float, high: float) -> object:
        return self.torch.rand(count, 1, 1, 1, device=self.device) * (high - low) + low

    def filter2d(self, x: object, kernels: object) -> object:
        functional = self.torch.nn.functional
        b, c, h, w = x.shape
        half = kernels.shape[-1] // 2
        x = functional.pad(x, (half,) * 4, mode="reflect").view(1, b * c, h + 2 * half, w + 2 * half)
        kernels = kernels[:, None].repeat(1, c, 1, 1).view(b * c, 1, *kernels.shape[1:])
        return functional.conv2d(x, kernels, groups=b * c).view(b, c, h, w)

    def noise(self, x: object, suffix: str) -> object:
        b, _, h, w = x.shape
        gray = (self.torch.rand(b, 1, 1, 1, device=self.device) < SETTINGS[f"gray_noise_prob{suffix}"]).float()
        if self.random.random() < SETTINGS[f"gaussian_noise_prob{suffix}"]:
            sigma = self.uniform(b, *SETTINGS[f"noise_range{suffix}"]) / 255
            noise = self.torch.randn_like(x) * sigma
            if gray.sum() > 0:
                noise = noise * (1 - gray) + self.torch.randn(h, w, device=self.device) * sigma * gray
            return (x + noise).clamp(0, 1)
        scale = self.uniform(b, *SETTINGS[f"poisson_scale_range{suffix}"])
        noise = self.shot(x) * (1 - gray)
        if gray.sum() > 0:
            noise = noise + self.shot((x * self.luma).sum(1, keepdim=True)) * gray
        return (x + noise * scale).clamp(0, 1)

    def shot(self, x: object) -> object:
        x = (x * 255).round().clamp(0, 255) / 255
        levels = [2 ** math.ceil(math.log2(len(self.torch.unique(image)))) for image in x]
        vals = self.torch.tensor(levels, dtype=x.dtype, device=self.device).view(-1, 1, 1, 1)
        return self.torch.poisson(x * vals) / vals - x

    def jpeg(self, x: object, quality: object) -> object:
        torch, functional = self.torch, self.torch.nn.functional
        _, _, h, w = x.shape
        x = functional.pad(x, (0, -w % 16, 0, -h % 16)) * 255
        factor = torch.where(quality < 50, 50 / quality, 2 - quality / 50).view(-1, 1, 1, 1, 1)
        planes = torch.einsum("ij,bjhw->bihw", self.to_ycbcr, x)
        luma = self.compress(planes[:, 0] - 128, self.tables[0] * factor) + 128
        chroma = functional.avg_pool2d(planes[:, 1:], 2)
        chroma = [self.compress(chroma[:, i], self.tables[1] * factor) for i in range(2)]
        chroma = [plane.repeat_interleave(2, 1).repeat_interleave(2, 2) for plane in chroma]
        x = torch.einsum("ij,bjhw->bihw", self.to_rgb, torch.stack([luma, *chroma], 1))
        return x.clamp(0, 255)[:, :, :h, :w] / 255

    def compress(self, plane: object, table: object) -> object:
        b, h, w = plane.shape
        blocks = plane.reshape(b, h // 8, 8, w // 8, 8).permute(0, 1, 3, 2, 4)
        blocks = self.torch.round(self.dct @ blocks @ self.dct.T / table) * table
        return (self.dct.T @ blocks @ self.dct).permute(0, 1, 3, 2, 4).reshape(b, h, w)

    def factor(self, suffix: str) -> float:
        low, high = SETTINGS[f"resize_range{suffix}"]
        direction = self.random.choices(["up", "down", "keep"], SETTINGS[f"resize_prob{suffix}"])[0]
        ranges = {"up": (1, high), "down": (low, 1), "keep": (1, 1)}
        return self.random.uniform(*ranges[direction])

    def resize(self, x: object, **size: object) -> object:
        mode = self.random.choice(["area", "bilinear", "bicubic"])
        return self.torch.nn.functional.interpolate(x, mode=mode, **size)

    def degrade(self, gt: object, kernels: object, crop: int) -> object:
        b, _, h, w = gt.shape
        first, second, sinc = kernels
        x = self.resize(self.filter2d(gt, first), scale_factor=self.factor(""))
        x = self.jpeg(self.noise(x, ""), self.uniform(b, *SETTINGS["jpeg_range"]))
        if self.random.random() < SETTINGS["second_blur_prob"]:
            x = self.filter2d(x, second)
        factor = self.factor("2")
        x = self.noise(self.resize(x, size=(int(h * factor), int(w * factor))), "2")
        quality = self.uniform(b, *SETTINGS["jpeg_range2"])
        if self.random.random() < 0.5:
            x = self.filter2d(self.resize(x, size=(h, w)), sinc)
            x = self.jpeg(x.clamp(0, 1), quality)
        else:
            x = self.jpeg(x.clamp(0, 1), quality)
            x = self.filter2d(self.resize(x, size=(h, w)), sinc)
        x = (x * 255).round().clamp(0, 255) / 255
        top, left = self.random.randint(0, h - crop), self.random.randint(0, w - crop)
        return x[:, :, top : top + crop, left : left + crop]


# ---- both sides ------------------------------------------------------------------------------------------------


def photographs(count: int, side: int) -> np.ndarray:
    """Returns uint8 (count, side, side, 3) crops of the package's photographs."""
    images = data.load_images(data.find_pairs(gt=assets.locate("embedded", assets.TRAIN_PHOTOGRAPHS)), crop=side)
    return np.stack([images[i % len(images)].gt for i in range(count)])


def degrade_side(gt: np.ndarray, crop: int) -> Callable[[int], None]:
    """Returns a function that runs one batch in kdjax."""
    recipe = recipe_of(crop)
    make = jax.jit(lambda batch, key: distill.make_pair(recipe, batch, key)[1])
    batch = {"gt": jnp.asarray(gt), "index": jnp.arange(len(gt))}
    return lambda seed: jax.block_until_ready(make(batch, jax.random.key(seed)))


def plain_side(gt: np.ndarray, crop: int) -> Callable[[int], None]:
    """Returns a function that runs one batch in PyTorch."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: jax has a GPU and this torch has none; install a CUDA build of torch beside jax")
    plain = Plain(torch, device, seed=0)
    from kdjax.degradations.realesrgan import Settings, draw

    keys = jax.random.split(jax.random.key(1), len(gt))
    choices, _ = jax.jit(jax.vmap(functools.partial(draw, settings=Settings())))(keys)
    drawn = choices.first.kernel, choices.second.kernel, choices.sinc
    kernels = [torch.tensor(np.asarray(kernel), device=device) for kernel in drawn]
    tensor = torch.tensor(gt, device=device).permute(0, 3, 1, 2).float().contiguous() / 255

    @torch.no_grad()
    def run(seed: int) -> None:
        plain.degrade(tensor, kernels, crop)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def recipe_of(crop: int, teacher: models.Model | None = None) -> distill.Recipe:
    """Returns a recipe with the guide's student and, given a teacher, the guide's losses."""
    student = models.network("srvggnetcompact", dict(num_feat=32, num_conv=8, upscale=1)).init(jax.random.key(0))
    apply = student.network.make_apply()
    teacher_apply = teacher and teacher.network.make_apply()
    specs = {"task": dict(criterion="charbonnier", weight=1.0)}
    specs |= {"output": dict(criterion="l1", weight=1.0)} if teacher else {}
    shape = (1, crop, crop, 3)
    setting = distill.make_setting(
        apply, student.params, teacher_apply, teacher and teacher.params, shape, jax.random.key(0)
    )
    return distill.Recipe(
        student=apply,
        teacher=teacher_apply,
        terms=make_terms(specs, setting),
        optimizer=distill.make_optimizer("adam", make_schedule(2e-4)),
        learning_rate=make_schedule(2e-4),
        ema_decay=0.999,
        degrade=make_degrade(SETTINGS),
        crop=crop,
    )


def step_side(gt: np.ndarray, crop: int) -> dict[str, Callable[[int], None]]:
    """Returns steps of distillation from the embedded teacher: one degrades its input, the other is given its lq."""
    teacher = load_model("embedded")
    student = models.network("srvggnetcompact", dict(num_feat=32, num_conv=8, upscale=1)).init(jax.random.key(0))
    recipe = recipe_of(crop, teacher)
    state = distill.init_state(recipe, student.params)
    frozen = distill.make_frozen(recipe.terms, teacher.params)
    step = jax.jit(functools.partial(distill.train_step, recipe))
    batch = {"gt": jnp.asarray(gt), "index": jnp.arange(len(gt))}
    given = {"gt": batch["gt"][:, :crop, :crop], "lq": batch["gt"][:, :crop, :crop], "index": batch["index"]}
    run = lambda batch, seed: jax.block_until_ready(step(state, frozen, batch, jax.random.key(seed)))  # noqa: E731
    return {"step": lambda seed: run(batch, seed), "step_with_lq": lambda seed: run(given, seed)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/degradations.py", description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=400, help="side of the square that is degraded (default: 400)")
    parser.add_argument("--crop", type=int, default=256, help="side of the crop that is kept (default: 256)")
    parser.add_argument("--repeats", type=int, default=24, help="batches of each side (default: 24)")
    parser.add_argument("--step-repeats", type=int, default=3, help="distillation steps; 0 for none (default: 3)")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    # The package's photographs are smaller than a canvas; reflect them, as the loader does.
    gt = photographs(options.batch_size, options.canvas)
    ways = {"kdjax": degrade_side(gt, options.crop), "torch": plain_side(gt, options.crop)}
    steps = step_side(gt, options.crop) if options.step_repeats else {}
    compiled = {}
    for name, run in {**ways, **steps}.items():
        started = time.perf_counter()
        run(0)
        compiled[name] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in {**ways, **steps}}
    for seed in range(1, options.repeats + 1):
        turns = {**ways, **(steps if seed <= options.step_repeats else {})}
        for name, run in turns.items():
            started = time.perf_counter()
            run(seed)
            seconds[name].append(time.perf_counter() - started)
    rates = {name: options.batch_size * len(seconds[name]) / sum(seconds[name]) for name in ways}
    ratio = rates["kdjax"] / rates["torch"]
    device = jax.devices()[0]
    lowered = jax.jit(lambda batch, key: distill.make_pair(recipe_of(options.crop), batch, key)[1]).lower(
        {"gt": gt, "index": np.arange(len(gt))}, jax.random.key(0)
    )
    memory = lowered.compile().memory_analysis()
    report = {
        "device": f"{device.device_kind} ({device.platform}), {os.cpu_count()} cores",
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "numpy")},
        "batch_size": options.batch_size,
        "canvas": options.canvas,
        "crop": options.crop,
        "images_per_second": rates,
        "ratio": ratio,
        "median_seconds_a_batch": {name: statistics.median(times) for name, times in seconds.items() if times},
        "first_run_seconds": compiled,
        "working_memory_mb_a_sample": memory.temp_size_in_bytes / options.batch_size / 2**20 if memory else None,
    }
    print(f"{report['device']}, jax {report['versions']['jax']}, torch {report['versions']['torch']}")
    print(f"batch {options.batch_size}, {options.canvas} -> {options.crop}, {options.repeats} batches each, in turns\n")
    print("| | images/s | median of a batch | first run |\n| --- | --- | --- | --- |")
    for name in ways:
        median = report["median_seconds_a_batch"][name]
        print(f"| {name} | {rates[name]:.1f} | {median:.3f} s | {compiled[name]:.1f} s |")
    bar = BARS.get(device.platform)
    print(f"\nkdjax / torch: {ratio:.2f}" + (f" (bar: {bar:g})" if bar else ""))
    if memory:
        print(f"working memory: {report['working_memory_mb_a_sample']:.1f} MB a sample, with all samples in one batch")
    if steps:
        step, without = (report["median_seconds_a_batch"][name] for name in ("step", "step_with_lq"))
        report["part_of_the_step"] = 1 - without / step
        print(
            f"distillation step: {step:.3f} s, {without:.3f} s with lq given: {100 * (1 - without / step):.1f} % of it"
        )
    if options.output:
        with whole_file(options.output) as path:
            Path(path).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
