"""DnCNN without batch normalisation, FDnCNN and FFDNet, in KAIR's layout `model.N`.

DnCNN (Zhang et al., 2017, arXiv:1608.03981) predicts the noise and subtracts it: y = x - net(x). KAIR's weights have
batch normalisation already folded into the convolutions, as here. FDnCNN and FFDNet (Zhang et al., 2018,
arXiv:1710.04026) are told the noise level, as one more input channel (`noise_map`), and predict the clean image
(`residual` False); FFDNet runs at half of the height and width (`unshuffle` 2).

Initial values are ours: with torch's, activations shrink at every ReLU, and a deep stack can learn nothing for a
thousand steps. With `unshuffle`, the network has about unshuffle^2 times fewer multiplications at the same num_feat.
`ranks` is our addition: in a convolution of rank r, a 3x3 convolution writes r channels, and a 1x1 convolution makes
its outputs of them.

Features: `model.N` for every convolution and ReLU of the list. All but the last have num_feat channels at 1/unshuffle
of the input's height and width.
"""

from __future__ import annotations

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
    StoredTensor,
    WeightsError,
    count,
    listed,
    num_low_rank,
    ranks,
    rename_by,
    settle_unshuffle,
    size,
    unshuffled,
)


class DnCNN(nnx.Module):
    """(b, h, w, num_in_ch) -> the same shape, and features. With `noise_map`, its input has one more channel for it.

    `depth` is the number of convolutions, `ranks` their ranks, 0 for a full one; () makes all of them full.

    Raises:
      ValueError: `depth` is below 2, or `ranks` has another length.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 64,
        depth: int = 20,
        unshuffle: int = 1,
        ranks: tuple[int, ...] = (),
        noise_map: bool = False,
        residual: bool = True,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 2:
            raise ValueError(f"depth={depth}: DnCNN needs a first and a last convolution, so at least 2")
        if ranks and len(ranks) != depth:
            raise ValueError(f"ranks={ranks} has {len(ranks)} numbers; DnCNN of depth {depth} needs as many, or none")
        self.remat, self.unshuffle, self.takes_sigma, self.residual = remat, unshuffle, noise_map, residual
        self.multiple = unshuffle
        self.pad_mode = "edge" if noise_map else "reflect"  # as FFDNet's, and as kdjax's own students
        num_image = num_in_ch * unshuffle**2
        ranks = ranks or (0,) * depth
        layers: list[nnx.Module] = []
        for i, rank in enumerate(ranks[:-1]):
            num_in = num_feat if i else num_image + noise_map
            layers.append(conv3x3(num_in, num_feat, rank=rank, init="relu", rngs=rngs))
            layers.append(Activation(jax.nn.relu))
        last = "residual" if residual else "relu"
        layers.append(conv3x3(num_feat, num_image, rank=ranks[-1], init=last, rngs=rngs))
        self.model = nnx.List(layers)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        pad = ops.repeat_to_multiple if self.pad_mode == "edge" else ops.pad_to_multiple
        padded = pad(image, self.unshuffle)
        x = ops.pixel_unshuffle(padded[..., : image.shape[-1] - self.takes_sigma], self.unshuffle)
        if self.takes_sigma:
            image, level = image[..., :-1], ops.pixel_unshuffle(padded[..., -1:], self.unshuffle)
            x = jnp.concatenate([x, level[..., :1]], -1)  # the level of one pixel of each square
        features = {}
        for i, layer in enumerate(self.model):
            x = features[f"model.{i}"] = call(layer, x, remat=self.remat)
        x = ops.pixel_shuffle(x, self.unshuffle)[:, :height, :width]
        return image - x if self.residual else x, features


# ---- its files -------------------------------------------------------------------------------------------------


# Weights do not record BatchNorm's epsilon. KAIR and Zhang's training code set this one, others use torch's default.
KAIR_EPS = 1e-4
TORCH_EPS = 1e-5
PUBLISHED_SIZES = {(64, 17), (64, 20)}  # num_feat, depth
PUBLISHED_FFDNETS = {(96, 12), (64, 15)}


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    last = count(shapes, r"model\.([0-9]+)(?:\.1)?\.weight") - 1
    inputs = size(shapes, 1, "model.0.weight", "model.0.0.weight", default=3)
    outputs = size(shapes, 0, f"model.{last}.weight", f"model.{last}.1.weight", default=inputs)
    noise_map = inputs == outputs + 1
    num_in_ch, unshuffle = unshuffled(outputs, stated, grey=noise_map)
    return {
        "num_in_ch": num_in_ch,
        "num_feat": size(shapes, 0, "model.0.weight", "model.0.1.weight", default=64),
        "depth": max(2, last // 2 + 1),
        "unshuffle": unshuffle,
        "ranks": ranks(shapes, [f"model.{i}" for i in range(0, last + 1, 2)]),
        "noise_map": noise_map,
    }


def _settle(known: Known) -> Settled:
    """Assumes ReLU, and asks for `arch` where the tensors fit both DnCNN and IRCNN."""
    sizes = known.hparams["num_feat"], known.hparams["depth"]
    if sizes == (64, 7) and not known.is_chosen:
        raise WeightsError(
            "its tensors fit DnCNN of depth 7 and IRCNN alike; IRCNN, whose convolutions are dilated, is not supported;"
            " if it is DnCNN, pass arch='dncnn'"
        )
    has_map = known.hparams["noise_map"]
    settled, notes = settle_unshuffle(known)
    if has_map:  # FDnCNN or FFDNet
        settled, notes = {} if "residual" in known.stated else {"residual": False}, []
    if sizes not in PUBLISHED_SIZES | (PUBLISHED_FFDNETS if has_map else set()):
        notes.append(
            "ReLU was assumed, as in every published DnCNN; one with leaky ReLU has the same tensors"
            " and is not supported"
        )
    return settled, notes


def _fold_batch_norm(state: State) -> tuple[dict[str, np.ndarray], str] | None:
    """Folds the BatchNorm of a DnCNN (conv, ReLU, [conv, BatchNorm, ReLU]..., conv); also returns the layout's name.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is a convolution with a scaled kernel and another bias, so the
    network is the same up to rounding. Convolutions without a bias, as in Zhang's training code and SaoYan's
    DnCNN-PyTorch, get a zero bias.
    """
    if not _has_batch_norm(state):
        return None
    name = "model" if "model.0.weight" in state else "dncnn"
    entries = _entries(state, name)
    norms = sorted(i for i, entry in entries.items() if "running_mean" in entry)
    convs = sorted(entries.keys() - set(norms))
    if [i - 1 for i in norms] != convs[1:-1]:
        raise WeightsError(
            f"it has BatchNorm at {listed(norms)} and convolutions at {listed(convs)} of `{name}`; wanted a DnCNN with"
            " a BatchNorm after every convolution but the first and the last"
        )
    with_bias = {i for i in convs if "bias" in entries[i]}
    has_biases = name == "model" or bool(with_bias & set(convs[1:]))
    eps = KAIR_EPS if name == "model" or with_bias == {0} else TORCH_EPS
    folded = {}
    for i, index in enumerate(convs):
        conv, norm = entries[index], entries.get(index + 1)
        weight = conv.get("weight")
        if weight is None or weight.ndim != 4 or not weight.numel:
            raise WeightsError(f"{name}.{index} is not a convolution, so its BatchNorm cannot be folded")
        shape = weight.shape[:1]
        if ("bias" not in conv and has_biases) or ("bias" in conv and conv["bias"].shape != shape):
            raise WeightsError(f"{name}.{index} is not a convolution with a bias, so its BatchNorm cannot be folded")
        kernel = weight.array().astype(np.float64)
        bias = conv["bias"].array().astype(np.float64) if "bias" in conv else np.zeros(shape)
        if norm is not None:
            parts = [norm[part] for part in ("weight", "bias", "running_mean", "running_var") if part in norm]
            if [part.shape for part in parts] != [shape] * 4 or (parts[3].array() < 0).any():
                raise WeightsError(
                    f"the BatchNorm {name}.{index + 1} needs weight, bias, running_mean and a running_var that is not"
                    f" negative, each of shape {shape}"
                )
            gamma, beta, mean, variance = (part.array().astype(np.float64) for part in parts)
            factor = gamma / np.sqrt(variance + eps)
            kernel, bias = kernel * factor[:, None, None, None], (bias - mean) * factor + beta
        folded[f"model.{2 * i}.weight"], folded[f"model.{2 * i}.bias"] = kernel, bias
    return folded, "KAIR with BatchNorm" if name == "model" else "DnCNN-PyTorch with BatchNorm"


def _has_batch_norm(state: State) -> bool:
    is_dncnn = "model.0.weight" in state or "dncnn.0.weight" in state
    return is_dncnn and any(key.endswith(".running_mean") for key in state)


def _entries(state: State, name: str) -> dict[int, dict[str, StoredTensor]]:
    """Groups the tensors by layer number."""
    entries: dict[int, dict[str, StoredTensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(rf"{name}\.([0-9]{{1,4}})\.(weight|bias|running_mean|running_var)", key)
        if not match or not value.is_float:
            raise WeightsError(f"it looks like DnCNN with BatchNorm, but has {listed([key])}; it cannot be folded")
        entries.setdefault(int(match[1]), {})[match[2]] = value
    return entries


ARCHITECTURE = Architecture(
    DnCNN,
    files=Files(
        layouts=(
            Layout("KAIR", rename_by((r"model\.<N>", "model.<N>"), (r"model\.<N>\.<J>", "model.<N>.<J>"))),
            Layout("DnCNN-PyTorch", rename_by((r"dncnn\.<N>", "model.<N>"))),
        ),
        infer=_infer,
        num_tensors=lambda hparams: 2 * hparams["depth"] + num_low_rank(hparams),
        settle=_settle,
        convert=_fold_batch_norm,
        is_extra=lambda key: key.endswith((".running_mean", ".running_var")),
    ),
    order=("model",),
    shrink=Shrink(("num_feat", "depth", "ranks"), stack="model", inputs=("noise_map",)),
)
