"""Affinity distillation (FAKD, ICIP 2020): pixels similar in the teacher's features should be similar in the student's.

    python -m kdjax.train --config configs/affinity.py

Needs no adapters. Published gains are within one family of networks; across families it may hurt, so compare with a
control run.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "affinity")
    student = "model.5" if variant == "quick" else "body.3" if variant == "debug" else "body.9"
    config.terms.affinity = dict(pairs=((student, "body.1", 1.0),), weight=dict(share=0.02))
    return config
