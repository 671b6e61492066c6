"""RCAN: residual groups of blocks with channel attention (Zhang et al., 2018, arXiv:1807.02758).

Names follow BasicSR's `rcan_arch.py`. Files of the authors' program and of BasicSR are read. Those that kdjax writes
are in the authors' layout, which spandrel reads. Internally the image is centred on DIV2K's mean colour and multiplied
by `img_range`; without `norm` it is not, as in some networks of traiNNer-redux.

Features: `conv_first`, `body.N` (each group) and `conv_after_body` (before `conv_first` is added), with num_feat
channels at the input's height and width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax.models.edsr import RGB_MEAN, img_range_of, upsampling
from kdjax.models.layers import Activation, MeanOverImage, call, conv, conv3x3, run_blocks
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import (
    Files,
    Hparams,
    Known,
    Layout,
    Settled,
    Shapes,
    State,
    count,
    how_to_say,
    num_steps,
    rename_by,
    size,
    upscaling,
)


class ChannelAttention(nnx.Module):
    """Multiplies every channel by a number from 0 to 1 that is made of the means of all channels."""

    def __init__(self, num_feat: int, squeeze_factor: int, *, rngs: nnx.Rngs) -> None:
        few = num_feat // squeeze_factor
        self.attention = nnx.List(
            [
                MeanOverImage(),
                conv(num_feat, few, 1, rngs=rngs),
                Activation(jax.nn.relu),
                conv(few, num_feat, 1, rngs=rngs),
                Activation(jax.nn.sigmoid),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for layer in self.attention:
            y = layer(y)
        return x * y


class RCAB(nnx.Module):
    """Two convolutions and channel attention; res_scale x their result is added to the input."""

    def __init__(self, num_feat: int, squeeze_factor: int, res_scale: float, *, rngs: nnx.Rngs) -> None:
        self.res_scale = res_scale
        self.rcab = nnx.List(
            [
                conv3x3(num_feat, num_feat, rngs=rngs),
                Activation(jax.nn.relu),
                conv3x3(num_feat, num_feat, rngs=rngs),
                ChannelAttention(num_feat, squeeze_factor, rngs=rngs),
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for layer in self.rcab:
            y = layer(y)
        return x + self.res_scale * y


class ResidualGroup(nnx.Module):
    """Blocks and a convolution, whose result is added to the input."""

    def __init__(self, num_feat: int, num_block: int, squeeze_factor: int, res_scale: float, *, rngs: nnx.Rngs) -> None:
        self.residual_group = nnx.List([RCAB(num_feat, squeeze_factor, res_scale, rngs=rngs) for _ in range(num_block)])
        self.conv = conv3x3(num_feat, num_feat, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv(run_blocks(self.residual_group, x, remat=False)[0])


class RCAN(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and features, for any h and w.

    Raises:
      ValueError: `upscale` is neither 3 nor a power of 2, or `squeeze_factor` leaves no channel.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_group: int = 10,
        num_block: int = 20,
        squeeze_factor: int = 16,
        upscale: int = 4,
        res_scale: float = 1.0,
        norm: bool = True,
        img_range: float = 255.0,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if squeeze_factor > num_feat:
            raise ValueError(f"RCAN's squeeze_factor={squeeze_factor} of num_feat={num_feat} channels leaves none")
        self.remat, self.upscale, self.img_range = remat, upscale, img_range if norm else 1.0
        self.mean = RGB_MEAN if norm and num_in_ch == num_out_ch == 3 else (0.0,)
        self.conv_first = conv3x3(num_in_ch, num_feat, rngs=rngs)
        self.body = nnx.List(
            [ResidualGroup(num_feat, num_block, squeeze_factor, res_scale, rngs=rngs) for _ in range(num_group)]
        )
        self.conv_after_body = conv3x3(num_feat, num_feat, rngs=rngs)
        self.upsample = upsampling(num_feat, upscale, rngs=rngs)
        self.conv_last = conv3x3(num_feat, num_out_ch, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        mean = jnp.array(self.mean, image.dtype)
        features = {}
        x = first = features["conv_first"] = self.conv_first((image - mean) * self.img_range)
        x, groups = run_blocks(self.body, x, remat=self.remat)
        features |= {f"body.{i}": group for i, group in enumerate(groups)}
        features["conv_after_body"] = self.conv_after_body(x)
        x = first + features["conv_after_body"]
        for layer in self.upsample:
            x = call(layer, x, remat=False)
        return self.conv_last(x) / self.img_range + mean, features


# ---- its files -------------------------------------------------------------------------------------------------


_AUTHORS = "RCAN-pytorch"
_PLACES = (  # of convolutions, here and in the authors' layout
    ("conv_first", "head.0"),
    ("body.<N>.residual_group.<J>.rcab.<K>", "body.<N>.body.<J>.body.<K>"),
    ("body.<N>.residual_group.<J>.rcab.3.attention.1", "body.<N>.body.<J>.body.3.conv_du.0"),
    ("body.<N>.residual_group.<J>.rcab.3.attention.3", "body.<N>.body.<J>.body.3.conv_du.2"),
    ("upsample.<N>", "tail.0.<N>"),
    ("conv_last", "tail.1"),
)
_MEAN_SHIFT = re.compile(r"(sub|add)_mean\.(weight|bias)")


def _renaming(places: Iterable[tuple[str, str]]) -> Callable[[str], str | None]:
    return rename_by(*((before.replace(".", r"\."), after) for before, after in places))


def _expand(hparams: Hparams, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the state dict in the authors' layout, with the mean shifts that say how it is normalised."""
    ends = (
        ("body.<N>.conv", f"body.<N>.body.{hparams['num_block']}"),
        ("conv_after_body", f"body.{hparams['num_group']}"),
    )
    rename = _renaming([*_PLACES, *ends])
    renamed = {rename(key) or key: value for key, value in state.items()}
    if not hparams["norm"] or hparams["num_in_ch"] != 3:
        return renamed
    shift = hparams["img_range"] * np.array(RGB_MEAN, np.float32)
    unit = np.eye(3, dtype=np.float32)[..., None, None]
    before = {"sub_mean.weight": unit, "sub_mean.bias": -shift}
    return before | {"add_mean.weight": unit, "add_mean.bias": shift} | renamed


