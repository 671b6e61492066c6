"""The denoiser `--model fast`: a small U-Net that removes Gaussian noise of unknown strength.

    python -m kdjax.train --config configs/fast.py --config.data.gt=FOLDER --config.val.gt=FOLDER

It learns without a teacher: one ten times slower would take four fifths of the time of every step. `:debug` takes
seconds and only checks that everything runs.
"""

from denoise import cosine, shorten
from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "debug"):
        raise ValueError(f"there is no variant {variant!r}; there is :debug, or none")
    config = get_denoise()
    config.name = f"fast_{variant}" if variant else "fast"

    # On a CPU, 64 channels take no longer than 48; half the resolution is what makes it fast.
    config.student.arch = "unet"
    config.student.hparams = dict(num_feat=64, num_level=1, num_conv=2, num_conv_up=1, unshuffle=2)
    config.teacher.weights = ""
    config.terms = dict(task=dict(criterion="l1", weight=1.0))
    config.degrade = dict(name="awgn_blind", sigma=(0.0, 55.0))
    config.data.update(crop=64, batch_size=16, workers=0)
    config.val.update(every=2_000)
    config.train.update(steps=14_000, grad_clip=0.5)
    config.train.lr = cosine(config, 1.5e-3, final=1e-6, warmup=200)
    config.log.update(every=200, diagnose=False)
    config.checkpoint.every = 500
    if variant:
        config.student.hparams.update(num_feat=4, num_conv=1)
        shorten(config)
    return config
