"""Where files keep their weights and how they name them: finding the state dict, and renaming its keys to ours.

Our names are BasicSR's (KAIR's for DnCNN); shapes stay torch's here. A new architecture needs a `Layout` here and a
function in `convert.INFER`. Left out: networks whose keys cannot be told apart from a supported one. Taken for what
they look like are DnCNN with leaky ReLU (KAIR ships none) and the old ESRGAN at scale 3 (one x3 upsampling, taken for
x2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.models import MODELS
from kdjax.weights.tensors import Tensor, WeightsError

# Where training programs put the weights, best first.
WRAPPERS = (
    "params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net", "network", "netG",
    "generator", "weights",
)  # fmt: skip
# What DataParallel, torch.compile and enclosing modules put before every key.
PREFIXES = ("module.", "_orig_mod.", "netG.", "net_g.", "generator.", "network.", "net.")
KAIR_BATCH_NORM_EPS = 1e-4  # KAIR models/basicblock.py; torch's default is 1e-5
MAX_LISTED = 20

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
    ("DnCNN in another layout than KAIR's", (r"dncnn\.0\.weight",)),
)


# ---- finding the state dict ------------------------------------------------------------------------------------


def unwrap(content: Any, key: str) -> tuple[dict[str, Any], str]:
    """The state dict inside what a file holds, and where it was: "params_ema", "state_dict/model", "bare".

    Args:
      content: what the file reader returned.
      key: "auto", "bare" for the top level, or the entry to take.
    """
    if type(content) is not dict:
        raise WeightsError(f"it holds a {type(content).__name__}, wanted a dict of tensors (a state dict)")
    found, path = content, []
    if key not in ("auto", "bare"):
        if type(content.get(key)) is not dict:
            available = [name for name, value in content.items() if type(value) is dict and name != "kdjax"]
            what = listed(available) if available else "bare (the file is one state dict, not wrapped)"
            raise WeightsError(f"it has no weights under key={key!r}; available: {what}; or use key='auto'")
        found, path = content[key], [key]
    while key != "bare" and len(path) < 5:
        inner = next((name for name in WRAPPERS if type(found.get(name)) is dict and found[name]), None)
        if inner is None and not _has_tensors(found):
            inner = _only_state_dict(found)
        if inner is None:
            break
        found, path = found[inner], [*path, inner]
    if not _has_tensors(found):
        raise WeightsError(f"it has no tensors at {'/'.join(path) or 'the top level'} (found: {listed(found)})")
    return found, "/".join(path) or "bare"


def _has_tensors(value: Any) -> bool:
    return type(value) is dict and any(isinstance(entry, Tensor) for entry in value.values())


def _only_state_dict(found: dict[str, Any]) -> str | None:
    candidates = [name for name, value in found.items() if _has_tensors(value)]
    if len(candidates) > 1:
        raise WeightsError(f"it holds several sets of tensors: {listed(candidates)}; choose one with key=...")
    if not candidates and len(found) == 1 and type(next(iter(found.values()))) is dict:
        return next(iter(found))
    return candidates[0] if candidates else None


def strip_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    """Removes what stands before every key, as often as it does."""
    while state:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), "")
        # "model." begins the keys of KAIR's DnCNN and of the old ESRGAN, always followed by a number.
        if not prefix and all(re.match(r"model\.[^0-9]", key) for key in state):
            prefix = "model."
        if not prefix:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


# ---- layouts: from the keys of a file to our names -------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """One way in which files name the parameters of `arch`; `rename` gives our name, or None for a key it lacks."""

    name: str
    arch: str
    rename: Callable[[str], str | None]


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


def _layouts(keys: Iterable[str]) -> list[Layout]:
    """Every layout; one of them depends on the keys: the old ESRGAN counts on past its upsamplings."""
    numbers = [int(match[1]) for key in keys if (match := re.match(r"model\.([0-9]{1,2})\.weight$", key))]
    last = 3 * max(0, (max(numbers, default=10) - 4) // 3)  # index of the last upsampling convolution
    upsample = tuple((rf"model\.{3 * k}", f"conv_up{k}") for k in range(1, last // 3 + 1))
    return [
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
            "BasicSR",
            "msrresnet",
            _rename_by(
                (r"(?P<name>conv_first|conv_hr|conv_last)", r"\g<name>"),
                (r"body\.<N>\.conv<K>", "body.<N>.conv<K>"),
                (r"upconv<K>", "upconv<K>"),
            ),
        ),
        Layout("NAFNet", "nafnet", _same_if(_NAFNET_KEY)),
        Layout("kdjax", "unet", _same_if(_UNET_KEY)),
        Layout("BasicSR", "srvggnetcompact", _rename_by((r"body\.<N>", "body.<N>"))),
        # Before the old ESRGAN: that one shares its first keys, and the earlier of two equal fits is taken.
        Layout("KAIR", "dncnn", _rename_by((r"model\.<N>", "model.<N>"))),
        Layout(
            "old ESRGAN",
            "rrdbnet",
            _rename_by(
                (r"model\.0", "conv_first"),
                (r"model\.1\.sub\.<N>\.RDB<J>\.conv<K>\.0", "body.<N>.rdb<J>.conv<K>"),
                (r"model\.1\.sub\.<N>", "conv_body"),
                *upsample,
                (rf"model\.{last + 2}", "conv_hr"),
                (rf"model\.{last + 4}", "conv_last"),
            ),
        ),
    ]


def best_layout(arrays: Mapping[str, np.ndarray], arch: str | None) -> tuple[Layout, dict[str, str], list[str]]:
    """The layout that knows most keys, our name -> key of the file, and the keys it does not know."""
    best: tuple[Layout, dict[str, str], list[str]] | None = None
    for layout in _layouts(arrays):
        if arch not in (None, layout.arch):
            continue
        renamed: dict[str, str] = {}
        unused = []
        for key in arrays:
            name = layout.rename(key)
            if name is None or name in renamed:
                unused.append(key)
            else:
                renamed[name] = key
        if best is None or len(renamed) > len(best[1]):
            best = layout, renamed, unused
    if best is None or not best[1]:
        raise WeightsError(
            f"its keys ({listed(arrays, 5)}) fit no supported architecture"
            f"{'' if arch is None else ' ' + arch} (supported: {', '.join(MODELS)})"
        )
    return best


def refuse_unsupported(arrays: Mapping[str, np.ndarray]) -> None:
    for name, patterns in UNSUPPORTED:
        if all(any(re.fullmatch(pattern, key) for key in arrays) for pattern in patterns):
            raise WeightsError(f"it looks like {name}, which is not supported (supported: {', '.join(MODELS)})")


# ---- DnCNN with batch normalisation ----------------------------------------------------------------------------


def has_batch_norm(state: Mapping[str, Any]) -> bool:
    return "model.0.weight" in state and any(key.endswith(".running_mean") for key in state)


def fold_batch_norm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """KAIR's DnCNN (conv, ReLU, [conv, BatchNorm, ReLU]..., conv) as one without BatchNorm, equal up to rounding.

    y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta is a convolution with scaled kernels and another bias.
    """
    entries: dict[int, dict[str, np.ndarray]] = {}
    for key, value in state.items():
        match = re.fullmatch(r"model\.([0-9]{1,4})\.(weight|bias|running_mean|running_var|num_batches_tracked)", key)
        if not match:
            raise WeightsError(f"it looks like KAIR's DnCNN with BatchNorm, but has {key[:120]!r}; it cannot be folded")
        entries.setdefault(int(match[1]), {})[match[2]] = value.astype(np.float64)
    norms = sorted(i for i, entry in entries.items() if "running_mean" in entry)
    convs = sorted(entries.keys() - set(norms))
    if [i - 1 for i in norms] != convs[1:-1]:
        raise WeightsError(
            f"it has BatchNorm at {listed(norms)} and convolutions at {listed(convs)} of `model`; wanted KAIR's"
            " DnCNN, with a BatchNorm after every convolution but the first and the last"
        )
    folded = {}
    for i, index in enumerate(convs):
        conv, norm = entries[index], entries.get(index + 1)
        weight, bias = conv.get("weight"), conv.get("bias")
        if weight is None or weight.ndim != 4 or bias is None or bias.shape != weight.shape[:1]:
            raise WeightsError(f"model.{index} is no convolution with a bias, so its BatchNorm cannot be folded")
        if norm is not None:
            parts = [norm.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
            if any(part is None or part.shape != bias.shape for part in parts) or (parts[3] < 0).any():
                raise WeightsError(
                    f"the BatchNorm model.{index + 1} needs weight, bias, running_mean and a running_var that is not"
                    f" negative, each of shape {bias.shape}"
                )
            gamma, beta, mean, variance = parts
            factor = gamma / np.sqrt(variance + KAIR_BATCH_NORM_EPS)
            weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + beta
        folded[f"model.{2 * i}.weight"], folded[f"model.{2 * i}.bias"] = weight, bias
    return folded


def listed(keys: Iterable[Any], limit: int = MAX_LISTED) -> str:
    keys = [str(key)[:120] for key in keys]
    more = f", ... ({len(keys)} in all)" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
