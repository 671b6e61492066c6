"""Terms that compare images: the student's with the clean one or the teacher's, directly or in another space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import losses
from kdjax.losses import perceptual
from kdjax.losses.vgg_file import load_vgg
from kdjax.names import pick
from kdjax.terms.features import Pairs, as_pairs, feature_of, listed_features, over_pairs
from kdjax.terms.term import Context, Forward, Loss, Setting

log = logging.getLogger("kdjax")


def task(setting: Setting, *, criterion: str, **options: float) -> Loss:
    """Compares the student's image with the clean one, over the samples that have one."""
    compare = losses.make_criterion(criterion, **options)
    return Loss(lambda context, *_: _mean(compare(context.student.output, context.gt), context.labelled))


def recorrupted(setting: Setting, *, sigma: float, criterion: str = "mse", **options: float) -> Loss:
    """Learns to denoise from noisy images alone, without a teacher (R2R, Pang et al., CVPR 2021).

    gt is a noisy image, whose noise is white and Gaussian with standard deviation `sigma` (0..255 scale), and the
    degradation adds more such noise, n. The student's image is compared with gt - k n. With k = sigma^2 / mean(n^2),
    the noise of that is independent of the noise of lq, as in a second photograph: on average, it is the clean image.

    Raises:
      ValueError: if `sigma` is not positive, or the networks change the image size.
    """
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} must be positive")
    if setting.student.output.shape != setting.lq:
        raise ValueError("recorrupted compares the student's image with the noisy one, so it needs scale 1")
    compare = losses.make_criterion(criterion, **options)

    def value(context: Context, *_: object) -> jax.Array:
        added = context.lq - context.gt
        k = (sigma / 255) ** 2 / jnp.maximum(jnp.mean(jnp.square(added), (1, 2, 3), keepdims=True), 1e-8)
        return _mean(compare(context.student.output, context.gt - k * added), context.labelled)

    return Loss(value)


def output(setting: Setting, *, criterion: str, gate: bool = False, **options: float) -> Loss:
    """Compares the student's image with the teacher's.

    With `gate`, the student imitates only pixels where the teacher is closer to the clean image than the student is
    (after attentive imitation, Saputra et al., 2019, arXiv:1908.00858), and all pixels of samples without a clean
    image.
    """
    compare = losses.make_criterion(criterion, **options)

    def value(context: Context, *_: object) -> jax.Array:
        difference = compare(context.student.output, context.teacher.output)
        return jnp.mean(difference * _gate(context)) if gate else jnp.mean(difference)

    return Loss(value)


