"""Attention transfer (arXiv:1612.03928): the student learns to be active where the teacher is.

    python -m kdjax.train --config configs/attention.py

Needs no adapters: energy maps have one channel, whatever the networks have. mode="guide" is the BasicSR guide's
scaling, at which the term has no effect; see `kdjax.losses.attention`.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "attention")
    student = "model.5" if variant == "quick" else "body.3" if variant == "debug" else "body.9"
    config.terms.attention = dict(
        pairs=((student, "body.1", 1.0),),
        mode="paper",
        weight=dict(share=0.02),  # of the gradient; docs/results.md shows what a larger share did
    )
    return config
