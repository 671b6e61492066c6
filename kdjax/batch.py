"""What a training batch holds: from the data pipeline or a cache, through the step, to the loss terms."""

from __future__ import annotations

from typing import Any, TypedDict


class Answers(TypedDict):
    """What the teacher said of the lq of a batch, where it comes from a cache.

    Attributes:
      output: (b, h * scale, w * scale, c), in [0, 1].
      features: {name: array (b, ...)}.
    """

    output: Any
    features: dict[str, Any]


class Batch(TypedDict, total=False):
    """A batch of b samples. Arrays are NumPy's on the host and JAX's on the devices; or only their shapes are known.

    Attributes:
      gt: (b, h * scale, w * scale, c), uint8 or float in [0, 1]: the clean images.
      lq: (b, h, w, c), the same: the degraded ones. Without it, they are made of gt in the step.
      index: (b,) int32, the numbers of the samples (modulo 2**31), from which everything random about them follows.
      labelled: (b,) bool, false where only the teacher knows what the clean image is. Without it, all are labelled.
      is_paired: (b,) bool, false where lq is to be made of gt although the batch has one. Without it, all are paired.
      teacher: what the teacher says of lq; then it is not asked.
      damaged: (b,) which image could not be read and was replaced, or -1. The pipeline reports it and takes it out.
    """

    gt: Any
    lq: Any
    index: Any
    labelled: Any
    is_paired: Any
    teacher: Answers
    damaged: Any
