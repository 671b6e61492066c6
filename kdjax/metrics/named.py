"""Metrics by the names used in tables and on the command line.

A metric is one entry of METRICS, including its command-line option if it reads a file. Whatever it needs besides the
two images is in one `MetricInputs`, so all metrics are called the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kdjax.metrics import lpips, lpips_file, niqe, niqe_file
from kdjax.metrics.psnr_ssim import TooSmallError, psnr, ssim


class MetricInputs(NamedTuple):
    """What metrics need besides the images: pixels cropped at each side, and, by metric, what it read from a file."""

    crop_border: int = 0
    files: Mapping[str, Any] = {}


class Source(NamedTuple):
    """The file a metric needs: how the command line shows its option, and `load(path) -> (content, origin)`."""

    metavar: str
    about: str
    load: Callable[[str], tuple[Any, str]]


class Metric(NamedTuple):
    """How to display a metric, which way is better, and `compute(output, gt, inputs)` on uint8 (h, w, c) images.

    Attributes:
      source: the file it needs, or None.
    """

    title: str
    unit: str
    digits: int
    higher_is_better: bool
    compute: Callable[[np.ndarray, np.ndarray, MetricInputs], float]
    source: Source | None = None

    @property
    def heading(self) -> str:
        """The column heading, such as "PSNR (dB)"."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def text(self, value: float) -> str:
        """Formats a value: "31.33", or "-" for nan."""
        return "-" if math.isnan(value) else f"{value:.{self.digits}f}"


def _niqe(output: np.ndarray, _: np.ndarray, inputs: MetricInputs) -> float:
    return niqe.distance(output, inputs.files["niqe"], crop_border=inputs.crop_border)


def _lpips(output: np.ndarray, gt: np.ndarray, inputs: MetricInputs) -> float:
    return lpips.distance(output, gt, inputs.files["lpips"], crop_border=inputs.crop_border)


_PRISTINE = Source("FILE|DIR", "BasicSR's niqe_pris_params.npz, or a folder of clean photographs", niqe_file.load)
_NETWORK = Source("FILE", "the state dict of lpips.LPIPS", lpips_file.load)

METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", "dB", 2, True, lambda a, b, c: psnr(a, b, crop_border=c.crop_border)),
    "ssim": Metric("SSIM", "", 4, True, lambda a, b, c: ssim(a, b, crop_border=c.crop_border)),
    "psnr_y": Metric("PSNR-Y", "dB", 2, True, lambda a, b, c: psnr(a, b, crop_border=c.crop_border, y_channel=True)),
    "ssim_y": Metric("SSIM-Y", "", 4, True, lambda a, b, c: ssim(a, b, crop_border=c.crop_border, y_channel=True)),
    "niqe": Metric("NIQE", "", 3, False, _niqe, _PRISTINE),
    "lpips": Metric("LPIPS", "", 4, False, _lpips, _NETWORK),
}


def measure(name: str, output: np.ndarray, gt: np.ndarray, inputs: MetricInputs) -> float:
    """Returns the metric `name` of a uint8 (h, w, c) image against the clean one; nan if the image is too small.

    Raises:
      ValueError: if the images have another dtype or shape, or for psnr_y and ssim_y of grey images.
    """
    try:
        return METRICS[name].compute(output, gt, inputs)
    except TooSmallError:
        return math.nan


def mean(values: list[float]) -> float:
    """Returns the mean of one metric over the images where it is defined; nan if there are none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
