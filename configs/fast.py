"""The denoiser `--model fast`: a small network that removes Gaussian noise of unknown strength.

    python -m kdjax.train --config configs/fast.py \\
        --config.teacher.weights=ffdnet_color.pth --config.data.gt=FOLDER --config.val.gt=FOLDER

It starts as FFDNet (KAIR's file), shrunk to a quarter of its cost and made blind: FFDNet is told the noise level, the
student is not. Then it learns without the teacher, which would take more than half of the time of every step. `:quick`
takes minutes and `:debug` seconds; they start from random weights, and need no teacher's file.
"""

from denoise import cosine
from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "fast")

    # On a CPU, 64 channels take no longer than 48; half the resolution is what makes it fast.
    config.student.arch = "dncnn"
    config.student.hparams = dict(num_feat=64, depth=8, unshuffle=2, residual=bool(variant))
    config.student.weights = "" if variant else "teacher"
    config.teacher.weights = "" if variant else "ffdnet_color.pth"
    config.terms = dict(task=dict(criterion="l1", weight=1.0))
    config.degrade = dict(name="awgn_blind", sigma=(0.0, 55.0))
    config.data.workers = 0
    config.train.grad_clip = 0.5
    config.log.diagnose = False
    if not variant:
        config.data.update(crop=64, batch_size=16)
        config.val.every = 2_000
        config.train.steps = 24_000
        config.train.lr = cosine(config, 5e-4, final=1e-6, warmup=200)
        config.log.every = 200
        config.checkpoint.every = 500
    if variant == "quick":
        config.train.lr = cosine(config, 1.5e-3)
    if variant == "debug":
        config.student.hparams.update(num_feat=4, depth=3)
    return config
