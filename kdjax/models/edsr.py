"""EDSR (Lim et al., 2017, arXiv:1707.02921): residual blocks without normalisation, after BasicSR's `edsr_arch.py`.

Internally the image is centred on DIV2K's mean colour and multiplied by `img_range`. `unshuffle` is our addition: the
trunk runs at 1/unshuffle of the input's height and width, and a final pixel shuffle restores the size.

Features: `conv_first`, `body.N` (each block), `conv_after_body` (before `conv_first` is added), all with num_feat
channels at 1/unshuffle of the input's height and width.
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
from kdjax.models.layers import Activation, call, conv3x3
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import (
    Files,
    Hparams,
    Known,
    Layout,
    Settled,
    Shapes,
    State,
    WeightsError,
    count,
    how_to_say,
    num_steps,
    rename_by,
    settle_unshuffle,
    size,
    unshuffled,
    upscaling,
)

RGB_MEAN = (0.4488, 0.4371, 0.4040)


class ResidualBlock(nnx.Module):
    """x + res_scale x conv2(relu(conv1(x))); MSRResNet uses it too."""

    def __init__(self, num_feat: int, res_scale: float, *, init: str, rngs: nnx.Rngs) -> None:
        self.res_scale = res_scale
        self.conv1 = conv3x3(num_feat, num_feat, rngs=rngs, init=init)
        self.conv2 = conv3x3(num_feat, num_feat, rngs=rngs, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.res_scale * self.conv2(jax.nn.relu(self.conv1(x)))


class EDSR(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and features, for any h and w.

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
        self.body = nnx.List([ResidualBlock(num_feat, res_scale, init="torch", rngs=rngs) for _ in range(num_block)])
        self.conv_after_body = conv3x3(num_feat, num_feat, rngs=rngs)
        self.upsample = upsampling(num_feat, upscale, rngs=rngs)
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


def upsampling(num_feat: int, upscale: int, *, rngs: nnx.Rngs) -> nnx.List:
    """Returns convolutions and pixel shuffles in turn, which enlarge `upscale` times; RCAN uses them too."""
    layers: list[nnx.Module] = []
    for factor in upsampling_steps(upscale):
        layers.append(conv3x3(num_feat, num_feat * factor**2, rngs=rngs))
        layers.append(Activation(lambda x, factor=factor: ops.pixel_shuffle(x, factor)))
    return nnx.List(layers)


def upsampling_steps(upscale: int) -> tuple[int, ...]:
    """Returns the factors of the pixel shuffles for `upscale`: twos, or a single three; empty for 1.

    Raises:
      ValueError: `upscale` is neither 3 nor a power of 2.
    """
    if upscale == 3:
        return (3,)
    if upscale < 1 or upscale & (upscale - 1):
        raise ValueError(f"upscale={upscale} is neither 3 nor a power of 2")
    return (2,) * (upscale.bit_length() - 1)


# ---- its files -------------------------------------------------------------------------------------------------


_AUTHORS = "EDSR-PyTorch"


def img_range_of(constants: State) -> dict[str, Any]:
    """Reads `img_range` from the mean shifts in the authors' files, x -> x -+ img_range * mean.

    Raises:
      WeightsError: the layers compute something else.
    """
    if not constants:
        return {}
    mean = np.array(RGB_MEAN)
    found = {name: tensor.array() for name, tensor in constants.items() if tensor.is_float and tensor.numel <= 9}
    bias = found.get("add_mean.bias", -found["sub_mean.bias"] if "sub_mean.bias" in found else None)
    img_range = float(bias[0] / mean[0]) if bias is not None and bias.shape == (3,) else math.nan
    wanted = {
        "sub_mean.weight": np.eye(3)[..., None, None],
        "add_mean.weight": np.eye(3)[..., None, None],
        "sub_mean.bias": -img_range * mean,
        "add_mean.bias": img_range * mean,
    }
    for name in constants:
        value = found.get(name)
        if value is None or value.shape != wanted[name].shape or not np.allclose(value, wanted[name], rtol=1e-3):
            raise WeightsError(
                f"{name} does not shift colours by the mean of DIV2K, {RGB_MEAN}, as in every published EDSR; such a"
                " network is not supported"
            )
    nearest = min((1.0, 255.0), key=lambda known: abs(known - img_range))
    return {"img_range": nearest if math.isclose(nearest, img_range, rel_tol=1e-3) else img_range}


_LAYOUTS = (
    Layout(
        "BasicSR",
        rename_by(
            (r"(?P<name>conv_first|conv_after_body|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upsample\.<N>", "upsample.<N>"),
        ),
    ),
    Layout(
        _AUTHORS,
        rename_by(
            (r"head\.0", "conv_first"),
            (r"body\.<N>\.body\.0", "body.<N>.conv1"),
            (r"body\.<N>\.body\.2", "body.<N>.conv2"),
            (r"body\.<N>", "conv_after_body"),
            (r"tail\.0\.<N>", "upsample.<N>"),
            (r"tail\.1", "conv_last"),
        ),
        is_constant=lambda key: re.fullmatch(r"(sub|add)_mean\.(weight|bias)", key) is not None,
        told=img_range_of,
    ),
    Layout(
        "MMEditing",
        rename_by(
            (r"(?P<name>conv_first|conv_after_body|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            # A convolution and its pixel shuffle are one module there, but two in BasicSR.
            *((rf"upsample\.{k}\.upsample_conv", f"upsample.{2 * k}") for k in range(4)),
        ),
        told=lambda constants: {"img_range": 1.0},
    ),
)


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_in_ch, unshuffle = unshuffled(size(shapes, 1, "conv_first.weight", default=3), stated)
    steps = len([key for key in shapes if re.match(r"upsample.*weight", key)])
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": max(1, size(shapes, 0, "conv_last.weight", default=3) // unshuffle**2),
        "num_feat": size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": upscaling(shapes, "upsample.0.weight", steps),
        "unshuffle": unshuffle,
    }


def _settle(known: Known) -> Settled:
    """Takes `res_scale` from the published network of this size, or asks for it; assumes BasicSR's `img_range`."""
    settled, notes = settle_unshuffle(known)
    if "res_scale" not in known.stated:
        res_scale, note = _res_scale(known.layout, known.hparams)
        settled["res_scale"] = res_scale
        notes.append(note)
    if not {"img_range"} & {*known.stated, *known.told}:
        notes.append(
            "img_range=255 and the mean colour of DIV2K were assumed, as in BasicSR, since no tensor shows them;"
            " otherwise"
            f" {how_to_say('img_range', (1,))}"
        )
    return settled, notes


