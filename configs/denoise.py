"""The guide's recipe: a large pretrained RRDBNet teaches a small SRVGGNetCompact to denoise.

    python -m kdjax.train --config configs/denoise.py \\
        --config.teacher.weights=teacher.pth --config.data.gt=FOLDER --config.val.gt=FOLDER

Without those three flags it uses the photographs and the teacher shipped with the package. `:quick` is a real run in a
few minutes on two CPU cores; `:debug` takes seconds and only checks that everything runs.

Keys not set here have their defaults; docs/configuration.md lists all of them. Any key can be set on the command line.
`configs/basicsr.py:FILE` runs the guide's YAML itself; docs/migrating.md says how each of its keys is translated.
"""

from ml_collections import ConfigDict

from kdjax.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "quick", "debug"):
        raise ValueError(f"there is no variant {variant!r}; there are :quick and :debug, or none")
    config = defaults()
    config.name = f"denoise_{variant}" if variant else "denoise"

    config.student.hparams = dict(num_feat=32, num_conv=8, upscale=1)
    config.teacher.weights = "embedded"
    config.terms = dict(
        task=dict(criterion="charbonnier", eps=1e-12, weight=1.0),
        # The guide uses l2 at 2.0: at |student - teacher| = 0.01 that is 4 % of the gradient. Its schedule is
        # weight=dict(name="multistep", value=5.0, milestones=(50_000, ...), gamma=0.5).
        output=dict(criterion="l1", weight=1.0),
    )
    config.degrade = dict(name="awgn", sigma=25.0)
    # The guide crops at 400, where the teacher's memory is the limit.
    config.data.update(gt="embedded", workers=4)
    config.val.gt = "embedded"
    config.train.lr = dict(
        name="multistep", value=2e-4, milestones=(50_000, 100_000, 150_000, 200_000), gamma=0.5, warmup=0
    )

    if variant == "quick":
        config.student.arch = "dncnn"
        config.student.hparams = dict(num_feat=16, depth=7)
        config.data.update(crop=64, batch_size=8, workers=0)
        config.val.update(crop=256, every=400)
        config.train.update(steps=1_200, ema_decay=0.99)
        config.train.lr = cosine(config, 6e-3)
        config.log.every = 50
        config.checkpoint.every = 200
    if variant == "debug":
        config.student.hparams.update(num_feat=8, num_conv=2)
        shorten(config)
    return config


def cosine(config: ConfigDict, value: float, *, final: float = 1e-5, warmup: int = 50) -> dict:
    """Returns a cosine learning rate that ends where training ends, even with --config.train.steps=N."""
    return dict(name="cosine", value=value, steps=config.train.get_oneway_ref("steps"), final=final, warmup=warmup)


def shorten(config: ConfigDict) -> None:
    """Shortens a config to seconds, for `:debug`."""
    config.data.update(crop=16, batch_size=4, workers=0)
    config.val.update(crop=32, limit=1, every=2, save_images=1)
    config.train.steps = 4
    config.log.every = config.checkpoint.every = 2
