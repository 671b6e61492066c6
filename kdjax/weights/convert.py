"""From a state dict to a model and back: hyper-parameters from shapes, one rule for every tensor, a check of all keys.

The rule: torch's 4-D `P.weight` (OIHW) is our `P.kernel` (HWIO); everything else keeps its name and shape. The file
must fit its architecture as a bijection: every tensor used, every parameter filled, every shape equal, every value
finite.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from kdjax.models import Model, abstract_params, complete_hparams
from kdjax.models.custom import is_custom
from kdjax.weights.layouts import (
    Layout,
    best_layout,
    fold_batch_norm,
    has_batch_norm,
    listed,
    refuse_unsupported,
    strip_prefixes,
)
from kdjax.weights.tensors import BFLOAT16, Tensor, WeightsError

Shapes = Mapping[str, tuple[int, ...]]


# ---- hyper-parameters from shapes ------------------------------------------------------------------------------


def _infer_rrdbnet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    num_upsample = _count(shapes, r"conv_up([0-9]+)\.weight", first=1)
    inputs = _size(shapes, 1, "conv_first.weight", default=3)
    num_out_ch = _size(shapes, 0, "conv_last.weight", default=3)
    # Only the ratio of the channels tells that the input is un-shuffled, as in every reader of these files; a network
    # that really reads 4 or 16 times the channels it writes has to say so: load_weights(path, scale=4).
    if "scale" in given:
        unshuffle = max(1, 2**num_upsample // max(1, given["scale"]))
    elif "num_in_ch" in given:
        unshuffle = max(1, math.isqrt(inputs // max(1, given["num_in_ch"])))
    else:
        unshuffle = {4: 2, 16: 4}.get(inputs // max(1, num_out_ch), 1) if inputs % max(1, num_out_ch) == 0 else 1
        unshuffle = unshuffle if unshuffle <= 2**num_upsample else 1
    return {
        "num_in_ch": inputs // unshuffle**2,
        "num_out_ch": num_out_ch,
        "scale": 2**num_upsample // unshuffle,
        "num_feat": _size(shapes, 0, "conv_first.weight", "conv_body.weight", "conv_hr.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "num_grow_ch": _size(shapes, 0, "body.0.rdb1.conv1.weight", "body.0.rdb2.conv1.weight", default=32),
        "num_upsample": num_upsample,
    }


def _infer_srvggnetcompact(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"body\.([0-9]+)\.weight") - 1
    inputs = _size(shapes, 1, "body.0.weight", default=3)
    outputs = _size(shapes, 0, f"body.{last}.weight", default=inputs)
    num_in_ch, unshuffle = _unshuffled(inputs, given)
    hparams = {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "body.0.weight", default=64),
        "num_conv": max(1, last // 2 - 1),
        "upscale": max(1, math.isqrt(outputs // max(1, inputs))),
        "unshuffle": unshuffle,
    }
    if any(len(shape) == 1 and key.endswith(".weight") for key, shape in shapes.items()):
        hparams["act_type"] = "prelu"  # the other two have no parameters, so they cannot be told apart
    return hparams


def _infer_dncnn(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"model\.([0-9]+)\.weight") - 1
    inputs = _size(shapes, 1, "model.0.weight", default=3)
    outputs = _size(shapes, 0, f"model.{last}.weight", default=inputs)
    if inputs == outputs + 1:
        raise WeightsError(
            f"it looks like FDnCNN or FFDNet: the first convolution reads {inputs} channels and the last writes"
            f" {outputs}, so one input is a map of the noise level; only DnCNN, which needs no map, is supported"
        )
    num_in_ch, unshuffle = _unshuffled(inputs, given)
    return {
        "num_in_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "model.0.weight", default=64),
        "depth": max(2, last // 2 + 1),
        "unshuffle": unshuffle,
    }


def _infer_edsr(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    num_in_ch, unshuffle = _unshuffled(_size(shapes, 1, "conv_first.weight", default=3), given)
    # res_scale and img_range leave no trace in the tensors: BasicSR's defaults, unless the file or the caller says.
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": max(1, _size(shapes, 0, "conv_last.weight", default=3) // unshuffle**2),
        "num_feat": _size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": _upscale(shapes, "upsample.0.weight", len([k for k in shapes if re.match(r"upsample.*weight", k)])),
        "unshuffle": unshuffle,
    }


def _infer_msrresnet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    num_in_ch = _size(shapes, 1, "conv_first.weight", default=3)
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": _upscale(shapes, "upconv1.weight", _count(shapes, r"upconv([0-9]+)\.weight", first=1)),
    }


def _infer_nafnet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    def blocks(stage: str) -> tuple[int, ...]:
        levels = _count(shapes, r"downs\.([0-9]+)\.weight")
        return tuple(_count(shapes, rf"{stage}\.{level}\.([0-9]+)\..*") for level in range(levels))

    return {
        "img_channel": _size(shapes, 1, "intro.weight", default=3),
        "width": _size(shapes, 0, "intro.weight", default=16),
        "middle_blk_num": max(1, _count(shapes, r"middle_blks\.([0-9]+)\..*")),
        "enc_blk_nums": blocks("encoders"),
        "dec_blk_nums": blocks("decoders"),
    }


def _infer_unet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_in_ch": _size(shapes, 1, "conv_first.weight", default=3),
        "num_feat": _size(shapes, 0, "conv_first.weight", default=16),
        "num_level": max(1, _count(shapes, r"down\.([0-9]+)\.weight")),
        "num_conv": max(1, _count(shapes, r"encoder\.0\.convs\.([0-9]+)\.weight")),
    }


def _unshuffled(inputs: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """Colour channels of the image and the un-shuffling in front of a first convolution that reads `inputs` channels.

    12 and 48 channels are taken for RGB un-shuffled 2 and 4 times; what else there may be has to be stated.
    """
    if "unshuffle" in given:
        unshuffle = max(1, given["unshuffle"])
    elif "num_in_ch" in given:
        unshuffle = max(1, math.isqrt(inputs // max(1, given["num_in_ch"])))
    else:
        unshuffle = {12: 2, 48: 4}.get(inputs, 1)
    return max(1, inputs // unshuffle**2), unshuffle


def _upscale(shapes: Shapes, first: str, count: int) -> int:
    """The enlargement by `count` pixel shuffles, of which the `first` convolution tells whether it is by 3."""
    shape = shapes.get(first, (4, 1))
    return 3 if count == 1 and shape[0] == 9 * shape[1] else 2**count


INFER: dict[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    "rrdbnet": _infer_rrdbnet,
    "srvggnetcompact": _infer_srvggnetcompact,
    "dncnn": _infer_dncnn,
    "edsr": _infer_edsr,
    "msrresnet": _infer_msrresnet,
    "nafnet": _infer_nafnet,
    "unet": _infer_unet,
}


def _size(shapes: Shapes, axis: int, *keys: str, default: int) -> int:
    """The size along `axis` of the first of these convolutions that the file has."""
    return next((shapes[key][axis] for key in keys if len(shapes.get(key, ())) == 4), default)


def _count(shapes: Shapes, pattern: str, *, first: int = 0) -> int:
    """How many numbered parts there are: up to the largest number, unless a stray one is far beyond the rest."""
    numbers = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    count = max(numbers, default=first - 1) + 1 - first
    return count if count <= 2 * len(numbers) + 8 else len(numbers)


# ---- the whole way, both directions ----------------------------------------------------------------------------


def to_model(
    state: dict[str, Any], *, arch: str | None, said: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Model, str]:
    """The model that a state dict holds, and the name of its layout.

    Args:
      state: an unwrapped state dict.
      arch: a key of MODELS, or None to recognise it.
      said: hyper-parameters the file states about itself.
      given: hyper-parameters the caller states; they win over `said`.
    """
    strange = [key for key, value in state.items() if type(key) is not str or not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"its state dict has entries that are not tensors: {listed(strange)}; remove them")
    arrays = _float32({key: tensor.array() for key, tensor in strip_prefixes(state).items()})
    layout_name = None
    if arch in (None, "dncnn") and has_batch_norm(arrays):
        arrays, layout_name = _float32(fold_batch_norm(arrays)), "KAIR with BatchNorm"
    if arch is None:
        refuse_unsupported(arrays)

    if arch is not None and is_custom(arch):
        layout, renamed, unused = Layout("kdjax", arch, str), {key: key for key in arrays}, []
    else:
        layout, renamed, unused = best_layout(arrays, arch)
    shapes = {name: arrays[key].shape for name, key in renamed.items()}
    stated = dict(said) | dict(given)
    completed = _complete(layout.arch, stated)
    stated = {name: completed[name] for name in stated}
    # Only the files themselves know the hyper-parameters of a network that is not ours.
    inferred = INFER[layout.arch](shapes, stated) if layout.arch in INFER else {}
    wrong = [
        f"{name}={value!r}, the tensors say {inferred[name]!r}"
        for name, value in stated.items()
        if name in inferred and inferred[name] != value
    ]
    if wrong:
        raise WeightsError(f"it is stated to be {layout.arch} with {'; '.join(wrong)}; leave that out or correct it")
    hparams = _complete(layout.arch, stated | inferred)
    unknown_activation = layout.arch == "srvggnetcompact" and "act_type" not in stated | inferred
    if unknown_activation:
        hparams["act_type"] = "relu"  # same keys as leakyrelu, so the check of the keys can be made first
    _check(layout, hparams, {name: arrays[key] for name, key in renamed.items()}, unused)
    if unknown_activation:
        raise WeightsError(
            "it is SRVGGNetCompact without PReLU weights, so its activation is ReLU or leaky ReLU and the file does not"
            " say which; pass act_type='relu' or act_type='leakyrelu'"
        )
    if arch is None and (layout.arch, hparams.get("depth"), hparams.get("num_feat")) == ("dncnn", 7, 64):
        raise WeightsError(
            "its tensors fit DnCNN of depth 7 and IRCNN alike; IRCNN, whose convolutions are dilated, is not supported;"
            " if it is DnCNN, pass arch='dncnn'"
        )
    params = {}
    for path, shape in _our_shapes(layout.arch, hparams).items():
        name = _torch_name(path, len(shape))
        value = arrays[renamed[name]]
        params[path] = np.ascontiguousarray(value if name == path else value.transpose(2, 3, 1, 0))
    return Model(layout.arch, hparams, traverse_util.unflatten_dict(params, sep=".")), layout_name or layout.name


def to_state_dict(model: Model) -> dict[str, np.ndarray]:
    """The model's parameters in torch's names and layouts, float32, in the order of the network.

    Raises:
      WeightsError: the parameters do not fit the architecture, or are not finite.
    """
    state = {}
    for path, leaf in traverse_util.flatten_dict(model.params, sep=".").items():
        value = np.asarray(leaf)
        name = _torch_name(path, value.ndim)
        state[name] = value if name == path else value.transpose(3, 2, 0, 1)
    _check(Layout("kdjax", model.arch, str), model.hparams, state, ())
    wanted = torch_shapes(model.arch, model.hparams)
    return _float32({key: np.ascontiguousarray(state[key]) for key in wanted})


def _complete(arch: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return complete_hparams(arch, hparams)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def torch_shapes(arch: str, hparams: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of an architecture: torch name and shape, in the order of the network."""
    shapes = {}
    for path, shape in _our_shapes(arch, hparams).items():
        name = _torch_name(path, len(shape))
        shapes[name] = shape if name == path else (shape[3], shape[2], shape[0], shape[1])
    return dict(sorted(shapes.items(), key=lambda item: _network_order(item[0])))


