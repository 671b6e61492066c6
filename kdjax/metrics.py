"""PSNR and SSIM as BasicSR defines them (`basicsr/metrics/psnr_ssim.py`), in float64 on 8-bit images.

Images are uint8 (h, w, c), RGB or grey. Clipping and rounding to 8 bit comes before: it changes the numbers.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

# ITU-R BT.601 luma in studio swing (16..235) from RGB in [0, 1].
_LUMA = np.array([65.481, 128.553, 24.966])


def psnr(a: np.ndarray, b: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE); infinite for equal images.

    Args:
      a, b: uint8 (h, w, c), the same shape.
      crop_border: pixels left out at each side.
      y_channel: compare the BT.601 luma of RGB images instead of their channels.

    Raises:
      ValueError: other types or shapes.
    """
    a, b = _prepare(a, b, crop_border, y_channel)
    mse = np.mean((a - b) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """Structural similarity (Wang et al., 2004): Gaussian window 11x11 of sigma 1.5, only where it fits whole.

    Mean over pixels and channels; at most 1. Arguments and errors as `psnr`, and the image must hold the window.
    """
    a, b = _prepare(a, b, crop_border, y_channel)
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs at least 11x11 pixels inside the crop border, got {a.shape[0]}x{a.shape[1]}")
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image: np.ndarray) -> np.ndarray:
        rows = correlate1d(image, window, axis=0)[5:-5]
        return correlate1d(rows, window, axis=1)[:, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return float(np.mean(luminance * structure))


def _prepare(a: np.ndarray, b: np.ndarray, crop_border: int, y_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"wanted two (h, w, c) images of one shape, got {a.shape} and {b.shape}")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"wanted uint8 images, got {a.dtype} and {b.dtype}; clip, times 255 and round first")
    if crop_border:
        a, b = (image[crop_border:-crop_border, crop_border:-crop_border] for image in (a, b))
        if a.size == 0:
            raise ValueError(f"crop_border={crop_border} leaves nothing of the image")
    if y_channel:
        if a.shape[2] != 3:
            raise ValueError(f"y_channel needs RGB images, got {a.shape[2]} channels")
        # BasicSR computes luma in float32; the difference shows in the sixth digit.
        a, b = (((image.astype(np.float32) / 255) @ _LUMA.astype(np.float32) + 16)[..., None] for image in (a, b))
    return a.astype(np.float64), b.astype(np.float64)
