"""From a state dict to a model and back: one rule for every tensor, and a check of all keys.

The rule: torch's 4-D `P.weight` (OIHW) is our `P.kernel` (HWIO); everything else keeps its name and shape. File and
architecture must match one-to-one: every tensor used, every parameter filled, every shape equal, every value finite.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from kdjax.models import MODELS, Architecture, Model, Network, network
from kdjax.models.reading import Known, Layout, Shapes, WeightsError, listed
from kdjax.names import brief
from kdjax.weights.hparams import infer
from kdjax.weights.layouts import Fit, best_layout
from kdjax.weights.tensors import Tensor


def to_model(
    state: Mapping[str, Tensor], *, architecture: Architecture | None, said: Mapping[str, Any] | None,
    given: Mapping[str, Any],
) -> tuple[Model, str, tuple[str, ...]]:  # fmt: skip
    """Returns the model in a state dict, its layout's name, and notes on what was assumed.

    Nothing is built or copied until keys and shapes are known to fit.

    Args:
      state: the tensors of one network, already checked by `check_cost`.
      architecture: None to recognise it.
      said: hyper-parameters the file states about itself; None if it states nothing.
      given: hyper-parameters the caller states.
    """
    state, layout_name = _converted(state, architecture)
    if architecture is not None and architecture.files is None:  # only kdjax writes these, and their names can be any
        fit = Fit(architecture, Layout("kdjax", str), {key: key for key in state}, [], [])
    else:
        fit = best_layout(state, architecture)
    found, files, layout = fit.architecture, fit.architecture.files, fit.layout
    tensors = {name: state[key] for name, key in fit.renamed.items()}
    stated = dict(said or {}) | dict(given)
    completed = _network(found, stated).hparams
    stated = {name: completed[name] for name in stated}
    said = said and _network(found, said).hparams
    # For a user-defined network, only the file itself knows the hyper-parameters.
    told = layout.told({key: state[key] for key in fit.constants})
    if files:
        told |= infer(found, {name: tensor.shape for name, tensor in tensors.items()}, stated)
    _refuse_contradictions(found, told=told, stated=stated, said=said, given=given)
    net = _network(found, {**(files.guess if files else {}), **stated, **told})
    _check(net, layout.name, tensors, fit.unused)
    notes: list[str] = []
    if said is None and files:
        known = Known(layout.name, net.hparams, set(stated), set(told), is_chosen=architecture is not None)
        settled, notes = files.settle(known)
        net = _network(found, net.hparams | settled)
    params, not_finite = {}, []
    for path, shape in _our_shapes(net).items():
        name = _torch_name(path, len(shape))
        value = _float32(tensors[name].array())
        if not np.isfinite(value).all():
            not_finite.append(fit.renamed[name])
        params[path] = np.asarray(value if name == path else value.transpose(2, 3, 1, 0), order="C")
    _refuse_not_finite(not_finite)
    return Model(net, traverse_util.unflatten_dict(params, sep=".")), layout_name or layout.name, tuple(notes)


def _converted(state: Mapping[str, Tensor], architecture: Architecture | None) -> tuple[Mapping[str, Tensor], str]:
    """Converts a state dict to a known layout; also returns the original layout's name, if it was converted."""
    for known in MODELS.values() if architecture is None else [architecture]:
        if known.files and (converted := known.files.convert(state)):
            arrays, name = converted
            return {key: Tensor.of(array) for key, array in arrays.items()}, name
    return state, ""


def _refuse_contradictions(
    architecture: Architecture,
    *,
    told: Mapping[str, Any],
    stated: Mapping[str, Any],
    said: Mapping[str, Any] | None,
    given: Mapping[str, Any],
) -> None:
    """Raises a WeightsError if a stated hyper-parameter contradicts the tensors or the file."""
    wrong = [
        f"{name}={brief(value)}, but the tensors say {told[name]!r}"
        for name, value in stated.items()
        if name in told and told[name] != value
    ]
    wrong += [
        f"{name}={brief(stated[name])}, but the file says {brief(said[name])}"
        for name in given
        if said and stated[name] != said[name]
    ]
    if wrong:
        raise WeightsError(f"given as {architecture.name} with {'; '.join(wrong)}; correct that or leave it out")


def to_state_dict(model: Model) -> dict[str, np.ndarray]:
    """Returns the model's parameters as other programs read them: torch's names and layouts, float32, in order.

    Raises:
      WeightsError: the parameters do not fit the architecture, or are not finite.
    """
    state = {}
    for path, leaf in traverse_util.flatten_dict(model.params, sep=".").items():
        value = np.asarray(leaf)
        name = _torch_name(path, value.ndim)
        state[name] = np.asarray(value if name == path else value.transpose(3, 2, 0, 1), order="C")
    tensors = {name: Tensor.of(value) for name, value in state.items()}
    _check(model.network, "kdjax", tensors, ())
    state = {name: _float32(state[name]) for name in torch_shapes(model.network)}
    _refuse_not_finite([name for name, value in state.items() if not np.isfinite(value).all()])
    files = model.network.architecture.files
    return files.expand(model.hparams, state) if files else state


def _network(architecture: Architecture, hparams: Mapping[str, Any]) -> Network:
    try:
        return network(architecture.name, hparams)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def torch_shapes(net: Network) -> dict[str, tuple[int, ...]]:
    """Returns torch name and shape of every parameter, in the network's order."""
    shapes = {}
    for path, shape in _our_shapes(net).items():
        name = _torch_name(path, len(shape))
        shapes[name] = shape if name == path else (shape[3], shape[2], shape[0], shape[1])
    return dict(sorted(shapes.items(), key=lambda item: _network_order(item[0], net.architecture.order)))


def _torch_name(path: str, ndim: int) -> str:
    """Returns a parameter's torch name; only convolution kernels are named, and stored, differently."""
    return path.removesuffix("kernel") + "weight" if path.endswith(".kernel") and ndim == 4 else path


def _our_shapes(net: Network) -> Shapes:
    try:
        leaves = traverse_util.flatten_dict(net.abstract_params, sep=".")
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return {path: leaf.shape for path, leaf in leaves.items()}


def _network_order(key: str, heads: Sequence[str]) -> tuple[Any, ...]:
    """Sorts in torch's registration order: first, trunk, tail; body.10 after body.9; weight before bias."""
    head = next((i for i, name in enumerate(heads) if key.split(".")[0].rstrip("0123456789") == name), len(heads))
    parts = [(int(text) if text.isdigit() else 0, text) for text in re.split(r"([0-9]+)|\.", key) if text]
    module, leaf = parts[:-1], parts[-1][1]
    return head, module, leaf != "weight", leaf


def _check(net: Network, layout_name: str, state: Mapping[str, Tensor], unused: Iterable[str]) -> None:
    """Raises a single error that lists every missing, unexpected and wrongly shaped key."""
    wanted = torch_shapes(net)
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
        settings = ", ".join(f"{name}={brief(value)}" for name, value in net.hparams.items())
        raise WeightsError(
            f"the tensors do not fit {net.arch} ({settings}; {layout_name} layout), the nearest architecture: {report}"
        )


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(array, np.float32)


def _refuse_not_finite(names: Collection[str]) -> None:
    if names:
        raise WeightsError(
            f"NaN or infinite values (as float32) in: {listed(names)}; training diverged or the file is damaged"
        )