def _torch_name(path: str, ndim: int) -> str:
    """torch's name of a parameter: only the kernels of convolutions are called, and stored, otherwise."""
    return path.removesuffix("kernel") + "weight" if path.endswith(".kernel") and ndim == 4 else path


def _our_shapes(arch: str, hparams: Mapping[str, Any]) -> Shapes:
    return _cached_shapes(arch, tuple(hparams.items()))


@functools.lru_cache(maxsize=16)  # seconds for a large network, and asked for several times per file
def _cached_shapes(arch: str, hparams: tuple[tuple[str, Any], ...]) -> Shapes:
    try:
        leaves = traverse_util.flatten_dict(abstract_params(arch, dict(hparams)), sep=".")
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return {path: leaf.shape for path, leaf in leaves.items()}


def _network_order(key: str) -> tuple[Any, ...]:
    """Sorts as torch registers: first, trunk, tail; body.10 after body.9; weight before bias."""
    heads = (
        "conv_first", "intro", "ending", "body", "model", "encoder", "encoders", "down", "decoders", "middle_blks",
        "ups", "downs", "up", "decoder", "conv_after_body", "conv_body", "conv_up", "upconv", "upsample", "conv_hr",
        "conv_last",
    )  # fmt: skip
    head = next((i for i, name in enumerate(heads) if key.split(".")[0].rstrip("0123456789") == name), len(heads))
    parts = [(int(text) if text.isdigit() else 0, text) for text in re.split(r"([0-9]+)|\.", key) if text]
    module, leaf = parts[:-1], parts[-1][1]
    return head, module, leaf != "weight", leaf


