"""Label consistency (DUKD, arXiv:2309.14162): also match the teacher on inverted, flipped and transposed inputs.

    python -m kdjax.train --config configs/label_consistency.py

Costs one more forward pass of the teacher. Both terms are gated: the student imitates only pixels where the teacher is
closer to the clean image than the student is (after arXiv:1908.00858).
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "label_consistency")
    config.terms.output.gate = True
    config.terms.label_consistency = dict(criterion="l1", gate=True, weight=1.0)
    return config