def _told(constants: State) -> dict[str, Any]:
    return {"norm": bool(constants), **img_range_of(constants)}


_LAYOUTS = (
    Layout(
        "BasicSR",
        _renaming(
            [
                *((ours, ours) for ours, _ in _PLACES),
                ("body.<N>.conv", "body.<N>.conv"),
                ("conv_after_body", "conv_after_body"),
            ]
        ),
    ),
    Layout(
        _AUTHORS,
        _renaming(
            [
                *((theirs, ours) for ours, theirs in _PLACES),
                ("body.<N>.body.<J>", "body.<N>.conv"),
                ("body.<N>", "conv_after_body"),
            ]
        ),
        is_constant=lambda key: _MEAN_SHIFT.fullmatch(key) is not None,
        told=_told,
    ),
)


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_feat = size(shapes, 0, "conv_first.weight", default=64)
    few = size(shapes, 0, "body.0.residual_group.0.rcab.3.attention.1.weight", default=max(1, num_feat // 16))
    steps = len([key for key in shapes if re.match(r"upsample.*weight", key)])
    return {
        "num_in_ch": size(shapes, 1, "conv_first.weight", default=3),
        "num_out_ch": size(shapes, 0, "conv_last.weight", default=3),
        "num_feat": num_feat,
        "num_group": max(1, count(shapes, r"body\.([0-9]+)\..*")),
        "num_block": max(1, count(shapes, r"body\.0\.residual_group\.([0-9]+)\..*")),
        "squeeze_factor": max(1, num_feat // max(1, few)),
        "upscale": upscaling(shapes, "upsample.0.weight", steps),
    }


def _settle(known: Known) -> Settled:
    """Assumes what BasicSR's network and the authors' have: residuals that are not scaled, and its `img_range`."""
    notes = []
    if known.hparams["norm"] and not {"img_range"} & {*known.stated, *known.told}:
        notes.append(
            "img_range=255 and the mean colour of DIV2K were assumed, as in BasicSR, since no tensor shows them;"
            f" otherwise {how_to_say('img_range', (1,))}"
        )
    if known.layout == "BasicSR" and "res_scale" not in known.stated:
        notes.append(
            "res_scale=1 was assumed, as in every published RCAN, since no tensor shows it; otherwise"
            f" {how_to_say('res_scale', (0.1,))}"
        )
    return {}, notes


def _num_tensors(hparams: Hparams) -> int:
    blocks = hparams["num_group"] * (8 * hparams["num_block"] + 2)
    return blocks + 2 * num_steps(hparams["upscale"]) + 6


ARCHITECTURE = Architecture(
    RCAN,
    files=Files(layouts=_LAYOUTS, infer=_infer, num_tensors=_num_tensors, settle=_settle, expand=_expand),
    order=("conv_first", "body", "conv_after_body", "upsample", "conv_last"),
    shrink=Shrink(("num_group",), blocks="body", writer="conv"),
)
