"""Degradations on the device: pure functions of a random key and one clean image, vmapped over the batch.

Images are float32 HWC in [0, 1]. A config selects a degradation by name, with its own settings:

    degrade=dict(name="awgn", sigma=25.0)
    degrade=preset("realesrgan", noise_range=(1, 15))

    awgn, awgn_blind   white Gaussian noise, with a fixed sigma or one drawn per sample
    poisson_gauss      sensor noise: photon shot noise and read noise
    jpeg               JPEG compression
    realesrgan         blur, resizing, noise and JPEG, twice (`kdjax.degradations.realesrgan`)

Pure noise is neither clipped nor quantised, as in the denoising benchmarks. Degradations that include JPEG produce
8-bit data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kdjax.degradations import jpeg, noise, realesrgan
from kdjax.degradations.canvas import Window, cut
from kdjax.degradations.sharpen import usm_sharpen
from kdjax.names import nearest, pick

__all__ = [
    "DEGRADATIONS",
    "Degrade",
    "Window",
    "cut",
    "draw_choices",
    "is_8_bit",
    "make_degrade",
    "make_sigma",
    "preset",
    "usm_sharpen",
]

Degrade = Callable[..., jax.Array]
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Awgn:
    """`sigma`: standard deviation of the noise, in 0..255."""

    sigma: float

    def __post_init__(self) -> None:
        if not isinstance(self.sigma, int | float) or not 0 <= self.sigma <= 255:
            raise ValueError(f"awgn: sigma={self.sigma!r} must be a number from 0 to 255")


@dataclasses.dataclass(frozen=True)
class AwgnBlind:
    """`sigma`: the range from which each sample's sigma is drawn uniformly, in 0..255."""

    sigma: Range

    def __post_init__(self) -> None:
        _check_range("awgn_blind: sigma", self.sigma, 0, 255)


@dataclasses.dataclass(frozen=True)
class PoissonGauss:
    """Sensor noise (Foi et al., 2008): variance `gain` x image + read_sigma^2.

    `gain` is the brightness one photon adds, drawn log-uniformly; `read_sigma` is in 0..255, drawn uniformly.
    """

    gain: Range = (1e-4, 1e-2)
    read_sigma: Range = (0.0, 10.0)

    def __post_init__(self) -> None:
        _check_range("poisson_gauss: gain", self.gain, 1e-6, 1)
        _check_range("poisson_gauss: read_sigma", self.read_sigma, 0, 255)


@dataclasses.dataclass(frozen=True)
class Jpeg:
    """`quality`: the range from which each sample's quality is drawn uniformly."""

    quality: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        _check_range("jpeg: quality", self.quality, 1, 100)


class Degradation(NamedTuple):
    """The implementation of a degradation.

    Attributes:
      settings: the dataclass that checks its settings.
      draw: (key, settings) -> (one sample's random choices, as a mapping or a NamedTuple; the key of its noise).
      apply: (choices, key, image, settings) -> lq; if it resizes, (..., scale, window) -> that window of lq.
      resizes: whether lq can be smaller than the image.
      is_8_bit: whether lq is 8-bit data, multiples of 1/255 from 0 to 1.
      is_white: whether it adds white Gaussian noise of standard deviation choices["sigma"], and nothing else.
    """

    settings: type
    draw: Callable[[jax.Array, Any], tuple[Any, jax.Array]]
    apply: Callable[..., jax.Array]
    resizes: bool = False
    is_8_bit: bool = False
    is_white: bool = False


def add_gaussian_noise(choices: Mapping, key: jax.Array, image: jax.Array, *_: Any) -> jax.Array:
    """Adds white noise of standard deviation `sigma` (0..255 scale) to an (h, w, c) image."""
    return image + choices["sigma"] / 255 * jax.random.normal(key, image.shape)


def _draw_blind_sigma(key: jax.Array, settings: AwgnBlind) -> tuple[dict[str, jax.Array], jax.Array]:
    key_sigma, key_noise = jax.random.split(key)
    return {"sigma": jax.random.uniform(key_sigma, minval=settings.sigma[0], maxval=settings.sigma[1])}, key_noise


def _draw_sensor(key: jax.Array, settings: PoissonGauss) -> tuple[dict[str, jax.Array], jax.Array]:
    key_gain, key_sigma, key_noise = jax.random.split(key, 3)
    low, high = map(math.log, settings.gain)
    sigma = jax.random.uniform(key_sigma, minval=settings.read_sigma[0], maxval=settings.read_sigma[1])
    return {"gain": jnp.exp(jax.random.uniform(key_gain, minval=low, maxval=high)), "sigma": sigma}, key_noise


def _add_sensor_noise(choices: Mapping, key: jax.Array, image: jax.Array, *_: Any) -> jax.Array:
    key_photons, key_read = jax.random.split(key)
    u = noise.uniform(key_photons, (image.shape[2], *image.shape[:2])).transpose(1, 2, 0)
    photons = noise.poisson_quantile(u, jnp.maximum(image, 0) / choices["gain"])
    return add_gaussian_noise(choices, key_read, photons * choices["gain"])


