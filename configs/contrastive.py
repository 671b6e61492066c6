"""Contrastive distillation (CSD, arXiv:2105.11683; DCKD, arXiv:2412.08939) in the teacher's own feature space.

    python -m kdjax.train --config configs/contrastive.py

Pulls the student's image to the teacher's and away from the noisy input. The published methods need VGG or VQGAN; here
the teacher's layers are the feature space. Costs two more forward passes through these layers, and one backward.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "contrastive")
    config.terms.contrastive = dict(layers=(("conv_first", 0.5), ("body.0", 1.0)), weight=0.1)  # DCKD's weight
    return config
