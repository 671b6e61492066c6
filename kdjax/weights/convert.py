"""From a state dict to a model and back: one rule for every tensor, and a check of all keys.

The rule: torch's 4-D `P.weight` (OIHW) is our `P.kernel` (HWIO); everything else keeps its name and shape. The file
must fit its architecture as a bijection: every tensor used, every parameter filled, every shape equal, every value
finite.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from kdjax.models import Model, abstract_params, complete_hparams
from kdjax.models.custom import is_custom
from kdjax.names import brief
from kdjax.weights.hparams import INFER, Shapes, infer, settle
from kdjax.weights.layouts import Fit, Layout, best_layout, fold_batch_norm, has_batch_norm, refuse_unsupported
from kdjax.weights.tensors import Tensor, WeightsError, listed


def to_model(
    state: Mapping[str, Tensor], *, arch: str | None, said: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[Model, str, tuple[str, ...]]:
    """The model that a state dict holds, the name of its layout, and what was taken that no tensor tells.

    Nothing is built or copied before the keys and shapes have been found to fit.

    Args:
      state: the tensors of one network; `check_cost` has seen them.
      arch: a key of MODELS, or None to recognise it.
      said: hyper-parameters the file states about itself; None when it states nothing.
      given: hyper-parameters the caller states.
    """
    layout_name = None
    if arch in (None, "dncnn") and has_batch_norm(state):
        state, layout_name = fold_batch_norm(state)
    if arch is None:
        refuse_unsupported(state)
    if arch is not None and is_custom(arch):
        fit = Fit(Layout("kdjax", arch, str), {key: key for key in state}, [], [])
    else:
        fit = best_layout(state, arch)
    layout, tensors = fit.layout, {name: state[key] for name, key in fit.renamed.items()}
    stated = dict(said or {}) | dict(given)
    completed = _complete(layout.arch, stated)
    stated = {name: completed[name] for name in stated}
    said = said and _complete(layout.arch, said)
    # Only the files themselves know the hyper-parameters of a network that is not ours.
    told = layout.told({key: state[key] for key in fit.constants})
    if layout.arch in INFER:
        told |= infer(layout.arch, {name: tensor.shape for name, tensor in tensors.items()}, stated)
    wrong = [
        f"{name}={brief(value)}, the tensors say {told[name]!r}"
        for name, value in stated.items()
        if name in told and told[name] != value
    ]
    wrong += [
        f"{name}={brief(stated[name])}, the file says {brief(said[name])}"
        for name in given
        if said and stated[name] != said[name]
    ]
    if wrong:
        raise WeightsError(f"it is stated to be {layout.arch} with {'; '.join(wrong)}; leave that out or correct it")
    hparams = _complete(layout.arch, stated | told)
    if layout.arch == "srvggnetcompact" and "act_type" not in stated | told:
        hparams["act_type"] = "relu"  # same keys as leakyrelu, so the check of the keys can be made first
    _check(layout, hparams, tensors, fit.unused)
    notes: tuple[str, ...] = ()
    if said is None and layout.arch in INFER:
        hparams, notes = settle(layout.arch, layout.name, hparams, stated=set(stated), told=set(told))
    if arch is None and (layout.arch, hparams.get("depth"), hparams.get("num_feat")) == ("dncnn", 7, 64):
        raise WeightsError(
            "its tensors fit DnCNN of depth 7 and IRCNN alike; IRCNN, whose convolutions are dilated, is not supported;"
            " if it is DnCNN, pass arch='dncnn'"
        )
    params, not_finite = {}, []
    for path, shape in _our_shapes(layout.arch, hparams).items():
        name = _torch_name(path, len(shape))
        value = _float32(tensors[name].array())
        if not np.isfinite(value).all():
            not_finite.append(fit.renamed[name])
        params[path] = np.asarray(value if name == path else value.transpose(2, 3, 1, 0), order="C")
    _refuse_not_finite(not_finite)
    return Model(layout.arch, hparams, traverse_util.unflatten_dict(params, sep=".")), layout_name or layout.name, notes


def to_state_dict(model: Model) -> dict[str, np.ndarray]:
    """The model's parameters in torch's names and layouts, float32, in the order of the network.

    Raises:
      WeightsError: the parameters do not fit the architecture, or are not finite.
    """
    state = {}
    for path, leaf in traverse_util.flatten_dict(model.params, sep=".").items():
        value = np.asarray(leaf)
        name = _torch_name(path, value.ndim)
        state[name] = np.asarray(value if name == path else value.transpose(3, 2, 0, 1), order="C")
    tensors = {name: Tensor.of(value) for name, value in state.items()}
    _check(Layout("kdjax", model.arch, str), model.hparams, tensors, ())
    state = {name: _float32(state[name]) for name in torch_shapes(model.arch, model.hparams)}
    _refuse_not_finite([name for name, value in state.items() if not np.isfinite(value).all()])
    return state


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


def _check(layout: Layout, hparams: Mapping[str, Any], state: Mapping[str, Tensor], unused: Iterable[str]) -> None:
    """Raises one error with every missing, unexpected and misshapen key."""
    wanted = torch_shapes(layout.arch, hparams)
    missing = [key for key in wanted if key not in state]
    unexpected = [*unused, *(key for key in state if key not in wanted)]
    misshapen = [
        f"{key} is {state[key].shape}, wanted {shape}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    not_float = [f"{key} is {state[key].dtype}" for key in wanted if key in state and not state[key].is_float]
    faults = {
        "missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating point": not_float,
    }  # fmt: skip
    if any(faults.values()):
        report = "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in faults.items() if keys)
        settings = ", ".join(f"{name}={brief(value)}" for name, value in hparams.items())
        raise WeightsError(
            f"the tensors do not fit {layout.arch} ({settings}; {layout.name} layout), the nearest architecture:"
            f" {report}"
        )


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def _refuse_not_finite(names: Collection[str]) -> None:
    if names:
        raise WeightsError(
            f"there are NaN or infinite values (as float32) in: {listed(names)}; training diverged or the file is"
            " damaged"
        )
