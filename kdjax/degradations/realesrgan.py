"""Real-ESRGAN's second-order degradation (arXiv:2107.10833): blur, resize, noise, JPEG, all twice; a sinc filter.

`draw` makes all random choices for one sample except its noise fields, and `apply` applies them. In BasicSR, a whole
batch shares one resize factor, mode and kind of noise, because its tensors must have one size. Here, every sample has
its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kdjax.degradations import kernels
from kdjax.degradations.canvas import Shape, Size, Window, resized_to, whole
from kdjax.degradations.jpeg import jpeg
from kdjax.degradations.noise import gaussian_noise, poisson_noise
from kdjax.degradations.resize import MODES, Taps, num_taps, resize, resize_taps
from kdjax.names import nearest

Range = tuple[float, float]
Factor = tuple[jax.Array | float, ...]

# Canvas sizes of the two rounds, relative to the largest. More of them compute less but compile longer. With the
# default ranges, 0.67 and 0.84 are the sizes of an image that is not resized.
_FIRST_CANVASES, _SECOND_CANVASES = (0.35, 0.67, 0.84, 1.0), (0.5, 0.84, 1.0)
_LEAST = 64 * 64  # pixels of an image for which several canvases save more time than their compilation takes
_NUMBERS = 48  # at least as many as `draw` consumes


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of a Real-ESRGAN YAML, with its defaults. Ranges are (low, high); probabilities sum to 1.

    Blur sigmas are in pixels, noise sigmas in 0..255. A poisson_scale of 1 is natural strength.
    """

    blur_kernel_size: int = 21  # the largest; kernels have 7, 9, ... pixels
    kernel_list: tuple[str, ...] = tuple(kernels.KINDS)
    kernel_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_prob: float = 0.1
    blur_sigma: Range = (0.2, 3.0)
    betag_range: Range = (0.5, 4.0)
    betap_range: Range = (1.0, 2.0)
    blur_kernel_size2: int = 21
    kernel_list2: tuple[str, ...] = tuple(kernels.KINDS)
    kernel_prob2: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_prob2: float = 0.1
    blur_sigma2: Range = (0.2, 1.5)
    betag_range2: Range = (0.5, 4.0)
    betap_range2: Range = (1.0, 2.0)
    final_sinc_prob: float = 0.8
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: Range = (0.15, 1.5)
    gaussian_noise_prob: float = 0.5
    noise_range: Range = (1.0, 30.0)
    poisson_scale_range: Range = (0.05, 3.0)
    gray_noise_prob: float = 0.4
    jpeg_range: Range = (30.0, 95.0)
    second_blur_prob: float = 0.8
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range2: Range = (0.3, 1.2)
    gaussian_noise_prob2: float = 0.5
    noise_range2: Range = (1.0, 25.0)
    poisson_scale_range2: Range = (0.05, 2.5)
    gray_noise_prob2: float = 0.4
    jpeg_range2: Range = (30.0, 95.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))
        for suffix in ("", "2"):
            names, chances = getattr(self, f"kernel_list{suffix}"), getattr(self, f"kernel_prob{suffix}")
            if len(names) != len(chances):
                raise ValueError(
                    f"kernel_list{suffix} has {len(names)} kernels and kernel_prob{suffix} {len(chances)}"
                    " probabilities; each kernel needs one"
                )


class Stage(NamedTuple):
    """The random choices of one round of blur, resizing, noise and JPEG."""

    kernel: jax.Array  # (side, side)
    blurs: jax.Array  # bool
    mode: jax.Array  # index into MODES
    factor: jax.Array  # in the first round in pixels of its input, in the second in pixels of the result
    is_gaussian: jax.Array  # bool; Poisson noise otherwise
    sigma: jax.Array
    poisson_scale: jax.Array
    gray: jax.Array  # bool
    quality: jax.Array


class Choices(NamedTuple):
    """The random choices for one sample."""

    first: Stage
    second: Stage
    mode: jax.Array  # of the resize back
    sinc: jax.Array  # kernel of the final filter
    has_sinc: jax.Array  # bool
    jpeg_first: jax.Array  # bool: compress, then resize and filter; otherwise the reverse


