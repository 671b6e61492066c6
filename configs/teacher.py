"""Trains a teacher: an RRDBNet denoiser for any noise from sigma 0 to 50, with the task loss alone.

    python -m kdjax.train --config configs/teacher.py --config.data.gt=FOLDER --config.val.gt=FOLDER

The teacher inside the package was trained with this file; `kdjax/assets/MODEL_CARD.md` has the exact command and what
it reached. `:debug` runs in seconds.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "debug"):
        raise ValueError(f"configs/teacher.py has no variant {variant!r}; it has :debug, or none")
    config = ConfigDict()
    config.name = "teacher"
    config.seed = 0

    # scale=1 un-shuffles the input 4 times, so num_feat below 4*4*3 = 48 would lose part of the image.
    hparams = dict(scale=1, num_feat=64, num_block=2, num_grow_ch=32)
    config.student = dict(arch="rrdbnet", hparams=hparams, weights="", remat=False, dtype="float32")
    config.terms = dict(task=dict(criterion="l1", weight=1.0))
    config.degrade = dict(name="awgn_blind", sigma=(0.0, 50.0))

    config.data = dict(gt="embedded", crop=64, batch_size=8, hflip=True, rot=True, workers=0, cache_mb=512)
    config.val = dict(gt="embedded", sigma=25.0, crop=0, limit=12, every=2_000, save_images=4)

    config.train = ConfigDict(
        dict(steps=10_000, optimizer="adam", betas=(0.9, 0.99), grad_clip=0.0, ema_decay=0.999, accumulate=1)
    )
    # The end of the cosine follows --config.train.steps.
    steps = config.train.get_oneway_ref("steps")
    config.train.lr = dict(name="cosine", value=1e-3, steps=steps, final=1e-6, warmup=500)

    config.log = dict(every=100, tensorboard=False, wandb="")
    config.checkpoint = dict(every=500, keep=2)

    if variant == "debug":
        config.student.hparams.update(num_feat=8, num_block=1, num_grow_ch=4)
        config.data.update(crop=16, batch_size=4)
        config.val.update(crop=32, limit=1, every=2, save_images=1)
        config.train.steps = 4
        config.log.every = config.checkpoint.every = 2
    return config
