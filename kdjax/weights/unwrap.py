"""Finds the network among the tensors of a file: the wanted set, without what surrounds it.

Training programs wrap weights in dicts ("params_ema", "state_dict"). They store several networks together, in dicts
("netG", "netD") or in one flat dict ("net_g.body...", "net_d.body..."). They add counters, and put the names of
wrappers before or inside every key ("module."). The generator's moving average is preferred, then the generator, then
anything called a model. A discriminator, optimizer or loss is never taken, and if several candidates remain, the caller
is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from kdjax.models.reading import WeightsError, listed
from kdjax.names import brief
from kdjax.weights.layouts import is_constant
from kdjax.weights.tensors import Tensor

# Names without a meaning of their own, best first.
WRAPPERS = (
    "params", "model_state_dict", "state_dict", "model", "net", "network", "weights", "module",
)  # fmt: skip
EMA, GENERATOR, NEUTRAL, UNKNOWN, OTHER = range(5)  # what a name says about a set of tensors, best first
_EMA_WORDS = {"ema", "average", "averaged", "averaging", "avg", "swa", "shadow"}
_GENERATOR_WORDS = {"g", "gen", "generator"}
_OTHER_WORDS = {
    "d", "dis", "disc", "discriminator", "discriminators", "critic", "optim", "optimizer", "optimizers", "scheduler",
    "schedulers", "loss", "losses", "criterion", "vgg", "lpips", "percep", "perceptual", "metric", "metrics",
    "callbacks", "loops", "scaler", "kdjax",
}  # fmt: skip
# Inserted anywhere in a key by DataParallel, torch.compile, FSDP and gradient checkpointing.
_WRAPPING_MODULES = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = {"num_batches_tracked", "total_ops", "total_params"}  # buffers of BatchNorm and of thop
_MAX_DEPTH = 5  # of nested dicts, and of prefixes before every key
_SMALLEST_NETWORK = 4  # tensors: a DnCNN of two convolutions
_MAX_SETS = 50  # networks side by side in a flat dict


@lru_cache(maxsize=1024)
def kind_of(name: str) -> int:
    """Classifies a name: EMA, GENERATOR, NEUTRAL, OTHER (not a restoration network), or UNKNOWN."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}
    if words & _OTHER_WORDS:
        return OTHER
    if words & _EMA_WORDS or words == {"net", "e"}:  # netE is KAIR's
        return EMA
    if words & _GENERATOR_WORDS:
        return GENERATOR
    return NEUTRAL if name in WRAPPERS else UNKNOWN


# ---- dicts in dicts --------------------------------------------------------------------------------------------


def unwrap(content: Any, key: str) -> tuple[dict[Any, Any], tuple[str, ...], str]:
    """Returns the dict of tensors inside a file's content.

    Args:
      content: the file reader's result.
      key: "auto", "bare" for the top level, an entry to take, a path of entries ("state_dict/net_g"), or a prefix of
        the wanted tensors' names ("net_g").

    Returns:
      The dict; the entries that lead to it; and the part of `key` that is not an entry, for `one_network`, or "".
    """
    if type(content) is not dict:
        raise WeightsError(f"it holds a {type(content).__name__}, wanted a dict of tensors (a state dict)")
    found, path, rest = content, [], [] if key in ("auto", "bare") else key.split("/")
    if type(found.get(key)) is dict:
        found, path, rest = found[key], [key], []
    while rest and type(found.get(rest[0])) is dict:
        found, path, rest = found[rest[0]], [*path, rest[0]], rest[1:]
    while key != "bare" and len(path) < _MAX_DEPTH and (inner := _best_entry(found, path)) is not None:
        if rest and _prefixed(found, ".".join(rest)):
            break
        found, path = found[inner], [*path, inner]
    if rest and not _prefixed(found, ".".join(rest)):
        raise _no_such_set(content, found, path, key)
    if not _has_tensors(found):
        raise WeightsError(f"it has no tensors at {'/'.join(path) or 'the top level'} (found: {listed(found)})")
    return found, tuple(path), ".".join(rest)


