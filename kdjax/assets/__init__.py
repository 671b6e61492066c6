"""Files inside the package: a few free photographs and a small pretrained denoiser (see LICENSES.md, MODEL_CARD.md).

A config names them with the word "embedded".
"""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent
TRAIN_PHOTOGRAPHS = _FOLDER / "photographs" / "train"
VAL_PHOTOGRAPHS = _FOLDER / "photographs" / "val"
TEACHER = _FOLDER / "rrdbnet_denoiser.pth"


def locate(path: str, embedded: Path) -> str:
    """`path`, or the embedded file or folder when it is the word "embedded"."""
    return str(embedded) if path == EMBEDDED else path
