"""Terms that compare intermediate features, and how features of different sizes are aligned.

A pair is (student feature, teacher feature, weight), using the feature names of `apply`. If the resolutions differ, the
larger map is reduced to the smaller one's size, by average pooling or by pixel-unshuffling. If the channel counts
differ, an adapter, a 1x1 convolution, maps the student's channels to the teacher's. It lives in `params["adapters"]`,
is trained with the student and never exported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kdjax import losses, ops
from kdjax.models import Params
from kdjax.names import nearest, pick
from kdjax.terms.term import Context, Forward, Loss, Setting

Pairs = Sequence[tuple[str, str, float]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two features to compare, and the functions that bring each to the common resolution."""

    names: tuple[str, str]
    weight: float
    resize: tuple[Callable[[jax.Array], jax.Array], ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def aligned(self, student: Forward, teacher: Forward) -> tuple[jax.Array, jax.Array]:
        """Returns the two features as float32 (b, h, w, c) with equal h and w."""
        features = student.features[self.names[0]], teacher.features[self.names[1]]
        ours, theirs = (resize(x.astype(jnp.float32)) for resize, x in zip(self.resize, features, strict=True))
        return ours, theirs

    def aligned_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns the shapes of `aligned`."""
        return tuple(jax.eval_shape(resize, shape) for resize, shape in zip(self.resize, self.shapes, strict=True))


def listed_features(network: Forward) -> str:
    """Lists all feature names and shapes as text."""
    return ", ".join(f"{key} {'x'.join(map(str, shape.shape[1:]))}" for key, shape in network.features.items())


def feature_of(network: Forward, name: str, whose: str) -> jax.ShapeDtypeStruct:
    """Returns the shape of the feature called `name`.

    Raises:
      ValueError: if there is no such feature; the message lists those available with their shapes.
    """
    if name not in network.features:
        raise ValueError(
            f"the {whose} has no feature {name!r}{nearest(name, network.features)} (available, height x width x"
            f" channels for a training crop: {listed_features(network)})"
        )
    shape = network.features[name]
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype)


def as_pairs(setting: Setting, pairs: Pairs, *, resample: str = "pool") -> list[Pair]:
    """Checks the pairs of a config and resolves them.

    Raises:
      ValueError: if there are no pairs, one is malformed, a feature is unknown, or neither resolution divides the
        other.
    """
    shrink = pick({"pool": _average_pool, "unshuffle": _unshuffle}, resample, "resample")
    if not pairs:
        raise ValueError(
            "pairs is empty; give (student feature, teacher feature, weight). Student:"
            f" {listed_features(setting.student)}. Teacher: {listed_features(setting.teacher)}"
        )
    checked = []
    for pair in pairs:
        try:
            ours, theirs, weight = pair
            weight = float(weight)
        except (TypeError, ValueError):
            raise ValueError(f"pair {pair!r} is not (student feature, teacher feature, weight)") from None
        shapes = feature_of(setting.student, ours, "student"), feature_of(setting.teacher, theirs, "teacher")
        factors = _factors(shapes[0].shape[1:3], shapes[1].shape[1:3])
        if factors is None:
            raise ValueError(
                f"pair {(ours, theirs)}: {shapes[0].shape[1:3]} and {shapes[1].shape[1:3]} pixels; one resolution must"
                " be a whole multiple of the other"
            )
        resize = tuple(lambda x, factor=factor: shrink(x, factor) if factor > 1 else x for factor in factors)
        checked.append(Pair((ours, theirs), weight, resize, shapes))
    return checked


def teacher_features(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Returns the names of the teacher's features in the pairs."""
    return tuple(pair.names[1] for pair in pairs)


def feature(
    setting: Setting,
    *,
    pairs: Pairs,
    criterion: str = "mse",
    adapter: str = "auto",
    resample: str = "pool",
    normalise: str = "none",
    **options: float,
) -> Loss:
    """Compares the student's features with the teacher's.

    Args:
      adapter: "auto" trains a 1x1 convolution where channel counts differ, "always" everywhere (FitNets' hint,
        arXiv:1412.6550), "never" requires equal counts.
      resample: how the higher-resolution map is reduced: "pool" averages, "unshuffle" moves pixels into channels.
      normalise: applied to both features before comparing: "none", "pixel" (each pixel's channels to unit length) or
        "instance" (each channel of each image to mean 0 and variance 1).
    """
    compare = losses.make_criterion(criterion, **options)
    adapts = pick(
        {"auto": lambda ours, theirs: ours != theirs, "always": lambda *_: True, "never": lambda *_: False},
        adapter,
        "adapter",
    )
    scale = pick({"none": lambda x: x, "pixel": _unit_pixels, "instance": _standardise}, normalise, "normalise")
    checked = as_pairs(setting, pairs, resample=resample)
    adapters = {}
    for i, pair in enumerate(checked):
        ours, theirs = (shape.shape[-1] for shape in pair.aligned_shapes())
        if adapts(ours, theirs):
            adapters[str(i)] = init_adapter(jax.random.fold_in(setting.key, i), ours, theirs)
        elif ours != theirs:
            raise ValueError(
                f'pair {pair.names} has {ours} and {theirs} channels and adapter="never"; use adapter="auto"'
            )

    def value(context: Context, adapters: Params, frozen: Params) -> jax.Array:
        total = jnp.float32(0)
        for i, pair in enumerate(checked):
            ours, theirs = pair.aligned(context.student, context.teacher)
            if str(i) in adapters:
                ours = adapt(adapters[str(i)], ours)
            total += pair.weight * jnp.mean(compare(scale(ours), scale(theirs)))
        return total

    return Loss(value, adapters, reads=teacher_features(checked))


def attention(setting: Setting, *, pairs: Pairs, mode: str = "paper", resample: str = "pool") -> Loss:
    """Attention transfer: compares normalised maps of the features' energy (arXiv:1612.03928).

    `mode` selects the scaling: "paper", "code" (the authors' repository: x 1000) or "guide" (BasicSR guide: about 1e-6,
    effectively off). See `kdjax.losses.attention`.
    """
    checked = as_pairs(setting, pairs, resample=resample)
    compare = lambda ours, theirs: losses.attention(ours, theirs, mode=mode)  # noqa: E731
    return over_pairs(checked, compare)


def affinity(setting: Setting, *, pairs: Pairs, resample: str = "pool") -> Loss:
    """Compares affinity matrices of the features: which pixels resemble which (FAKD, ICIP 2020). Any channel counts."""
    return over_pairs(as_pairs(setting, pairs, resample=resample), losses.affinity)


def laplace(setting: Setting, *, pairs: Pairs, resample: str = "pool") -> Loss:
    """Negative log-likelihood of the teacher's features under a Laplace distribution (PISR, arXiv:2007.07524).

    Two trained 1x1 convolutions predict its mean and width from the student's features, so the student may give up on
    what it cannot predict.
    """
    checked = as_pairs(setting, pairs, resample=resample)
    adapters = {}
    for i, pair in enumerate(checked):
        ours, theirs = (shape.shape[-1] for shape in pair.aligned_shapes())
        keys = jax.random.split(jax.random.fold_in(setting.key, i))
        adapters[str(i)] = {
            name: init_adapter(key, ours, theirs) for name, key in zip(("mean", "width"), keys, strict=True)
        }

    def value(context: Context, adapters: Params, frozen: Params) -> jax.Array:
        total = jnp.float32(0)
        for i, pair in enumerate(checked):
            ours, theirs = pair.aligned(context.student, context.teacher)
            mean, width = (adapt(adapters[str(i)][name], ours) for name in ("mean", "width"))
            # PISR's softplus x 0.1 starts the width at about 0.07, the scale of features of images in [0, 1].
            total += pair.weight * losses.laplace_nll(mean, 0.1 * jax.nn.softplus(width) + 1e-8, theirs)
        return total

    return Loss(value, adapters, reads=teacher_features(checked))


def init_adapter(key: jax.Array, num_in: int, num_out: int) -> Params:
    """Initialises a 1x1 convolution as torch does: uniform in +-1/sqrt(num_in)."""
    bound = 1 / math.sqrt(num_in)
    for_kernel, for_bias = jax.random.split(key)
    return {
        "kernel": jax.random.uniform(for_kernel, (1, 1, num_in, num_out), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(for_bias, (num_out,), minval=-bound, maxval=bound),
    }


def adapt(adapter: Params, x: jax.Array) -> jax.Array:
    """Applies the adapter: (b, h, w, num_in) -> (b, h, w, num_out)."""
    return jnp.einsum("bhwi,io->bhwo", x, adapter["kernel"][0, 0]) + adapter["bias"]


def over_pairs(pairs: list[Pair], compare: Callable[[jax.Array, jax.Array], jax.Array]) -> Loss:
    """Builds the weighted sum of a parameter-free comparison over the pairs."""
    for pair in pairs:
        jax.eval_shape(compare, *pair.aligned_shapes())  # fail now, not in the step, if they cannot be compared

    def value(context: Context, *_: object) -> jax.Array:
        return jnp.asarray(
            sum(pair.weight * compare(*pair.aligned(context.student, context.teacher)) for pair in pairs)
        )

    return Loss(value, reads=teacher_features(pairs))


def _factors(ours: tuple[int, ...], theirs: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns the factors to shrink the two maps by, (n, 1) or (1, n). A network that pads has rounded its size up."""
    n = math.ceil(max(ours[0] / theirs[0], theirs[0] / ours[0]))
    for factors in ((n, 1), (1, n)):
        if tuple(-(-a // factors[0]) for a in ours) == tuple(-(-b // factors[1]) for b in theirs):
            return factors
    return None


def _average_pool(x: jax.Array, factor: int) -> jax.Array:
    x = ops.pad_to_multiple(x, factor)
    b, h, w, c = x.shape
    return x.reshape(b, h // factor, factor, w // factor, factor, c).mean((2, 4))


def _unshuffle(x: jax.Array, factor: int) -> jax.Array:
    return ops.pixel_unshuffle(ops.pad_to_multiple(x, factor), factor)


def _unit_pixels(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def _standardise(x: jax.Array) -> jax.Array:
    centred = x - x.mean((1, 2), keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, (1, 2), keepdims=True) + 1e-6)
