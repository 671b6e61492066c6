"""Which learning rate suits a student? A short sweep; the table's first row is the answer.

    python -m kdjax.study --config configs/study_lr.py --config.base.data.gt=FOLDER --config.base.val.gt=FOLDER \\
        --config.base.student.arch=dncnn --config.base.student.hparams="{'num_feat': 48, 'depth': 10}"

The student learns alone, with clipped gradients; a teacher changes little of what it can bear. In a longer run
somewhat less than the best of a short one is safe. `:quick` and `:debug` are shorter.
"""

from denoise import cosine
from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    base = get_denoise(variant)
    study = ConfigDict(type_safe=False)
    study.name = "study_lr" + (f"_{variant}" if variant else "")
    study.seeds = (0,)
    study.curve_images = 8

    base.terms = dict(task=dict(criterion="l1", weight=1.0))
    base.train.lr = cosine(base, 1e-3)
    if variant != "debug":
        base.data.update(crop=48, batch_size=4, workers=0)
        base.train.update(steps=600, ema_decay=0.99, grad_clip=0.1)
        base.val.update(crop=256, limit=16, every=200)
        base.log.update(every=100, diagnose=False)
        base.checkpoint.every = 200
    if variant == "quick":
        base.train.steps = 200

    study.base = base
    rates = {"lr_2e4": 2e-4, "lr_5e4": 5e-4, "lr_1e3": 1e-3, "lr_2e3": 2e-3, "lr_4e3": 4e-3, "lr_8e3": 8e-3}
    study.columns = {name: dict(train=dict(lr=dict(value=rate))) for name, rate in rates.items()}
    return study
