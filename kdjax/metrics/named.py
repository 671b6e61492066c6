"""Metrics by the names that a command line and a table use.

What a name stands for beside the two images (the border that is left out, the pristine model of NIQE, the weights of
LPIPS) is in one `Context`, so that every metric is called in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kdjax.metrics import lpips, niqe
from kdjax.metrics.psnr_ssim import TooSmallError, psnr, ssim


class Context(NamedTuple):
    """What metrics need beside the images: pixels left out at each side, and what NIQE and LPIPS read from files."""

    crop_border: int = 0
    pristine: niqe.Pristine | None = None
    network: lpips.Network | None = None


class Metric(NamedTuple):
    """How a metric is shown, which way is better, and `compute(output, gt, context)` on uint8 (h, w, c) images."""

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    compute: Callable[[np.ndarray, np.ndarray, Context], float]

    @property
    def heading(self) -> str:
        """PSNR (dB)"""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: float) -> str:
        """31.33, or - for nan."""
        return "-" if math.isnan(value) else f"{value:.{self.digits}f}"


def _niqe(output: np.ndarray, _: np.ndarray, context: Context) -> float:
    assert context.pristine is not None
    return niqe.distance(output, context.pristine, crop_border=context.crop_border)


def _lpips(output: np.ndarray, gt: np.ndarray, context: Context) -> float:
    assert context.network is not None
    return lpips.distance(output, gt, context.network, crop_border=context.crop_border)


METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", "dB", 2, True, lambda a, b, c: psnr(a, b, crop_border=c.crop_border)),
    "ssim": Metric("SSIM", "", 4, True, lambda a, b, c: ssim(a, b, crop_border=c.crop_border)),
    "psnr_y": Metric("PSNR-Y", "dB", 2, True, lambda a, b, c: psnr(a, b, crop_border=c.crop_border, y_channel=True)),
    "ssim_y": Metric("SSIM-Y", "", 4, True, lambda a, b, c: ssim(a, b, crop_border=c.crop_border, y_channel=True)),
    "niqe": Metric("NIQE", "", 3, False, _niqe),
    "lpips": Metric("LPIPS", "", 4, False, _lpips),
}


def measure(name: str, output: np.ndarray, gt: np.ndarray, context: Context) -> float:
    """The metric `name` of a uint8 (h, w, c) image beside the clean one; nan where the image is too small for it.

    Raises:
      ValueError: other types or shapes, or psnr_y and ssim_y of grey images.
    """
    try:
        return METRICS[name].compute(output, gt, context)
    except TooSmallError:
        return math.nan


def mean(values: list[float]) -> float:
    """The mean of one metric over images, of those it is defined for; nan where there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
