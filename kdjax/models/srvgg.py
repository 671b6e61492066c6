"""SRVGGNetCompact: a plain stack of convolutions with a pixel-shuffle end (Real-ESRGAN, `srvgg_arch.py`).

Names and initialisation are BasicSR's: `body` is one flat list conv, activation, conv, activation, ..., conv; the
nearest-upsampled input is added at the end. `unshuffle` is ours: the stack runs at 1/unshuffle of the input's height
and width, with about unshuffle^2 times fewer multiplications at the same num_feat.

Features: `body.N` for every layer of that list, so `body.1` is the first activation. All but the last have num_feat
channels at 1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import functools

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, PReLU, call, conv3x3
from kdjax.names import brief

ACTIVATIONS = {
    "relu": lambda num_feat: Activation(jax.nn.relu),
    "prelu": PReLU,
    "leakyrelu": lambda num_feat: Activation(functools.partial(jax.nn.leaky_relu, negative_slope=0.1)),
}


class SRVGGNetCompact(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*upscale, w*upscale, num_out_ch) and its features; any h and w.

    Raises:
      ValueError: `act_type` is not one of relu, prelu, leakyrelu; or num_in_ch != num_out_ch.
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
        self.upscale, self.unshuffle, self.remat = upscale, unshuffle, remat
        self.multiple = unshuffle
        body: list[nnx.Module] = []
        for i in range(num_conv + 1):
            body.append(conv3x3(num_feat if i else num_in_ch * unshuffle**2, num_feat, rngs=rngs))
            body.append(ACTIVATIONS[act_type](num_feat))
        body.append(conv3x3(num_feat, num_out_ch * (upscale * unshuffle) ** 2, rngs=rngs))
        self.body = nnx.List(body)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        x = ops.pixel_unshuffle(ops.pad_to_multiple(image, self.unshuffle), self.unshuffle)
        features = {}
        for i, layer in enumerate(self.body):
            x = features[f"body.{i}"] = call(layer, x, remat=self.remat)
        x = ops.pixel_shuffle(x, self.upscale * self.unshuffle)[:, : height * self.upscale, : width * self.upscale]
        return x + ops.upsample_nearest(image, self.upscale), features
