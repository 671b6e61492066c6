"""DnCNN without batch normalisation (Zhang et al., 2017, arXiv:1608.03981), in KAIR's layout `model.N`.

The network predicts the noise and subtracts it: y = x - net(x). KAIR ships its DnCNN weights with the batch
normalisation already folded into the convolutions, which is the form here. `unshuffle` is ours: the network runs at
1/unshuffle of the input's height and width, with about unshuffle^2 times fewer multiplications at the same num_feat.

Features: `model.N` for every convolution and ReLU of the list; all but the last have num_feat channels at
1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import jax
from flax import nnx

from kdjax import ops
from kdjax.models.layers import Activation, call, conv3x3


class DnCNN(nnx.Module):
    """(b, h, w, num_in_ch) -> the same shape, and its features; `depth` counts the convolutions.

    Raises:
      ValueError: `depth` is below 2.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 64,
        depth: int = 20,
        unshuffle: int = 1,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 2:
            raise ValueError(f"depth={depth}: DnCNN needs a first and a last convolution, so at least 2")
        self.remat, self.unshuffle = remat, unshuffle
        self.multiple = unshuffle
        num_image = num_in_ch * unshuffle**2
        layers: list[nnx.Module] = []
        for i in range(depth - 1):
            layers.append(conv3x3(num_feat if i else num_image, num_feat, rngs=rngs))
            layers.append(Activation(jax.nn.relu))
        layers.append(conv3x3(num_feat, num_image, rngs=rngs))
        self.model = nnx.List(layers)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        x = ops.pixel_unshuffle(ops.pad_to_multiple(image, self.unshuffle), self.unshuffle)
        features = {}
        for i, layer in enumerate(self.model):
            x = features[f"model.{i}"] = call(layer, x, remat=self.remat)
        return image - ops.pixel_shuffle(x, self.unshuffle)[:, :height, :width], features
