"""A small, plain U-Net for students; most of its compute is at low resolution.

Each level halves height and width by un-shuffling pixels into channels, and doubles the network's width. Skips are
added, not concatenated. The network predicts a residual correction to its input. With `unshuffle`, level 0 runs at
1/unshuffle of the input's height and width. The layout is kdjax's own.

Features: `encoder.L` (L = 0 ... num_level) and `decoder.L` (L = num_level - 1 ... 0), each after the last activation of
its level. Level l has num_feat x 2^l channels at 1/(unshuffle x 2^l) of the padded height and width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.layers import call, conv, conv3x3
from kdjax.models.model import Architecture
from kdjax.models.reading import (
    Files,
    Hparams,
    Layout,
    Shapes,
    count,
    levels,
    same_if,
    settle_unshuffle,
    size,
    unshuffled,
)


class Stage(nnx.Module):
    """`num_conv` 3x3 convolutions, each followed by ReLU."""

    def __init__(self, num_feat: int, num_conv: int, *, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List([conv3x3(num_feat, num_feat, init="relu", rngs=rngs) for _ in range(num_conv)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.convs:
            x = jax.nn.relu(layer(x))
        return x


class UNet(nnx.Module):
    """(b, h, w, num_in_ch) -> the same shape, and features, for any h and w.

    A level of the encoder has `num_conv` convolutions, one of the decoder `num_conv_up`, or as many if that is 0.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 16,
        num_level: int = 3,
        num_conv: int = 2,
        unshuffle: int = 1,
        num_conv_up: int = 0,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat, self.num_level, self.unshuffle = remat, num_level, unshuffle
        self.multiple = unshuffle * 2**num_level
        widths = [num_feat * 2**level for level in range(num_level + 1)]
        self.conv_first = conv3x3(num_in_ch * unshuffle**2, num_feat, rngs=rngs)
        self.encoder = nnx.List([Stage(width, num_conv, rngs=rngs) for width in widths])
        self.down = nnx.List([conv(4 * width, 2 * width, 1, rngs=rngs) for width in widths[:-1]])
        self.up = nnx.List([conv(2 * width, 4 * width, 1, rngs=rngs) for width in widths[:-1]])
        self.decoder = nnx.List([Stage(width, num_conv_up or num_conv, rngs=rngs) for width in widths[:-1]])
        self.conv_last = conv3x3(num_feat, num_in_ch * unshuffle**2, init="residual", rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        padded = ops.pad_to_multiple(image, self.multiple)
        x, features, skips = self.conv_first(ops.pixel_unshuffle(padded, self.unshuffle)), {}, []
        for level, stage in enumerate(self.encoder):
            if level:
                skips.append(x)
                x = self.down[level - 1](ops.pixel_unshuffle(x, 2))
            x = features[f"encoder.{level}"] = call(stage, x, remat=self.remat)
        for level in reversed(range(self.num_level)):
            x = ops.pixel_shuffle(self.up[level](x), 2) + skips.pop()
            x = features[f"decoder.{level}"] = call(self.decoder[level], x, remat=self.remat)
        return (padded + ops.pixel_shuffle(self.conv_last(x), self.unshuffle))[:, :height, :width], features


# ---- its files -------------------------------------------------------------------------------------------------


_KEY = r"(conv_first|conv_last|(up|down)\.[0-9]{1,2}|(encoder|decoder)\.[0-9]{1,2}\.convs\.[0-9]{1,3})\.(weight|bias)"


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_in_ch, unshuffle = unshuffled(size(shapes, 1, "conv_first.weight", default=3), stated)
    num_conv, num_conv_up = (
        max(1, count(shapes, rf"{part}\.0\.convs\.([0-9]+)\.weight")) for part in ("encoder", "decoder")
    )
    return {
        "num_in_ch": num_in_ch,
        "num_feat": size(shapes, 0, "conv_first.weight", default=16),
        "num_level": max(1, levels(shapes, r"down\.([0-9]+)\.weight")),
        "num_conv": num_conv,
        "unshuffle": unshuffle,
        "num_conv_up": num_conv_up if num_conv_up != num_conv else 0,
    }


def _num_tensors(hparams: Hparams) -> int:
    num_level, num_conv = hparams["num_level"], hparams["num_conv"]
    convs = num_conv * (num_level + 1) + (hparams["num_conv_up"] or num_conv) * num_level
    return 2 * (convs + 2 * num_level + 2)


ARCHITECTURE = Architecture(
    UNet,
    files=Files(
        layouts=(Layout("kdjax", same_if(_KEY)),), infer=_infer, num_tensors=_num_tensors, settle=settle_unshuffle
    ),
    order=("conv_first", "encoder", "down", "up", "decoder", "conv_last"),
)
