"""Trains a teacher: an RRDBNet denoiser for any noise from sigma 0 to 50, with the task loss alone.

    python -m kdjax.train --config configs/teacher.py --config.data.gt=FOLDER --config.val.gt=FOLDER

The teacher in the package was trained with this file; `kdjax/assets/MODEL_CARD.md` has the exact command and the
results. `:quick` trains a small network in a few minutes on two CPU cores; `:debug` takes seconds.
"""

from denoise import cosine, shorten
from ml_collections import ConfigDict

from kdjax.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"there is no variant {variant!r}; there are :quick and :debug, or none")
    config = defaults()
    config.name = f"teacher_{variant}" if variant else "teacher"

    config.student.arch = "rrdbnet"
    # scale=1 unshuffles the input by 4, so num_feat below 4*4*3 = 48 would lose part of the image.
    config.student.hparams = dict(scale=1, num_feat=64, num_block=2, num_grow_ch=32)
    config.terms = dict(task=dict(criterion="l1", weight=1.0))
    config.degrade = dict(name="awgn_blind", sigma=(0.0, 50.0))
    config.data.update(gt="embedded", crop=64, batch_size=8)
    config.val.update(gt="embedded", limit=12, every=2_000)
    config.train.steps = 10_000
    config.train.lr = cosine(config, 1e-3, final=1e-6, warmup=500)
    config.checkpoint.every = 500

    if variant == "quick":
        config.student.hparams.update(num_block=1)
        config.val.update(crop=256, every=400)
        config.train.update(steps=1_200, ema_decay=0.99)
        config.train.lr = cosine(config, 1e-3)
        config.log.every = 50
        config.checkpoint.every = 200
    if variant == "debug":
        config.student.hparams.update(num_feat=8, num_block=1, num_grow_ch=4)
        shorten(config)
    return config
