"""FitNets' hints (arXiv:1412.6550): first the student's middle layer learns to predict the teacher's, then all of it.

    python -m kdjax.train --config configs/hint.py

For the first fifth of the run only the hint counts: a trained 1x1 convolution maps the student's features to the
teacher's channels. Then the losses of `denoise.py` take over, and the hint and its convolution are idle.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "hint")
    switch = config.train.steps // 5  # of the config's steps; if you change these by flag, set the boundaries too
    student = "model.5" if variant == "quick" else "body.3" if variant == "debug" else "body.9"
    config.terms.hint = dict(
        pairs=((student, "body.1", 1.0),),  # student feature, teacher feature, weight
        normalise="instance",  # the teacher's channels differ in scale by orders of magnitude
        weight=dict(name="piecewise", values=(1.0, 0.0), boundaries=(switch,)),
    )
    for name in ("task", "output"):
        config.terms[name].weight = dict(name="piecewise", values=(0.0, 1.0), boundaries=(switch,))
    return config
