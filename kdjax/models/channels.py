"""Channel pruning for convolutions: rank the channels and keep the most important ones.

A channel's importance is the product of the L1 norms of the kernels that write it and those that read it, after Li et
al., "Pruning filters for efficient ConvNets", arXiv:1608.08710. Parameters are NumPy arrays here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.models.model import Params

Conv = Mapping[str, np.ndarray]  # kernel (HWIO) and bias


def best(importance: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` largest values, in ascending order."""
    return np.sort(np.argsort(-importance, kind="stable")[:count])


def writes(conv: Conv) -> np.ndarray:
    """Returns how strongly each output channel is written."""
    return np.abs(conv["kernel"]).sum((0, 1, 2))


def reads(conv: Conv) -> np.ndarray:
    """Returns how strongly each input channel is read."""
    return np.abs(conv["kernel"]).sum((0, 1, 3))


def every(conv: Conv, side: str) -> np.ndarray:
    """Returns the indices of all channels on a side, "in" or "out"."""
    return np.arange(conv["kernel"].shape[2 if side == "in" else 3])


def take(conv: Conv, read: np.ndarray, written: np.ndarray) -> Params:
    """Returns the convolution restricted to some input and output channels."""
    return {"kernel": conv["kernel"][:, :, read][..., written], "bias": conv["bias"][written]}


def cut_stack(name: str, count: Callable[[Mapping[str, Any]], int]) -> Callable[..., Params]:
    """Returns a `Slice.cut` for a list `name` (conv, activation, ..., conv) with `count(hparams)` convolutions."""

    def cut(params: Params, before: Mapping[str, Any], after: Mapping[str, Any]) -> Params:
        layers, last, width = params[name], 2 * (count(before) - 1), after["num_feat"]
        new_last = 2 * (count(after) - 1)
        sliced, read = {}, every(layers["0"], "in")
        for i in range(0, new_last, 2):
            written = best(writes(layers[str(i)]) * reads(layers[str(i + 2)]), width)
            sliced[str(i)] = take(layers[str(i)], read, written)
            if str(i + 1) in layers:  # the slopes of a PReLU
                sliced[str(i + 1)] = {"weight": layers[str(i + 1)]["weight"][written]}
            read = written
        if new_last < last:
            read = best(reads(layers[str(last)]), width)
        sliced[str(new_last)] = take(layers[str(last)], read, every(layers[str(last)], "out"))
        return {name: sliced}

    return cut


def cut_chain(params: Params, names: Sequence[str], read: np.ndarray, width: int) -> Params:
    """Cuts a chain of convolutions to `width` channels, from input channels `read` to all channels of the last one."""
    sliced = {}
    for name, following in zip(names, [*names[1:], None], strict=True):
        if following is None:
            written = every(params[name], "out")
        else:
            written = best(writes(params[name]) * reads(params[following]), width)
        sliced[name] = take(params[name], read, written)
        read = written
    return sliced
