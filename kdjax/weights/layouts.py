"""How files name their tensors: renaming the keys of a state dict to ours.

Our names are BasicSR's (KAIR's for DnCNN); shapes stay torch's here. A new architecture needs a `Layout` here and a
function in `hparams.INFER`. What keys and shapes leave open is `kdjax.weights.hparams`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.models import MODELS, edsr
from kdjax.weights.tensors import Tensor, WeightsError, listed

# BatchNorm's epsilon leaves no trace: KAIR and Zhang's training code set it, others have torch's default.
KAIR_EPS = 1e-4
TORCH_EPS = 1e-5
RGB_MEAN = np.array(edsr.RGB_MEAN)

# Networks we do not have, by keys that only they have: name, patterns that must all occur.
UNSUPPORTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ESRGAN+ (RRDBNet with 1x1 convolutions)", (r".*\.conv1x1\.weight",)),
    ("a discriminator (net_d instead of net_g?)", (r"conv0\.weight", r"conv1\.weight_orig")),
    ("a discriminator (net_d instead of net_g?)", (r"conv0_0\.weight", r"linear1\.weight")),
    ("HAT", (r"layers\.0\.residual_group\.blocks\.0\.conv_block\..*",)),
    ("SwinIR", (r"layers\.0\.residual_group\.blocks\.0\.norm1\.weight",)),
    ("Restormer", (r"patch_embed\.proj\.weight", r"encoder_level1\.0\..*")),
    ("DRUNet", (r"m_head\.weight", r"m_down1\.0\..*")),
    ("SCUNet", (r"m_head\.0\.weight", r"m_tail\.0\.weight")),
    ("MPRNet", (r"shallow_feat1\.0\.weight",)),
    ("Uformer", (r"input_proj\.proj\.0\.weight",)),
    ("RealCUGAN", (r"unet1\.conv1\.conv\.0\.weight",)),
    ("SPAN", (r"block_1\.c1_r\..*",)),
    ("MDSR, which has one network for several scales", (r"pre_process\.0\.0\.body\.0\.weight", r"head\.0\.weight")),
    ("RCAN", (r"body\.0\.body\.0\.body\.3\.conv_du\.0\.weight",)),
    ("SRResNet of the first ESRGAN (MSRResNet0 of KAIR)", (r"model\.1\.sub\.0\.res\.0\.weight",)),
    ("a network with weight normalisation", (r".*\.(weight_g|parametrizations\.weight\.original0)",)),
)


# ---- layouts: from the keys of a file to our names -------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One way in which files name the parameters of `arch`.

    Attributes:
      name: what messages call it.
      rename: our name for a key of the file, or None for one that this layout does not have.
      is_constant: whether a key is a tensor that is never trained, and so none of our parameters.
      told: hyper-parameters that the layout, or the values of its constants, tell.
    """

    name: str
    arch: str
    rename: Callable[[str], str | None]
    is_constant: Callable[[str], bool] = lambda key: False
    told: Callable[[Mapping[str, Tensor]], dict[str, Any]] = lambda constants: {}


