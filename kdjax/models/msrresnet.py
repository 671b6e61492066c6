"""MSRResNet: the modified SRResNet of ESRGAN (arXiv:1809.00219), after BasicSR's `srresnet_arch.py`.

Unlike BasicSR's, it supports upscale 1: the same network without the upsampling layers.

Features: `conv_first` (after its activation) and `body.N` (each block), all with num_feat channels at the input's
height and width.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.edsr import ResidualBlock, upsampling_steps
from kdjax.models.layers import call, conv3x3
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import Files, Hparams, Layout, Shapes, count, num_steps, rename_by, size, upscaling


def _lrelu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.1)


class MSRResNet(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and features, for any h and w.

    Raises:
      ValueError: `upscale` is not 1, 2, 3 or 4; or num_in_ch != num_out_ch.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        upscale: int = 4,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if upscale not in (1, 2, 3, 4):
            raise ValueError(f"MSRResNet has upscale 1, 2, 3 or 4, not upscale={upscale}")
        if num_in_ch != num_out_ch:
            raise ValueError(
                f"MSRResNet adds its input to its output: num_in_ch={num_in_ch} and num_out_ch={num_out_ch} must be"
                " equal"
            )
        self.remat, self.upscale = remat, upscale
        self.conv_first = conv3x3(num_in_ch, num_feat, rngs=rngs, init="residual")
        self.body = nnx.List([ResidualBlock(num_feat, 1.0, init="residual", rngs=rngs) for _ in range(num_block)])
        self.factors = upsampling_steps(upscale)
        for i, factor in enumerate(self.factors, start=1):
            setattr(self, f"upconv{i}", conv3x3(num_feat, num_feat * factor**2, rngs=rngs, init="residual"))
        self.conv_hr = conv3x3(num_feat, num_feat, rngs=rngs, init="residual")
        self.conv_last = conv3x3(num_feat, num_out_ch, rngs=rngs, init="residual")

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        features = {}
        x = features["conv_first"] = _lrelu(self.conv_first(image))
        for i, block in enumerate(self.body):
            x = features[f"body.{i}"] = call(block, x, remat=self.remat)
        for i, factor in enumerate(self.factors, start=1):
            x = _lrelu(ops.pixel_shuffle(getattr(self, f"upconv{i}")(x), factor))
        x = self.conv_last(_lrelu(self.conv_hr(x)))
        return x + ops.upsample_bilinear(image, self.upscale), features


# ---- its files -------------------------------------------------------------------------------------------------


_LAYOUTS = (
    Layout(
        "BasicSR",
        rename_by(
            (r"(?P<name>conv_first|conv_hr|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upconv<K>", "upconv<K>"),
        ),
    ),
    Layout(
        "KAIR",
        rename_by(
            (r"(?P<name>conv_first|conv_last)", r"\g<name>"),
            (r"recon_trunk\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upconv<K>", "upconv<K>"),
            (r"HRconv", "conv_hr"),
        ),
    ),
    Layout(
        "MMEditing",
        rename_by(
            (r"(?P<name>conv_first|conv_hr|conv_last)", r"\g<name>"),
            (r"trunk_net\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upsample<K>\.upsample_conv", "upconv<K>"),
        ),
    ),
)


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_in_ch = size(shapes, 1, "conv_first.weight", default=3)
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": upscaling(shapes, "upconv1.weight", count(shapes, r"upconv([0-9]+)\.weight", first=1)),
    }


ARCHITECTURE = Architecture(
    MSRResNet,
    files=Files(
        layouts=_LAYOUTS,
        infer=_infer,
        num_tensors=lambda hparams: 4 * hparams["num_block"] + 2 * num_steps(hparams["upscale"]) + 6,
    ),
    order=("conv_first", "body", "upconv", "conv_hr", "conv_last"),
    shrink=Shrink(
        ("num_feat", "num_block"),
        blocks="body",
        writer="conv2",
        trunk=r"conv_first|body\.[0-9]+\.conv2",
        is_linear=False,  # conv_first has an activation
        shuffled=r"upconv[0-9]+",
    ),
)
