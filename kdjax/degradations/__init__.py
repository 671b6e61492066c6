"""Degradations on the device: pure functions of a random key and one clean image, vmapped over the batch.

Images are float32 HWC in [0, 1]; results are not clipped or quantised, as the denoising benchmarks have it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import jax

Degrade = Callable[[jax.Array, jax.Array], jax.Array]


def awgn(key: jax.Array, image: jax.Array, *, sigma: float | tuple[float, float]) -> jax.Array:
    """Adds white Gaussian noise to an (h, w, c) image.

    Args:
      sigma: standard deviation on the 0..255 scale; a pair (low, high) draws one uniformly per image.
    """
    key_sigma, key_noise = jax.random.split(key)
    if isinstance(sigma, tuple):
        sigma = jax.random.uniform(key_sigma, minval=sigma[0], maxval=sigma[1])
    return image + sigma / 255 * jax.random.normal(key_noise, image.shape)


def _check_awgn(sigma: float | tuple[float, float]) -> None:
    low, high = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    if not 0 <= low <= high <= 255:
        raise ValueError(f"sigma={sigma} must be a number or a pair low <= high within 0..255")


DEGRADATIONS: dict[str, tuple[Degrade, Callable[..., None]]] = {"awgn": (awgn, _check_awgn)}


def make_degrade(spec: Mapping[str, Any]) -> Degrade:
    """`degrade(key, image) -> lq` from a dict with a `name` and the degradation's own options.

    Raises:
      ValueError: an unknown name or option, or a value out of range.
    """
    options = dict(spec)
    name = options.pop("name", None)
    if name not in DEGRADATIONS:
        near = get_close_matches(str(name), DEGRADATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown degradation {name!r}{hint} (known: {', '.join(DEGRADATIONS)})")
    degrade, check = DEGRADATIONS[name]
    try:
        check(**options)
    except TypeError as error:  # an option it does not have, or one that is missing
        raise ValueError(f"degradation {dict(spec)}: {error}") from None
    return functools.partial(degrade, **options)
