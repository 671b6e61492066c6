"""The recipe recommended in `docs/results.md`: output distillation plus its Haar bands (MTKD, arXiv:2404.09571).

    python -m kdjax.train --config configs/frequency.py

The fine bands, where students blur, count as much as the coarse one. `config.terms.fft = dict(weight=dict(share=0.2))`
does the same in the Fourier domain (arXiv:2108.05054).
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "frequency")
    config.terms.wavelet = dict(levels=2, bands=(1.0, 1.0, 1.0, 1.0), criterion="l1", weight=dict(share=0.2))
    return config
