"""PSNR and SSIM as BasicSR defines them (`basicsr/metrics/psnr_ssim.py`), in float64 on 8-bit images.

Images are uint8 (h, w, c), RGB or grey. Clip and round to 8 bits first: it changes the numbers.
"""

from __future__ import annotations

import numpy as np

# ITU-R BT.601 luma in studio swing (16..235) from RGB in [0, 1].
_LUMA = np.array([65.481, 128.553, 24.966], np.float32)


class TooSmallError(ValueError):
    """The image is too small for a metric, for example for SSIM's window."""


def psnr(a: np.ndarray, b: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / MSE); infinite for equal images.

    Examples:
      >>> grey, lighter = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 105, np.uint8)
      >>> round(psnr(grey, lighter), 2)  # 10 log10(255^2 / 5^2)
      34.15
      >>> psnr(grey, grey)
      inf

    Args:
      a: uint8 (h, w, c).
      b: another image of the same dtype and shape.
      crop_border: pixels to leave out at each side.
      y_channel: compare the BT.601 luma of RGB images instead of their channels.

    Raises:
      ValueError: if the images have another dtype or their shapes do not match.
      TooSmallError: if cropping the border leaves nothing.
    """
    a, b = _prepare(a, b, crop_border, y_channel)
    mse = np.mean((a - b) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255.0**2 / mse))


def ssim(a: np.ndarray, b: np.ndarray, *, crop_border: int = 0, y_channel: bool = False) -> float:
    """Structural similarity (Wang et al., 2004): 11x11 Gaussian window, sigma 1.5, only where it fits entirely.

    Mean over pixels and channels; at most 1. Arguments and errors are those of `psnr`; also, the window must fit into
    the image.

    Examples:
      >>> waves = np.uint8(np.indices((16, 16, 1))[1] % 4 * 60)
      >>> ssim(waves, waves)
      1.0
      >>> round(ssim(waves, waves // 2), 2)  # half the contrast
      0.64
    """
    from scipy.ndimage import correlate1d  # takes a quarter of a second, and most programs do not need it

    a, b = _prepare(a, b, crop_border, y_channel)
    if min(a.shape[:2]) < 11:
        raise TooSmallError(f"SSIM needs at least 11x11 pixels inside the crop border, got {a.shape[0]}x{a.shape[1]}")
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


def luma(image: np.ndarray) -> np.ndarray:
    """Returns the BT.601 luma (h, w, 1) of a uint8 RGB image, 16..235, not rounded.

    Computed in float32 like BasicSR; the difference shows in the sixth digit of a PSNR.
    """
    return ((image.astype(np.float32) / 255) @ _LUMA + 16)[..., None]


def crop(image: np.ndarray, border: int) -> np.ndarray:
    """Returns the image without `border` pixels at each side.

    Raises:
      TooSmallError: if nothing is left.
    """
    inside = image[border : image.shape[0] - border, border : image.shape[1] - border]
    if inside.size == 0:
        raise TooSmallError(f"crop_border={border} leaves nothing of an image of {image.shape[0]}x{image.shape[1]}")
    return inside


def check(*images: np.ndarray) -> None:
    """Raises a `ValueError` unless the images are uint8 (h, w, c) of one shape."""
    shapes = [image.shape for image in images]
    if any(len(shape) != 3 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"wanted (h, w, c) images of one shape, got {' and '.join(map(str, shapes))}")
    if any(image.dtype != np.uint8 for image in images):
        given = " and ".join(str(image.dtype) for image in images)
        raise ValueError(f"wanted uint8 images, got {given}; clip, times 255 and round first")


def _prepare(a: np.ndarray, b: np.ndarray, crop_border: int, y_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    check(a, b)
    a, b = crop(a, crop_border), crop(b, crop_border)
    if y_channel:
        if a.shape[2] != 3:
            raise ValueError(f"y_channel needs RGB images, got {a.shape[2]} channels")
        a, b = luma(a), luma(b)
    return a.astype(np.float64), b.astype(np.float64)