def soft_target(
    setting: Setting, *, space: str, temperature: float = 1.0, reduction: str = "pixelmean", pairs: Pairs = ()
) -> Loss:
    """Soft targets: KL divergence between softened distributions of student and teacher.

    `space="rgb"` is the guide's softmax over the colours of a pixel. In effect it is an MSE of colour differences: the
    temperature cancels, and brightness errors are invisible. `space="spatial"` is a softmax over the positions of each
    channel (CWD, arXiv:2011.13256), of the images or of feature `pairs` with equal channel counts.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if space == "rgb":
        if pairs:
            raise ValueError('space="rgb" compares images; pairs are for space="spatial"')
        log.warning(
            'soft_target with space="rgb" only sees differences between colours: at any temperature it is close to half'
            ' their MSE, and an error of brightness costs nothing. It exists for comparison; use "output" instead'
        )
        compare = lambda s, t: losses.soft_target_rgb(s, t, temperature=temperature, reduction=reduction)  # noqa: E731
        jax.eval_shape(compare, setting.student.output, setting.teacher.output)  # refuses an unknown reduction now
        return Loss(lambda context, *_: compare(context.student.output, context.teacher.output))
    pick({"spatial": None}, space, "space of soft_target")
    compare = lambda s, t: losses.soft_target_spatial(s, t, temperature=temperature)  # noqa: E731
    if not pairs:
        return Loss(lambda context, *_: compare(context.student.output, context.teacher.output))
    return over_pairs(as_pairs(setting, pairs), compare)


def wavelet(
    setting: Setting,
    *,
    levels: int = 2,
    bands: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    criterion: str = "l1",
) -> Loss:
    """Compares the Haar bands of the student's and the teacher's image; `bands` weights (ll, lh, hl, hh)."""
    compare = lambda s, t: losses.wavelet(s, t, levels=levels, bands=tuple(bands), criterion=criterion)  # noqa: E731
    jax.eval_shape(compare, setting.student.output, setting.teacher.output)
    return Loss(lambda context, *_: compare(context.student.output, context.teacher.output))


def fft(setting: Setting) -> Loss:
    """Compares the Fourier transforms of the student's and the teacher's image."""
    return Loss(lambda context, *_: losses.fft(context.student.output, context.teacher.output))


def label_consistency(setting: Setting, *, criterion: str = "l1", gate: bool = False, **options: float) -> Loss:
    """Compares the student's image with the teacher's for a transformed input, after undoing the transform.

    Each sample is inverted (1 - x), flipped left-right, flipped top-bottom and transposed, each with probability 1/2
    (DUKD, arXiv:2309.14162). White noise stays white noise under all of these. Costs one more forward pass of the
    teacher. `gate` is as in `output`.

    Raises:
      ValueError: if training crops are not square, as they cannot be transposed.
    """
    height, width = setting.student.output.shape[1:3]
    if height != width:
        raise ValueError(f"label_consistency transposes images, so crops must be square, not {height}x{width}")
    compare = losses.make_criterion(criterion, **options)

    def value(context: Context, *_: object) -> jax.Array:
        choices = jax.vmap(lambda key: jax.random.bernoulli(key, shape=(4,)))(context.keys)
        target = _changed(context.ask_teacher(_changed(context.lq, choices)).output, choices, back=True)
        difference = compare(context.student.output, jax.lax.stop_gradient(target))
        return jnp.mean(difference * _gate(context)) if gate else jnp.mean(difference)

    return Loss(value, asks=True)


def contrastive(setting: Setting, *, layers: Sequence[tuple[str, float]]) -> Loss:
    """Pulls the student's image to the teacher's and away from the noisy one, in the teacher's own feature space.

    The value is d(student, teacher) / d(student, lq), summed over the `layers` (teacher feature, weight), where d is
    the mean absolute difference of the teacher's features for the two images (CSD, arXiv:2105.11683, and DCKD,
    arXiv:2412.08939, which use VGG and VQGAN). Costs two forward passes of the teacher up to the deepest layer, and one
    backward pass.

    Raises:
      ValueError: if there are no layers, one is unknown, or the networks change the image size.
    """
    if setting.student.output.shape[1:3] != setting.lq[1:3]:
        raise ValueError("contrastive runs the teacher on restored images, so it needs scale 1")
    if not layers:
        raise ValueError(
            f"layers is empty; give features of the teacher with weights: {listed_features(setting.teacher)}"
        )
    names, weights = zip(*layers, strict=True)
    for name in names:
        feature_of(setting.teacher, name, "teacher")

    def embed(network: Forward) -> list[jax.Array]:
        return [network.features[name] for name in names]

    def value(context: Context, *_: object) -> jax.Array:
        anchor = embed(context.ask_teacher(context.student.output))
        positive = embed(context.ask_teacher(context.teacher.output))
        return losses.contrastive(anchor, positive, [embed(context.teacher)], weights=weights)

    return Loss(value, reads=names, asks=True)


def perceptual_term(
    setting: Setting, *, vgg: str, layer_weights: Mapping[str, float], criterion: str = "l1", **options: object
) -> Loss:
    """Compares VGG features of the student's image with those of the clean one; see `kdjax.losses.perceptual`.

    `vgg` is a torchvision file. With `target="teacher"` the target is the teacher's image. This term lowers PSNR.
    """
    return _vgg_term(setting, vgg, layer_weights, criterion, perceptual.perceptual, options)


def style(
    setting: Setting, *, vgg: str, layer_weights: Mapping[str, float], criterion: str = "l1", **options: object
) -> Loss:
    """Like `perceptual`, on the Gram matrices of the features."""
    return _vgg_term(setting, vgg, layer_weights, criterion, perceptual.style, options)


def _vgg_term(
    setting: Setting,
    vgg: str,
    layer_weights: Mapping[str, float],
    criterion: str,
    compare: Callable[..., jax.Array],
    options: dict[str, Any],
) -> Loss:
    options = dict(options)
    target_name = options.pop("target", "gt")
    vgg_type = options.pop("vgg_type", "vgg19")
    # What the student is compared with, as a constant. A sample without a clean image is its own target and costs
    # nothing.
    targets = {
        "gt": lambda context: (
            context.gt
            if context.labelled is None
            else jnp.where(context.labelled > 0, context.gt, jax.lax.stop_gradient(context.student.output))
        ),
        "teacher": lambda context: context.teacher.output,
    }
    target = pick(targets, target_name, "target")
    if not layer_weights:
        raise ValueError('layer_weights is empty; give VGG layers with weights, such as {"conv5_4": 1.0}')
    layers = tuple(layer_weights)
    extract = lambda params, images: perceptual.vgg_features(  # noqa: E731
        params, images, vgg_type=vgg_type, layers=layers, **options
    )

    def value(context: Context, adapters: object, frozen: dict) -> jax.Array:
        ours, theirs = extract(frozen, context.student.output), extract(frozen, target(context))
        return compare(ours, theirs, layer_weights=layer_weights, criterion=criterion)

    params = load_vgg(vgg, vgg_type=vgg_type, layers=layers)
    features = jax.eval_shape(extract, params, setting.student.output)  # reject unknown options now
    jax.eval_shape(lambda f: compare(f, f, layer_weights=layer_weights, criterion=criterion), features)
    return Loss(value, frozen=params, is_mean=criterion != "fro")


def _mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Returns the mean over all elements, weighted by the (b, 1, 1, 1) sample weights."""
    return jnp.mean(values if weights is None else values * weights)


def _gate(context: Context) -> jax.Array:
    """Returns (b, h, w, 1): 1 where the teacher should be imitated."""
    gate = losses.teacher_is_better(context.student.output, context.teacher.output, context.gt)
    return gate if context.labelled is None else jnp.where(context.labelled > 0, gate, 1.0)


def _changed(images: jax.Array, choices: jax.Array, *, back: bool = False) -> jax.Array:
    """Inverts, flips and transposes square (b, n, n, c) images as the (b, 4) `choices` say, or undoes it."""
    changes = (lambda x: 1 - x, lambda x: x[:, :, ::-1], lambda x: x[:, ::-1], lambda x: x.swapaxes(1, 2))
    for i, change in sorted(enumerate(changes), reverse=back):
        images = jnp.where(choices[:, i, None, None, None], change(images), images)
    return images
