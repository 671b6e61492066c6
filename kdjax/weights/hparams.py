"""The hyper-parameters of a network: told by the shapes of its tensors, settled by what was published, or asked for.

What shapes cannot tell, architecture by architecture:

| | cannot be told | what is done |
| --- | --- | --- |
| rrdbnet | whether one upsampling is by 2 or by 3 | asked for (`scale`) |
| | whether 12 or 48 input channels are an image un-shuffled 2 or 4 times | taken so, as BasicSR has it, and noted |
| srvggnetcompact | ReLU or leaky ReLU, where there is no PReLU | asked for (`act_type`) |
| dncnn | ReLU or leaky ReLU | ReLU, as in all that were published; noted for sizes that were not |
| | DnCNN of depth 7 or IRCNN | asked for (`arch`) |
| edsr | `res_scale` | the published one for published sizes, and noted; else asked for |
| | `img_range`, the mean colour | told by the authors' files; else BasicSR's, and noted |
| srvggnetcompact, dncnn, edsr | whether 12 or 48 input channels are an un-shuffled image | taken so, and noted |
| msrresnet, nafnet, unet | nothing | |

A file that kdjax wrote states all of them, so nothing is asked and nothing noted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from kdjax.weights.tensors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

MAX_LEVELS = 12  # of a U-Net: an image of a gigapixel has 2^15 pixels a side
MAX_UPSAMPLE = 8  # enlargements by 2
MAX_NETWORK = 5_000  # tensors; the largest supported network that was published has 1,300
DNCNN_SIZES = {(64, 17), (64, 20)}  # num_feat, depth


# ---- told by shapes --------------------------------------------------------------------------------------------


def infer(arch: str, shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes tell, given what is stated; where they do not fit each other, something near.

    Args:
      arch: a key of MODELS.
      shapes: of the tensors under our names, in torch's layout.
      stated: hyper-parameters that the file or the caller states; they decide what shapes leave open.

    Raises:
      WeightsError: it is a network of a known kind that is not supported, or one far larger than its tensors: numbers
        in keys are not trusted.
    """
    hparams = INFER[arch](shapes, stated)
    wanted = NUM_TENSORS[arch](hparams, any(shape for key, shape in shapes.items() if _is_prelu(key, shape)))
    # Beyond a thousand tensors, a network has far more than 250 scalars for each of them.
    most = min(MAX_NETWORK, 1_000 + sum(map(math.prod, shapes.values())) // 250)
    if wanted > min(len(shapes) * 5 // 4 + 64, most):
        settings = ", ".join(f"{name}={value}" for name, value in hparams.items())
        raise WeightsError(
            f"its keys are those of {arch} ({settings}), which has {wanted:,} tensors; the file has {len(shapes):,},"
            f" and at most {most:,} as small as these are read; it is incomplete or damaged"
        )
    return hparams


def _infer_rrdbnet(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    num_upsample = min(_count(shapes, r"conv_up([0-9]+)\.weight", first=1), MAX_UPSAMPLE)
    inputs = _size(shapes, 1, "conv_first.weight", default=3)
    num_out_ch = _size(shapes, 0, "conv_last.weight", default=3)
    enlargement = 3 if num_upsample == 1 and stated.get("scale") == 3 else 2**num_upsample
    # Only the ratio of the channels tells that the input is un-shuffled, as in every reader of these files; a network
    # that really reads 4 or 16 times the channels it writes has to say so: load_weights(path, scale=4).
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
        "num_feat": _size(shapes, 0, "conv_first.weight", "conv_body.weight", "conv_hr.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "num_grow_ch": _size(shapes, 0, "body.0.rdb1.conv1.weight", "body.0.rdb2.conv1.weight", default=32),
        "num_upsample": num_upsample,
    }


def _infer_srvggnetcompact(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"body\.([0-9]+)\.weight") - 1
    inputs = _size(shapes, 1, "body.0.weight", default=3)
    outputs = _size(shapes, 0, f"body.{last}.weight", default=inputs)
    num_in_ch, unshuffle = _unshuffled(inputs, stated)
    hparams = {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "body.0.weight", default=64),
        "num_conv": max(1, last // 2 - 1),
        "upscale": max(1, math.isqrt(outputs // max(1, inputs))),
        "unshuffle": unshuffle,
    }
    if any(_is_prelu(key, shape) for key, shape in shapes.items()):
        hparams["act_type"] = "prelu"  # the other two have no parameters, so they cannot be told apart
    return hparams


def _infer_dncnn(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    last = _count(shapes, r"model\.([0-9]+)\.weight") - 1
    inputs = _size(shapes, 1, "model.0.weight", default=3)
    outputs = _size(shapes, 0, f"model.{last}.weight", default=inputs)
    if inputs == outputs + 1:
        raise WeightsError(
            f"it looks like FDnCNN or FFDNet: the first convolution reads {inputs} channels and the last writes"
            f" {outputs}, so one input is a map of the noise level; only DnCNN, which needs no map, is supported"
        )
    num_in_ch, unshuffle = _unshuffled(inputs, stated)
    return {
        "num_in_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "model.0.weight", default=64),
        "depth": max(2, last // 2 + 1),
        "unshuffle": unshuffle,
    }


def _infer_edsr(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    num_in_ch, unshuffle = _unshuffled(_size(shapes, 1, "conv_first.weight", default=3), stated)
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": max(1, _size(shapes, 0, "conv_last.weight", default=3) // unshuffle**2),
        "num_feat": _size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": _upscale(shapes, "upsample.0.weight", len([k for k in shapes if re.match(r"upsample.*weight", k)])),
        "unshuffle": unshuffle,
    }


def _infer_msrresnet(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    num_in_ch = _size(shapes, 1, "conv_first.weight", default=3)
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": num_in_ch,
        "num_feat": _size(shapes, 0, "conv_first.weight", default=64),
        "num_block": max(1, _count(shapes, r"body\.([0-9]+)\..*")),
        "upscale": _upscale(shapes, "upconv1.weight", _count(shapes, r"upconv([0-9]+)\.weight", first=1)),
    }


def _infer_nafnet(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    levels = _levels(shapes, r"downs\.([0-9]+)\.weight")
    return {
        "img_channel": _size(shapes, 1, "intro.weight", default=3),
        "width": _size(shapes, 0, "intro.weight", default=16),
        "middle_blk_num": max(1, _count(shapes, r"middle_blks\.([0-9]+)\..*")),
        "enc_blk_nums": tuple(_count(shapes, rf"encoders\.{level}\.([0-9]+)\..*") for level in range(levels)),
        "dec_blk_nums": tuple(_count(shapes, rf"decoders\.{level}\.([0-9]+)\..*") for level in range(levels)),
    }


def _infer_unet(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_in_ch": _size(shapes, 1, "conv_first.weight", default=3),
        "num_feat": _size(shapes, 0, "conv_first.weight", default=16),
        "num_level": max(1, _levels(shapes, r"down\.([0-9]+)\.weight")),
        "num_conv": max(1, _count(shapes, r"encoder\.0\.convs\.([0-9]+)\.weight")),
    }


def _unshuffled(inputs: int, stated: Mapping[str, Any]) -> tuple[int, int]:
    """Colour channels of the image and the un-shuffling in front of a first convolution that reads `inputs` channels.

    12 and 48 channels are taken for RGB un-shuffled 2 and 4 times; what else there may be has to be stated.
    """
    if "unshuffle" in stated:
        unshuffle = max(1, stated["unshuffle"])
    elif "num_in_ch" in stated:
        unshuffle = max(1, math.isqrt(inputs // max(1, stated["num_in_ch"])))
    else:
        unshuffle = {12: 2, 48: 4}.get(inputs, 1)
    return max(1, inputs // unshuffle**2), unshuffle


def _upscale(shapes: Shapes, first: str, count: int) -> int:
    """The enlargement by `count` pixel shuffles, of which the `first` convolution tells whether it is by 3."""
    shape = shapes.get(first, ())
    return 3 if count == 1 and len(shape) == 4 and shape[0] == 9 * shape[1] else 2 ** min(count, MAX_UPSAMPLE)


INFER: dict[str, Callable[[Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    "rrdbnet": _infer_rrdbnet,
    "srvggnetcompact": _infer_srvggnetcompact,
    "dncnn": _infer_dncnn,
    "edsr": _infer_edsr,
    "msrresnet": _infer_msrresnet,
    "nafnet": _infer_nafnet,
    "unet": _infer_unet,
}

# How many tensors a network has. To say it costs nothing; to build it, even without values, a millisecond each.
NUM_TENSORS: dict[str, Callable[[Mapping[str, Any], bool], int]] = {
    "rrdbnet": lambda h, _: 30 * h["num_block"] + 2 * h["num_upsample"] + 8,
    "srvggnetcompact": lambda h, prelu: 2 * (h["num_conv"] + 2) + prelu * (h["num_conv"] + 1),
    "dncnn": lambda h, _: 2 * h["depth"],
    "edsr": lambda h, _: 4 * h["num_block"] + 2 * _steps(h["upscale"]) + 6,
    "msrresnet": lambda h, _: 4 * h["num_block"] + 2 * _steps(h["upscale"]) + 6,
    "nafnet": lambda h, _: (
        18 * (h["middle_blk_num"] + sum(h["enc_blk_nums"]) + sum(h["dec_blk_nums"])) + 3 * len(h["enc_blk_nums"]) + 4
    ),
    "unet": lambda h, _: 2 * (h["num_conv"] * (2 * h["num_level"] + 1) + 2 * h["num_level"] + 2),
}


def _steps(upscale: int) -> int:
    return 1 if upscale == 3 else upscale.bit_length() - 1


def _is_prelu(key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 and key.endswith(".weight")


def _size(shapes: Shapes, axis: int, *keys: str, default: int) -> int:
    """The size along `axis` of the first of these convolutions that the file has."""
    return next((shapes[key][axis] for key in keys if len(shapes.get(key, ())) == 4), default)


def _count(shapes: Shapes, pattern: str, *, first: int = 0) -> int:
    """How many numbered parts there are: up to the largest number, unless a stray one is far beyond the rest."""
    numbers = {int(match[1]) for key in shapes if (match := re.fullmatch(pattern, key))}
    count = max(numbers, default=first - 1) + 1 - first
    return count if count <= 2 * len(numbers) + 8 else len(numbers)


def _levels(shapes: Shapes, pattern: str) -> int:
    levels = _count(shapes, pattern)
    if levels > MAX_LEVELS:
        raise WeightsError(f"it is a U-Net of {levels} levels, at most {MAX_LEVELS} are read")
    return levels


# ---- not told: settled by what was published, or asked for -----------------------------------------------------


def settle(
    arch: str, layout: str, hparams: Mapping[str, Any], *, stated: Collection[str], told: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The hyper-parameters with those that no tensor tells, and for each of them what was taken and why.

    Args:
      arch: a key of MODELS.
      layout: the name of the file's layout.
      hparams: complete; what was not told has its default.
      stated: the names of those that the caller states.
      told: the names of those that the shapes or the layout tell, perhaps by what is usual.

    Raises:
      WeightsError: one of them has to be said; the message says how.
    """
    hparams, notes = dict(hparams), []
    if arch == "rrdbnet":
        if hparams["num_upsample"] == 1 and "scale" not in stated:
            scales = (2, 3) if hparams["scale"] == 2 else (1, 2, 3)  # 1 with an un-shuffled input
            raise WeightsError(
                "it is RRDBNet with one upsampling, which enlarges 2 or 3 times with the same tensors:"
                f" {how_to_say('scale', scales)}"
            )
        if hparams["scale"] < 2 ** hparams["num_upsample"] and not {"scale", "num_in_ch"} & set(stated):
            factor = 2 ** hparams["num_upsample"] // hparams["scale"]
            notes.append(
                _unshuffling_note(hparams["num_in_ch"], factor, "scale", hparams["scale"], "BasicSR's RRDBNet")
            )
    elif hparams.get("unshuffle", 1) > 1 and not {"unshuffle", "num_in_ch"} & set(stated):
        factor = hparams["unshuffle"]
        notes.append(_unshuffling_note(hparams["num_in_ch"], factor, "unshuffle", factor, "a student of kdjax"))
    if arch == "srvggnetcompact" and not {"act_type"} & {*stated, *told}:
        raise WeightsError(
            "it is SRVGGNetCompact without PReLU weights, so its activation is ReLU or leaky ReLU and the file does not"
            f" say which: {how_to_say('act_type', ('relu', 'leakyrelu'))}"
        )
    if arch == "dncnn" and (hparams["num_feat"], hparams["depth"]) not in DNCNN_SIZES:
        notes.append(
            "its activation was taken for ReLU, as in every published DnCNN; one with leaky ReLU has the same tensors"
            " and is not supported"
        )
    if arch == "edsr":
        if "res_scale" not in stated:
            hparams["res_scale"], note = _res_scale(layout, hparams)
            notes.append(note)
        if not {"img_range"} & {*stated, *told}:
            notes.append(
                "img_range=255 and the mean colour of DIV2K were taken, as in BasicSR; no tensor tells them; otherwise"
                f" {how_to_say('img_range', (1,))}"
            )
    return hparams, tuple(notes)


def _res_scale(layout: str, hparams: Mapping[str, Any]) -> tuple[float, str]:
    size = hparams["num_feat"], hparams["num_block"]
    words = f"{size[0]} features and {size[1]} blocks"
    published = {(64, 16): 1.0, (256, 32): 0.1}.get(size)
    if published is not None and hparams["upscale"] in (2, 3, 4) and hparams["unshuffle"] == 1:
        why = f"as in the published EDSR of {words}"
    elif layout == AUTHORS_EDSR and size[0] <= 64:
        published, why = 1.0, "the default of the authors' program, which only their 256 features need smaller"
    else:
        raise WeightsError(
            f"it is EDSR of {words}, whose residuals are multiplied by a number that no tensor tells (1 in the"
            f" published network of 64 features, 0.1 in that of 256): {how_to_say('res_scale', (0.1, 1))}"
        )
    other = 1 if published < 1 else 0.1
    note = (
        f"res_scale={published:g} was taken, {why}; no tensor tells it; otherwise {how_to_say('res_scale', (other,))}"
    )
    return published, note


AUTHORS_EDSR = "EDSR-PyTorch"


def _unshuffling_note(channels: int, factor: int, name: str, value: int, whose: str) -> str:
    read = channels * factor**2
    return (
        f"its {read} input channels were taken for {channels} of an image un-shuffled {factor} times, as in {whose}"
        f" ({name}={value}); if it reads {read} colours, {how_to_say('num_in_ch', (read,))}"
    )


def how_to_say(name: str, values: Iterable[Any]) -> str:
    """How a hyper-parameter is stated: in Python, on the command line and in a config."""
    python = " or ".join(f"{name}={value!r}" for value in values)
    first = next(iter(values))
    return (
        f"say {python}, as load_model(..., {name}={first!r}) in Python, --hparam {name}={first} on the command line,"
        f" config.teacher.hparams.{name} = {first!r} in a config"
    )


# ---- as command lines give them --------------------------------------------------------------------------------

Hparam = bool | int | float | str | tuple


def parse_hparams(pairs: Iterable[str]) -> dict[str, Hparam]:
    """Hyper-parameters from NAME=VALUE: numbers, true and false, lists of numbers, and anything else as text.

    >>> parse_hparams(["act_type=relu", "res_scale=1e-1", "enc_blk_nums=1,1,1,28", "enc_blk_nums=[2]"][:3])
    {'act_type': 'relu', 'res_scale': 0.1, 'enc_blk_nums': (1, 1, 1, 28)}

    Raises:
      WeightsError: a pair is not NAME=VALUE.
    """
    hparams = {}
    for pair in pairs:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            raise WeightsError(f"{pair!r}: wanted NAME=VALUE, such as act_type=relu, scale=3 or enc_blk_nums=1,1,1,28")
        hparams[name] = _parse_value(value)
    return hparams


def _parse_value(text: str) -> Hparam:
    brackets = text[0] + text[-1] in ("[]", "()")
    if brackets or "," in text:
        parts = [part.strip() for part in (text[1:-1] if brackets else text).split(",")]
        return tuple(_parse_value(part) for part in parts if part)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return float(text)
    return text