def _draw_quality(key: jax.Array, settings: Jpeg) -> tuple[dict[str, jax.Array], jax.Array]:
    return {"quality": jax.random.uniform(key, minval=settings.quality[0], maxval=settings.quality[1])}, key


def _compress(choices: Mapping, key: jax.Array, image: jax.Array, *_: Any) -> jax.Array:
    compressed = jpeg.jpeg(jnp.clip(image, 0, 1).transpose(2, 0, 1), choices["quality"])
    return jnp.round(compressed.transpose(1, 2, 0) * 255) / 255


DEGRADATIONS: dict[str, Degradation] = {
    "awgn": Degradation(
        Awgn, lambda key, settings: ({"sigma": jnp.float32(settings.sigma)}, key), add_gaussian_noise, is_white=True
    ),
    "awgn_blind": Degradation(AwgnBlind, _draw_blind_sigma, add_gaussian_noise, is_white=True),
    "poisson_gauss": Degradation(PoissonGauss, _draw_sensor, _add_sensor_noise),
    "jpeg": Degradation(Jpeg, _draw_quality, _compress, is_8_bit=True),
    "realesrgan": Degradation(realesrgan.Settings, realesrgan.draw, realesrgan.apply, resizes=True, is_8_bit=True),
}


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Returns the complete dict of a degradation for a config, so that every key can be set on the command line.

    Raises:
      ValueError: an unknown name or key, a missing setting, or a value out of range.
    """
    return {"name": name, **dataclasses.asdict(_settings({"name": name, **overrides}))}


def make_degrade(spec: Mapping[str, Any], *, scale: int = 1) -> Degrade:
    """Returns `degrade(key, image, window=None) -> lq` for a dict with a `name` and the degradation's own settings.

    `image` is (h, w, c). lq is (h/scale, w/scale, c), or only the `window` of it, which may cost less than all of it.

    Raises:
      ValueError: an unknown name or setting, a value out of range, or a degradation that cannot change the size.

    Examples:
      >>> degrade = make_degrade({"name": "awgn", "sigma": 25.0})
      >>> lq = degrade(jax.random.key(0), jnp.full((64, 64, 3), 0.5))
      >>> lq.shape, round(float(lq.std()) * 255)
      ((64, 64, 3), 25)
    """
    settings, chosen = _settings(spec), DEGRADATIONS[spec["name"]]
    if scale != 1 and not chosen.resizes:
        raise ValueError(
            f"degradation {spec['name']!r} keeps the size of images, but the student upscales {scale}x; give the small"
            ' images as lq, or use "realesrgan"'
        )

    def degrade(key: jax.Array, image: jax.Array, window: Window | None = None) -> jax.Array:
        choices, noise_key = chosen.draw(key, settings)
        if chosen.resizes:
            return chosen.apply(choices, noise_key, image, settings, scale, window)
        lq = chosen.apply(choices, noise_key, image, settings)
        return cut(lq, window) if window else lq

    return degrade


def is_8_bit(spec: Mapping[str, Any]) -> bool:
    """Whether `make_degrade(spec)` produces 8-bit data, multiples of 1/255 from 0 to 1."""
    return DEGRADATIONS[spec["name"]].is_8_bit


def make_sigma(spec: Mapping[str, Any]) -> Callable[[jax.Array], jax.Array] | None:
    """Returns `sigma(key)`, the standard deviation (0..255 scale) of the noise of `make_degrade(spec)` for a key.

    None if that is not all it does: then no single number describes what it makes of an image.
    """
    settings, chosen = _settings(spec), DEGRADATIONS[spec["name"]]
    return (lambda key: chosen.draw(key, settings)[0]["sigma"]) if chosen.is_white else None


def draw_choices(spec: Mapping[str, Any], key: jax.Array) -> Any:
    """Returns what `make_degrade(spec)` chooses for a key, except noise: a dict of arrays or `realesrgan.Choices`."""
    settings = _settings(spec)
    return DEGRADATIONS[spec["name"]].draw(key, settings)[0]


def _settings(spec: Mapping[str, Any]) -> Any:
    """Returns a degradation's checked settings."""
    name = spec.get("name")
    cls: Any = pick(DEGRADATIONS, name, "degradation").settings
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, value in spec.items():
        if key == "name":
            continue
        if key not in fields:
            raise ValueError(
                f"degradation {name!r} has no setting {key!r}{nearest(key, fields)} (it has: {', '.join(fields)})"
            )
        values[key] = tuple(value) if isinstance(value, list) else value
    missing = [key for key, f in fields.items() if f.default is dataclasses.MISSING and key not in values]
    if missing:
        raise ValueError(f"degradation {name!r} needs {', '.join(missing)}")
    return cls(**values)


def _check_range(what: str, value: object, low: float, high: float) -> None:
    numbers = isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value)
    if not numbers or not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{what}={value!r} must be two numbers, low <= high, from {low:g} to {high:g}")
