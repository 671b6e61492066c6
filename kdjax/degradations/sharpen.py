"""Unsharp masking of clean images for Real-ESRGAN's targets, to compensate for slightly soft photographs.

For denoising it is off by default: a sharpened target is no longer the clean image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kdjax.degradations.kernels import bivariate_kernel, filter2d

_SIDE = 51
_SIGMA = 0.3 * ((_SIDE - 1) / 2 - 1) + 0.8  # OpenCV's default for this kernel side


def usm_sharpen(image: jax.Array, *, weight: float = 0.5, threshold: float = 10.0) -> jax.Array:
    """Sharpens an (h, w, c) image in [0, 1] where it differs from its blurred self by more than `threshold` (0..255).

    Real-ESRGAN's `USMSharp`: it adds `weight` x the difference, blended by a blurred mask.
    """
    image = image.transpose(2, 0, 1)
    blur = bivariate_kernel(_SIDE, _SIDE, (_SIGMA, _SIGMA), 0.0)
    residual = image - filter2d(image, blur, image.shape[1:])
    mask = filter2d((jnp.abs(residual) * 255 > threshold).astype(jnp.float32), blur, image.shape[1:])
    sharp = jnp.clip(image + weight * residual, 0, 1)
    return (image + mask * (sharp - image)).transpose(1, 2, 0)
