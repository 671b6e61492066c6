"""Draws what a config trains on: clean and degraded images side by side, with the degradation of each.

    python -m kdjax.show --config configs/realworld.py --output sheet.png [--count 8] [--step 0]

The samples are those of the run itself: same files, crops, flips and degradations. Each row has gt, lq, the kernels
that blurred it, and the random choices, in the order in which they were applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdjax import commandline, data, degradations, distill, ops, sharding
from kdjax import config as config_lib
from kdjax.data import DataError
from kdjax.degradations import realesrgan
from kdjax.degradations.resize import MODES
from kdjax.teacher import cache as teacher_cache
from kdjax.training import preparation

_TEXT_WIDTH, _LINE, _GAP = 220, 15, 6
_KERNEL_ZOOM = 4
_LARGEST = 320  # maximum side of an image on the sheet, in pixels


def draw_sheet(setup: preparation.Setup, *, count: int, step: int = 0) -> np.ndarray:
    """Draws the first `count` samples from training step `step` on, as uint8 (h, w, 3)."""
    key = jax.random.key(setup.config.seed)
    rows: list[np.ndarray] = []
    make_pair = jax.jit(lambda batch: distill.make_pair(setup.recipe, batch, key))
    with preparation.open_batches(setup, start_step=step) as batches:
        while len(rows) < count:
            batch = next(batches)
            pair = [np.asarray(ops.to_uint8(images)) for images in make_pair(batch)]
            for i, (gt, lq) in enumerate(zip(*pair, strict=True)):
                index = batch["index"][i : i + 1]
                made = setup.recipe.degrade is not None and not batch.get("is_paired", np.zeros(len(gt)))[i]
                choices = {}
                if made:
                    (sample_key,) = distill.sample_keys(key, index)
                    choices = jax.device_get(degradations.draw_choices(setup.config.degrade, sample_key))
                lines, kernels = _told(choices) if made else (["lq from its file"], [])
                lines = [f"sample {index.item()}: gt {_size(gt)}, lq {_size(lq)}", *lines]
                rows.append(_row(gt, lq, lines, kernels))
    rows = rows[:count]
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def _told(choices: Mapping[str, np.ndarray] | realesrgan.Choices) -> tuple[list[str], list[np.ndarray]]:
    """Returns text lines and kernels that describe the choices, omitting those that had no effect."""
    if not isinstance(choices, realesrgan.Choices):
        return [f"{name} {float(value):.4g}" for name, value in choices.items()], []
    modes, kernels, lines = tuple(MODES), [], []
    for number, stage in enumerate((choices.first, choices.second), 1):
        if stage.blurs:
            kernels.append(stage.kernel)
        kind, strength = ("Gaussian", stage.sigma) if stage.is_gaussian else ("Poisson", stage.poisson_scale)
        lines += [
            f"{number}: blur {'yes' if stage.blurs else 'no'}",
            f"{number}: size x {stage.factor:.2f}, {modes[stage.mode]}",
            f"{number}: {kind} {strength:.3g}, {'grey' if stage.gray else 'colour'}",
        ]
        lines += [f"{number}: JPEG {stage.quality:.0f}"] if number == 1 else []
    if choices.has_sinc:
        kernels.append(choices.sinc)
    back = [f"back by {modes[choices.mode]}", f"sinc {'yes' if choices.has_sinc else 'no'}"]
    compressed = [f"2: JPEG {choices.second.quality:.0f}"]
    return lines + (compressed + back if choices.jpeg_first else back + compressed), kernels


def _row(gt: np.ndarray, lq: np.ndarray, lines: list[str], kernels: list[np.ndarray]) -> np.ndarray:
    """Places gt, lq, kernels and text side by side."""
    height = max(min(_LARGEST, gt.shape[0]), _LINE * len(lines))
    parts = [_shown(image, height) for image in (gt, lq)]
    if kernels:
        parts.append(_shown(np.concatenate([_kernel_picture(kernel) for kernel in kernels], 1), height))
    canvas = Image.new("RGB", (_TEXT_WIDTH, height), "white")
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, line in enumerate(lines):
        text.text((4, _LINE * i), line, fill="black", font=font)
    return np.concatenate([*parts, np.asarray(canvas)], 1)


def _shown(image: np.ndarray, height: int) -> np.ndarray:
    """Converts to RGB, shrinks to the sheet's maximum size, and pads with white below."""
    image = np.repeat(image, 3, 2) if image.shape[2] == 1 else image
    if max(image.shape) > _LARGEST:
        picture = Image.fromarray(image)
        picture.thumbnail((_LARGEST, _LARGEST))
        image = np.asarray(picture)
    image = image[:height]
    return np.pad(image, ((0, height - image.shape[0]), (0, _GAP), (0, 0)), constant_values=255)


def _kernel_picture(kernel: np.ndarray) -> np.ndarray:
    """Magnifies a kernel, from black at its minimum to white at its maximum."""
    scaled = (kernel - kernel.min()) / max(float(np.ptp(kernel)), 1e-12)
    picture = np.kron(np.uint8(255 * scaled), np.ones((_KERNEL_ZOOM, _KERNEL_ZOOM), np.uint8))
    return np.pad(np.repeat(picture[..., None], 3, 2), ((0, 0), (0, _GAP), (0, 0)), constant_values=255)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.show", __doc__)
    parser.add_config()
    add = parser.add_argument
    add("--output", type=Path, default=Path("sheet.png"), metavar="FILE", help="image to write")
    add("--count", type=int, default=8, metavar="N", help="how many samples")
    add("--step", type=int, default=0, metavar="N", help="training step to start with")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options, values = parser.parse(arguments)
    output = options.output
    if output.suffix.lower() not in data.WRITTEN_SUFFIXES:
        parser.error(f"--output {output} must end in one of {', '.join(data.WRITTEN_SUFFIXES)}")
    if options.count < 1 or options.step < 0:
        parser.error(f"--count {options.count} must be 1 or more, and --step {options.step} 0 or more")
    try:
        config = config_lib.parse(values)
        sharding.use_all_cores(config.data.batch_size)
        setup = preparation.prepare(teacher_cache.without_cache(preparation.on_these_devices(config)))
        data.write_image(output, draw_sheet(setup, count=options.count, step=options.step))
    except (ValueError, OSError, DataError) as error:
        commandline.fail(str(error))
    made = f", degraded by {config.degrade['name']}" if setup.recipe.degrade else ""
    print(f"{options.count} samples{made}: {output}")


if __name__ == "__main__":
    commandline.run(main)
