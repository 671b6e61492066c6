"""Knowledge distillation for image denoising and restoration in JAX.

Public names load on first use, so that `import kdjax` costs nothing:

    load_model(path)             a Model from any supported .pth or .safetensors file
    save_model(model, path)      the way back, by suffix
    restore_image(model, image)  an image of any size, in tiles; uint8, uint16 or float
    psnr, ssim                   BasicSR's metrics on uint8 images

Programs: `python -m kdjax.NAME` with train, study, show, cache; evaluate, compare, restore, export, demo.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load_model": "kdjax.weights",
    "save_model": "kdjax.weights",
    "restore_image": "kdjax.tiles",
    "psnr": "kdjax.metrics",
    "ssim": "kdjax.metrics",
}

__version__ = "0.1.0"
__all__ = ["load_model", "psnr", "restore_image", "save_model", "ssim"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kdjax' has no attribute {name!r}; it has {', '.join(__all__)}")
