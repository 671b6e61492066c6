"""From the tensors of any known file to a model: unwrap, rename, infer the hyper-parameters, check every key.

One rule converts names and layouts: torch's 4-D `P.weight` (OIHW) is our `P.kernel` (HWIO); everything else keeps its
name and shape. Other layouts of the same network are first renamed to the names that our models have.

A file must fit its architecture as a bijection: every tensor used, every parameter filled, every shape equal, every
value finite. Left out: networks whose keys cannot be told apart from a supported one. Taken for what they look like
are DnCNN with leaky ReLU (KAIR ships none) and the old ESRGAN at scale 3 (one x3 upsampling, taken for x2).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import traverse_util

from kdjax.models import Model, abstract_params, complete_hparams
from kdjax.weights.tensors import BFLOAT16, Tensor, WeightsError

Shapes = Mapping[str, tuple[int, ...]]

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
    ("NAFNet", (r"intro\.weight", r"ending\.weight")),
    ("DRUNet", (r"m_head\.weight", r"m_down1\.0\..*")),
    ("SCUNet", (r"m_head\.0\.weight", r"m_tail\.0\.weight")),
    ("EDSR", (r"conv_first\.weight", r"conv_after_body\.weight", r"body\.0\.conv1\.weight")),
    ("MSRResNet", (r"conv_first\.weight", r"conv_hr\.weight", r"body\.0\.conv1\.weight")),
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
            what = _listed(available) if available else "bare (the file is one state dict, not wrapped)"
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
        raise WeightsError(f"it has no tensors at {'/'.join(path) or 'the top level'} (found: {_listed(found)})")
    return found, "/".join(path) or "bare"


def _has_tensors(value: Any) -> bool:
    return type(value) is dict and any(isinstance(entry, Tensor) for entry in value.values())


def _only_state_dict(found: dict[str, Any]) -> str | None:
    candidates = [name for name, value in found.items() if _has_tensors(value)]
    if len(candidates) > 1:
        raise WeightsError(f"it holds several sets of tensors: {_listed(candidates)}; choose one with key=...")
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


# ---- hyper-parameters from shapes ------------------------------------------------------------------------------


def _infer_rrdbnet(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    num_upsample = _count(shapes, r"conv_up([0-9]+)\.weight", first=1)
    inputs = _size(shapes, 1, "conv_first.weight", default=3)
    num_out_ch = _size(shapes, 0, "conv_last.weight", default=3)
    # Only the ratio of the channels tells that the input is un-shuffled, as in every reader of these files; a network
    # that really reads 4 or 16 times the channels it writes has to say so: load_weights(path, scale=4).
    if "scale" in given:
        unshuffle = max(1, 2**num_upsample // max(1, given["scale"]))
    elif "num_in_ch" in given:
        unshuffle = max(1, math.isqrt(inputs // max(1, given["num_in_ch"])))
    else:
        unshuffle = {4: 2, 16: 4}.get(inputs // max(1, num_out_ch), 1) if inputs % max(1, num_out_ch) == 0 else 1
        unshuffle = unshuffle if unshuffle <= 2**num_upsample else 1
    return {
        "num_in_ch": inputs // unshuffle**2,
        "num_out_ch": num_out_ch,
        "scale": 2**num_upsample // unshuffle,
        "num_feat": _size(shapes, 0, "conv_first.weight", "conv_body.weight", "conv_hr.weight", default=64),
        "num_block": _count(shapes, r"body\.([0-9]+)\..*"),
        "num_grow_ch": _size(shapes, 0, "body.0.rdb1.conv1.weight", "body.0.rdb2.conv1.weight", default=32),
        "num_upsample": num_upsample,
    }


def _infer_srvggnetcompact(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"body\.([0-9]+)\.weight") - 1
    num_in_ch = _size(shapes, 1, "body.0.weight", default=3)
    outputs = _size(shapes, 0, f"body.{last}.weight", default=num_in_ch)
    hparams = {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "body.0.weight", default=64),
        "num_conv": max(1, last // 2 - 1),
        "upscale": max(1, math.isqrt(outputs // max(1, num_in_ch))),
    }
    if any(len(shape) == 1 and key.endswith(".weight") for key, shape in shapes.items()):
        hparams["act_type"] = "prelu"  # the other two have no parameters, so they cannot be told apart
    return hparams


def _infer_dncnn(shapes: Shapes, given: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"model\.([0-9]+)\.weight") - 1
    num_in_ch = _size(shapes, 1, "model.0.weight", default=3)
    outputs = _size(shapes, 0, f"model.{last}.weight", default=num_in_ch)
    if num_in_ch == outputs + 1:
        raise WeightsError(
            f"it looks like FDnCNN or FFDNet: the first convolution reads {num_in_ch} channels and the last writes"
            f" {outputs}, so one input is a map of the noise level; only DnCNN, which needs no map, is supported"
        )
    return {
        "num_in_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "model.0.weight", default=64),
        "depth": max(2, last // 2 + 1),
    }


INFER: dict[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    "rrdbnet": _infer_rrdbnet,
    "srvggnetcompact": _infer_srvggnetcompact,
    "dncnn": _infer_dncnn,
}


def _size(shapes: Shapes, axis: int, *keys: str, default: int) -> int:
    """The size along `axis` of the first of these convolutions that the file has."""
    return next((shapes[key][axis] for key in keys if len(shapes.get(key, ())) == 4), default)


def _count(shapes: Shapes, pattern: str, *, first: int = 0) -> int:
    """How many numbered parts there are: up to the largest number, unless a stray one is far beyond the rest."""
    numbers = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    count = max(numbers, default=first - 1) + 1 - first
    return count if count <= 2 * len(numbers) + 8 else len(numbers)


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
            f"it has BatchNorm at {_listed(norms)} and convolutions at {_listed(convs)} of `model`; wanted KAIR's"
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


# ---- the whole way, both directions ----------------------------------------------------------------------------


def to_model(
    state: dict[str, Any], *, arch: str | None, said: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Model, str]:
    """The model that a state dict holds, and the name of its layout.

    Args:
      state: an unwrapped state dict.
      arch: a key of MODELS, or None to recognise it.
      said: hyper-parameters the file states about itself.
      given: hyper-parameters the caller states; they win over `said`.
    """
    strange = [key for key, value in state.items() if type(key) is not str or not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"its state dict has entries that are not tensors: {_listed(strange)}; remove them")
    arrays = _float32({key: tensor.array() for key, tensor in strip_prefixes(state).items()})
    layout_name = None
    if arch in (None, "dncnn") and has_batch_norm(arrays):
        arrays, layout_name = _float32(fold_batch_norm(arrays)), "KAIR with BatchNorm"
    if arch is None:
        _refuse_unsupported(arrays)

    layout, renamed, unused = _best_layout(arrays, arch)
    shapes = {name: arrays[key].shape for name, key in renamed.items()}
    stated = dict(said) | dict(given)
    _complete(layout.arch, stated)
    inferred = INFER[layout.arch](shapes, stated)
    wrong = [
        f"{name}={value!r}, the tensors say {inferred[name]!r}"
        for name, value in stated.items()
        if name in inferred and inferred[name] != value
    ]
    if wrong:
        raise WeightsError(f"it is stated to be {layout.arch} with {'; '.join(wrong)}; leave that out or correct it")
    hparams = _complete(layout.arch, stated | inferred)
    unknown_activation = layout.arch == "srvggnetcompact" and "act_type" not in stated | inferred
    if unknown_activation:
        hparams["act_type"] = "relu"  # same keys as leakyrelu, so the check of the keys can be made first
    _check(layout, hparams, {name: arrays[key] for name, key in renamed.items()}, unused)
    if unknown_activation:
        raise WeightsError(
            "it is SRVGGNetCompact without PReLU weights, so its activation is ReLU or leaky ReLU and the file does not"
            " say which; pass act_type='relu' or act_type='leakyrelu'"
        )
    if arch is None and (layout.arch, hparams.get("depth"), hparams.get("num_feat")) == ("dncnn", 7, 64):
        raise WeightsError(
            "its tensors fit DnCNN of depth 7 and IRCNN alike; IRCNN, whose convolutions are dilated, is not supported;"
            " if it is DnCNN, pass arch='dncnn'"
        )
    params = {}
    for name, key in renamed.items():
        path, value = name, arrays[key]
        if value.ndim == 4:
            path, value = name.removesuffix("weight") + "kernel", value.transpose(2, 3, 1, 0)
        params[path] = np.ascontiguousarray(value)
    params = {path: params[path] for path in _our_shapes(layout.arch, hparams)}
    return Model(layout.arch, hparams, traverse_util.unflatten_dict(params, sep=".")), layout_name or layout.name


def to_state_dict(model: Model) -> dict[str, np.ndarray]:
    """The model's parameters in torch's names and layouts, float32, in the order of the network.

    Raises:
      WeightsError: the parameters do not fit the architecture, or are not finite.
    """
    state = {}
    for path, leaf in traverse_util.flatten_dict(model.params, sep=".").items():
        value = np.asarray(leaf)
        if path.endswith(".kernel") and value.ndim == 4:
            path, value = path.removesuffix("kernel") + "weight", value.transpose(3, 2, 0, 1)
        state[path] = value
    _check(Layout("kdjax", model.arch, str), model.hparams, state, ())
    wanted = torch_shapes(model.arch, model.hparams)
    return _float32({key: np.ascontiguousarray(state[key]) for key in wanted})


def _complete(arch: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return complete_hparams(arch, hparams)
    except ValueError as error:
        raise WeightsError(str(error)) from None


def torch_shapes(arch: str, hparams: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of an architecture: torch name and shape, in the order of the network."""
    shapes = {}
    for path, shape in _our_shapes(arch, hparams).items():
        if path.endswith(".kernel"):
            path, shape = path.removesuffix("kernel") + "weight", (shape[3], shape[2], shape[0], shape[1])
        shapes[path] = shape
    return dict(sorted(shapes.items(), key=lambda item: _network_order(item[0])))


