"""LPIPS: the distance between two images in the features of a trained network (Zhang et al., arXiv:1801.03924).

At five layers of an AlexNet or VGG16, every pixel's features are scaled to unit length. Their squared differences are
weighted per channel, with weights fitted to human judgements, and averaged over the image. Equal images give 0; lower
is better. The numbers match the `lpips` package, version 0.1 of its weights, for images in [-1, 1].

The user supplies the weights in a file (`kdjax.metrics.lpips_file.load_lpips`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.losses.perceptual import Params, vgg_features
from kdjax.metrics.psnr_ssim import TooSmallError, check, crop

# ImageNet's mean and standard deviation for images in [-1, 1], with the digits of the `lpips` package.
_SHIFT, _SCALE = np.array([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]], np.float32)
# The layers compared, and their channels.
VGG_LAYERS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}
ALEX_LAYERS = {"conv1": 64, "conv2": 192, "conv3": 384, "conv4": 256, "conv5": 256}
# Per convolution of AlexNet (Krizhevsky, arXiv:1404.5997): stride, padding, and whether the input is pooled first.
_ALEX_CONVOLUTIONS = {
    "conv1": (4, 2, False), "conv2": (1, 2, True), "conv3": (1, 1, True), "conv4": (1, 1, False), "conv5": (1, 1, False)
}  # fmt: skip
# The smallest side that leaves every layer at least one pixel.
_SMALLEST = {"alex": 31, "vgg": 16}


class Network(NamedTuple):
    """The weights of LPIPS.

    Attributes:
      kind: "alex" or "vgg".
      convolutions: {"conv1" or "conv1_1": {"kernel": HWIO, "bias": (c,)}, ...}
      channel_weights: (c,) for each of the five layers.
    """

    kind: str
    convolutions: Params
    channel_weights: tuple[np.ndarray, ...]


def distance(a: np.ndarray, b: np.ndarray, network: Network, *, crop_border: int = 0) -> float:
    """Returns LPIPS between uint8 (h, w, c) images, RGB or grey; compiles once per image size.

    Raises:
      TooSmallError: if a side, less the border, is below 31 pixels (AlexNet) or 16 (VGG).
      ValueError: if the images have another dtype or their shapes do not match.
    """
    check(a, b)
    a, b = crop(a, crop_border), crop(b, crop_border)
    if min(a.shape[:2]) < (smallest := _SMALLEST[network.kind]):
        raise TooSmallError(
            f"LPIPS with {network.kind} needs at least {smallest}x{smallest} pixels inside the crop border, got"
            f" {a.shape[0]}x{a.shape[1]}"
        )
    return float(_distance(network.convolutions, network.channel_weights, a, b, kind=network.kind))


@functools.partial(jax.jit, static_argnames="kind")
def _distance(
    convolutions: Params, channel_weights: tuple[jax.Array, ...], a: jax.Array, b: jax.Array, *, kind: str
) -> jax.Array:
    # A grey image broadcasts to three channels here.
    images = (jnp.stack([a, b]).astype(jnp.float32) / 127.5 - 1 - _SHIFT) / _SCALE
    if kind == "vgg":
        features = vgg_features(
            convolutions, images, vgg_type="vgg16", layers=tuple(VGG_LAYERS), use_input_norm=False
        ).values()
    else:
        features = _alex_features(convolutions, images)
    total = jnp.zeros(())
    for weights, layer in zip(channel_weights, features, strict=True):
        ours, theirs = layer / (jnp.linalg.norm(layer, axis=-1, keepdims=True) + 1e-10)
        total += jnp.mean(jnp.square(ours - theirs) @ weights)
    return total


def _alex_features(convolutions: Params, x: jax.Array) -> list[jax.Array]:
    """Returns the five outputs (b, h, w, c) of AlexNet's convolutions, after their ReLU."""
    features = []
    for name, (stride, padding, pools) in _ALEX_CONVOLUTIONS.items():
        if pools:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x, convolutions[name]["kernel"], (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        x = jax.nn.relu(x + convolutions[name]["bias"])
        features.append(x)
    return features
