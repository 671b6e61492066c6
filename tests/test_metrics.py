"""PSNR and SSIM against BasicSR's numbers and scikit-image."""

from pathlib import Path

import numpy as np
import pytest
from conftest import load_npz
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kdjax.metrics import psnr, ssim


@pytest.mark.parametrize("crop_border", [0, 4])
@pytest.mark.parametrize("y_channel", [False, True])
def test_equal_basicsr(golden: Path, crop_border: int, y_channel: bool) -> None:
    vectors = load_npz(golden / "metrics.npz")
    options = dict(crop_border=crop_border, y_channel=y_channel)
    suffix = f"crop{crop_border}_y{int(y_channel)}"
    assert psnr(vectors["a"], vectors["b"], **options) == pytest.approx(float(vectors[f"psnr_{suffix}"]), abs=1e-5)
    assert ssim(vectors["a"], vectors["b"], **options) == pytest.approx(float(vectors[f"ssim_{suffix}"]), abs=1e-6)


@pytest.mark.parametrize("shape", [(11, 11, 3), (17, 40, 1), (33, 21, 3)])
def test_equal_scikit_image_at_odd_sizes(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 256, shape, dtype=np.uint8)
    b = np.clip(a + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-9)
    _, full = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, full=True, data_range=255
    )
    assert ssim(a, b) == pytest.approx(full[5 : shape[0] - 5, 5 : shape[1] - 5].mean(), abs=1e-9)


def test_equal_images() -> None:
    a = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert psnr(a, a) == float("inf")
    assert ssim(a, a) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 15, 3), np.uint8), {}, "one shape"),
        (np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8), {}, "one shape"),
        (np.zeros((16, 16, 3)), np.zeros((16, 16, 3)), {}, "uint8"),
        (np.zeros((16, 16, 1), np.uint8), np.zeros((16, 16, 1), np.uint8), {"y_channel": True}, "RGB"),
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8), {"crop_border": 8}, "leaves nothing"),
    ],
)
def test_bad_images_are_refused(a: np.ndarray, b: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psnr(a, b, **options)


def test_ssim_needs_its_window() -> None:
    small = np.zeros((10, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(small, small)
