"""A student of the teacher's family that starts as an approximation of it, computed before the first step.

    python -m kdjax.train --config configs/shrink.py

See `kdjax.models.shrinking`. The embedded teacher is an RRDBNet of 64 channels and 2 blocks.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "shrink")
    config.student.arch = "rrdbnet"
    config.student.hparams = dict(scale=1, num_feat=32, num_block=1, num_grow_ch=16)
    config.student.weights = "teacher"
    if variant == "quick":  # a rate for random weights would undo what shrinking has found
        config.train.lr.value = 1e-4
    return config
