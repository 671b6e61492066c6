"""Perceptual and style losses: images compared by their VGG features (Johnson et al., arXiv:1603.08155).

These follow BasicSR: layers have BasicSR's names, "conv3_4" is the output before its ReLU, and images in [0, 1] are
normalised with ImageNet's mean and standard deviation. The weights come from a torchvision file
(`kdjax.losses.vgg_file`) as a dict {"conv1_1": {"kernel": HWIO, "bias": ...}, ...}. Everything is computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from kdjax.models import Params
from kdjax.names import pick
from kdjax.ops.convolution import convolve

Features = Mapping[str, jax.Array]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHANNELS = (64, 128, 256, 512, 512)  # of the five blocks, the same in every VGG
# Convolutions per block (Simonyan & Zisserman, arXiv:1409.1556).
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def layer_names(vgg_type: str) -> list[str]:
    """Returns conv1_1, relu1_1, ..., pool1, conv2_1, ... in the order of torchvision's `features`.

    Raises:
      ValueError: if the type is unknown.
    """
    names = []
    for block, depth in enumerate(pick(DEPTHS, vgg_type, "vgg_type"), start=1):
        for i in range(1, depth + 1):
            names += [f"conv{block}_{i}", f"relu{block}_{i}"]
        names.append(f"pool{block}")
    return names


def needed_layers(vgg_type: str, layers: Sequence[str]) -> list[str]:
    """Returns all layers up to the deepest of `layers`.

    Raises:
      ValueError: if the network lacks a layer, or `layers` is empty.
    """
    names = layer_names(vgg_type)
    if not layers:
        raise ValueError(f"no layers of {vgg_type} given (known: {', '.join(names)})")
    positions = {name: i for i, name in enumerate(names)}
    return names[: 1 + max(pick(positions, layer, f"layer of {vgg_type}") for layer in layers)]


def vgg_features(
    params: Params,
    images: jax.Array,
    *,
    vgg_type: str,
    layers: Sequence[str],
    use_input_norm: bool = True,
    range_norm: bool = False,
    remove_pooling: bool = False,
    pooling_stride: int = 2,
) -> dict[str, jax.Array]:
    """Returns the outputs (b, h, w, c) of some layers for RGB images (b, h, w, 3); computes nothing deeper.

    `range_norm` maps images from [-1, 1] to [0, 1] before `use_input_norm` subtracts ImageNet's mean and divides by its
    standard deviation. Pooling windows are 2x2.

    Raises:
      ValueError: if the type or a layer is unknown.
    """
    x = images.astype(jnp.float32)
    if range_norm:
        x = (x + 1) / 2
    if use_input_norm:
        x = (x - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)
    features = {}
    for name in needed_layers(vgg_type, layers):
        if name.startswith("conv"):
            x = convolve(x, params[name]["kernel"]) + params[name]["bias"]
        elif name.startswith("relu"):
            x = jax.nn.relu(x)
        elif not remove_pooling:
            window, stride = (1, 2, 2, 1), (1, pooling_stride, pooling_stride, 1)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, stride, "VALID")
        if name in layers:
            features[name] = x
    return features


def perceptual(ours: Features, theirs: Features, *, layer_weights: Mapping[str, float], criterion: str) -> jax.Array:
    """Weighted sum over layers of "l1" (mean |d|), "l2" (mean d^2) or "fro" (Frobenius norm of d).

    "fro" is BasicSR's: it is taken over the whole batch rather than averaged, so it grows with batch and image size.

    Raises:
      ValueError: if the criterion is unknown.
    """
    compare = pick(CRITERIA, criterion, "criterion of a perceptual loss")
    return jnp.asarray(sum(weight * compare(ours[layer] - theirs[layer]) for layer, weight in layer_weights.items()))


def style(ours: Features, theirs: Features, *, layer_weights: Mapping[str, float], criterion: str) -> jax.Array:
    """Like `perceptual`, on the Gram matrices F^T F / (c h w) of the features (Gatys et al., arXiv:1508.06576)."""
    grams = ({layer: _gram(features[layer]) for layer in layer_weights} for features in (ours, theirs))
    return perceptual(*grams, layer_weights=layer_weights, criterion=criterion)


def _gram(x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    flat = x.reshape(b, h * w, c)
    return jnp.einsum("bpi,bpj->bij", flat, flat) / (c * h * w)


def _length(difference: jax.Array) -> jax.Array:
    square = jnp.sum(jnp.square(difference))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # gradient 0 at 0


CRITERIA: dict[str, Callable[[jax.Array], jax.Array]] = {
    "l1": lambda difference: jnp.mean(jnp.where(difference == 0, 0, jnp.abs(difference))),  # gradient 0 at 0, as torch
    "l2": lambda difference: jnp.mean(jnp.square(difference)),
    "fro": _length,
}
