"""Networks, and the single interface through which the rest of kdjax uses them.

    net = network("rrdbnet", {"num_block": 6})      an architecture with its hyper-parameters: a `Network`
    apply = net.make_apply()                        apply(params, x) -> (output, features), a pure function
    model = net.init(jax.random.key(0))             with weights: a `Model`; model(x) -> (output, features)

x is float NHWC in [0, 1], and `features` maps module paths ("body.3") to arrays. Flax NNX is used inside this folder
only. Parameters are a nested dict of arrays whose path is the torch module path. The leaves of a convolution are
`kernel` (HWIO) and `bias`; every other leaf keeps its torch name.

An architecture is one file, `models/X.py`, and one line of `MODELS`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kdjax.models import (
    custom,
    dncnn,
    drunet,
    edsr,
    mosr,
    msrresnet,
    nafnet,
    rcan,
    realplksr,
    rrdbnet,
    span,
    srvgg,
    unet,
)
from kdjax.models.model import Apply, Architecture, Model, Network, Params, Shrink, count_params
from kdjax.names import nearest

__all__ = [
    "MODELS",
    "Apply",
    "Architecture",
    "Model",
    "Network",
    "Params",
    "Shrink",
    "architecture",
    "count_params",
    "network",
]

# If a file's keys fit two architectures equally well, the first one wins.
MODELS: dict[str, Architecture] = {
    "rrdbnet": rrdbnet.ARCHITECTURE,
    "srvggnetcompact": srvgg.ARCHITECTURE,
    "dncnn": dncnn.ARCHITECTURE,
    "drunet": drunet.ARCHITECTURE,
    "edsr": edsr.ARCHITECTURE,
    "msrresnet": msrresnet.ARCHITECTURE,
    "rcan": rcan.ARCHITECTURE,
    "nafnet": nafnet.ARCHITECTURE,
    "span": span.ARCHITECTURE,
    "realplksr": realplksr.ARCHITECTURE,
    "mosr": mosr.ARCHITECTURE,
    "unet": unet.ARCHITECTURE,
}


def architecture(name: str) -> Architecture:
    """Looks up an architecture by its key in MODELS, BasicSR's class name ("RRDBNet"), or "module:Class".

    Raises:
      ValueError: the name is unknown (the message lists the valid ones), or the class cannot be imported.
    """
    if custom.is_custom(name):
        return custom.architecture(name)
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    raise ValueError(f"unknown architecture {name!r}{nearest(name.lower(), MODELS)} (known: {', '.join(MODELS)})")


def network(arch: str, hparams: Mapping[str, Any] | None = None) -> Network:
    """Returns the network with these hyper-parameters; missing ones take their defaults.

    Raises:
      ValueError: an unknown architecture or hyper-parameter, or an invalid value.

    Examples:
      >>> student = network("srvggnetcompact", {"num_feat": 16, "num_conv": 4, "upscale": 1})
      >>> student.scale, student.channels, count_params(student.abstract_params)
      (1, 3, 10243)
    """
    found = architecture(arch)
    return _network(found, tuple(found.complete(hparams or {}).items()))


@functools.lru_cache(maxsize=32)
def _network(architecture: Architecture, hparams: tuple[tuple[str, Any], ...]) -> Network:
    return Network(architecture, dict(hparams))
