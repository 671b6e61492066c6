"""Reads LPIPS weights from a state dict of the `lpips` package."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdjax.losses.vgg_file import read_convolution, vgg_params
from kdjax.metrics.lpips import ALEX_LAYERS, VGG_LAYERS, Network
from kdjax.models.reading import WeightsError
from kdjax.weights import load_tensors
from kdjax.weights.tensors import Tensor

# AlexNet's convolutions: their index in torchvision's `features`, and their kernel in torch's layout.
_ALEX = {
    "conv1": (0, (64, 3, 11, 11)),
    "conv2": (3, (192, 64, 5, 5)),
    "conv3": (6, (384, 192, 3, 3)),
    "conv4": (8, (256, 384, 3, 3)),
    "conv5": (10, (256, 256, 3, 3)),
}


def load_lpips(path: str | os.PathLike[str], /) -> Network:
    """Loads LPIPS weights from a file with the state dict of `lpips.LPIPS(net="alex" or "vgg")`.

    Raises:
      WeightsError: if the file cannot be read or holds something else.
    """
    return load_tensors(path, lpips_network)


def load(path: str) -> tuple[Network, str]:
    """Like `load_lpips`, but also returns a description of the file."""
    network = load_lpips(path)
    return network, f"{network.kind}, {path}, sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def lpips_network(state: Mapping[str, Any]) -> Network:
    """Converts an unwrapped `lpips.LPIPS(net="alex" or "vgg").state_dict()` to the network and its channel weights.

    Raises:
      WeightsError: if it is something else, incomplete or damaged.
    """
    found = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    first = found.get("net.slice1.0.weight")
    kind = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}.get(first.shape if first is not None else ())
    channels = (ALEX_LAYERS if kind == "alex" else VGG_LAYERS).values()
    lins = [lin for i in range(5) if (lin := found.get(f"lin{i}.model.1.weight")) is not None]
    if kind is None or [lin.shape for lin in lins] != [(1, c, 1, 1) for c in channels]:
        raise WeightsError(
            "it is not the state dict of lpips.LPIPS with net='alex' or 'vgg', which has net.slice1.0.weight,"
            f" lin0.model.1.weight and so on (found: {', '.join(list(found)[:6]) or 'no tensors'});"
            " docs/evaluating.md says how to write it"
        )
    convolutions = {re.sub(r"^net\.slice[0-9]\.", "", key): value for key, value in found.items() if key[:4] == "net."}
    if kind == "vgg":
        params = vgg_params(convolutions, vgg_type="vgg16", layers=tuple(VGG_LAYERS))
    else:
        params = {name: read_convolution(convolutions, f"{name} of AlexNet", *where) for name, where in _ALEX.items()}
    weights = tuple(np.ascontiguousarray(lin.array().reshape(-1), np.float32) for lin in lins)
    if not all(np.isfinite(array).all() for array in weights):
        raise WeightsError("its channel weights (lin0 to lin4) have NaN or infinite values; the file is damaged")
    return Network(kind, params, weights)
