"""Soft targets: a softmax over the positions of every channel (CWD, arXiv:2011.13256).

    python -m kdjax.train --config configs/soft_target.py

The guide's softmax over colours is `space="rgb", temperature=3.0` (4.1); it ignores brightness, and its temperature has
no effect. The other meaningful option is `laplace`, a likelihood of the teacher's features:
    laplace=dict(pairs=(("body.9", "body.1", 1.0),), weight=dict(share=0.02))
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "soft_target")
    config.terms.soft_target = dict(space="spatial", temperature=1.0, weight=dict(share=0.1))
    return config
