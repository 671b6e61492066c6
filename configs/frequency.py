"""Output distillation by frequency: Haar bands (MTKD, arXiv:2404.09571) and the Fourier transform (arXiv:2108.05054).

    python -m kdjax.train --config configs/frequency.py

Weights the fine bands, where students blur, above what they have in a plain pixel loss.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

get_denoise = runpy.run_path(str(Path(__file__).with_name("denoise.py")))["get_config"]


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "frequency")
    config.terms.wavelet = dict(levels=2, bands=(0.5, 1.0, 1.0, 1.0), criterion="l1", weight=0.2)  # ll, lh, hl, hh
    config.terms.fft = dict(weight=0.1)
    return config