def _our_shapes(arch: str, hparams: Mapping[str, Any]) -> Shapes:
    return _cached_shapes(arch, tuple(hparams.items()))


@functools.lru_cache(maxsize=16)  # seconds for a large network, and asked for several times per file
def _cached_shapes(arch: str, hparams: tuple[tuple[str, Any], ...]) -> Shapes:
    try:
        leaves = traverse_util.flatten_dict(abstract_params(arch, dict(hparams)), sep=".")
    except ValueError as error:
        raise WeightsError(str(error)) from None
    return {path: leaf.shape for path, leaf in leaves.items()}


def _network_order(key: str) -> tuple[Any, ...]:
    """Sorts as torch registers: first, trunk, tail; body.10 after body.9; weight before bias."""
    heads = ("conv_first", "body", "model", "conv_body", "conv_up", "conv_hr", "conv_last")
    head = next((i for i, name in enumerate(heads) if key.split(".")[0].rstrip("0123456789") == name), len(heads))
    parts = [(int(text) if text.isdigit() else 0, text) for text in re.split(r"([0-9]+)|\.", key) if text]
    module, leaf = parts[:-1], parts[-1][1]
    return head, module, leaf != "weight", leaf


def _best_layout(arrays: Mapping[str, np.ndarray], arch: str | None) -> tuple[Layout, dict[str, str], list[str]]:
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
            f"its keys ({_listed(arrays, 5)}) fit no supported architecture"
            f"{'' if arch is None else ' ' + arch} (supported: {', '.join(INFER)})"
        )
    return best