def draw(key: jax.Array, settings: Settings) -> tuple[Choices, jax.Array]:
    """Returns one sample's random choices, except its noise fields, and the key for those."""
    key, noise_key = jax.random.split(key)
    s, side = settings, max(settings.blur_kernel_size, settings.blur_kernel_size2)
    # Draws many numbers at once and derives one choice from each, which compiles much faster than a draw per choice.
    numbers = iter(jax.random.uniform(key, (_NUMBERS,)))
    first_kernel = _draw_kernel(
        numbers, side, s.blur_kernel_size, s.kernel_list, s.kernel_prob, s.sinc_prob, s.blur_sigma, s.betag_range,
        s.betap_range,
    )  # fmt: skip
    second_kernel = _draw_kernel(
        numbers, side, s.blur_kernel_size2, s.kernel_list2, s.kernel_prob2, s.sinc_prob2, s.blur_sigma2,
        s.betag_range2, s.betap_range2,
    )  # fmt: skip
    first = _draw_stage(
        numbers, first_kernel, 1.0, s.resize_prob, s.resize_range, s.gaussian_noise_prob, s.noise_range,
        s.poisson_scale_range, s.gray_noise_prob, s.jpeg_range,
    )  # fmt: skip
    second = _draw_stage(
        numbers, second_kernel, s.second_blur_prob, s.resize_prob2, s.resize_range2, s.gaussian_noise_prob2,
        s.noise_range2, s.poisson_scale_range2, s.gray_noise_prob2, s.jpeg_range2,
    )  # fmt: skip
    size, cutoff = _kernel_size(next(numbers), s.blur_kernel_size), _between(next(numbers), (math.pi / 3, math.pi))
    choices = Choices(
        first,
        second,
        mode=_one_of(next(numbers), len(MODES)),
        sinc=kernels.sinc_kernel(side, size, cutoff),
        has_sinc=next(numbers) < s.final_sinc_prob,
        jpeg_first=next(numbers) < 0.5,
    )
    return choices, noise_key


