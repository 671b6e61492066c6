"""A student cut out of a teacher of the same family: its first blocks, and the channels that matter most.

A channel matters as much as the kernels that write it times those that read it (their L1 norms, after Li et al.,
"Pruning filters for efficient ConvNets", arXiv:1608.08710). Channels that are added to each other, along a residual
stream, are chosen together. Nothing is trained here: the slice is a start.

The last layers of the student are the teacher's last layers. Where a plain stack was shortened, the layer behind the
cut does not read the channels it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.models import Model, complete_hparams
from kdjax.names import pick

Tree = dict[str, Any]


def slice_model(teacher: Model, hparams: Mapping[str, Any]) -> Model:
    """A model of the teacher's architecture with smaller hyper-parameters and some of its weights.

    Raises:
      ValueError: an architecture that cannot be sliced, a size above the teacher's, or another difference than sizes.
    """
    cut, sizes = pick(SLICERS, teacher.arch, "architecture to slice")
    hparams = complete_hparams(teacher.arch, hparams)
    for name, value in hparams.items():
        ours = teacher.hparams[name]
        if name in sizes and value > ours:
            raise ValueError(f"a slice cannot be larger than the teacher: {name}={value}, the teacher has {ours}")
        if name not in sizes and value != ours:
            raise ValueError(
                f"a slice can differ from its teacher in {', '.join(sizes)} only: {name}={value} is not {ours}"
            )
    return Model(teacher.arch, hparams, cut(_as_numpy(teacher.params), teacher.hparams, hparams))


def _stack(name: str, count: Callable[[Mapping[str, Any]], int]) -> Callable[..., Tree]:
    """The slicer of a list `name` of conv, activation, conv, ..., conv with `count(hparams)` convolutions."""

    def cut(params: Tree, before: Mapping[str, Any], after: Mapping[str, Any]) -> Tree:
        layers, last, width = params[name], 2 * (count(before) - 1), after["num_feat"]
        new_last = 2 * (count(after) - 1)
        sliced, read = {}, _all(layers["0"], "in")
        for i in range(0, new_last, 2):
            written = _best(_writes(layers[str(i)]) * _reads(layers[str(i + 2)]), width)
            sliced[str(i)] = _take(layers[str(i)], read, written)
            if str(i + 1) in layers:  # the slopes of a PReLU
                sliced[str(i + 1)] = {"weight": layers[str(i + 1)]["weight"][written]}
            read = written
        if new_last < last:
            read = _best(_reads(layers[str(last)]), width)
        sliced[str(new_last)] = _take(layers[str(last)], read, _all(layers[str(last)], "out"))
        return {name: sliced}

    return cut


def _rrdbnet(params: Tree, before: Mapping[str, Any], after: Mapping[str, Any]) -> Tree:
    body = [params["body"][str(i)] for i in range(after["num_block"])]
    dense = [block[f"rdb{j}"] for block in body for j in (1, 2, 3)]
    width, growth = before["num_feat"], before["num_grow_ch"]
    readers = [_reads(rdb[f"conv{k}"])[:width] for rdb in dense for k in range(1, 6)] + [_reads(params["conv_body"])]
    writers = [_writes(rdb["conv5"]) for rdb in dense] + [_writes(params["conv_first"])]
    stream = _best(sum(readers) * sum(writers), after["num_feat"])

    def cut_dense(rdb: Tree) -> Tree:
        read, sliced = stream, {}
        for k in range(1, 6):
            conv = rdb[f"conv{k}"]
            if k == 5:
                written = stream
            else:
                own = slice(width + (k - 1) * growth, width + k * growth)
                reads = sum(_reads(rdb[f"conv{later}"])[own] for later in range(k + 1, 6))
                written = _best(_writes(conv) * reads, after["num_grow_ch"])
            sliced[f"conv{k}"] = _take(conv, read, written)
            read = np.concatenate([read, width + (k - 1) * growth + written]) if k < 5 else read
        return sliced

    sliced = {"conv_first": _take(params["conv_first"], _all(params["conv_first"], "in"), stream)}
    sliced["body"] = {
        str(i): {f"rdb{j}": cut_dense(block[f"rdb{j}"]) for j in (1, 2, 3)} for i, block in enumerate(body)
    }
    sliced["conv_body"] = _take(params["conv_body"], stream, stream)
    # A block adds 0.2 x (its input + what its branches make of it): one less, and all that follows is 1.2 times weaker.
    sliced["conv_body"]["kernel"] = sliced["conv_body"]["kernel"] * np.float32(1.2) ** (
        before["num_block"] - after["num_block"]
    )
    ups = [f"conv_up{i + 1}" for i in range(before["num_upsample"])]
    return sliced | _chain(params, [*ups, "conv_hr", "conv_last"], stream, after["num_feat"])


def _chain(params: Tree, names: Sequence[str], read: np.ndarray, width: int) -> Tree:
    """Convolutions one after another, from the channels `read` to all channels of the last one."""
    sliced = {}
    for name, following in zip(names, [*names[1:], None], strict=True):
        if following is None:
            written = _all(params[name], "out")
        else:
            written = _best(_writes(params[name]) * _reads(params[following]), width)
        sliced[name] = _take(params[name], read, written)
        read = written
    return sliced


# arch -> (slicer of the parameters, the hyper-parameters in which a slice may be smaller)
SLICERS: dict[str, tuple[Callable[..., Tree], tuple[str, ...]]] = {
    "rrdbnet": (_rrdbnet, ("num_feat", "num_block", "num_grow_ch")),
    "srvggnetcompact": (_stack("body", lambda hparams: hparams["num_conv"] + 2), ("num_feat", "num_conv")),
    "dncnn": (_stack("model", lambda hparams: hparams["depth"]), ("num_feat", "depth")),
}


def _best(importance: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest, in their order."""
    return np.sort(np.argsort(-importance, kind="stable")[:count])


def _writes(conv: Tree) -> np.ndarray:
    """How strongly each output channel is written."""
    return np.abs(conv["kernel"]).sum((0, 1, 2))


def _reads(conv: Tree) -> np.ndarray:
    """How strongly each input channel is read."""
    return np.abs(conv["kernel"]).sum((0, 1, 3))


def _all(conv: Tree, side: str) -> np.ndarray:
    return np.arange(conv["kernel"].shape[2 if side == "in" else 3])


def _take(conv: Tree, read: np.ndarray, written: np.ndarray) -> Tree:
    return {"kernel": conv["kernel"][:, :, read][..., written], "bias": conv["bias"][written]}


def _as_numpy(tree: Any) -> Any:
    return {key: _as_numpy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else np.asarray(tree)
