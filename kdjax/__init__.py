"""Knowledge distillation for image denoising and restoration in JAX.

Public names load on first use, so `import kdjax` is cheap:

    load_model(path)             a Model from any supported .pth or .safetensors file
    save_model(model, path)      the reverse; the suffix chooses the format
    restore_image(model, image)  an image of any size, in tiles; uint8, uint16 or float
    psnr, ssim                   BasicSR's metrics on uint8 images

These modules are the building blocks of a training loop (`examples/own_loop.py`):

    kdjax.models        networks: `network("srvggnetcompact", hparams).init(key)` is a Model
    kdjax.data          batches of crops from image folders
    kdjax.degradations  noise, blur, JPEG, Real-ESRGAN, on the device
    kdjax.losses        distances between images and between features
    kdjax.terms         the terms of a distillation loss, built-in or your own
    kdjax.schedules     learning rates and weights over time
    kdjax.distill       `Recipe`, `State` and `train_step`

`kdjax --help` lists the programs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdjax import data, degradations, distill, losses, models, schedules, terms
    from kdjax.metrics import psnr, ssim
    from kdjax.tiles import restore_image
    from kdjax.weights import load_model, save_model

_HOME = {
    "load_model": "kdjax.weights",
    "save_model": "kdjax.weights",
    "restore_image": "kdjax.tiles",
    "psnr": "kdjax.metrics",
    "ssim": "kdjax.metrics",
}

__version__ = "0.1.0"
__all__ = [
    "data",
    "degradations",
    "distill",
    "load_model",
    "losses",
    "models",
    "psnr",
    "restore_image",
    "save_model",
    "schedules",
    "ssim",
    "terms",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"kdjax.{name}")
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
