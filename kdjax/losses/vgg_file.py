"""Reads VGG weights for perceptual losses from the files that torchvision publishes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.losses.perceptual import CHANNELS, layer_names, needed_layers
from kdjax.models.reading import WeightsError
from kdjax.weights import load_tensors
from kdjax.weights.tensors import Tensor


def load_vgg(
    path: str | os.PathLike[str], /, *, vgg_type: str, layers: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    """Loads the VGG weights in a torchvision file, up to the deepest of `layers`, for `kdjax.losses.perceptual`.

    Raises:
      WeightsError: if the file cannot be read or holds another network.
      ValueError: if the type or a layer is unknown.
    """
    needed_layers(vgg_type, layers)
    return load_tensors(path, lambda state: vgg_params(state, vgg_type=vgg_type, layers=layers))


def vgg_params(state: Mapping[str, Any], *, vgg_type: str, layers: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Converts an unwrapped state dict to {"conv1_1": {"kernel": HWIO, "bias": (c,)}, ...}, as far as `layers` need it.

    Keys are torchvision's `features.N.weight`, or `N.weight` if the file holds `features` alone.

    Raises:
      WeightsError: if it is not a VGG, has batch normalisation, or is not of type `vgg_type`.
      ValueError: if the type or a layer is unknown.
    """
    state = {str(key).removeprefix("features."): value for key, value in state.items() if isinstance(value, Tensor)}
    if any(key.endswith("running_mean") for key in state):
        raise WeightsError(f"it is a VGG with batch normalisation; wanted torchvision's plain {vgg_type}")
    wanted = _convolutions(vgg_type)
    found = {key: value.shape for key, value in state.items() if re.fullmatch(r"[0-9]+\.weight", key)}
    expected = {f"{index}.weight": (num_out, num_in, 3, 3) for index, num_in, num_out in wanted.values()}
    if not found or any(expected.get(key) != shape for key, shape in found.items()):
        raise WeightsError(
            f"its convolutions ({_listed(found)}) are not those of {vgg_type} ({_listed(expected)}); give torchvision's"
            f" file of {vgg_type}, or set vgg_type"
        )
    params = {}
    for name in needed_layers(vgg_type, layers):
        if not name.startswith("conv"):
            continue
        index, num_in, num_out = wanted[name]
        params[name] = read_convolution(state, f"{name} of {vgg_type}", index, (num_out, num_in, 3, 3))
    return params


def read_convolution(
    state: Mapping[str, Tensor], name: str, index: int, shape: tuple[int, int, int, int]
) -> dict[str, np.ndarray]:
    """Returns {"kernel": HWIO, "bias": (c,)} of the convolution at this index of torchvision's `features`.

    Args:
      name: what messages call it.
      shape: of its weight, OIHW.

    Raises:
      WeightsError: if it is missing, has another shape or is damaged.
    """
    weight, bias = state.get(f"{index}.weight"), state.get(f"{index}.bias")
    if weight is None or bias is None or weight.shape != shape or bias.shape != shape[:1]:
        raise WeightsError(f"{name} should be features.{index} with weight and bias; it is incomplete")
    arrays = {"kernel": weight.array().transpose(2, 3, 1, 0), "bias": bias.array()}
    arrays = {part: np.ascontiguousarray(array, np.float32) for part, array in arrays.items()}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise WeightsError(f"{name} has NaN or infinite values; the file is damaged")
    return arrays


def _convolutions(vgg_type: str) -> dict[str, tuple[int, int, int]]:
    """Returns layer -> (its index in torchvision's `features`, input channels, output channels)."""
    table, num_in = {}, 3
    for index, name in enumerate(layer_names(vgg_type)):
        if name.startswith("conv"):
            num_out = CHANNELS[int(name[4]) - 1]
            table[name] = (index, num_in, num_out)
            num_in = num_out
    return table


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    first = list(shapes.items())[:6]
    return ", ".join(f"{key} {shape}" for key, shape in first) + (", ..." if len(shapes) > 6 else "") or "none"