def _refuse_unsupported(arrays: Mapping[str, np.ndarray]) -> None:
    for name, patterns in UNSUPPORTED:
        if all(any(re.fullmatch(pattern, key) for key in arrays) for pattern in patterns):
            raise WeightsError(f"it looks like {name}, which is not supported (supported: {', '.join(INFER)})")


def _check(layout: Layout, hparams: Mapping[str, Any], state: Mapping[str, np.ndarray], unused: Iterable[str]) -> None:
    """Raises one error with every missing, unexpected and misshapen key."""
    wanted = torch_shapes(layout.arch, hparams)
    missing = [key for key in wanted if key not in state]
    unexpected = [*unused, *(key for key in state if key not in wanted)]
    misshapen = [
        f"{key} is {state[key].shape}, wanted {shape}"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    not_float = [f"{key} is {state[key].dtype}" for key in wanted if key in state and not _is_float(state[key])]
    faults = {
        "missing": missing, "unexpected": unexpected, "wrong shape": misshapen, "not floating point": not_float,
    }  # fmt: skip
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in faults.items() if keys)
        settings = ", ".join(f"{name}={value}" for name, value in hparams.items())
        raise WeightsError(
            f"the tensors do not fit {layout.arch} ({settings}; {layout.name} layout), the nearest architecture:"
            f" {listed}"
        )


def _float32(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with every floating-point array as float32, all values finite; integers stay for `_check` to report."""
    with np.errstate(over="ignore"):
        converted = {key: array.astype(np.float32) if _is_float(array) else array for key, array in arrays.items()}
    bad = [key for key, array in converted.items() if not np.isfinite(array).all()]
    if bad:
        raise WeightsError(
            f"there are NaN or infinite values (as float32) in: {_listed(bad)}; training diverged, or the file is damaged"
        )
    return converted


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == BFLOAT16


def _listed(keys: Iterable[Any], limit: int = MAX_LISTED) -> str:
    keys = [str(key)[:120] for key in keys]
    more = f", ... ({len(keys)} in all)" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
