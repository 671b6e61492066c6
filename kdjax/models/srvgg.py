"""SRVGGNetCompact: a plain stack of convolutions ending in a pixel shuffle (Real-ESRGAN, `srvgg_arch.py`).

Names and initialisation follow BasicSR: `body` is one flat list conv, activation, conv, activation, ..., conv, and the
nearest-upsampled input is added at the end. `unshuffle` is our addition: the stack runs at 1/unshuffle of the input's
height and width, with about unshuffle^2 times fewer multiplications at the same num_feat. `ranks` is another: in a
convolution of rank r, a 3x3 convolution writes r channels, and a 1x1 convolution makes its outputs of them.

Features: `body.N` for every layer of that list, so `body.1` is the first activation. All but the last have num_feat
channels at 1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, PReLU, call, conv3x3
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import (
    Files,
    Hparams,
    Known,
    Layout,
    Settled,
    Shapes,
    WeightsError,
    count,
    how_to_say,
    num_low_rank,
    ranks,
    rename_by,
    settle_unshuffle,
    size,
    unshuffled,
)
from kdjax.names import brief

ACTIVATIONS = {
    "relu": lambda num_feat: Activation(jax.nn.relu),
    "prelu": PReLU,
    "leakyrelu": lambda num_feat: Activation(functools.partial(jax.nn.leaky_relu, negative_slope=0.1)),
}


class SRVGGNetCompact(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and features, for any h and w.

    There are num_conv + 2 convolutions. `ranks` are theirs, 0 for a full one; () makes all of them full.

    Raises:
      ValueError: `act_type` is not one of relu, prelu, leakyrelu; num_in_ch != num_out_ch; or `ranks` has another
        length.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_conv: int = 16,
        upscale: int = 4,
        act_type: str = "prelu",
        unshuffle: int = 1,
        ranks: tuple[int, ...] = (),
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if act_type not in ACTIVATIONS:
            raise ValueError(f"act_type={brief(act_type)} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if num_in_ch != num_out_ch:
            raise ValueError(
                f"SRVGGNetCompact adds its input to its output: num_in_ch={num_in_ch} and num_out_ch={num_out_ch}"
                " must be equal"
            )
        if ranks and len(ranks) != num_conv + 2:
            raise ValueError(
                f"ranks={ranks} has {len(ranks)} numbers; SRVGGNetCompact with num_conv={num_conv} needs"
                f" {num_conv + 2}, or none"
            )
        self.upscale, self.unshuffle, self.remat = upscale, unshuffle, remat
        self.multiple = unshuffle
        body: list[nnx.Module] = []
        *inner, last = ranks or (0,) * (num_conv + 2)
        for i, rank in enumerate(inner):
            body.append(conv3x3(num_feat if i else num_in_ch * unshuffle**2, num_feat, rank=rank, rngs=rngs))
            body.append(ACTIVATIONS[act_type](num_feat))
        body.append(conv3x3(num_feat, num_out_ch * (upscale * unshuffle) ** 2, rank=last, rngs=rngs))
        self.body = nnx.List(body)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        x = ops.pixel_unshuffle(ops.pad_to_multiple(image, self.unshuffle), self.unshuffle)
        features = {}
        for i, layer in enumerate(self.body):
            x = features[f"body.{i}"] = call(layer, x, remat=self.remat)
        x = ops.pixel_shuffle(x, self.upscale * self.unshuffle)[:, : height * self.upscale, : width * self.upscale]
        return x + ops.upsample_nearest(image, self.upscale), features


# ---- its files -------------------------------------------------------------------------------------------------


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    last = count(shapes, r"body\.([0-9]+)(?:\.1)?\.weight") - 1
    inputs = size(shapes, 1, "body.0.weight", "body.0.0.weight", default=3)
    outputs = size(shapes, 0, f"body.{last}.weight", f"body.{last}.1.weight", default=inputs)
    num_in_ch, unshuffle = unshuffled(inputs, stated)
    hparams = {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": size(shapes, 0, "body.0.weight", "body.0.1.weight", default=64),
        "num_conv": max(1, last // 2 - 1),
        "upscale": max(1, math.isqrt(outputs // max(1, inputs))),
        "unshuffle": unshuffle,
        "ranks": ranks(shapes, [f"body.{i}" for i in range(0, last + 1, 2)]),
    }
    if any(len(shape) == 1 and key.endswith(".weight") for key, shape in shapes.items()):
        hparams["act_type"] = "prelu"  # the other two have no parameters and look the same
    return hparams


def _num_tensors(hparams: Hparams) -> int:
    slopes = hparams["num_conv"] + 1 if hparams.get("act_type") == "prelu" else 0
    return 2 * (hparams["num_conv"] + 2) + slopes + num_low_rank(hparams)


def _settle(known: Known) -> Settled:
    """Asks for the activation if it has no parameters."""
    if not {"act_type"} & {*known.stated, *known.told}:
        raise WeightsError(
            "it is SRVGGNetCompact without PReLU weights, so its activation is ReLU or leaky ReLU and the file does not"
            f" say which: {how_to_say('act_type', ('relu', 'leakyrelu'))}"
        )
    return settle_unshuffle(known)


ARCHITECTURE = Architecture(
    SRVGGNetCompact,
    files=Files(
        layouts=(Layout("BasicSR", rename_by((r"body\.<N>", "body.<N>"), (r"body\.<N>\.<J>", "body.<N>.<J>"))),),
        infer=_infer,
        num_tensors=_num_tensors,
        settle=_settle,
        guess={"act_type": "relu"},
    ),
    order=("body",),
    shrink=Shrink(("num_feat", "num_conv", "ranks"), stack="body"),
)
