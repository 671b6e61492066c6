"""NAFNet (Chen et al., 2022, arXiv:2204.04676): a U-Net of blocks without activation functions.

Names and layout match the published weights (megvii-research/NAFNet). As there, the image is zero-padded at the bottom
and right to a multiple of 2^levels, and the output is cropped back.

Features: `intro` (level 0), `encoders.L` (after the last block of level L), `middle_blks` and `decoders.I` (level
levels - 1 - I). Level l has width x 2^l channels at 1/2^l of the padded height and width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import ops
from kdjax.models.layers import LayerNorm2d, MeanOverImage, call, conv
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import Files, Hparams, Layout, Shapes, count, levels, same_if, size


def _gate(x: jax.Array) -> jax.Array:
    """Multiplies the first half of the channels by the second."""
    first, second = jnp.split(x, 2, -1)
    return first * second


class NAFBlock(nnx.Module):
    """A gated depthwise branch with channel attention, then a gated pointwise branch, each added with learnt scales."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs) -> None:
        c = num_channels
        self.conv1 = conv(c, 2 * c, 1, rngs=rngs)
        self.conv2 = conv(2 * c, 2 * c, 3, rngs=rngs, groups=2 * c)
        self.conv3 = conv(c, c, 1, rngs=rngs)
        self.sca = nnx.List([MeanOverImage(), conv(c, c, 1, rngs=rngs)])
        self.conv4 = conv(c, 2 * c, 1, rngs=rngs)
        self.conv5 = conv(c, c, 1, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm2d(c), LayerNorm2d(c)
        self.beta, self.gamma = nnx.Param(jnp.zeros((1, c, 1, 1))), nnx.Param(jnp.zeros((1, c, 1, 1)))  # torch's shape

    def __call__(self, x: jax.Array) -> jax.Array:
        y = _gate(self.conv2(self.conv1(self.norm1(x))))
        y = self.conv3(y * self.sca[1](self.sca[0](y)))
        x = x + y * self.beta[...].reshape(-1).astype(x.dtype)
        y = self.conv5(_gate(self.conv4(self.norm2(x))))
        return x + y * self.gamma[...].reshape(-1).astype(x.dtype)


class NAFNet(nnx.Module):
    """(b, h, w, img_channel) -> the same shape, and features, for any h and w. `width` is the channel count at level 0.

    Raises:
      ValueError: encoder and decoder have different numbers of levels.
    """

    pad_mode = "constant"

    def __init__(
        self,
        img_channel: int = 3,
        width: int = 16,
        middle_blk_num: int = 1,
        enc_blk_nums: tuple = (1, 1, 1, 28),
        dec_blk_nums: tuple = (1, 1, 1, 1),
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if len(enc_blk_nums) != len(dec_blk_nums):
            raise ValueError(
                f"NAFNet needs as many levels up as down: enc_blk_nums={enc_blk_nums} has {len(enc_blk_nums)},"
                f" dec_blk_nums={dec_blk_nums} has {len(dec_blk_nums)}"
            )
        self.remat, self.multiple = remat, 2 ** len(enc_blk_nums)
        stage = lambda channels, num_blk: nnx.List([NAFBlock(channels, rngs=rngs) for _ in range(num_blk)])  # noqa: E731
        channels = width
        self.intro = conv(img_channel, width, 3, rngs=rngs)
        encoders, downs, ups, decoders = [], [], [], []
        for num_blk in enc_blk_nums:
            encoders.append(stage(channels, num_blk))
            downs.append(conv(channels, 2 * channels, 2, rngs=rngs, stride=2))
            channels *= 2
        self.middle_blks = stage(channels, middle_blk_num)
        for num_blk in dec_blk_nums:
            # torch has a list of a convolution and a pixel shuffle here.
            ups.append(nnx.List([conv(channels, 2 * channels, 1, rngs=rngs, bias=False)]))
            channels //= 2
            decoders.append(stage(channels, num_blk))
        self.encoders, self.downs = nnx.List(encoders), nnx.List(downs)
        self.ups, self.decoders = nnx.List(ups), nnx.List(decoders)
        self.ending = conv(width, img_channel, 3, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        pads = [(0, ops.round_up(size, self.multiple) - size) for size in (height, width)]
        padded = jnp.pad(image, ((0, 0), *pads, (0, 0)))
        features = {}
        x = features["intro"] = self.intro(padded)
        skips = []
        for i, (blocks, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            x = features[f"encoders.{i}"] = self._run(blocks, x)
            skips.append(x)
            x = down(x)
        x = features["middle_blks"] = self._run(self.middle_blks, x)
        for i, (up, blocks) in enumerate(zip(self.ups, self.decoders, strict=True)):
            x = ops.pixel_shuffle(up[0](x), 2) + skips.pop()
            x = features[f"decoders.{i}"] = self._run(blocks, x)
        return (self.ending(x) + padded)[:, :height, :width], features

    def _run(self, blocks: nnx.List, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = call(block, x, remat=self.remat)
        return x


# ---- its files -------------------------------------------------------------------------------------------------


_BLOCK = r"(norm[12]|conv[1-5]|sca\.1)\.(weight|bias)|beta|gamma"
_KEY = (
    r"(intro|ending|downs\.[0-9]{1,2})\.(weight|bias)|ups\.[0-9]{1,2}\.0\.weight"
    rf"|((encoders|decoders)\.[0-9]{{1,2}}|middle_blks)\.[0-9]{{1,3}}\.({_BLOCK})"
)


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    depth = levels(shapes, r"downs\.([0-9]+)\.weight")
    return {
        "img_channel": size(shapes, 1, "intro.weight", default=3),
        "width": size(shapes, 0, "intro.weight", default=16),
        "middle_blk_num": max(1, count(shapes, r"middle_blks\.([0-9]+)\..*")),
        "enc_blk_nums": tuple(count(shapes, rf"encoders\.{level}\.([0-9]+)\..*") for level in range(depth)),
        "dec_blk_nums": tuple(count(shapes, rf"decoders\.{level}\.([0-9]+)\..*") for level in range(depth)),
    }


def _num_tensors(hparams: Hparams) -> int:
    blocks = hparams["middle_blk_num"] + sum(hparams["enc_blk_nums"]) + sum(hparams["dec_blk_nums"])
    return 18 * blocks + 3 * len(hparams["enc_blk_nums"]) + 4


ARCHITECTURE = Architecture(
    NAFNet,
    files=Files(layouts=(Layout("NAFNet", same_if(_KEY)),), infer=_infer, num_tensors=_num_tensors),
    order=("intro", "ending", "encoders", "decoders", "middle_blks", "ups", "downs"),
    shrink=Shrink(
        ("enc_blk_nums", "middle_blk_num", "dec_blk_nums"),
        is_joint=True,
        blocks=r"encoders\.[0-9]+|middle_blks|decoders\.[0-9]+",
        writer="conv5",
    ),
)
