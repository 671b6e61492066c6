"""The contents of a training batch, from the data pipeline or a cache through the step to the loss terms."""

from __future__ import annotations

from typing import Any, TypedDict


class Answers(TypedDict):
    """The teacher's cached answers for a batch's lq.

    Attributes:
      output: (b, h * scale, w * scale, c), uint8 or float in [0, 1].
      features: {name: array (b, ...)}.
    """

    output: Any
    features: dict[str, Any]


class Batch(TypedDict, total=False):
    """A batch of b samples: NumPy arrays on the host, JAX arrays on the devices, or only their shapes.

    Attributes:
      gt: (b, h * scale, w * scale, c), uint8 or float in [0, 1]: the clean images.
      lq: (b, h, w, c), likewise: the degraded images. If absent, the step makes them from gt.
      index: (b,) int32, the sample numbers (modulo 2**31), which determine everything random about the samples.
      labelled: (b,) bool, false where there is no ground truth and only the teacher's answer can be used. If absent,
        all samples are labelled.
      is_paired: (b,) bool, false where lq must be made from gt even though the batch has an lq. If absent, all are
        paired.
      teacher: the teacher's answers for lq; if present, the teacher is not run.
      damaged: (b,) index of an image that could not be read and was replaced, or -1. The pipeline reports and removes
        it.
    """

    gt: Any
    lq: Any
    index: Any
    labelled: Any
    is_paired: Any
    teacher: Answers
    damaged: Any