def _rename_by(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    """A renaming by whole-key patterns; N, K, J in a pattern are numbers, and keys end in .weight or .bias."""
    compiled = []
    for pattern, replacement in rules:
        for letter in "NJK":
            pattern = pattern.replace(f"<{letter}>", f"(?P<{letter}>0|[1-9][0-9]{{0,5}})")
            replacement = replacement.replace(f"<{letter}>", rf"\g<{letter}>")
        compiled.append((re.compile(pattern + r"(?P<leaf>\.weight|\.bias)"), replacement + r"\g<leaf>"))

    def rename(key: str) -> str | None:
        for pattern, replacement in compiled:
            if match := pattern.fullmatch(key):
                return match.expand(replacement)
        return None

    return rename


_BLOCK = r"(norm[12]|conv[1-5]|sca\.1)\.(weight|bias)|beta|gamma"
_NAFNET_KEY = re.compile(
    r"(intro|ending|downs\.[0-9]{1,2})\.(weight|bias)|ups\.[0-9]{1,2}\.0\.weight"
    rf"|((encoders|decoders)\.[0-9]{{1,2}}|middle_blks)\.[0-9]{{1,3}}\.({_BLOCK})"
)
_UNET_KEY = re.compile(
    r"(conv_first|conv_last|(up|down)\.[0-9]{1,2}|(encoder|decoder)\.[0-9]{1,2}\.convs\.[0-9]{1,3})\.(weight|bias)"
)


def _same_if(pattern: re.Pattern[str]) -> Callable[[str], str | None]:
    """A layout whose keys are our names."""
    return lambda key: key if pattern.fullmatch(key) else None


def _img_range(constants: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the mean shifts of EDSR's authors, x -> x -+ img_range * mean, tell.

    Raises:
      WeightsError: they do something else.
    """
    if not constants:
        return {}
    found = {name: tensor.array() for name, tensor in constants.items() if tensor.is_float and tensor.numel <= 9}
    bias = found.get("add_mean.bias", -found["sub_mean.bias"] if "sub_mean.bias" in found else None)
    img_range = float(bias[0] / RGB_MEAN[0]) if bias is not None and bias.shape == (3,) else math.nan
    wanted = {
        "sub_mean.weight": np.eye(3)[..., None, None],
        "add_mean.weight": np.eye(3)[..., None, None],
        "sub_mean.bias": -img_range * RGB_MEAN,
        "add_mean.bias": img_range * RGB_MEAN,
    }
    for name in constants:
        value = found.get(name)
        if value is None or value.shape != wanted[name].shape or not np.allclose(value, wanted[name], rtol=1e-3):
            raise WeightsError(
                f"{name} does not shift colours by the mean of DIV2K, {edsr.RGB_MEAN}, as in every published EDSR; such"
                " a network is not supported"
            )
    nearest = min((1.0, 255.0), key=lambda known: abs(known - img_range))
    return {"img_range": nearest if math.isclose(nearest, img_range, rel_tol=1e-3) else img_range}


LAYOUTS = (
    Layout(
        "BasicSR",
        "rrdbnet",
        _rename_by(
            (r"(?P<name>conv_first|conv_body|conv_hr|conv_last)", r"\g<name>"),
            (r"conv_up<K>", "conv_up<K>"),
            (r"body\.<N>\.rdb<J>\.conv<K>", "body.<N>.rdb<J>.conv<K>"),
        ),
    ),
    Layout(
        "BSRGAN",
        "rrdbnet",
        _rename_by(
            (r"(?P<name>conv_first|conv_last)", r"\g<name>"),
            (r"RRDB_trunk\.<N>\.RDB<J>\.conv<K>", "body.<N>.rdb<J>.conv<K>"),
            (r"trunk_conv", "conv_body"),
            (r"upconv<K>", "conv_up<K>"),
            (r"HRconv", "conv_hr"),
        ),
    ),
    Layout(
        "BasicSR",
        "edsr",
        _rename_by(
            (r"(?P<name>conv_first|conv_after_body|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upsample\.<N>", "upsample.<N>"),
        ),
    ),
    Layout(
        "EDSR-PyTorch",
        "edsr",
        _rename_by(
            (r"head\.0", "conv_first"),
            (r"body\.<N>\.body\.0", "body.<N>.conv1"),
            (r"body\.<N>\.body\.2", "body.<N>.conv2"),
            (r"body\.<N>", "conv_after_body"),
            (r"tail\.0\.<N>", "upsample.<N>"),
            (r"tail\.1", "conv_last"),
        ),
        is_constant=lambda key: re.fullmatch(r"(sub|add)_mean\.(weight|bias)", key) is not None,
        told=_img_range,
    ),
    Layout(
        "MMEditing",
        "edsr",
        _rename_by(
            (r"(?P<name>conv_first|conv_after_body|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            # A convolution and its pixel shuffle are one module there, and two in BasicSR.
            *((rf"upsample\.{k}\.upsample_conv", f"upsample.{2 * k}") for k in range(4)),
        ),
        told=lambda constants: {"img_range": 1.0},
    ),
    Layout(
        "BasicSR",
        "msrresnet",
        _rename_by(
            (r"(?P<name>conv_first|conv_hr|conv_last)", r"\g<name>"),
            (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upconv<K>", "upconv<K>"),
        ),
    ),
    Layout(
        "KAIR",
        "msrresnet",
        _rename_by(
            (r"(?P<name>conv_first|conv_last)", r"\g<name>"),
            (r"recon_trunk\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upconv<K>", "upconv<K>"),
            (r"HRconv", "conv_hr"),
        ),
    ),
    Layout(
        "MMEditing",
        "msrresnet",
        _rename_by(
            (r"(?P<name>conv_first|conv_hr|conv_last)", r"\g<name>"),
            (r"trunk_net\.<N>\.conv<K>", "body.<N>.conv<K>"),
            (r"upsample<K>\.upsample_conv", "upconv<K>"),
        ),
    ),
    Layout("NAFNet", "nafnet", _same_if(_NAFNET_KEY)),
    Layout("kdjax", "unet", _same_if(_UNET_KEY)),
    Layout("BasicSR", "srvggnetcompact", _rename_by((r"body\.<N>", "body.<N>"))),
    Layout("KAIR", "dncnn", _rename_by((r"model\.<N>", "model.<N>"))),
    Layout("DnCNN-PyTorch", "dncnn", _rename_by((r"dncnn\.<N>", "model.<N>"))),
)


def layouts(keys: Iterable[str]) -> tuple[Layout, ...]:
    """Every layout. One depends on the keys: the old ESRGAN counts on past its upsamplings.

    The earlier of two equal fits is taken, so KAIR's DnCNN stands before the old ESRGAN, whose first keys it shares.
    """
    numbers = [int(match[1]) for key in keys if (match := re.fullmatch(r"model\.([0-9]{1,2})\.weight", key))]
    last = 3 * max(0, (max(numbers, default=10) - 4) // 3)  # index of the last upsampling convolution
    old_esrgan = Layout(
        "old ESRGAN",
        "rrdbnet",
        _rename_by(
            (r"model\.0", "conv_first"),
            (r"model\.1\.sub\.<N>\.RDB<J>\.conv<K>\.0", "body.<N>.rdb<J>.conv<K>"),
            (r"model\.1\.sub\.<N>", "conv_body"),
            *((rf"model\.{3 * k}", f"conv_up{k}") for k in range(1, last // 3 + 1)),
            (rf"model\.{last + 2}", "conv_hr"),
            (rf"model\.{last + 4}", "conv_last"),
        ),
    )
    return *LAYOUTS, old_esrgan


@dataclass(frozen=True)
class Fit:
    """How a layout names the tensors of a file.

    Attributes:
      renamed: our name -> the key of the file.
      constants: keys of tensors that are none of our parameters.
      unused: keys that the layout does not know.
    """

    layout: Layout
    renamed: dict[str, str]
    constants: list[str]
    unused: list[str]

    @property
    def part(self) -> float:
        """The part of the keys that the layout knows."""
        known = len(self.renamed) + len(self.constants)
        return known / max(1, known + len(self.unused))


def best_layout(keys: Iterable[str], arch: str | None) -> Fit:
    """The layout that knows most keys."""
    keys = list(keys)
    fits = [_fit(layout, keys) for layout in layouts(keys) if arch in (None, layout.arch)]
    best = max(fits, key=lambda fit: fit.part)  # the first of equal ones
    if not best.renamed:
        raise WeightsError(
            f"its keys ({listed(keys, 5)}) fit no supported architecture"
            f"{'' if arch is None else ' ' + arch} (supported: {', '.join(MODELS)})"
        )
    return best


def _fit(layout: Layout, keys: list[str]) -> Fit:
    fit = Fit(layout, {}, [], [])
    for key in keys:
        if layout.is_constant(key):
            fit.constants.append(key)
        elif (name := layout.rename(key)) is None or name in fit.renamed:
            fit.unused.append(key)
        else:
            fit.renamed[name] = key
    return fit


def known_part(state: Mapping[str, Tensor]) -> float:
    """About what part of the keys the best layout knows, from 0 to 1; those of BatchNorm count where it can be folded.

    Some two hundred keys are looked at, so that it costs nothing to ask again and again.
    """
    statistics = (".running_mean", ".running_var") if has_batch_norm(state) else ()
    keys = [key for key in state if not key.endswith(statistics)] if statistics else list(state)
    some = keys[:: -(-len(keys) // 200) or 1]
    return max(_fit(layout, some).part for layout in layouts(keys))


def refuse_unsupported(keys: Iterable[str]) -> None:
    """Raises a WeightsError that names the network, for those whose keys are known and that we do not have."""
    keys = list(keys)
    for name, patterns in UNSUPPORTED:
        if all(any(re.fullmatch(pattern, key) for key in keys) for pattern in patterns):
            raise WeightsError(f"it looks like {name}, which is not supported (supported: {', '.join(MODELS)})")


# ---- DnCNN with batch normalisation, or without biases ---------------------------------------------------------


def has_batch_norm(state: Mapping[str, Any]) -> bool:
    """Whether it may be a DnCNN with BatchNorm, for `fold_batch_norm`."""
    is_dncnn = "model.0.weight" in state or "dncnn.0.weight" in state
    return is_dncnn and any(key.endswith(".running_mean") for key in state)


def fold_batch_norm(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A DnCNN (conv, ReLU, [conv, BatchNorm, ReLU]..., conv) as one without BatchNorm, and the name of its layout.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is a convolution with scaled kernels and another bias: the
    network is the same up to rounding.
    Convolutions without biases, as in Zhang's training code and in SaoYan's DnCNN-PyTorch, get those of zero.
    """
    name = "model" if "model.0.weight" in state else "dncnn"
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = re.fullmatch(rf"{name}\.([0-9]{{1,4}})\.(weight|bias|running_mean|running_var)", key)
        if not match or not value.is_float:
            raise WeightsError(f"it looks like DnCNN with BatchNorm, but has {listed([key])}; it cannot be folded")
        entries.setdefault(int(match[1]), {})[match[2]] = value
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
            raise WeightsError(f"{name}.{index} is no convolution, so its BatchNorm cannot be folded")
        shape = weight.shape[:1]
        if ("bias" not in conv and has_biases) or ("bias" in conv and conv["bias"].shape != shape):
            raise WeightsError(f"{name}.{index} is no convolution with a bias, so its BatchNorm cannot be folded")
        kernel = weight.array().astype(np.float64)
        bias = conv["bias"].array().astype(np.float64) if "bias" in conv else np.zeros(shape)
        if norm is not None:
            parts = [norm.get(part) for part in ("weight", "bias", "running_mean", "running_var")]
            if any(part is None or part.shape != shape for part in parts) or (parts[3].array() < 0).any():
                raise WeightsError(
                    f"the BatchNorm {name}.{index + 1} needs weight, bias, running_mean and a running_var that is not"
                    f" negative, each of shape {shape}"
                )
            gamma, beta, mean, variance = (part.array().astype(np.float64) for part in parts)
            factor = gamma / np.sqrt(variance + eps)
            kernel, bias = kernel * factor[:, None, None, None], (bias - mean) * factor + beta
        folded[f"model.{2 * i}.weight"], folded[f"model.{2 * i}.bias"] = Tensor.of(kernel), Tensor.of(bias)
    return folded, "KAIR with BatchNorm" if name == "model" else "DnCNN-PyTorch with BatchNorm"
