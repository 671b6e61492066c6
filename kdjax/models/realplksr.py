"""RealPLKSR: PLKSR (Lee et al., 2024, arXiv:2404.11848) for photographs, in the layout of neosr and traiNNer-redux.

A block mixes channels, runs a large kernel over the first part of them, weighs every element by an attention, and
normalises: by groups of channels over the whole image, or (`layer_norm`) by pixel and before. The nearest-upsampled
input is added at the end. Files with DySample in its place are not supported.

Features: `feats.N` for the first convolution (0), every block and the last convolution, with `dim` channels but for the
last, at the input's height and width.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, LayerNorm2d, call, conv, mish
from kdjax.models.model import Architecture
from kdjax.models.reading import Files, Hparams, Known, Layout, Settled, Shapes, count, how_to_say, same_if, size
from kdjax.ops.convolution import convolve


class GroupNorm(nnx.Module):
    """torch's: normalises groups of channels over the whole image, in float32."""

    def __init__(self, num_groups: int, num_channels: int) -> None:
        self.num_groups = num_groups
        self.weight, self.bias = nnx.Param(jnp.ones(num_channels)), nnx.Param(jnp.zeros(num_channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y / jnp.sqrt(self._mean(jnp.square(y)) + 1e-5)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        """Returns (b, 1, 1, c): for every channel, the mean of its group. A convolution, which every format knows."""
        size = x.shape[-1] // self.num_groups
        average = np.kron(np.eye(self.num_groups), np.full((size, size), 1 / size)).astype(np.float32)
        return convolve(x.mean((1, 2), keepdims=True), jnp.asarray(average[None, None]))


class PartialConv(nnx.Module):
    """A large kernel over the first channels; the others stay as they are."""

    def __init__(self, num_channels: int, kernel_size: int, *, rngs: nnx.Rngs) -> None:
        self.conv = conv(num_channels, num_channels, kernel_size, rngs=rngs, init="small")

    def __call__(self, x: jax.Array) -> jax.Array:
        count = self.conv.kernel.shape[-1]
        return jnp.concatenate([self.conv(x[..., :count]), x[..., count:]], -1)


class Attention(nnx.Module):
    """Multiplies every element by a number from 0 to 1, which a convolution makes."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs) -> None:
        self.f = nnx.List([conv(num_channels, num_channels, 3, rngs=rngs, init="small")])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.nn.sigmoid(self.f[0](x))


class Block(nnx.Module):
    def __init__(
        self,
        dim: int,
        kernel_size: int,
        split_ratio: float,
        use_ea: bool,
        norm_groups: int,
        layer_norm: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_norm = LayerNorm2d(dim) if layer_norm else None
        self.channel_mixer = nnx.List(
            [
                conv(dim, 2 * dim, 3, rngs=rngs),
                Activation(mish),
                conv(2 * dim, dim, 3, rngs=rngs, init="small"),
            ]
        )
        self.lk = PartialConv(num_large(dim, split_ratio), kernel_size, rngs=rngs)
        self.attn = Attention(dim, rngs=rngs) if use_ea else None
        self.refine = conv(dim, dim, 1, rngs=rngs, init="small")
        self.norm = None if layer_norm else GroupNorm(norm_groups, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layer_norm(x) if self.layer_norm else x
        for layer in self.channel_mixer:
            y = layer(y)
        y = self.lk(y)
        y = self.refine(self.attn(y) if self.attn else y)
        return x + (self.norm(y) if self.norm else y)


def num_large(dim: int, split_ratio: float) -> int:
    """Returns the number of channels that the large kernel reads and writes."""
    return int(dim * split_ratio + 1e-6)


class RealPLKSR(nnx.Module):
    """(b, h, w, 3) -> (b, h*upscale, w*upscale, 3) and features, for any h and w.

    Raises:
      ValueError: the large kernel has an even size or no channels, or `dim` is no multiple of `norm_groups`.
    """

    def __init__(
        self,
        dim: int = 64,
        n_blocks: int = 28,
        upscale: int = 4,
        kernel_size: int = 17,
        split_ratio: float = 0.25,
        use_ea: bool = True,
        norm_groups: int = 4,
        layer_norm: bool = False,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"RealPLKSR's kernel_size={kernel_size} must be odd")
        if not 1 <= num_large(dim, split_ratio) <= dim:
            raise ValueError(f"RealPLKSR with split_ratio={split_ratio:g} of dim={dim} channels has no large kernel")
        if not layer_norm and dim % norm_groups:
            raise ValueError(f"RealPLKSR's dim={dim} is no multiple of norm_groups={norm_groups}")
        self.remat, self.upscale = remat, upscale
        blocks = [
            Block(dim, kernel_size, split_ratio, use_ea, norm_groups, layer_norm, rngs=rngs) for _ in range(n_blocks)
        ]
        first, last = (
            conv(num_in, num_out, 3, rngs=rngs, init="small") for num_in, num_out in ((3, dim), (dim, 3 * upscale**2))
        )
        dropout = Activation(lambda x: x)  # has a number in the authors' list
        self.feats = nnx.List([first, *blocks, dropout, last])

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, features = image, {}
        for i, layer in enumerate(self.feats):
            x = call(layer, x, remat=self.remat)
            if not isinstance(layer, Activation):
                features[f"feats.{i}"] = x
        return ops.pixel_shuffle(x, self.upscale) + ops.upsample_nearest(image, self.upscale), features


# ---- its files -------------------------------------------------------------------------------------------------


_PARTS = r"channel_mixer\.[02]|lk\.conv|attn\.f\.0|refine|norm|layer_norm"
_NUMBER = r"(0|[1-9][0-9]{0,5})"


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    dim = size(shapes, 0, "feats.0.weight", default=64)
    n_blocks = max(1, count(shapes, r"feats\.([0-9]+)\.refine\.weight", first=1))
    large = size(shapes, 0, "feats.1.lk.conv.weight", default=dim // 4)
    outputs = size(shapes, 0, f"feats.{n_blocks + 2}.weight", default=48)
    return {
        "dim": dim,
        "n_blocks": n_blocks,
        "upscale": max(1, math.isqrt(outputs // 3)),
        "kernel_size": size(shapes, 2, "feats.1.lk.conv.weight", default=17),
        "split_ratio": large / dim,
        "use_ea": any(re.fullmatch(r"feats\.1\.attn\..*", key) for key in shapes),
        "layer_norm": any(re.fullmatch(r"feats\.1\.layer_norm\..*", key) for key in shapes),
    }


def _settle(known: Known) -> Settled:
    """Assumes the number of groups of every published file."""
    if known.hparams["layer_norm"] or "norm_groups" in known.stated:
        return {}, []
    return {}, [f"norm_groups=4 was assumed, since no tensor shows it; otherwise {how_to_say('norm_groups', (8,))}"]


def _num_tensors(hparams: Hparams) -> int:
    return (10 + 2 * hparams["use_ea"]) * hparams["n_blocks"] + 4


ARCHITECTURE = Architecture(
    RealPLKSR,
    files=Files(
        layouts=(Layout("RealPLKSR", same_if(rf"feats\.{_NUMBER}(\.({_PARTS}))?\.(weight|bias)")),),
        infer=_infer,
        num_tensors=_num_tensors,
        settle=_settle,
    ),
    order=("feats",),
)
