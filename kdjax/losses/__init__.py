"""The loss formulas: arrays (b, h, w, c) in, numbers out; no term weights, no state, no networks.

Pixel criteria return the unreduced loss of every element. All others return a float32 scalar, the batch mean of one
value per sample, so a sample's contribution does not depend on the rest of the batch. Everything is computed in
float32, even for bfloat16 arrays, where Charbonnier's eps would vanish. `kdjax.terms` connects these to networks.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kdjax import sharding
from kdjax.names import brief, pick

Criterion = Callable[[jax.Array, jax.Array], jax.Array]


def _difference(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return prediction.astype(jnp.float32) - target.astype(jnp.float32)


def l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """|d|, with gradient 0 at d = 0 as in torch (JAX gives 1)."""
    difference = _difference(prediction, target)
    return jnp.where(difference == 0, 0, jnp.abs(difference))


def mse(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """d^2."""
    return jnp.square(_difference(prediction, target))


def charbonnier(prediction: jax.Array, target: jax.Array, *, eps: float = 1e-12) -> jax.Array:
    """sqrt(d^2 + eps). Like BasicSR this adds `eps`, not eps^2: with 1e-12 it is L1 except for |d| < 1e-6."""
    return jnp.sqrt(jnp.square(_difference(prediction, target)) + eps)


def smooth_l1(prediction: jax.Array, target: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta/2. With torch's beta = 1 this is MSE/2 on images in [0, 1]."""
    size = jnp.abs(_difference(prediction, target))
    return jnp.where(size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta)


CRITERIA: dict[str, Callable[..., jax.Array]] = {
    "l1": l1,
    "mse": mse,
    "charbonnier": charbonnier,
    "smooth_l1": smooth_l1,
}


def make_criterion(name: str, **options: float) -> Criterion:
    """Returns the criterion called `name` with its options bound (`eps` for charbonnier, `beta` for smooth_l1).

    Raises:
      ValueError: if the criterion or an option is unknown, or an option is not positive.

    Examples:
      >>> make_criterion("smooth_l1", beta=0.5)(jnp.array([0.0, 1.0]), jnp.zeros(2)).tolist()
      [0.0, 0.75]
    """
    criterion = pick(CRITERIA, name, "criterion")
    known = getattr(criterion, "__kwdefaults__", None) or {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"criterion {name!r} has no option {option!r} (it has: {', '.join(known) or 'none'})")
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not value > 0:
            raise ValueError(f"criterion {name!r}: {option}={brief(value)} must be a positive number")
    return functools.partial(criterion, **options)


# ---- features ---------------------------------------------------------------------------------------------------


def attention(student: jax.Array, teacher: jax.Array, *, mode: str = "paper") -> jax.Array:
    """Distance of normalised energy maps q = vec(sum_c F^2) / |.| (Zagoruyko & Komodakis, arXiv:1612.03928).

    Channel counts may differ; height and width must match. The three scalings in use, with p the number of pixels:
      "paper": |q_s - q_t| / 2; about 0.1 for unrelated features at any resolution.
      "code": 1000 x mean (q_s - q_t)^2, from the authors' repository, including its beta.
      "guide": mean (q_s - q_t)^2. |q| is 1, so this is at most 2/p: about 4e-7 for unrelated features of 400x400
        pixels. At the guide's weight of 0.5 it has no effect.

    Raises:
      ValueError: if the mode is unknown or the maps differ in size.
    """
    _check_equal("height and width", student.shape[1:3], teacher.shape[1:3])
    maps = (_unit(jnp.square(x.astype(jnp.float32)).sum(-1).reshape(len(x), -1)) for x in (student, teacher))
    difference = jnp.subtract(*maps)
    scalings = {
        "paper": lambda: 0.5 * jnp.mean(_norm(difference)),
        "code": lambda: 1e3 * jnp.mean(jnp.square(difference)),
        "guide": lambda: jnp.mean(jnp.square(difference)),
    }
    return pick(scalings, mode, "mode of attention")()


