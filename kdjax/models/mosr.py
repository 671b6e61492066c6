"""MoSR: gated convolutional blocks in a row, after MambaOut (Yu & Wang, 2024, arXiv:2405.07992), as spandrel reads it.

A block normalises by pixel, makes a gate and a value, runs a depthwise kernel over the last part of the value, and is
added to its input. Two of three ways to enlarge are here: `upsampler="ps"`, a pixel shuffle, and "gps", the mean of
eight of them. Files with the third, DySample, are not supported.

Features: `gblocks.N` for the first convolution (0), every block and the last three convolutions, and `shortcut`, at the
input's height and width. All have `dim` channels but the first of the last three, which has twice as many.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, LayerNorm2d, call, conv, mish
from kdjax.models.model import Architecture
from kdjax.models.reading import Files, Hparams, Layout, Shapes, count, same_if, size
from kdjax.names import brief

_MEMBERS = 8  # pixel shuffles of which "gps" is the mean


class GatedBlock(nnx.Module):
    def __init__(
        self, dim: int, kernel_size: int, expansion_ratio: float, conv_ratio: float, *, rngs: nnx.Rngs
    ) -> None:
        self.hidden, self.filtered = part_of(dim, expansion_ratio), part_of(dim, conv_ratio)
        self.norm = LayerNorm2d(dim)
        self.fc1 = conv(dim, 2 * self.hidden, 3, rngs=rngs, init="small")
        self.conv = conv(self.filtered, self.filtered, kernel_size, groups=self.filtered, rngs=rngs, init="small")
        self.fc2 = conv(self.hidden, dim, 3, rngs=rngs, init="small")

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.fc1(self.norm(x))
        gate, kept = y[..., : self.hidden], y[..., self.hidden : y.shape[-1] - self.filtered]
        filtered = self.conv(y[..., y.shape[-1] - self.filtered :])
        value = jnp.concatenate([kept, filtered], -1) if kept.shape[-1] else filtered
        return x + (mish(self.fc2(mish(gate) * value)) - 0.5)


class Shortcut(nnx.Module):
    """Two convolutions with activations, and a 1x1 convolution beside them."""

    def __init__(self, num_in: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.block = nnx.List(
            [conv(num_in, dim, 3, rngs=rngs), Activation(mish), conv(dim, dim, 3, rngs=rngs), Activation(mish)]
        )
        self.conv11 = conv(num_in, dim, 1, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        x = image
        for layer in self.block:
            x = layer(x)
        return x + self.conv11(image)


class GeoEnsemble(nnx.Module):
    """The mean of eight convolutions."""

    def __init__(self, dim: int, num_out: int, *, rngs: nnx.Rngs) -> None:
        self.in_to_k = conv(dim, _MEMBERS * num_out, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.in_to_k(x)
        count = y.shape[-1] // _MEMBERS
        mean = y[..., :count] / _MEMBERS
        for i in range(1, _MEMBERS):
            mean = mean + y[..., i * count : (i + 1) * count] / _MEMBERS
        return mean


def part_of(dim: int, ratio: float) -> int:
    """Returns a number of channels as the authors' code computes it, but for rounding errors of the ratio."""
    return int(dim * ratio + 1e-6)


class MoSR(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_in_ch) and features, for any h and w.

    Raises:
      ValueError: `upsampler` is neither "ps" nor "gps", the kernel has an even size, or reads more channels than there
        are, or none.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        upscale: int = 4,
        n_block: int = 24,
        dim: int = 64,
        upsampler: str = "ps",
        kernel_size: int = 7,
        expansion_ratio: float = 1.5,
        conv_ratio: float = 1.0,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if upsampler not in ("ps", "gps"):
            raise ValueError(f"MoSR's upsampler={brief(upsampler)} is unknown; choose ps or gps")
        if kernel_size % 2 == 0:
            raise ValueError(f"MoSR's kernel_size={kernel_size} must be odd")
        if not 1 <= part_of(dim, conv_ratio) <= part_of(dim, expansion_ratio):
            raise ValueError(
                f"MoSR with conv_ratio={conv_ratio:g} and expansion_ratio={expansion_ratio:g} of dim={dim}: the kernel"
                f" would read {part_of(dim, conv_ratio)} of {part_of(dim, expansion_ratio)} channels"
            )
        self.remat, self.upscale = remat, upscale
        blocks = [GatedBlock(dim, kernel_size, expansion_ratio, conv_ratio, rngs=rngs) for _ in range(n_block)]
        end = [conv(dim, 2 * dim, 3, rngs=rngs), Activation(mish), conv(2 * dim, dim, 3, rngs=rngs), Activation(mish)]
        self.gblocks = nnx.List([conv(num_in_ch, dim, 3, rngs=rngs), *blocks, *end, conv(dim, dim, 1, rngs=rngs)])
        self.shortcut = Shortcut(num_in_ch, dim, rngs=rngs)
        num_out = num_in_ch * upscale**2
        make = {
            "ps": lambda: nnx.List([conv(dim, num_out, 3, rngs=rngs)]),
            "gps": lambda: GeoEnsemble(dim, num_out, rngs=rngs),
        }
        self.upsampler = make[upsampler]()

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, features = image, {}
        for i, layer in enumerate(self.gblocks):
            x = call(layer, x, remat=self.remat)
            if not isinstance(layer, Activation):
                features[f"gblocks.{i}"] = x
        features["shortcut"] = call(self.shortcut, image, remat=self.remat)
        x = x + (features["shortcut"] - 0.5)
        x = self.upsampler(x) if isinstance(self.upsampler, GeoEnsemble) else self.upsampler[0](x)
        return ops.pixel_shuffle(x, self.upscale), features


# ---- its files -------------------------------------------------------------------------------------------------


_NUMBER = r"(0|[1-9][0-9]{0,5})"
_LAYERS = rf"gblocks\.{_NUMBER}(\.(norm|fc1|conv|fc2))?|shortcut\.(block\.[02]|conv11)|upsampler\.(0|in_to_k)"


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    dim = size(shapes, 0, "gblocks.0.weight", default=64)
    num_in_ch = size(shapes, 1, "gblocks.0.weight", default=3)
    is_ensemble = any(key.startswith("upsampler.in_to_k.") for key in shapes)
    outputs = size(shapes, 0, "upsampler.0.weight", "upsampler.in_to_k.weight", default=48)
    return {
        "num_in_ch": num_in_ch,
        "upscale": max(1, math.isqrt(outputs // num_in_ch // (_MEMBERS if is_ensemble else 1))),
        "n_block": max(1, count(shapes, r"gblocks\.([0-9]+)\.fc1\.weight", first=1)),
        "dim": dim,
        "upsampler": "gps" if is_ensemble else "ps",
        "kernel_size": size(shapes, 2, "gblocks.1.conv.weight", default=7),
        "expansion_ratio": size(shapes, 1, "gblocks.1.fc2.weight", default=dim * 3 // 2) / dim,
        "conv_ratio": size(shapes, 0, "gblocks.1.conv.weight", default=dim) / dim,
    }


ARCHITECTURE = Architecture(
    MoSR,
    files=Files(
        layouts=(Layout("MoSR", same_if(rf"({_LAYERS})\.(weight|bias)")),),
        infer=_infer,
        num_tensors=lambda hparams: 8 * hparams["n_block"] + 16,
    ),
    order=("gblocks", "shortcut", "upsampler"),
)