def apply(
    choices: Choices, key: jax.Array, image: jax.Array, settings: Settings, scale: int = 1, window: Window | None = None
) -> jax.Array:
    """Degrades a clean (h, w, c) image in [0, 1]; returns (h/scale, w/scale, c) in steps of 1/255, or its window.

    `key` is for the noise fields. No gradient flows to the image.
    """
    image = jax.lax.stop_gradient(image)
    window = window or whole(tuple(extent // scale for extent in image.shape[:2]))
    if jax.default_backend() != "cpu":
        return apply_on(choices, key, image, settings, scale, window, small_canvases=False)
    # Side by side every sample costs as much as the largest one; a CPU does better one after another.
    one = lambda choices, key_data, image, start: apply_on(  # noqa: E731
        choices,
        jax.random.wrap_key_data(key_data),
        image,
        settings,
        scale,
        window._replace(start=start),
        small_canvases=image.shape[0] * image.shape[1] >= _LEAST,
    )
    return jax.custom_batching.sequential_vmap(one)(choices, jax.random.key_data(key), image, window.start)


def apply_on(
    choices: Choices,
    key: jax.Array,
    image: jax.Array,
    settings: Settings,
    scale: int,
    window: Window,
    *,
    small_canvases: bool,
) -> jax.Array:
    """Runs `apply` on the smallest canvases the sample fits into, or on the largest.

    The smallest pay off only if samples run one after another: under vmap, every branch of a condition is computed.
    """
    image = image.transpose(2, 0, 1)
    shape = image.shape[1:]
    out = tuple(extent // scale for extent in shape)
    first, second = choices.first, choices.second
    first_key, second_key = jax.random.split(key)
    canvases = _canvases(shape, settings.resize_range, _FIRST_CANVASES if small_canvases else (1.0,))
    second_canvases = _canvases(out, settings.resize_range2, _SECOND_CANVASES if small_canvases else (1.0,))
    largest, second_largest = canvases[-1], second_canvases[-1]
    valid, second_valid = _scaled(shape, first.factor, largest), _scaled(out, second.factor, second_largest)
    least, second_least = _smallest(shape, settings.resize_range), _smallest(out, settings.resize_range2)
    # The first resize uses the drawn factor, the others the ratios of their sizes.
    counts = map(num_taps, shape, least)
    to_first = _taps(first.mode, shape, largest, valid, counts, (first.factor, first.factor))
    counts = map(num_taps, largest, second_least)
    to_second = _taps(second.mode, valid, second_largest, second_valid, counts)
    back = _taps(choices.mode, second_valid, out, out, map(num_taps, second_largest, out))
    # After the resize back, only the window is computed: the JPEG blocks it touches, and what the filter reads of them.
    spans = [_blocks(*axis) for axis in zip(window.start, window.shape, out, strict=True)]
    starts, extents = tuple(start for start, _ in spans), tuple(extent for _, extent in spans)
    places = [kernels.places_to_filter(*span, len(choices.sinc), size) for span, size in zip(spans, out, strict=True)]
    back = tuple(taps.at(place) for taps, place in zip(back, places, strict=True))

    def compress(x: jax.Array, valid: Size) -> jax.Array:
        return jpeg(jnp.clip(x, 0, 1), second.quality, valid)

    def first_round(canvas: Shape) -> jax.Array:
        x = _resize(image, to_first, canvas)
        x = jpeg(_noisy(first, first_key, x, valid), first.quality, valid)
        x = _if(second.blurs, lambda x: kernels.filter2d(x, second.kernel, valid), x)
        return resize(x, *to_second)

    def second_round(canvas: Shape) -> jax.Array:
        x = _noisy(second, second_key, resized_to(image, canvas), second_valid)
        x = _if(choices.jpeg_first, lambda x: compress(x, second_valid), x)
        return _resize(x, back, tuple(map(len, places)))

    def without_margin(x: jax.Array) -> jax.Array:
        return resized_to(x[:, len(choices.sinc) // 2 :, len(choices.sinc) // 2 :], extents)

    image = _if(first.blurs, lambda x: kernels.filter2d(x, first.kernel, shape), image)
    image = _on_canvas(first_round, valid, canvases)
    image = _on_canvas(second_round, second_valid, second_canvases)
    image = jax.lax.cond(
        choices.has_sinc,
        lambda x: resized_to(kernels.filter_inside(x, choices.sinc), extents),
        without_margin,
        image,
    )
    beyond = tuple(size - start for size, start in zip(out, starts, strict=True))
    image = _if(~choices.jpeg_first, lambda x: compress(x, beyond), image)
    offset = tuple(place - start for place, start in zip(window.start, starts, strict=True))
    image = jax.lax.dynamic_slice(image, (0, *offset), (image.shape[0], *window.shape))
    return (jnp.clip(jnp.round(image * 255), 0, 255) / 255).transpose(1, 2, 0)


def _blocks(start: jax.Array | int, extent: int, size: int) -> tuple[jax.Array | int, int]:
    """Returns start and extent of the 16-pixel blocks that `extent` pixels from `start` touch, within `size`."""
    blocks = 16 * math.ceil((extent + 15) / 16)
    return (0, size) if blocks >= size else (start // 16 * 16, blocks)


def _if(chosen: jax.Array, change: Callable[[jax.Array], jax.Array], image: jax.Array) -> jax.Array:
    return jax.lax.cond(chosen, change, lambda x: x, image)


def _noisy(stage: Stage, key: jax.Array, image: jax.Array, valid: Size) -> jax.Array:
    noise = jax.lax.cond(
        stage.is_gaussian,
        lambda x: gaussian_noise(key, x, stage.sigma, stage.gray),
        lambda x: poisson_noise(key, x, stage.poisson_scale, stage.gray, valid),
        image,
    )
    return jnp.clip(image + noise, 0, 1)


def _taps(
    mode: jax.Array,
    valid: Size,
    new_canvas: Shape,
    new_valid: Size,
    counts: Iterable[int],
    factor: Factor | None = None,
) -> tuple[Taps, ...]:
    """Returns the taps for rows and columns."""
    factor = factor or tuple(new / old for new, old in zip(new_valid, valid, strict=True))
    axes = zip(valid, new_canvas, new_valid, factor, counts, strict=True)
    return tuple(resize_taps(mode, *axis) for axis in axes)


def _resize(image: jax.Array, taps: tuple[Taps, ...], canvas: Shape) -> jax.Array:
    return resize(image, *(axis.at(slice(extent)) for axis, extent in zip(taps, canvas, strict=True)))


def _canvases(shape: Shape, resize_range: Range, parts: tuple[float, ...]) -> list[Shape]:
    """Returns the canvases for images of `shape` resized by factors in this range, the largest last."""
    largest = tuple(max(extent, math.floor(extent * resize_range[1])) for extent in shape)
    return [tuple(math.ceil(extent * part) for extent in largest) for part in parts]


def _smallest(shape: Shape, resize_range: Range) -> Shape:
    """Returns the smallest size that `shape` can shrink to; sizes are rounded down in float32."""
    return tuple(max(1, math.floor(extent * min(resize_range[0], 1) - 1e-3)) for extent in shape)


def _on_canvas(function: Callable[[Shape], jax.Array], valid: Size, canvases: list[Shape]) -> jax.Array:
    """Returns `function(canvas)` on the smallest canvas that fits `valid`, padded to the largest result's shape.

    A pixel's value does not depend on the canvas.
    """
    if len(canvases) == 1:
        return function(canvases[0])
    shape = jax.eval_shape(lambda: function(canvases[-1])).shape[1:]
    fits = jnp.stack([(valid[0] <= height) & (valid[1] <= width) for height, width in canvases])
    return jax.lax.switch(
        jnp.argmax(fits), [lambda canvas=canvas: resized_to(function(canvas), shape) for canvas in canvases]
    )


def _scaled(shape: Shape, factor: jax.Array, largest: Shape) -> Size:
    """Returns the size after resizing, clipped to the canvas: float32 rounding could exceed it by one."""
    return tuple(
        jnp.clip(jnp.floor(extent * factor), 1, most).astype(jnp.int32)
        for extent, most in zip(shape, largest, strict=True)
    )


def _draw_stage(
    numbers: Iterator[jax.Array],
    kernel: jax.Array,
    blur_prob: float,
    resize_prob: tuple[float, ...],
    resize_range: Range,
    gaussian_prob: float,
    noise_range: Range,
    poisson_scale_range: Range,
    gray_prob: float,
    jpeg_range: Range,
) -> Stage:
    direction, change = _choice(next(numbers), resize_prob), next(numbers)
    low, high = resize_range
    factors = jnp.stack([_between(change, (1.0, high)), _between(change, (low, 1.0)), jnp.float32(1)])
    return Stage(
        kernel,
        blurs=next(numbers) < blur_prob,
        mode=_one_of(next(numbers), len(MODES)),
        factor=factors[direction],
        is_gaussian=next(numbers) < gaussian_prob,
        sigma=_between(next(numbers), noise_range),
        poisson_scale=_between(next(numbers), poisson_scale_range),
        gray=next(numbers) < gray_prob,
        quality=_between(next(numbers), jpeg_range),
    )


def _draw_kernel(
    numbers: Iterator[jax.Array],
    side: int,
    largest: int,
    names: tuple[str, ...],
    probabilities: tuple[float, ...],
    sinc_prob: float,
    sigma: Range,
    betag_range: Range,
    betap_range: Range,
) -> jax.Array:
    """Returns (side, side): one of the six kinds, or a sinc filter."""
    size, kind = _kernel_size(next(numbers), largest), _choice(next(numbers), probabilities)
    shape = jnp.array([kernels.SHAPES.index(kernels.KINDS[name][0]) for name in names])[kind]
    is_round = jnp.array([kernels.KINDS[name][1] for name in names])[kind]
    sigmas = _between(next(numbers), sigma), _between(next(numbers), sigma)
    theta = _between(next(numbers), (-math.pi, math.pi))
    above, place = next(numbers) < 0.5, next(numbers)
    beta = jnp.where(shape == 1, _beta(above, place, betag_range), _beta(above, place, betap_range))
    blur = kernels.bivariate_kernel(
        side,
        size,
        (sigmas[0], jnp.where(is_round, sigmas[0], sigmas[1])),
        jnp.where(is_round, 0.0, theta),
        shape,
        beta,
    )
    cutoff = _between(next(numbers), (jnp.where(size < 13, math.pi / 3, math.pi / 5), math.pi))
    return jnp.where(next(numbers) < sinc_prob, kernels.sinc_kernel(side, size, cutoff), blur)


def _beta(above: jax.Array, place: jax.Array, limits: Range) -> jax.Array:
    """Returns a beta above or below 1. As in BasicSR, betap, whose range starts at 1, is exactly 1 half of the time."""
    return jnp.where(above, _between(place, (1.0, limits[1])), _between(place, (limits[0], 1.0)))


def _kernel_size(number: jax.Array, largest: int) -> jax.Array:
    return kernels.SMALLEST + 2 * _one_of(number, (largest - kernels.SMALLEST) // 2 + 1)


# Conversions from a number between 0 and 1.


def _between(number: jax.Array, limits: tuple[jax.Array | float, jax.Array | float]) -> jax.Array:
    return limits[0] + (limits[1] - limits[0]) * number


def _one_of(number: jax.Array, count: int) -> jax.Array:
    return jnp.minimum((number * count).astype(jnp.int32), count - 1)


def _choice(number: jax.Array, probabilities: tuple[float, ...]) -> jax.Array:
    """Returns the index drawn with these probabilities."""
    return jnp.asarray(sum((number >= limit).astype(jnp.int32) for limit in itertools.accumulate(probabilities[:-1])))


# The limits of the ranges; JPEG quality 0 has no table.
_LIMITS: dict[str, Range] = {
    "blur_sigma": (0.01, 100.0),
    "betag_range": (0.01, 100.0),
    "betap_range": (0.01, 100.0),
    "resize_range": (0.01, 8.0),
    "noise_range": (0.0, 255.0),
    "poisson_scale_range": (0.0, 100.0),
    "jpeg_range": (1.0, 100.0),
}


def _check(name: str, value: object) -> None:
    """Raises an error for a value that its key cannot have."""
    kind = name.removesuffix("2")
    numbers = isinstance(value, tuple) and all(isinstance(x, int | float) for x in value)
    if kind in _LIMITS:
        low, high = _LIMITS[kind]
        if not numbers or len(value) != 2 or not low <= value[0] <= value[1] <= high:
            raise ValueError(f"{name}={value!r} must be two numbers, low <= high, from {low:g} to {high:g}")
        if kind == "resize_range" and not value[0] <= 1 <= value[1]:
            raise ValueError(f"{name}={value!r} must include 1: images are scaled down and up from there")
    elif kind == "kernel_list":
        if not isinstance(value, tuple):
            raise ValueError(f"{name}={value!r} must be a tuple of kernels ({', '.join(kernels.KINDS)})")
        for kernel in value:
            if kernel not in kernels.KINDS:
                raise ValueError(
                    f"{name}: unknown kernel {kernel!r}{nearest(kernel, kernels.KINDS)}"
                    f" (known: {', '.join(kernels.KINDS)})"
                )
    elif kind in ("kernel_prob", "resize_prob"):
        wanted = 3 if kind == "resize_prob" else len(value) if numbers else 0
        if not numbers or len(value) != wanted or min(value, default=-1) < 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError(
                f"{name}={value!r} must be probabilities that sum to 1"
                + (", of scaling up, scaling down and keeping the size" if kind == "resize_prob" else "")
            )
    elif kind == "blur_kernel_size":
        if not isinstance(value, int) or value < kernels.SMALLEST or value % 2 == 0 or value > 51:
            raise ValueError(f"{name}={value!r} must be an odd number from {kernels.SMALLEST} to 51")
    elif not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be a probability from 0 to 1")
