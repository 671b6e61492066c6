"""A network's hyper-parameters: inferred from tensor shapes, or parsed from the command line.

What shapes cannot tell is taken from published networks, or asked for. Each file in `kdjax.models` says which:

| | shapes cannot tell | what happens |
| --- | --- | --- |
| rrdbnet | whether one upsampling is by 2 or by 3 | asked for (`scale`) |
| | whether 12 or 48 input channels are an image un-shuffled 2 or 4 times | assumed, as in BasicSR, and noted |
| srvggnetcompact | ReLU or leaky ReLU, where there is no PReLU | asked for (`act_type`) |
| dncnn | ReLU or leaky ReLU | ReLU, as in all published networks; noted for unpublished sizes |
| | DnCNN of depth 7 or IRCNN | asked for (`arch`) |
| edsr | `res_scale` | the published value for published sizes, and noted; else asked for |
| | `img_range`, the mean colour | in the authors' files; else BasicSR's, and noted |
| span | `img_range`, the mean colour | 255 and that of DIV2K, as in the authors' code, and noted |
| srvggnetcompact, dncnn, edsr | whether 12 or 48 input channels are an un-shuffled image | assumed, and noted |
| msrresnet, nafnet, unet | nothing | |

Files written by kdjax state all of them, so nothing is asked or noted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kdjax.models import Architecture
from kdjax.models.reading import Shapes, WeightsError

MAX_NETWORK = 5_000  # tensors; the largest supported published network has 1,634


def infer(architecture: Architecture, shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Infers hyper-parameters from shapes and stated values; if shapes are inconsistent, returns something close.

    Args:
      shapes: of the tensors under our names, in torch's layout.
      stated: hyper-parameters that the file or the caller states; they decide what shapes leave open.

    Raises:
      WeightsError: the network is of a known but unsupported kind, or far larger than its tensors: numbers in keys are
        not trusted.
    """
    assert architecture.files is not None, architecture.name
    hparams = architecture.files.infer(shapes, stated)
    wanted = architecture.files.num_tensors(hparams)
    # Beyond a thousand tensors, a network has far more than 250 scalars per tensor.
    most = min(MAX_NETWORK, 1_000 + sum(map(math.prod, shapes.values())) // 250)
    if wanted > min(len(shapes) * 5 // 4 + 64, most):
        settings = ", ".join(f"{name}={value}" for name, value in hparams.items())
        raise WeightsError(
            f"its keys are those of {architecture.name} ({settings}), which has {wanted:,} tensors; the file has"
            f" {len(shapes):,}, and at most {most:,} of this size are read; it is incomplete or damaged"
        )
    return hparams


# ---- as command lines give them --------------------------------------------------------------------------------

Hparam = bool | int | float | str | tuple


def parse_hparams(pairs: Iterable[str]) -> dict[str, Any]:
    """Parses NAME=VALUE hyper-parameters: numbers, true and false, lists of numbers, and anything else as text.

    Examples:
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
