"""RRDBNet: the trunk of residual-in-residual dense blocks of ESRGAN (Wang et al., 2018, arXiv:1809.00219).

Names, concatenation order, residual scales and initialisation are BasicSR's (`rrdbnet_arch.py`). BasicSR's network
always ends in two x2 upsamplings and reaches scale 2 and 1 by un-shuffling its input 2x and 4x; the first ESRGAN
release instead has log2(scale) upsamplings, or one by 3, and no un-shuffling. `num_upsample` covers both.

Features: `conv_first`, `body.N` (each RRDB), `conv_body` (before it is added to `conv_first`), all with num_feat
channels at 1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kdjax import ops
from kdjax.models.layers import call, conv3x3


def _lrelu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


class ResidualDenseBlock(nnx.Module):
    """Five convolutions, each reading everything before it; 0.2 x the last is added to the input."""

    def __init__(self, num_feat: int, num_grow_ch: int, *, rngs: nnx.Rngs) -> None:
        for i in range(1, 6):
            num_out = num_grow_ch if i < 5 else num_feat
            conv = conv3x3(num_feat + (i - 1) * num_grow_ch, num_out, rngs=rngs, residual_init=True, narrow=True)
            setattr(self, f"conv{i}", conv)

    def __call__(self, x: jax.Array) -> jax.Array:
        dense = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            dense = jnp.concatenate([dense, _lrelu(conv(dense))], axis=-1)
        return x + 0.2 * self.conv5(dense)


class RRDB(nnx.Module):
    """Three dense blocks; 0.2 x their result is added to the input."""

    def __init__(self, num_feat: int, num_grow_ch: int, *, rngs: nnx.Rngs) -> None:
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch, rngs=rngs)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch, rngs=rngs)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*scale, w*scale, num_out_ch) and its features; any h and w.

    Raises:
      ValueError: 2**num_upsample is not a multiple of `scale`, nor is `scale` 3 with one upsampling.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
        num_upsample: int = 2,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.factors = (3,) if (scale, num_upsample) == (3, 1) else (2,) * num_upsample
        enlargement = math.prod(self.factors)
        if scale < 1 or enlargement % scale:
            raise ValueError(
                f"RRDBNet with num_upsample={num_upsample} enlarges {enlargement} times before un-shuffling;"
                f" scale={scale} does not divide that; use scale 1, 2 or 4 with num_upsample=2, or scale 3 with"
                " num_upsample=1"
            )
        self.scale, self.remat = scale, remat
        self.unshuffle = self.multiple = enlargement // scale
        self.conv_first = conv3x3(num_in_ch * self.unshuffle**2, num_feat, rngs=rngs)
        self.body = nnx.List([RRDB(num_feat, num_grow_ch, rngs=rngs) for _ in range(num_block)])
        self.conv_body = conv3x3(num_feat, num_feat, rngs=rngs)
        for i in range(num_upsample):
            setattr(self, f"conv_up{i + 1}", conv3x3(num_feat, num_feat, rngs=rngs))
        self.conv_hr = conv3x3(num_feat, num_feat, rngs=rngs)
        self.conv_last = conv3x3(num_feat, num_out_ch, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        x = ops.pixel_unshuffle(ops.pad_to_multiple(image, self.unshuffle), self.unshuffle)
        features = {}
        x = first = features["conv_first"] = self.conv_first(x)
        x, blocks = self._run_body(x)
        features |= {f"body.{i}": block for i, block in enumerate(blocks)}
        features["conv_body"] = self.conv_body(x)
        x = first + features["conv_body"]
        for i, factor in enumerate(self.factors, start=1):
            x = _lrelu(getattr(self, f"conv_up{i}")(ops.upsample_nearest(x, factor)))
        x = self.conv_last(_lrelu(self.conv_hr(x)))
        return x[:, : height * self.scale, : width * self.scale], features

    def _run_body(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The output of the last block, and those of all of them: (num_block, b, h, w, num_feat).

        A loop: 23 blocks of 15 convolutions take ten times as long to compile one after another.
        """
        graphdef, _ = nnx.split(self.body[0])
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(block) for block in self.body))

        def step(x: jax.Array, params: nnx.State) -> tuple[jax.Array, jax.Array]:
            x = call(nnx.merge(graphdef, params), x, remat=self.remat)
            return x, x

        return jax.lax.scan(step, x, params)
