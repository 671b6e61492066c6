"""DRUNet (Zhang et al., 2021, arXiv:2008.13751), in KAIR's layout (`UNetRes`): a U-Net of residual blocks.

Convolutions have no bias. Skips are added. The network is told the noise level, as one more input channel
(`noise_map`), and predicts the clean image. The image is padded at the bottom and right to a multiple of 8, by
repeating its edge, and the output is cropped back.

Features: `m_head`, `m_down1` to `m_down3`, `m_body`, and `m_up3` to `m_up1`. Those of level l (0 for `m_head` and
`m_up1`, 3 for `m_down3` and `m_body`) have num_feat[l] channels at 1/2^l of the padded height and width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, UpConv, call, conv
from kdjax.models.model import Architecture
from kdjax.models.reading import Files, Hparams, Known, Layout, Settled, Shapes, count, same_if, size

LEVELS = 4


class ResBlock(nnx.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, num_feat: int, *, rngs: nnx.Rngs) -> None:
        first, second = (conv(num_feat, num_feat, 3, bias=False, rngs=rngs) for _ in range(2))
        self.res = nnx.List([first, Activation(jax.nn.relu), second])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for layer in self.res:
            y = layer(y)
        return x + y


class DRUNet(nnx.Module):
    """(b, h, w, num_in_ch) -> the same shape, and features. With `noise_map`, its input has one more channel for it.

    `num_feat` has the channels of the four levels, `num_block` is the number of blocks in each, down and up.

    Raises:
      ValueError: `num_feat` has another number of levels.
    """

    pad_mode = "edge"
    multiple = 2 ** (LEVELS - 1)

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: tuple = (64, 128, 256, 512),
        num_block: int = 4,
        noise_map: bool = True,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if len(num_feat) != LEVELS:
            raise ValueError(f"DRUNet has {LEVELS} levels; num_feat={num_feat} has {len(num_feat)} numbers")
        self.remat, self.takes_sigma = remat, noise_map

        def blocks(level: int) -> list[nnx.Module]:
            return [ResBlock(num_feat[level], rngs=rngs) for _ in range(num_block)]

        self.m_head = conv(num_in_ch + noise_map, num_feat[0], 3, bias=False, rngs=rngs)
        for i in range(1, LEVELS):
            down = conv(num_feat[i - 1], num_feat[i], 2, stride=2, bias=False, rngs=rngs)
            setattr(self, f"m_down{i}", nnx.List([*blocks(i - 1), down]))
        self.m_body = nnx.List(blocks(LEVELS - 1))
        for i in reversed(range(1, LEVELS)):
            up = UpConv(num_feat[i], num_feat[i - 1], rngs=rngs)
            setattr(self, f"m_up{i}", nnx.List([up, *blocks(i - 1)]))
        self.m_tail = conv(num_feat[0], num_in_ch, 3, bias=False, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        features = {}
        x = features["m_head"] = self.m_head(ops.repeat_to_multiple(image, self.multiple))
        skips = []
        for name in (*(f"m_down{i}" for i in range(1, LEVELS)), "m_body"):
            skips.append(x)
            x = features[name] = self._run(getattr(self, name), x)
        for i in reversed(range(1, LEVELS)):
            x = features[f"m_up{i}"] = self._run(getattr(self, f"m_up{i}"), x + skips.pop())
        return self.m_tail(x + skips.pop())[:, :height, :width], features

    def _run(self, layers: nnx.List, x: jax.Array) -> jax.Array:
        for layer in layers:
            x = call(layer, x, remat=self.remat)
        return x


# ---- its files -------------------------------------------------------------------------------------------------


_NAMES = [f"m_down{i}" for i in range(1, LEVELS)]
_KEY = r"m_(head|tail|down[123]\.[0-9]{1,3}|up[123]\.0|(down[123]|body|up[123])\.[0-9]{1,3}\.res\.[02])\.weight"


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_in_ch = size(shapes, 0, "m_tail.weight", default=3)
    return {
        "num_in_ch": num_in_ch,
        "num_feat": (
            size(shapes, 0, "m_head.weight", default=64),
            *(size(shapes, 1, f"m_up{i}.1.res.0.weight", default=64) for i in range(2, LEVELS)),
            size(shapes, 1, "m_body.0.res.0.weight", default=64),
        ),
        "num_block": max(1, count(shapes, r"m_body\.([0-9]+)\.res\.0\.weight")),
        "noise_map": size(shapes, 1, "m_head.weight", default=4) == num_in_ch + 1,
    }


def _settle(known: Known) -> Settled:
    """Notes that the map is taken for that of a denoiser."""
    if not known.hparams["noise_map"] or "noise_map" in known.stated:
        return {}, []
    return {}, [
        "its last input channel was taken for a noise level map; a DRUNet for JPEG images, which reads another number"
        " there, has the same tensors"
    ]


ARCHITECTURE = Architecture(
    DRUNet,
    files=Files(
        layouts=(Layout("KAIR", same_if(_KEY)),),
        infer=_infer,
        num_tensors=lambda hparams: 2 * hparams["num_block"] * (2 * LEVELS - 1) + 2 * LEVELS,
        settle=_settle,
    ),
    order=("m_head", *_NAMES, "m_body", *(f"m_up{i}" for i in reversed(range(1, LEVELS))), "m_tail"),
)