def _res_scale(layout: str, hparams: Hparams) -> tuple[float, str]:
    sizes = hparams["num_feat"], hparams["num_block"]
    words = f"{sizes[0]} features and {sizes[1]} blocks"
    published = {(64, 16): 1.0, (256, 32): 0.1}.get(sizes)
    if published is not None and hparams["upscale"] in (2, 3, 4) and hparams["unshuffle"] == 1:
        why = f"as in the published EDSR of {words}"
    elif layout == _AUTHORS and sizes[0] <= 64:
        published, why = 1.0, "the default of the authors' program, smaller only for 256 features"
    else:
        raise WeightsError(
            f"it is EDSR of {words}, whose residuals are scaled by a number that no tensor shows (1 in the"
            f" published network of 64 features, 0.1 in that of 256): {how_to_say('res_scale', (0.1, 1))}"
        )
    other = 1 if published < 1 else 0.1
    otherwise = how_to_say("res_scale", (other,))
    note = f"res_scale={published:g} was assumed, {why}, since no tensor shows it; otherwise {otherwise}"
    return published, note


ARCHITECTURE = Architecture(
    EDSR,
    files=Files(
        layouts=_LAYOUTS,
        infer=_infer,
        num_tensors=lambda hparams: 4 * hparams["num_block"] + 2 * num_steps(hparams["upscale"]) + 6,
        settle=_settle,
    ),
    order=("conv_first", "body", "conv_after_body", "upsample", "conv_last"),
    shrink=Shrink(
        ("num_feat", "num_block"),
        blocks="body",
        writer="conv2",
        trunk=r"conv_first|conv_after_body|body\.[0-9]+\.conv2",
        shuffled=r"upsample\.[0-9]+",
    ),
)