def affinity(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared difference of the affinity matrices A = F F^T of the pixels' unit feature vectors (FAKD, ICIP 2020).

    A has (h w)^2 entries and is never formed. With F (h w, c), |A_s - A_t|^2 = |F_s^T F_s|^2 + |F_t^T F_t|^2 - 2 |F_s^T
    F_t|^2, which costs h w c^2. FAKD itself uses the mean absolute difference, which has no such identity. Channel
    counts may differ; height and width must match.

    Raises:
      ValueError: if the maps differ in size.
    """
    _check_equal("height and width", student.shape[1:3], teacher.shape[1:3])
    ours, theirs = (_unit(x.astype(jnp.float32)).reshape(len(x), -1, x.shape[-1]) for x in (student, teacher))
    pixels = ours.shape[1]

    def energy(a: jax.Array, b: jax.Array) -> jax.Array:
        # Divide before squaring: the three terms nearly cancel.
        gram = jnp.einsum("bpi,bpj->bij", a, b, precision=jax.lax.Precision.HIGHEST) / pixels
        return jnp.sum(jnp.square(gram), (1, 2))

    return jnp.mean(energy(ours, ours) + energy(theirs, theirs) - 2 * energy(ours, theirs))


def contrastive(
    anchor: Sequence[jax.Array],
    positive: Sequence[jax.Array],
    negatives: Sequence[Sequence[jax.Array]],
    *,
    weights: Sequence[float],
) -> jax.Array:
    """sum_i w_i d(anchor_i, positive_i) / (sum over negatives of d(anchor_i, negative_i) + 1e-7), d the mean |.|.

    `anchor`, `positive` and each of the `negatives` are features of one image each, from the same layers (CSD,
    arXiv:2105.11683; DCKD, arXiv:2412.08939).
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.mean(l1(a, b), (1, 2, 3))

    total = jnp.float32(0)
    for i, weight in enumerate(weights):
        away = sum(distance(anchor[i], negative[i]) for negative in negatives)
        total += weight * jnp.mean(distance(anchor[i], positive[i]) / (away + 1e-7))
    return total


# ---- soft targets -----------------------------------------------------------------------------------------------


def soft_target_rgb(
    student: jax.Array, teacher: jax.Array, *, temperature: float, reduction: str = "pixelmean"
) -> jax.Array:
    """The guide's T^2 KL(softmax(t/T) || softmax(s/T)) over the colours of each pixel.

    For images in [0, 1] the softmax is nearly linear. With d = s - t the loss is (mean_c d^2 - (mean_c d)^2) / 2 to
    within a few percent at any temperature: a squared colour error that ignores brightness. reduction="batchmean",
    torch's and the guide's choice, divides by the batch size alone and grows with the number of pixels.

    Raises:
      ValueError: if the images differ in shape or the reduction is unknown.
    """
    _check_equal("shape", student.shape, teacher.shape)
    divisor = pick({"pixelmean": math.prod(student.shape[:3]), "batchmean": len(student)}, reduction, "reduction")
    return _kl(student, teacher, -1, temperature) / divisor


def soft_target_spatial(student: jax.Array, teacher: jax.Array, *, temperature: float) -> jax.Array:
    """T^2 KL of the softmax over the positions of each channel (CWD, arXiv:2011.13256), mean over channels and batch.

    Raises:
      ValueError: if the arrays differ in shape.
    """
    _check_equal("shape", student.shape, teacher.shape)
    return _kl(student, teacher, (1, 2), temperature) / (len(student) * student.shape[-1])


def laplace_nll(mean: jax.Array, scale: jax.Array, target: jax.Array) -> jax.Array:
    """Mean of |target - mean| / scale + log(2 scale): the Laplace negative log-likelihood (PISR, arXiv:2007.07524).

    `scale` is positive and broadcasts.
    """
    scale = scale.astype(jnp.float32)
    return jnp.mean(l1(mean, target) / scale + jnp.log(2 * scale))


# ---- wavelets and Fourier ---------------------------------------------------------------------------------------


def haar(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the orthonormal Haar bands (ll, lh, hl, hh), each (b, ceil(h/2), ceil(w/2), c) in float32.

    lh is low-pass along the width and high-pass along the height: horizontal edges. Odd sizes repeat their last line.
    """
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    return (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2


def wavelet(
    prediction: jax.Array,
    target: jax.Array,
    *,
    levels: int = 2,
    bands: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    criterion: str = "l1",
) -> jax.Array:
    """Weighted sum over the Haar bands of the criterion's mean (MTKD, arXiv:2404.09571).

    `bands` weights (ll, lh, hl, hh): the three high-pass bands count at every level, ll only at the last.

    Raises:
      ValueError: if the images differ in shape, if there are fewer than one level or more than the image has, or if the
        weights are not four, negative or all 0.
    """
    _check_equal("shape", prediction.shape, target.shape)
    if not 1 <= levels <= math.log2(max(1, min(prediction.shape[1:3]))):
        raise ValueError(f"levels={levels}: an image of {prediction.shape[1:3]} pixels cannot be halved that often")
    if len(bands) != 4 or min(bands) < 0 or not any(bands):
        raise ValueError(f"bands={tuple(bands)} must be four weights for (ll, lh, hl, hh), none negative, not all 0")
    compare = make_criterion(criterion)
    total = jnp.float32(0)
    for level in range(levels):
        (prediction, *ours), (target, *theirs) = (sharding.per_sample(haar, x) for x in (prediction, target))
        pairs = [*zip(bands[1:], ours, theirs, strict=True)]
        if level == levels - 1:
            pairs.append((bands[0], prediction, target))
        total += sum(weight * jnp.mean(compare(a, b)) for weight, a, b in pairs)
    return total


def fft(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean |Re d| + |Im d| over the orthonormal 2-D Fourier transform of the difference (MIMO-UNet, arXiv:2108.05054).

    Raises:
      ValueError: if the images differ in shape.
    """
    _check_equal("shape", prediction.shape, target.shape)
    transform = functools.partial(jnp.fft.rfft2, axes=(1, 2), norm="ortho")
    spectrum = sharding.per_sample(transform, _difference(prediction, target))
    # A real image needs only half of its spectrum: the omitted columns mirror the ones counted twice here.
    width = prediction.shape[2]
    columns = jnp.arange(spectrum.shape[2])
    twice = jnp.where((columns == 0) | (2 * columns == width), 1.0, 2.0)[:, None]
    sizes = l1(spectrum.real, jnp.zeros(())) + l1(spectrum.imag, jnp.zeros(()))
    return jnp.sum(sizes * twice) / prediction.size


# ---- comparing student and teacher ------------------------------------------------------------------------------


def teacher_is_better(student: jax.Array, teacher: jax.Array, gt: jax.Array) -> jax.Array:
    """Returns (b, h, w, 1): 1 where the teacher's mean absolute error over channels is below the student's, else 0."""
    ours, theirs = (jnp.mean(l1(x, gt), -1, keepdims=True) for x in (student, teacher))
    return jax.lax.stop_gradient((theirs < ours).astype(jnp.float32))


def psnr_between(a: jax.Array, b: jax.Array) -> jax.Array:
    """Batch mean of the PSNR in dB of float images in [0, 1], neither clipped nor rounded; at most 100."""
    return jnp.mean(-10 * jnp.log10(jnp.maximum(jnp.mean(mse(a, b), (1, 2, 3)), 1e-10)))


# ---- helpers ----------------------------------------------------------------------------------------------------


def _check_equal(what: str, student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    if student != teacher:
        raise ValueError(f"the two must have equal {what}, got {student} and {teacher}")


def _unit(x: jax.Array) -> jax.Array:
    """Normalises x to unit length along the last axis, like torch's `normalize`: zero stays zero."""
    return x / jnp.maximum(_norm(x, keepdims=True), 1e-12)


def _norm(x: jax.Array, *, keepdims: bool = False) -> jax.Array:
    """Returns the length along the last axis, with gradient 0 at zero."""
    square = jnp.sum(jnp.square(x), -1, keepdims=keepdims)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _kl(student: jax.Array, teacher: jax.Array, axis: int | tuple[int, ...], temperature: float) -> jax.Array:
    """Returns T^2 times the sum over all elements of KL(softmax(teacher / T) || softmax(student / T))."""
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis) for x in (student, teacher))
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours))