def _best_entry(found: dict[Any, Any], path: list[str]) -> str | None:
    """Returns the entry to descend into; None to stay.

    Raises:
      WeightsError: several are equally good, or none is a restoration network.
    """
    known: dict[int, int] = {}
    entries: dict[int, list[str]] = {kind: [] for kind in range(5)}
    for name, value in found.items():
        if type(name) is str and type(value) is dict:
            depth = _depth_of_tensors(value, known)
            if depth == 1 or (depth > 1 and kind_of(name) < UNKNOWN):
                entries[kind_of(name)].append(name)
    if entries[NEUTRAL]:
        entries[NEUTRAL] = [min(entries[NEUTRAL], key=WRAPPERS.index)]
    if _has_tensors(found):
        entries[UNKNOWN] = entries[OTHER] = []
    for kind in (EMA, GENERATOR, NEUTRAL, UNKNOWN):
        if len(entries[kind]) == 1:
            return entries[kind][0]
        if entries[kind]:
            raise _several(["/".join((*path, name)) for name in entries[kind]])
    if entries[OTHER]:
        raise _only_others(["/".join((*path, name)) for name in entries[OTHER]])
    if len(found) == 1 and type(next(iter(found.values()))) is dict and not _has_tensors(found):
        return next(iter(found))
    return None


def _has_tensors(value: Any) -> bool:
    return type(value) is dict and any(isinstance(entry, Tensor) for entry in value.values())


def _depth_of_tensors(value: Any, known: dict[int, int], left: int = _MAX_DEPTH) -> int:
    """Returns the nesting depth of the nearest tensor; 0 if there is none. Each dict is visited once."""
    if type(value) is not dict or not left:
        return 0
    if id(value) not in known:
        known[id(value)] = 0  # it may contain itself
        depths = (_depth_of_tensors(entry, known, left - 1) for entry in value.values())
        known[id(value)] = 1 if _has_tensors(value) else 1 + min(filter(None, depths), default=-1)
    return known[id(value)]


# ---- several networks in one flat dict -------------------------------------------------------------------------

Fits = Callable[[Mapping[str, Tensor]], float]


def one_network(
    tensors: Mapping[Any, Any], path: tuple[str, ...], rest: str, fits: Fits
) -> tuple[dict[str, Tensor], str]:
    """Returns one network's tensors by their names in that network, and their location: "state_dict/net_g", "bare".

    Args:
      tensors: a dict of tensors and whatever else is stored beside them, already checked by `check_cost`.
      path: where the dict is in the file.
      rest: the prefix of the wanted tensors' names; "" to choose automatically.
      fits: returns the fraction, from 0 to 1, of a state dict's keys that the best supported layout knows.

    Raises:
      WeightsError: it is ambiguous which network is wanted.
    """
    # Numbers, strings and schedules beside the tensors are not part of a network.
    state = {key: value for key, value in tensors.items() if type(key) is str and isinstance(value, Tensor)}
    if rest:
        state, path = _prefixed(state, rest), (*path, rest)
    state = _without_wrapping_modules(_without_counters(state))
    before: tuple[str, ...] = ()  # the prefixes removed from every key
    for _ in range(_MAX_DEPTH):
        state, is_one_of_several = _without_others(state, path)
        heads = _groups(state)
        names, inner = _without_prefixes(state, fits)
        if names:
            before, state = (*before, *names), inner
        elif (name := _network_among(heads, state, path, fits)) is not None:
            before, is_one_of_several = (*before, name), True
            state = heads[name]
        else:
            break
        if is_one_of_several:
            path, before = (*path, ".".join(before)), ()
    return state, "/".join(path) or "bare"


def _network_among(
    heads: Mapping[str, dict[str, Tensor]], state: Mapping[str, Tensor], path: tuple[str, ...], fits: Fits
) -> str | None:
    """Returns the key prefix of the wanted network; None if the prefixes are parts of one network."""
    if not 1 < len(heads) <= _MAX_SETS:
        return None

    def fitting(names: Iterable[str], least: float) -> list[str]:
        large = [name for name in names if name and len(heads[name]) >= _SMALLEST_NETWORK]
        return [name for name in large if fits(_without_prefixes(heads[name], fits)[1]) > least]

    def only(names: list[str]) -> str:
        if len(names) > 1:
            raise _several(["/".join((*path, name)) for name in names])
        return names[0]

    for kind in (EMA, GENERATOR):
        if found := fitting((name for name in heads if kind_of(name) == kind), 0.5):
            return only(found)
    if fits(state) < 0.5 and (found := fitting(heads, 0.9)):
        return only(found)
    named = [name for name in heads if kind_of(name) in (EMA, GENERATOR)]
    return named[0] if len(named) == 1 else None  # not a supported network, but the message can name it


