"""Measures how fast training images are read, compared with Pillow alone:

    python benchmarks/data.py FOLDER [--output FILE]

Three ways of reading the same images, in one process pinned to one core:

    pillow   every file opened, decoded and converted to RGB by Pillow: the minimum for any loader of image files
    folder   batches of `kdjax.data.training_batches` from the folder: decode, crop, flip, stack; nothing is cached
    pack     the same batches from a pack of the folder, made beforehand in a temporary folder

They take turns, so that other load on the machine affects all of them. A rate is images per second of CPU time, which
is what one core delivers. The table has medians over the repeats, with minimum and maximum. The files should be in the
page cache: this measures the CPU, not the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from kdjax.data import ImagePair, find_pairs, spread, training_batches
from kdjax.data.pack import pack
from kdjax.files import whole_file

BARS = {"folder": 0.8, "pack": 2.0}  # required minimum, as a multiple of the rate of Pillow alone


def decode(pairs: list[ImagePair]) -> float:
    """Returns Pillow's images per second of CPU time."""
    started = time.process_time()
    for pair in pairs:
        with Image.open(pair.gt) as image:
            np.asarray(image.convert("RGB"))
    return len(pairs) / (time.process_time() - started)


def load(pairs: list[ImagePair], *, crop: int, batch_size: int, seed: int) -> float:
    """Returns the loader's images per second of CPU time."""
    steps = -(-len(pairs) // batch_size)
    with training_batches(pairs, crop=crop, batch_size=batch_size, seed=seed, cache_mb=0) as batches:
        next(batches)  # one-time start-up; from here on as many batches are in flight as at the end
        started = time.process_time()
        for _ in range(steps):
            next(batches)
        return steps * batch_size / (time.process_time() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/data.py", description="Speed of the training data.")
    parser.add_argument("folder", help="folder of images")
    parser.add_argument("--crop", type=int, default=128, help="side of the training crop (default: 128)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument("--limit", type=int, default=400, help="images at most, spread over the folder (default: 400)")
    parser.add_argument("--repeats", type=int, default=9, help="default: 9")
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = spread(find_pairs(gt=options.folder), options.limit)
            pack(options.folder, f"{folder}/pack")
            packed = spread(find_pairs(gt=f"{folder}/pack"), options.limit)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        setting = dict(crop=options.crop, batch_size=options.batch_size)
        ways: dict[str, Callable[[int], float]] = {
            "pillow": lambda seed: decode(files),
            "folder": lambda seed: load(files, seed=seed, **setting),
            "pack": lambda seed: load(packed, seed=seed, **setting),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(-1, options.repeats):  # the first one warms up
            for name, measure in ways.items():
                rate = measure(repeat + 1)
                if repeat >= 0:
                    rates[name].append(rate)

    # Take ratios within a repeat: what slows down all three then cancels.
    ratios = {name: [a / b for a, b in zip(rates[name], rates["pillow"], strict=True)] for name in BARS}
    print(f"{len(files)} images, crops of {options.crop}, batches of {options.batch_size}, {options.repeats} repeats;")
    print(f"Pillow {PIL.__version__}, Python {platform.python_version()}, {platform.machine()}")
    print(f"{'':8}{'images/s per core':>20}{'lowest .. highest':>22}{'to pillow':>12}{'at least':>10}")
    result = {}
    for name, values in rates.items():
        result[name] = {"images_per_second": statistics.median(values), "lowest": min(values), "highest": max(values)}
        line = f"{name:8}{statistics.median(values):20.0f}{f'{min(values):.0f} .. {max(values):.0f}':>22}"
        if name in BARS:
            ratio = statistics.median(ratios[name])
            result[name] |= {"ratio": ratio, "bar": BARS[name], "reached": ratio >= BARS[name]}
            line += f"{ratio:12.2f}{BARS[name]:10.2f}{'' if ratio >= BARS[name] else '  MISSED'}"
        print(line)
    if options.output:
        setting |= {"images": len(files), "repeats": options.repeats, "pillow": PIL.__version__}
        with whole_file(options.output) as temporary:
            temporary.write_text(json.dumps({"setting": setting, "rates": result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
