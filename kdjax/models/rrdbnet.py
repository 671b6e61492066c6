"""RRDBNet: ESRGAN's trunk of residual-in-residual dense blocks (Wang et al., 2018, arXiv:1809.00219).

Names, concatenation order, residual scales and initialisation follow BasicSR's `rrdbnet_arch.py`. BasicSR's network
always ends in two x2 upsamplings and reaches scale 2 and 1 by un-shuffling its input 2x and 4x. The first ESRGAN
release instead has log2(scale) upsamplings, or one by 3, and no un-shuffling. `num_upsample` covers both. `plus` is
ESRGAN+ (Rakotonirina & Rasoanaivo, 2020, arXiv:2001.08073), with more shortcuts within a dense block. `ranks` is
our addition: in a convolution of rank r, a 3x3 convolution writes r channels, and a 1x1 convolution makes its outputs
of them. Every block has the same 15 ranks, in the order of its convolutions.

Features: `conv_first`, `body.N` (each RRDB), `conv_body` (before `conv_first` is added), all with num_feat channels at
1/unshuffle of the input's height and width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kdjax import ops
from kdjax.models.layers import conv, conv3x3, run_blocks
from kdjax.models.model import Architecture, Shrink
from kdjax.models.reading import (
    MAX_UPSAMPLE,
    Files,
    Hparams,
    Known,
    Layout,
    Settled,
    Shapes,
    WeightsError,
    count,
    how_to_say,
    note_unshuffling,
    num_low_rank,
    ranks,
    rename_by,
    size,
)

_CONVOLUTIONS = tuple(f"rdb{i}.conv{k}" for i in (1, 2, 3) for k in range(1, 6))  # of a block


def _lrelu(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, 0.2)


class ResidualDenseBlock(nnx.Module):
    """Five convolutions, each reading all earlier outputs; 0.2 x the last is added to the input.

    With `plus`, the second output gets a 1x1 convolution of the input, and the fourth gets the second.
    """

    def __init__(self, num_feat: int, num_grow_ch: int, ranks: tuple[int, ...], plus: bool, *, rngs: nnx.Rngs) -> None:
        self.conv1x1 = conv(num_feat, num_grow_ch, 1, bias=False, rngs=rngs) if plus else None
        for i, rank in enumerate(ranks, start=1):
            num_in, num_out = num_feat + (i - 1) * num_grow_ch, num_grow_ch if i < 5 else num_feat
            layer = conv3x3(num_in, num_out, rngs=rngs, init="residual", narrow=True, rank=rank)
            setattr(self, f"conv{i}", layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        *growing, last = (getattr(self, f"conv{i}") for i in range(1, 6))
        outputs = [x]
        for i, layer in enumerate(growing, start=1):
            y = _lrelu(layer(jnp.concatenate(outputs, axis=-1)))
            if self.conv1x1 and i == 2:
                y = y + self.conv1x1(x)
            if self.conv1x1 and i == 4:
                y = y + outputs[2]
            outputs.append(y)
        return x + 0.2 * last(jnp.concatenate(outputs, axis=-1))


class RRDB(nnx.Module):
    """Three dense blocks; 0.2 x their result is added to the input."""

    def __init__(self, num_feat: int, num_grow_ch: int, ranks: tuple[int, ...], plus: bool, *, rngs: nnx.Rngs) -> None:
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch, ranks[:5], plus, rngs=rngs)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch, ranks[5:10], plus, rngs=rngs)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch, ranks[10:], plus, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nnx.Module):
    """(b, h, w, num_in_ch) -> (b, h*scale, w*scale, num_out_ch) and features, for any h and w.

    Raises:
      ValueError: 2**num_upsample is not a multiple of `scale`, and it is not scale 3 with one upsampling; or `ranks` is
        neither empty nor 15 numbers.
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
        ranks: tuple[int, ...] = (),
        plus: bool = False,
        *,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.factors = (3,) if (scale, num_upsample) == (3, 1) else (2,) * num_upsample
        enlargement = math.prod(self.factors)
        if scale < 1 or enlargement % scale:
            raise ValueError(
                f"RRDBNet with num_upsample={num_upsample} upscales {enlargement}x before un-shuffling;"
                f" scale={scale} does not divide that; use scale 1, 2 or 4 with num_upsample=2, or scale 3 with"
                " num_upsample=1"
            )
        if ranks and len(ranks) != len(_CONVOLUTIONS):
            raise ValueError(f"ranks={ranks} has {len(ranks)} numbers; a block of RRDBNet needs 15, or none")
        ranks = ranks or (0,) * len(_CONVOLUTIONS)
        self.scale, self.remat = scale, remat
        self.unshuffle = self.multiple = enlargement // scale
        self.conv_first = conv3x3(num_in_ch * self.unshuffle**2, num_feat, rngs=rngs)
        self.body = nnx.List([RRDB(num_feat, num_grow_ch, ranks, plus, rngs=rngs) for _ in range(num_block)])
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
        x, blocks = run_blocks(self.body, x, remat=self.remat)
        features |= {f"body.{i}": block for i, block in enumerate(blocks)}
        features["conv_body"] = self.conv_body(x)
        x = first + features["conv_body"]
        for i, factor in enumerate(self.factors, start=1):
            x = _lrelu(getattr(self, f"conv_up{i}")(ops.upsample_nearest(x, factor)))
        x = self.conv_last(_lrelu(self.conv_hr(x)))
        return x[:, : height * self.scale, : width * self.scale], features


