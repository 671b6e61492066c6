"""EDSR (Lim et al., 2017, arXiv:1707.02921): residual blocks without normalisation, as BasicSR has it (`edsr_arch.py`).

The image is centred on the mean colour of DIV2K and multiplied by `img_range` inside. `unshuffle` is ours: the trunk
runs at 1/unshuffle of the input's height and width, and a last pixel shuffle brings it back.

Features: `conv_first`, `body.N` (each block), `conv_after_body` (before it is added to `conv_first`), all with
num_feat channels at 1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, call, conv3x3

RGB_MEAN = (0.4488, 0.4371, 0.4040)


class ResidualBlock(nnx.Module):
    """x + res_scale x conv2(relu(conv1(x))), which MSRResNet has as well."""

    def __init__(self, num_feat: int, res_scale: float, *, residual_init: bool, rngs: nnx.Rngs) -> None:
        self.res_scale = res_scale
        self.conv1 = conv3x3(num_feat, num_feat, rngs=rngs, residual_init=residual_init)
        self.conv2 = conv3x3(num_feat, num_feat, rngs=rngs, residual_init=residual_init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.res_scale * self.conv2(jax.nn.relu(self.conv1(x)))


class EDSR(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and its features; any h and w.

    Raises:
      ValueError: `upscale` is neither 3 nor a power of 2.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        upscale: int = 4,
        res_scale: float = 1.0,
        img_range: float = 255.0,
        unshuffle: int = 1,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat, self.img_range, self.upscale, self.unshuffle = remat, img_range, upscale, unshuffle
        self.multiple = unshuffle
        self.mean = RGB_MEAN if num_in_ch == num_out_ch == 3 else (0.0,)
        self.conv_first = conv3x3(num_in_ch * unshuffle**2, num_feat, rngs=rngs)
        self.body = nnx.List(
            [ResidualBlock(num_feat, res_scale, residual_init=False, rngs=rngs) for _ in range(num_block)]
        )
        self.conv_after_body = conv3x3(num_feat, num_feat, rngs=rngs)
        layers: list[nnx.Module] = []
        for factor in upsampling_steps(upscale):
            layers.append(conv3x3(num_feat, num_feat * factor**2, rngs=rngs))
            layers.append(Activation(lambda x, factor=factor: ops.pixel_shuffle(x, factor)))
        self.upsample = nnx.List(layers)
        self.conv_last = conv3x3(num_feat, num_out_ch * unshuffle**2, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        mean = jnp.array(self.mean, image.dtype)
        x = (ops.pad_to_multiple(image, self.unshuffle) - mean) * self.img_range
        features = {}
        x = first = features["conv_first"] = self.conv_first(ops.pixel_unshuffle(x, self.unshuffle))
        for i, block in enumerate(self.body):
            x = features[f"body.{i}"] = call(block, x, remat=self.remat)
        features["conv_after_body"] = self.conv_after_body(x)
        x = first + features["conv_after_body"]
        for layer in self.upsample:
            x = layer(x)
        x = ops.pixel_shuffle(self.conv_last(x), self.unshuffle) / self.img_range + mean
        return x[:, : height * self.upscale, : width * self.upscale], features


def upsampling_steps(upscale: int) -> tuple[int, ...]:
    """The pixel shuffles that enlarge `upscale` times: twos, or one three; none for 1.

    Raises:
      ValueError: there are no such steps.
    """
    if upscale == 3:
        return (3,)
    if upscale < 1 or upscale & (upscale - 1):
        raise ValueError(f"upscale={upscale} is neither 3 nor a power of 2")
    return (2,) * (upscale.bit_length() - 1)