def _without_others(state: dict[str, Tensor], path: tuple[str, ...]) -> tuple[dict[str, Tensor], bool]:
    """Returns the tensors without losses and discriminators, and whether there were any."""
    heads = _groups(state)
    others = [name for name in heads if kind_of(name) == OTHER]
    if others and len(others) == len(heads):
        raise _only_others(["/".join((*path, name)) for name in others])
    dropped = tuple(f"{name}." for name in others)
    return {key: value for key, value in state.items() if not key.startswith(dropped)}, bool(others)


def _without_prefixes(state: dict[str, Tensor], fits: Fits) -> tuple[list[str], dict[str, Tensor]]:
    """Returns the wrapper names that precede every key, and the tensors without them."""
    names: list[str] = []
    inner = [state]
    heads = _groups(state)
    while len(heads) == 1 and "" not in heads and len(names) < _MAX_DEPTH:
        names += heads
        inner += heads.values()
        heads = _groups(inner[-1])
    depth = next((depth for depth, candidate in enumerate(inner) if fits(candidate) >= 0.5), None)
    if depth is None and any(kind_of(head) in (EMA, GENERATOR, OTHER) for head in heads):
        depth = len(names)  # several networks inside
    if depth is None:  # not a supported network, but without prefixes the message can name it
        is_part = [
            kind_of(name) == UNKNOWN or any(key[:1].isdigit() for key in keys)
            for name, keys in zip(names, inner[1:], strict=True)
        ]
        depth = [*is_part, True].index(True)
    return names[:depth], inner[depth]


def _groups(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups the entries by the text before the first dot of their keys; "" if there is no dot."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        head, dot, tail = key.partition(".")
        groups.setdefault(head if dot else "", {})[tail if dot else head] = value
    return groups


def _prefixed(state: Mapping[Any, Any], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose keys start with `prefix`, with or without wrapping modules, keyed by the rest."""
    prefix = prefix.removesuffix(".") + "."
    tensors = {key: value for key, value in state.items() if type(key) is str and isinstance(value, Tensor)}
    for rename in (str, _unwrapped):
        names = {key: rename(key) for key in tensors}
        if chosen := {name.removeprefix(prefix): key for key, name in names.items() if name.startswith(prefix)}:
            return {name: tensors[key] for name, key in chosen.items()}
    return {}


def _unwrapped(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPING_MODULES)


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops counters of steps and operations: no parameter of a supported network is a single number."""

    def is_counter(key: str, value: Tensor) -> bool:
        is_number = not value.ndim or (value.numel == 1 and "." not in key)
        return key.rsplit(".", 1)[-1] in _COUNTERS or (is_number and not is_constant(_unwrapped(key)))

    return {key: value for key, value in state.items() if not is_counter(key, value)}


def _without_wrapping_modules(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _unwrapped(key)
        if name in result:
            raise WeightsError(f"it has the tensor {brief(name, 120)} twice, with and without 'module.' before it")
        result[name] = value
    return result


# ---- messages --------------------------------------------------------------------------------------------------


def _several(names: list[str]) -> WeightsError:
    return WeightsError(
        f"it holds several sets of tensors: {listed(names)}; choose one with key=... (--key on the command line)"
    )


def _only_others(names: list[str]) -> WeightsError:
    return WeightsError(
        f"judging by the names, it has no image restoration network, only: {listed(names)}; if one of them is"
        " what you want, choose it with key=... (--key on the command line)"
    )


def _no_such_set(content: Mapping[Any, Any], found: Mapping[Any, Any], path: list[str], key: str) -> WeightsError:
    available = [name for name, value in content.items() if type(value) is dict and name != "kdjax"]
    heads = _groups({name: None for name in found if type(name) is str})
    available += ["/".join((*path, head)) for head in heads if kind_of(head) != UNKNOWN]
    what = listed(available) if available else "bare (the file is one state dict, not wrapped)"
    return WeightsError(f"it has no weights under key={brief(key)}; available: {what}; or use key='auto'")
