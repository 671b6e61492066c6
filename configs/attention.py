"""Attention transfer (arXiv:1612.03928): the student is active where the teacher is.

    python -m kdjax.train --config configs/attention.py

No adapters: maps of energy have one channel whatever the networks have. mode="guide" is the scaling of the BasicSR
guide, which is switched off for all practical purposes; see `kdjax.losses.attention`.
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
        weight=dict(share=0.02),  # of the gradient; docs/results.md has what a larger one did
    )
    return config