def _check(layout: Layout, hparams: Mapping[str, Any], state: Mapping[str, np.ndarray], unused: Iterable[str]) -> None:
    """Raises one error with every missing, unexpected and misshapen key."""
    wanted = torch_shapes(layout.arch, hparams)
    missing = [key for key in wanted if key not in state]
    unexpected = [*unused, *(key for key in state if key not in wanted)]
    misshapen = [
        f"{key} is {state[key].shape}, wanted {shape}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    not_float = [f"{key} is {state[key].dtype}" for key in wanted if key in state and not _is_float(state[key])]
    faults = {
        "missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating point": not_float,
    }  # fmt: skip
    if any(faults.values()):
        report = "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in faults.items() if keys)
        settings = ", ".join(f"{name}={value}" for name, value in hparams.items())
        raise WeightsError(
            f"the tensors do not fit {layout.arch} ({settings}; {layout.name} layout), the nearest architecture:"
            f" {report}"
        )


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with every floating-point array as float32, all values finite; integers stay for `_check` to report."""
    with np.errstate(over="ignore"):
        converted = {key: array.astype(np.float32) if _is_float(array) else array for key, array in arrays.items()}
    bad = [key for key, array in converted.items() if not np.isfinite(array).all()]
    if bad:
        raise WeightsError(
            f"there are NaN or infinite values (as float32) in: {listed(bad)}; training diverged or the file is damaged"
        )
    return converted


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == BFLOAT16
