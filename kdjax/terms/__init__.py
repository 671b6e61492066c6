"""The terms of the loss, under the names that a config uses.

    terms = dict(
        task=dict(criterion="charbonnier", weight=1.0),
        output=dict(criterion="l1", weight=dict(name="linear", value=1.0, steps=100_000)),
        hint=dict(pairs=(("body.3", "body.2", 1.0),), weight=dict(share=0.2)),
        deep=dict(kind="attention", pairs=(("body.5", "body.4", 1.0),), weight=1.0),
    )

A term is a key of TERMS, or any other name with a `kind` that is one. Its `weight` is a number, a schedule
(`kdjax.schedules`), or `dict(share=r)`, which keeps the norm of the term's update at the fraction r of the sum over all
terms. The formulas are in `kdjax.losses` and `kdjax.losses.perceptual`; this package connects them to networks and
configs.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kdjax.names import brief, nearest, pick
from kdjax.schedules import constant, is_zero, make_schedule, reaches_zero
from kdjax.terms import features, images
from kdjax.terms.term import Context, Forward, Loss, Setting, Term

__all__ = ["TERMS", "Context", "Forward", "Loss", "Setting", "Term", "make_terms", "needs_teacher"]

# name -> (builds the loss from the setting and the term's options, whether it needs the teacher)
TERMS: dict[str, tuple[Callable[..., Loss], bool]] = {
    "task": (images.task, False),
    "recorrupted": (images.recorrupted, False),
    "output": (images.output, True),
    "feature": (features.feature, True),
    "hint": (functools.partial(features.feature, adapter="always"), True),
    "attention": (features.attention, True),
    "affinity": (features.affinity, True),
    "laplace": (features.laplace, True),
    "soft_target": (images.soft_target, True),
    "wavelet": (images.wavelet, True),
    "fft": (images.fft, True),
    "label_consistency": (images.label_consistency, True),
    "contrastive": (images.contrastive, True),
    "perceptual": (images.perceptual_term, False),
    "style": (images.style, False),
}


def needs_teacher(specs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether any term of a config uses the teacher and has a weight above 0 at some step.

    Raises:
      ValueError: if a term is unknown or a weight is invalid.
    """
    return any(_is_on(name, spec) and _needs_teacher(name, spec) for name, spec in specs.items())


def make_terms(specs: Mapping[str, Mapping[str, Any]], setting: Setting) -> tuple[Term, ...]:
    """Builds the terms of a config, in its order; terms whose weight is always zero are left out.

    Raises:
      ValueError: if a term, option, criterion or feature is unknown, if no term is left to train on, or if the shares
        leave nothing for the terms with weights.
      OSError: if a weight file named by a term cannot be read.

    Examples:
      >>> image = Forward(jax.ShapeDtypeStruct((4, 32, 32, 3), "float32"), {})
      >>> setting = Setting(student=image, teacher=image, lq=(4, 32, 32, 3), key=jax.random.key(0))
      >>> specs = {"task": {"criterion": "l1", "weight": 1.0}, "output": {"criterion": "mse", "weight": 0.0}}
      >>> [term.name for term in make_terms(specs, setting)]
      ['task']
    """
    terms = []
    for name, spec in specs.items():
        if not _is_on(name, spec):
            continue
        options = {key: value for key, value in spec.items() if key not in ("kind", "weight")}
        key = jax.random.fold_in(setting.key, zlib.crc32(name.encode()) % 2**31)  # independent of the other terms
        try:
            loss = _entry(name, spec)[0](setting._replace(key=key), **options)
        except TypeError as error:  # an unknown or missing option, or text for a number
            raise ValueError(f"loss term {name!r}: {error}; its options are {brief(options)}") from None
        except ValueError as error:
            raise ValueError(f"loss term {name!r}: {error}") from None
        weight = spec["weight"]
        share = _share(weight)
        terms.append(
            Term(
                name,
                loss,
                weight=constant(0.0) if share else make_schedule(weight),
                share=share,
                sometimes_off=not share and reaches_zero(weight),
                needs_teacher=_needs_teacher(name, spec),
            )
        )
    if not terms:
        raise ValueError(f"no loss term has a weight above 0 (given: {', '.join(specs) or 'none'})")
    shares = {term.name: term.share for term in terms if term.share}
    if shares and (len(shares) == len(terms) or sum(shares.values()) >= 1):
        raise ValueError(
            f"the shares {shares} must sum to less than 1, and at least one term needs a number or a schedule, which"
            " they"
            " are relative to"
        )
    return tuple(terms)


def _entry(name: str, spec: Mapping[str, Any]) -> tuple[Callable[..., Loss], bool]:
    if "kind" in spec:
        return pick(TERMS, spec["kind"], f"kind of the loss term {name!r}")
    return pick(TERMS, name, "loss term")


def _needs_teacher(name: str, spec: Mapping[str, Any]) -> bool:
    return _entry(name, spec)[1] or spec.get("target") == "teacher"


def _is_on(name: str, spec: Mapping[str, Any]) -> bool:
    """Checks the weight and returns whether it is above 0 at some step."""
    _entry(name, spec)
    if "weight" not in spec:
        raise ValueError(f"loss term {name!r} has no weight; give a number or a schedule")
    try:
        if _share(spec["weight"]):
            return True
        make_schedule(spec["weight"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss term {name!r}: {error}") from None
    return not is_zero(spec["weight"])


def _share(weight: float | Mapping[str, Any]) -> float:
    """Returns r for a weight `dict(share=r)`, 0 for any other weight."""
    if not isinstance(weight, Mapping) or "share" not in weight:
        return 0.0
    for key in weight:
        if key != "share":
            raise ValueError(
                f"weight {dict(weight)} has share and {key!r}{nearest(key, ['share'])}; use one or the other"
            )
    share = weight["share"]
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError(f"share={share!r} must lie between 0 and 1")
    return float(share)
