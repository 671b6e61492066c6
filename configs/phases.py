"""The guide's schedule from section 6: distillation at 5, 2 and 1, then the task loss alone.

    python -m kdjax.train --config configs/phases.py

The last phase does not run the teacher at all. The guide's other schedule (4.2) is
    weight=dict(name="multistep", value=5.0, milestones=(50_000, 100_000, 150_000), gamma=0.5)
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "phases")
    steps = config.train.steps  # 250,000 in the guide
    boundaries = (steps // 5, 2 * steps // 5, 4 * steps // 5)
    config.terms.output.weight = dict(name="piecewise", values=(5.0, 2.0, 1.0, 0.0), boundaries=boundaries)
    return config
