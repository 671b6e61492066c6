"""Files shipped with the package: a few free photographs and small pretrained denoisers (LICENSES.md, MODEL_CARD.md).

Configs and command lines refer to the photographs as "embedded", and to a denoiser by its name in `MODELS`.
"""

from __future__ import annotations

import os
from pathlib import Path

EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent
TRAIN_PHOTOGRAPHS = _FOLDER / "photographs" / "train"
VAL_PHOTOGRAPHS = _FOLDER / "photographs" / "val"
TEACHER = _FOLDER / "rrdbnet_denoiser.pth"
MODELS = {"embedded": TEACHER, "fast": _FOLDER / "fast_denoiser.pth"}
BEST = "fast"
MODEL_HELP = f".pth or .safetensors file, or {' or '.join(MODELS)}"


def locate(path: str, embedded: Path) -> str:
    """Returns `path`, or the shipped folder if `path` is "embedded"."""
    return str(embedded) if path == EMBEDDED else path


def model(path: str | os.PathLike[str]) -> str:
    """Returns `path`, or the shipped file if `path` is the name of a shipped model."""
    return str(MODELS.get(os.fspath(path), os.fspath(path)))
