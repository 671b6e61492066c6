"""Cuts a student out of a teacher of the same architecture: its first blocks and most important channels.

Channels that are added together along a residual stream are selected together. Nothing is trained here; the slice is an
initialisation. The student ends in the teacher's last layers. In a shortened plain stack, the layer after the cut no
longer reads the channels it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.models import MODELS, Model, network
from kdjax.names import pick


def slice_model(teacher: Model, hparams: Mapping[str, Any]) -> Model:
    """Returns a smaller model of the teacher's architecture, with a subset of its weights.

    Raises:
      ValueError: the architecture cannot be sliced, a size exceeds the teacher's, or something other than sizes
        differs.
    """
    slices = {name: known.slice for name, known in MODELS.items() if known.slice}
    slicing = pick(slices, teacher.arch, "architecture to slice")
    student = network(teacher.arch, hparams)
    for name, value in student.hparams.items():
        ours = teacher.hparams[name]
        if name in slicing.sizes and value > ours:
            raise ValueError(f"a slice cannot be larger than the teacher: {name}={value}, the teacher has {ours}")
        if name not in slicing.sizes and value != ours:
            raise ValueError(
                f"a slice can differ from its teacher in {', '.join(slicing.sizes)} only: {name}={value} is not {ours}"
            )
    return Model(student, slicing.cut(_as_numpy(teacher.params), teacher.hparams, student.hparams))


def _as_numpy(tree: Any) -> Any:
    return {key: _as_numpy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)
