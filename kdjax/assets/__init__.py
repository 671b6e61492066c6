"""Files shipped with the package: a few free photographs and a small pretrained denoiser (LICENSES.md, MODEL_CARD.md).

A config refers to them with the word "embedded".
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent
TRAIN_PHOTOGRAPHS = _FOLDER / "photographs" / "train"
VAL_PHOTOGRAPHS = _FOLDER / "photographs" / "val"
TEACHER = _FOLDER / "rrdbnet_denoiser.pth"


def locate(path: str, embedded: Path) -> str:
    """Returns `path`, or the shipped file or folder if `path` is "embedded"."""
    return str(embedded) if path == EMBEDDED else path
