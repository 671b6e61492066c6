"""A small upscaler that imitates a large one: Real-ESRGAN's RRDBNet teaches an SRVGGNetCompact nine times cheaper.

    python -m kdjax.cache --config configs/upscale.py --output answers --samples 10000 \\
        --config.teacher.weights=RealESRGAN_x4plus_anime_6B.pth --config.data.gt=FOLDER
    python -m kdjax.train --config configs/upscale.py --config.teacher.cache=answers \\
        --config.teacher.weights=RealESRGAN_x4plus_anime_6B.pth --config.data.gt=FOLDER --config.val.gt=FOLDER

FOLDER has clean images, which are made small as in Real-ESRGAN. The student learns the teacher's images and not the
clean ones: those of a network that was trained with a GAN are not the nearest to the truth, and are meant to be. The
teacher answers beforehand, since in every step it would take most of the time. `:quick` is a smaller student in a
short run; both variants need a teacher's file, too.
"""

from denoise import cosine, shorten
from denoise import get_config as get_denoise
from ml_collections import ConfigDict

from kdjax.degradations import preset


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise()
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"there is no variant {variant!r}; there are :quick and :debug, or none")
    config.name = f"upscale_{variant}" if variant else "upscale"
    config.student.hparams = dict(num_feat=64, num_conv=16, upscale=4)
    config.teacher.weights = "RealESRGAN_x4plus_anime_6B.pth"
    config.terms = dict(output=dict(criterion="l1", weight=1.0))
    config.degrade = preset("realesrgan")
    config.data.update(canvas=400, crop=192, batch_size=8)
    config.val.update(degrade=config.degrade, crop=512, limit=8, every=500)
    config.train.update(steps=10_000, ema_decay=0.99, grad_clip=0.5)
    config.train.lr = cosine(config, 1e-3, warmup=200)
    config.log.update(every=100, diagnose=False)
    config.checkpoint.every = 500
    if variant == "quick":
        config.student.hparams.update(num_feat=32, num_conv=8)
        config.data.update(canvas=256, workers=0)
        config.train.steps = 1_000
    if variant == "debug":
        config.student.hparams.update(num_feat=8, num_conv=2)
        shorten(config)
        config.data.update(canvas=128, crop=64, batch_size=2)
    return config
