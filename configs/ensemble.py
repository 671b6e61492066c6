"""A better teacher from the same file: its average over the eight flips and rotations of the input (x8).

    python -m kdjax.train --config configs/ensemble.py

Costs eight forward passes per step. Flags to average several teachers:
    --config.teacher.also="('second.pth',)" --config.teacher.mix="(0.7, 0.3)"
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "ensemble")
    config.teacher.self_ensemble = True
    return config