# ---- its files -------------------------------------------------------------------------------------------------


_LAYOUTS = (
    Layout(
        "BasicSR",
        rename_by(
            (r"(?P<name>conv_first|conv_body|conv_hr|conv_last)", r"\g<name>"),
            (r"conv_up<K>", "conv_up<K>"),
            (r"body\.<N>\.rdb<J>\.conv<K>", "body.<N>.rdb<J>.conv<K>"),
            (r"body\.<N>\.rdb<J>\.conv1x1", "body.<N>.rdb<J>.conv1x1"),
            (r"body\.<N>\.rdb<J>\.conv<K>\.(?P<part>[01])", r"body.<N>.rdb<J>.conv<K>.\g<part>"),
        ),
    ),
    Layout(
        "BSRGAN",
        rename_by(
            (r"(?P<name>conv_first|conv_last)", r"\g<name>"),
            (r"RRDB_trunk\.<N>\.RDB<J>\.conv<K>", "body.<N>.rdb<J>.conv<K>"),
            (r"trunk_conv", "conv_body"),
            (r"upconv<K>", "conv_up<K>"),
            (r"HRconv", "conv_hr"),
        ),
    ),
)


def _old_esrgan(keys: Collection[str]) -> tuple[Layout, ...]:
    """The layout of the first ESRGAN release, whose numbering continues past the upsamplings."""
    if not any(key.startswith("model.1.sub.") for key in keys):
        return ()
    numbers = [int(match[1]) for key in keys if (match := re.fullmatch(r"model\.([0-9]{1,2})\.weight", key))]
    last = 3 * max(0, (max(numbers, default=10) - 4) // 3)  # index of the last upsampling convolution
    return (
        Layout(
            "old ESRGAN",
            rename_by(
                (r"model\.0", "conv_first"),
                (r"model\.1\.sub\.<N>\.RDB<J>\.conv<K>\.0", "body.<N>.rdb<J>.conv<K>"),
                (r"model\.1\.sub\.<N>\.RDB<J>\.conv1x1", "body.<N>.rdb<J>.conv1x1"),
                (r"model\.1\.sub\.<N>", "conv_body"),
                *((rf"model\.{3 * k}", f"conv_up{k}") for k in range(1, last // 3 + 1)),
                (rf"model\.{last + 2}", "conv_hr"),
                (rf"model\.{last + 4}", "conv_last"),
            ),
        ),
    )


def _expand(hparams: Hparams, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns an ESRGAN+ in the layout of the first ESRGAN release, in which other programs know it."""
    if not hparams["plus"]:
        return state
    num_block, num_upsample = hparams["num_block"], hparams["num_upsample"]
    rename = rename_by(
        ("conv_first", "model.0"),
        (r"body\.<N>\.rdb<J>\.conv<K>", "model.1.sub.<N>.RDB<J>.conv<K>.0"),
        (r"body\.<N>\.rdb<J>\.conv1x1", "model.1.sub.<N>.RDB<J>.conv1x1"),
        ("conv_body", f"model.1.sub.{num_block}"),
        *((f"conv_up{k}", f"model.{3 * k}") for k in range(1, num_upsample + 1)),
        ("conv_hr", f"model.{3 * num_upsample + 2}"),
        ("conv_last", f"model.{3 * num_upsample + 4}"),
    )
    return {rename(key) or key: value for key, value in state.items()}


def _infer(shapes: Shapes, stated: Hparams) -> dict[str, Any]:
    num_upsample = min(count(shapes, r"conv_up([0-9]+)\.weight", first=1), MAX_UPSAMPLE)
    inputs = size(shapes, 1, "conv_first.weight", default=3)
    num_out_ch = size(shapes, 0, "conv_last.weight", default=3)
    enlargement = 3 if num_upsample == 1 and stated.get("scale") == 3 else 2**num_upsample
    # As in every reader of these files, un-shuffling is inferred from the channel ratio alone. A network that really
    # reads 4 or 16 times the channels it writes must say so: load_weights(path, scale=4).
    if "scale" in stated:
        unshuffle = max(1, enlargement // max(1, stated["scale"]))
    elif "num_in_ch" in stated:
        unshuffle = max(1, math.isqrt(inputs // max(1, stated["num_in_ch"])))
    else:
        unshuffle = {4: 2, 16: 4}.get(inputs // max(1, num_out_ch), 1) if inputs % max(1, num_out_ch) == 0 else 1
        unshuffle = unshuffle if unshuffle <= enlargement else 1
    return {
        "num_in_ch": inputs // unshuffle**2,
        "num_out_ch": num_out_ch,
        "scale": enlargement // unshuffle,
        "num_feat": size(shapes, 0, "conv_first.weight", "conv_body.weight", "conv_hr.weight", default=64),
        "num_block": max(1, count(shapes, r"body\.([0-9]+)\..*")),
        "num_grow_ch": size(
            shapes, 0, "body.0.rdb1.conv1.weight", "body.0.rdb1.conv1.1.weight", "body.0.rdb2.conv1.weight", default=32
        ),
        "num_upsample": num_upsample,
        "ranks": ranks(shapes, [f"body.0.{name}" for name in _CONVOLUTIONS]),
        "plus": any(key.endswith(".conv1x1.weight") for key in shapes),
    }


def _settle(known: Known) -> Settled:
    """Asks whether a single upsampling is by 2 or 3; notes input channels taken as those of an un-shuffled image."""
    hparams, stated = known.hparams, set(known.stated)
    if hparams["num_upsample"] == 1 and "scale" not in stated:
        scales = (2, 3) if hparams["scale"] == 2 else (1, 2, 3)  # 1 with an un-shuffled input
        raise WeightsError(
            "it is RRDBNet with one upsampling, which upscales 2x or 3x with the same tensors:"
            f" {how_to_say('scale', scales)}"
        )
    factor = 2 ** hparams["num_upsample"] // hparams["scale"]
    if factor <= 1 or {"scale", "num_in_ch"} & stated:
        return {}, []
    return {}, [note_unshuffling(hparams["num_in_ch"], factor, "scale", hparams["scale"], "BasicSR's RRDBNet")]


ARCHITECTURE = Architecture(
    RRDBNet,
    files=Files(
        layouts=_LAYOUTS,
        layouts_of=_old_esrgan,
        infer=_infer,
        num_tensors=lambda hparams: (
            (30 + 3 * hparams["plus"] + num_low_rank(hparams)) * hparams["num_block"] + 2 * hparams["num_upsample"] + 8
        ),
        settle=_settle,
        expand=_expand,
    ),
    order=("conv_first", "body", "conv_body", "conv_up", "conv_hr", "conv_last"),
    shrink=Shrink(
        ("num_feat", "num_block", "num_grow_ch", "ranks"),
        blocks="body",
        writer="rdb3.conv5",
        ranked=_CONVOLUTIONS,
        trunk=r"conv_first|conv_body|body\.[0-9]+\.rdb[123]\.conv5",
    ),
)
