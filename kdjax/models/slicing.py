"""A student cut out of a teacher of the same family: its first blocks, and the channels that matter most.

Channels that are added to each other, along a residual stream, are chosen together. Nothing is trained here: the slice
is a start. The last layers of the student are the teacher's last layers. Where a plain stack was shortened, the layer
behind the cut does not read the channels it was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdjax.models import MODELS, Model, network
from kdjax.names import pick


def slice_model(teacher: Model, hparams: Mapping[str, Any]) -> Model:
    """A model of the teacher's architecture with smaller hyper-parameters and some of its weights.

    Raises:
      ValueError: an architecture that cannot be sliced, a size above the teacher's, or another difference than sizes.
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
