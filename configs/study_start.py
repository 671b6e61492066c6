"""Where should a student start? From random weights or from the shrunk teacher, with and without distillation.

    python -m kdjax.study --config configs/study_start.py \\
        --config.base.teacher.weights=cdncnn_sigma25.pth --config.base.data.gt=FOLDER --config.base.val.gt=FOLDER

The student has 36 of 64 channels and 12 of 20 layers of KAIR's CDnCNN, a sixth of its multiply-accumulates. Each start
has a learning rate of its own: random weights want a high one, which would undo what shrinking has found. Columns of
equal compute train longer, for as many multiply-accumulates as `shrunk_distilled` with its teacher takes. `rival` is a
U-Net from random weights, which costs about as much and is faster. `:quick` and `:debug` shrink the embedded RRDBNet,
in minutes and in seconds.
"""

from denoise import cosine
from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    base = get_denoise(variant)
    study = ConfigDict(type_safe=False)
    study.name = "study_start" + (f"_{variant}" if variant else "")
    study.seeds = (0, 1, 2)
    study.curve_images = 8

    if variant:
        base.student.arch = "rrdbnet"
        base.student.hparams = dict(scale=1, num_feat=32, num_block=1, num_grow_ch=16)
    else:
        base.student.arch = "dncnn"
        base.student.hparams = dict(num_feat=36, depth=12)
    rival = dict(arch="unet", hparams=dict(num_feat=64, num_level=1, num_conv=5, num_conv_up=4, unshuffle=2))
    if variant:
        rival["hparams"].update(num_feat=16, num_conv=2, num_conv_up=1)
    base.terms = dict(task=dict(criterion="l1", weight=1.0))
    if variant != "debug":
        base.data.update(crop=48, batch_size=4, workers=0)
        base.train.update(steps=1_500, ema_decay=0.99, grad_clip=0.1)
        base.train.lr = cosine(base, 2e-3)
        base.val.update(crop=0, limit=0, every=250)
        base.log.update(every=250, diagnose=False)
        base.checkpoint.every = 250
    if variant == "quick":
        base.train.steps = 200
        base.val.update(crop=128, every=100)
        base.log.every = base.checkpoint.every = 100
    if variant:
        study.seeds = (0,)

    output = dict(criterion="l1", weight=1.0)
    shrunk = dict(student=dict(weights="teacher"))
    if variant != "debug":
        shrunk["train"] = dict(lr=dict(value=5e-4))
    study.base = base
    study.columns = dict(
        scratch=dict(),
        distilled=dict(terms=dict(output=output)),
        shrunk=shrunk,
        shrunk_distilled=dict(**shrunk, terms=dict(output=output)),
        scratch_equal_compute=dict(compute_of="shrunk_distilled"),
        shrunk_equal_compute=dict(**shrunk, compute_of="shrunk_distilled"),
        rival=dict(student=rival, train=dict(lr=dict(value=5e-4)), compute_of="shrunk_distilled"),
    )
    return study
