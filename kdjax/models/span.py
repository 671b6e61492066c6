"""SPAN (Wan et al., 2024, arXiv:2311.12770): six blocks of convolutions whose outputs are weighted by themselves.

Names follow the authors' code. There, a convolution is trained as three in a row and one beside them (`Conv3XC`), and
folded into one, `eval_conv`, when the network is used. Here it is the folded one. Files of either form are read, and
those that kdjax writes have all parts, which spandrel needs: three convolutions that fold to the same numbers, bit for
bit.

Features: `conv_1`, `block_1` to `block_6` and `conv_2`, with `feature_channels` channels at the input's height and
width.
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
from kdjax.models.edsr import RGB_MEAN
from kdjax.models.layers import Activation, call, conv, conv3x3
from kdjax.models.model import Architecture
from kdjax.models.reading import Files, Hparams, Known, Layout, Settled, Shapes, State, how_to_say, same_if, size

NUM_BLOCKS = 6


class Conv3XC(nnx.Module):
    """A 3x3 convolution, zero-padded, under the name that the authors' code gives to the folded one."""

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs) -> None:
        self.eval_conv = conv3x3(num_in, num_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.eval_conv(x)


class SPAB(nnx.Module):
    """Three convolutions; their output y and the input x become (x + y) (sigmoid(y) - 1/2)."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs) -> None:
        self.c1_r = Conv3XC(num_channels, num_channels, rngs=rngs)
        self.c2_r = Conv3XC(num_channels, num_channels, rngs=rngs)
        self.c3_r = Conv3XC(num_channels, num_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.finish(x, self.begin(x))

    def begin(self, x: jax.Array) -> jax.Array:
        """Returns the first convolution's output, after its activation."""
        return jax.nn.silu(self.c1_r(x))

    def finish(self, x: jax.Array, first: jax.Array) -> jax.Array:
        y = self.c3_r(jax.nn.silu(self.c2_r(first)))
        return (x + y) * (jax.nn.sigmoid(y) - 0.5)


class SPAN(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and features, for any h and w.

    With `norm`, the input is centred at the mean colour of DIV2K and multiplied by `img_range`. The output is not.

    Raises:
      ValueError: `norm` with another number of channels than 3.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        feature_channels: int = 48,
        upscale: int = 4,
        norm: bool = True,
        img_range: float = 255.0,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if norm and num_in_ch != 3:
            raise ValueError(f"SPAN with norm=True is for 3 channels, as its mean colour is; got num_in_ch={num_in_ch}")
        self.remat, self.upscale, self.norm, self.img_range = remat, upscale, norm, img_range
        c = feature_channels
        self.conv_1 = Conv3XC(num_in_ch, c, rngs=rngs)
        for i in range(1, NUM_BLOCKS + 1):
            setattr(self, f"block_{i}", SPAB(c, rngs=rngs))
        self.conv_cat = conv(4 * c, c, 1, rngs=rngs)
        self.conv_2 = Conv3XC(c, c, rngs=rngs)
        shuffle = Activation(lambda x: ops.pixel_shuffle(x, upscale))
        self.upsampler = nnx.List([conv3x3(c, num_out_ch * upscale**2, rngs=rngs), shuffle])

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = (image - jnp.array(RGB_MEAN, image.dtype)) * self.img_range if self.norm else image
        features = {}
        x = features["conv_1"] = self.conv_1(x)
        *blocks, last = [getattr(self, f"block_{i}") for i in range(1, NUM_BLOCKS + 1)]
        for i, block in enumerate(blocks, 1):
            x = features[f"block_{i}"] = call(block, x, remat=self.remat)
        # What the last block's first convolution makes is also an output of the trunk. In the authors' code its
        # activation works in place, so it is the activated one.
        first = last.begin(x)
        features[f"block_{NUM_BLOCKS}"] = last.finish(x, first)
        features["conv_2"] = self.conv_2(features[f"block_{NUM_BLOCKS}"])
        x = self.conv_cat(jnp.concatenate([features[name] for name in ("conv_1", "conv_2", "block_1")] + [first], -1))
        for layer in self.upsampler:
            x = layer(x)
        return x, features


# ---- its files -------------------------------------------------------------------------------------------------


_CONV3XC = r"conv_[12]|block_[1-6]\.c[123]_r"
_KEY = rf"(({_CONV3XC})\.eval_conv|conv_cat|upsampler\.0)\.(weight|bias)"
_TRAINED = re.compile(rf"(?P<name>{_CONV3XC})\.(sk|conv\.[012])\.(weight|bias)")
_GAIN = 2  # the channels between the three convolutions, as a multiple of those outside
_NO_NORM = "no_norm"  # a buffer that marks files whose input is not normalised; spandrel reads it


def _fold(state: State) -> tuple[dict[str, np.ndarray], str] | None:
    """Folds the parts of every `Conv3XC` into `eval_conv`, whatever the file has there; keeps all other tensors.

    None if there are no such parts, or if their shapes do not fit each other.
    """
    names = {match["name"] for key in state if (match := _TRAINED.fullmatch(key))}
    if not names:
        return None
    folded = {}
    for name in names:
        parts = _parts(state, name)
        if parts is None:
            return None
        folded[f"{name}.eval_conv.weight"], folded[f"{name}.eval_conv.bias"] = _folded(*parts)
    rest = {key: tensor for key, tensor in state.items() if not _TRAINED.fullmatch(key) and key not in folded}
    return {**{key: tensor.array() for key, tensor in rest.items()}, **folded}, "SPAN, as trained"


def _parts(state: State, name: str) -> list[np.ndarray] | None:
    """Returns kernels and biases of sk, conv.0, conv.1 and conv.2, in float64."""
    keys = [f"{name}.{part}.{leaf}" for part in ("sk", "conv.0", "conv.1", "conv.2") for leaf in ("weight", "bias")]
    tensors = [state[key] for key in keys if key in state and state[key].is_float]
    if len(tensors) < len(keys) or tensors[0].ndim != 4:
        return None
    o, c = tensors[0].shape[:2]
    kernels = [(o, c, 1, 1), (_GAIN * c, c, 1, 1), (_GAIN * o, _GAIN * c, 3, 3), (o, _GAIN * o, 1, 1)]
    if [tensor.shape for tensor in tensors] != [shape for kernel in kernels for shape in (kernel, kernel[:1])]:
        return None
    return [tensor.array().astype(np.float64) for tensor in tensors]


def _folded(
    skip: np.ndarray, skip_bias: np.ndarray, w0: np.ndarray, b0: np.ndarray, w1: np.ndarray, b1: np.ndarray,
    w2: np.ndarray, b2: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns kernel (o, c, 3, 3) and bias (o,) of the one convolution that is their sum."""
    last = w2[:, :, 0, 0]
    kernel = np.einsum("om,mnyx,nc->ocyx", last, w1, w0[:, :, 0, 0], optimize=True)
    kernel[:, :, 1, 1] += skip[:, :, 0, 0]
    bias = last @ (w1.sum((2, 3)) @ b0 + b1) + b2 + skip_bias
    return kernel, bias


def _expand(hparams: Hparams, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the state dict with all parts of every `Conv3XC`, in the authors' order; `_fold` reverses it exactly."""
    expanded = {}
    for key, value in state.items():
        name, is_folded, leaf = key.partition(".eval_conv.")
        if is_folded and leaf == "weight":
            o, c = value.shape[:2]
            first, middle, last = (
                np.zeros(shape, np.float32)
                for shape in ((_GAIN * c, c, 1, 1), (_GAIN * o, _GAIN * c, 3, 3), (o, _GAIN * o, 1, 1))
            )
            first[range(c), range(c)] = 1
            middle[:o, :c] = value
            last[range(o), range(o)] = 1
            parts = {"sk": np.zeros((o, c, 1, 1), np.float32), "conv.0": first, "conv.1": middle, "conv.2": last}
            for part, kernel in parts.items():
                bias = state[f"{name}.eval_conv.bias"] if part == "conv.2" else np.zeros(len(kernel), np.float32)
                expanded |= {f"{name}.{part}.weight": kernel, f"{name}.{part}.bias": bias}
        expanded[key] = value
    return expanded | ({} if hparams["norm"] else {_NO_NORM: np.zeros(1, np.float32)})


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    inputs = size(shapes, 1, "conv_1.eval_conv.weight", default=3)
    outputs = size(shapes, 0, "upsampler.0.weight", default=inputs)
    upscale = max(1, math.isqrt(outputs // max(1, inputs)))
    return {
        "num_in_ch": inputs,
        "num_out_ch": max(1, outputs // upscale**2),
        "feature_channels": size(shapes, 0, "conv_1.eval_conv.weight", default=48),
        "upscale": upscale,
    }


def _settle(known: Known) -> Settled:
    """Assumes the authors' `img_range`."""
    if not known.hparams["norm"] or "img_range" in known.stated:
        return {}, []
    return {}, [
        "img_range=255 and the mean colour of DIV2K were assumed, as in the authors' code, since no tensor shows"
        f" them; otherwise {how_to_say('img_range', (1,))}"
    ]


ARCHITECTURE = Architecture(
    SPAN,
    files=Files(
        layouts=(
            Layout(
                "SPAN",
                same_if(_KEY),
                is_constant=lambda key: key == _NO_NORM,
                told=lambda constants: {"norm": _NO_NORM not in constants},
            ),
        ),
        infer=_infer,
        num_tensors=lambda hparams: 2 * (3 * NUM_BLOCKS + 2) + 4,
        settle=_settle,
        convert=_fold,
        is_extra=lambda key: _TRAINED.fullmatch(key) is not None,
        expand=_expand,
    ),
    order=("conv_1", "block_", "conv_cat", "conv_2", "upsampler"),
)
