"""Metrics against the numbers of BasicSR, scikit-image and the package lpips, and against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import load_npz
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kdjax import assets
from kdjax.data import read_image
from kdjax.losses.vgg_file import _convolutions
from kdjax.metrics import TooSmallError, lpips, named, niqe, psnr, psnr_ssim, ssim
from kdjax.metrics.lpips_file import load_lpips
from kdjax.weights import WeightsError
from kdjax.weights.torch_file import torch_file_bytes


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
    with pytest.raises(TooSmallError, match="at least 11x11"):
        ssim(small, small)


# ---- NIQE ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return read_image(assets.TRAIN_PHOTOGRAPHS / "chelsea.png")


# What BasicSR 1.4.2 gives, with its pristine model replaced by the one below.
@pytest.mark.parametrize(("crop_border", "expected"), [(0, 11.155616668), (5, 11.136549132)])
def test_niqe_equals_basicsr(photograph: np.ndarray, crop_border: int, expected: float) -> None:
    pristine = niqe.Pristine(np.linspace(0, 3, 36), np.diag(np.linspace(0.5, 2, 36)))
    assert niqe.distance(photograph, pristine, crop_border=crop_border) == pytest.approx(expected, rel=1e-7)


def test_noise_and_blur_look_less_natural(photograph: np.ndarray) -> None:
    pristine = niqe.fit(read_image(path) for path in sorted(assets.TRAIN_PHOTOGRAPHS.iterdir()))
    noise = np.random.default_rng(0).normal(size=photograph.shape)
    noisy = [np.uint8(np.clip(photograph + sigma * noise, 0, 255)) for sigma in (5, 15, 25)]
    half = np.repeat(np.repeat(photograph[::2, ::2], 2, 0), 2, 1)
    clean, *worse = (niqe.distance(image, pristine) for image in (photograph, *noisy))
    assert clean < worse[0] < worse[1] < worse[2]
    assert clean < niqe.distance(half, pristine)
    grey = np.uint8(np.round(psnr_ssim.luma(photograph)))
    assert niqe.distance(grey, pristine) == pytest.approx(clean)


@pytest.mark.parametrize(
    ("shape", "left", "right"), [(2.0, 3.0, 3.0), (1.0, 2.0, 2.0), (0.5, 1.0, 1.0), (2.0, 1.0, 4.0)]
)
def test_the_generalised_gaussian_is_found_again(shape: float, left: float, right: float) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.gamma(1 / shape, size=(1, 1000, 600)) ** (1 / shape)  # |x| / scale of exp(-(|x| / scale)^shape)
    is_left = rng.random(sizes.shape) < left / (left + right)
    found = niqe.generalised_gaussian(np.where(is_left, -left, right) * sizes)
    np.testing.assert_allclose(np.concatenate(found), [shape, left, right], rtol=0.02)


def test_halving_is_bicubic_without_aliasing() -> None:
    """As Pillow's, which leaves out what is beyond the border: mirrored beforehand, that makes no difference."""
    plane = np.random.default_rng(0).uniform(0, 255, (24, 38))
    mirrored = Image.fromarray(np.float32(np.pad(plane, 8, mode="symmetric")))
    expected = np.asarray(mirrored.resize((54 // 2, 40 // 2), Image.Resampling.BICUBIC))[4:-4, 4:-4]
    np.testing.assert_allclose(niqe.halve(plane), expected, atol=1e-3)


def test_only_sharp_blocks_make_the_pristine_model() -> None:
    noise = np.random.default_rng(0).normal(size=(96, 96 * 40, 1))
    sharp, dull = (np.uint8(np.clip(128 + sigma * noise, 0, 255)) for sigma in (40, 10))
    both = niqe.fit([np.concatenate([sharp, dull], axis=1)])
    np.testing.assert_allclose(both.mean, niqe.fit([sharp]).mean, atol=0.02)
    assert np.abs(both.mean - niqe.fit([dull]).mean).max() > 0.05


def test_niqe_needs_two_blocks_with_texture_and_its_model_many() -> None:
    pristine = niqe.Pristine(np.zeros(36), np.eye(36))
    noise = np.random.default_rng(0).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    assert niqe.distance(noise, pristine) > 0
    flat = noise.copy()
    flat[:, 96:] = 7
    for image in (noise[:, :191], noise[:95], flat):
        with pytest.raises(TooSmallError, match="at least two blocks"):
            niqe.distance(image, pristine)
    with pytest.raises(ValueError, match=r"2 sharp blocks .* in 1 images"):
        niqe.fit([noise, noise[:50]])


# ---- LPIPS -----------------------------------------------------------------------------------------------------


def lpips_state(kind: str) -> dict[str, np.ndarray]:
    """Random weights by the names of the package lpips."""
    random = np.random.RandomState(0)
    if kind == "vgg":
        slices = {name: int(name[4]) for name in _convolutions("vgg16")}
        layers = {
            f"net.slice{slices[name]}.{index}": (num_out, num_in, 3, 3)
            for name, (index, num_in, num_out) in _convolutions("vgg16").items()
        }
    else:
        layers = {
            "net.slice1.0": (64, 3, 11, 11),
            "net.slice2.3": (192, 64, 5, 5),
            "net.slice3.6": (384, 192, 3, 3),
            "net.slice4.8": (256, 384, 3, 3),
            "net.slice5.10": (256, 256, 3, 3),
        }
    state = {}
    for name, shape in layers.items():
        state[f"{name}.weight"] = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * random.randn(shape[0])
    for i, channels in enumerate([64, 128, 256, 512, 512] if kind == "vgg" else [64, 192, 384, 256, 256]):
        state[f"lin{i}.model.1.weight"] = random.rand(1, channels, 1, 1)
    return {name: np.float32(array) for name, array in state.items()}


def write_lpips(path: Path, state: dict[str, np.ndarray]) -> Path:
    path.write_bytes(torch_file_bytes(state, {}))
    return path


@pytest.fixture(scope="module")
def alex(tmp_path_factory: pytest.TempPathFactory) -> lpips.Network:
    return load_lpips(write_lpips(tmp_path_factory.mktemp("alex") / "alex.pth", lpips_state("alex")))


def two_images() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(1)
    a = random.randint(0, 256, (40, 51, 3)).astype(np.uint8)
    return a, np.uint8(np.clip(a + random.normal(0, 40, a.shape), 0, 255))


# What the package lpips 0.1.4 gives with these weights, in float64.
def test_lpips_of_alexnet_equals_the_package(alex: lpips.Network) -> None:
    a, b = two_images()
    assert alex.kind == "alex"
    assert lpips.distance(a, b, alex) == pytest.approx(0.16126905793500937, rel=1e-5)
    assert lpips.distance(a, a, alex) < 1e-10
    assert lpips.distance(a, b, alex, crop_border=4) == lpips.distance(a[4:-4, 4:-4], b[4:-4, 4:-4], alex)


def test_lpips_of_vgg_equals_the_package(tmp_path: Path) -> None:
    network = load_lpips(write_lpips(tmp_path / "vgg.pth", lpips_state("vgg")))
    assert network.kind == "vgg"
    assert lpips.distance(*two_images(), network) == pytest.approx(0.18137894293450038, rel=1e-5)


def test_lpips_of_grey_images_and_of_small_ones(alex: lpips.Network) -> None:
    a, b = (image[..., :1] for image in two_images())
    assert lpips.distance(a, b, alex) == pytest.approx(lpips.distance(a.repeat(3, 2), b.repeat(3, 2), alex))
    with pytest.raises(TooSmallError, match=r"at least 31x31 .* got 30x51"):
        lpips.distance(a[:30], b[:30], alex)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lin2.model.1.weight": None}, "not the state dict of lpips.LPIPS"),
        ({"net.slice1.0.weight": None}, "not the state dict of lpips.LPIPS"),
        ({"net.slice4.8.bias": None}, "conv4 of AlexNet should be features.8"),
        ({"lin0.model.1.weight": np.full((1, 64, 1, 1), np.nan, np.float32)}, "damaged"),
    ],
)
def test_lpips_files_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    state = {name: array for name, array in (lpips_state("alex") | change).items() if array is not None}
    with pytest.raises(WeightsError, match=f"lpips.pth: .*{message}"):
        load_lpips(write_lpips(tmp_path / "lpips.pth", state))


# ---- by name ---------------------------------------------------------------------------------------------------


def test_names_stand_for_the_functions(photograph: np.ndarray, alex: lpips.Network) -> None:
    gt = photograph[:200, :220]
    output = np.uint8(np.clip(gt + np.random.default_rng(0).normal(0, 9, gt.shape), 0, 255))
    pristine = niqe.Pristine(np.zeros(36), np.eye(36))
    context = named.MetricInputs(crop_border=2, files={"niqe": pristine, "lpips": alex})
    expected = {
        "psnr": psnr(output, gt, crop_border=2),
        "ssim": ssim(output, gt, crop_border=2),
        "psnr_y": psnr(output, gt, crop_border=2, y_channel=True),
        "ssim_y": ssim(output, gt, crop_border=2, y_channel=True),
        "niqe": niqe.distance(output, pristine, crop_border=2),
        "lpips": lpips.distance(output, gt, alex, crop_border=2),
    }
    assert {name: named.measure(name, output, gt, context) for name in named.METRICS} == expected
    better = {name: named.measure(name, gt, gt, context) for name in named.METRICS}
    for name, metric in named.METRICS.items():
        assert (better[name] > expected[name]) == metric.higher_is_better or name == "niqe"


def test_what_an_image_is_too_small_for_is_left_out_of_the_mean(alex: lpips.Network) -> None:
    small = np.zeros((10, 20, 3), np.uint8)
    context = named.MetricInputs(files={"niqe": niqe.Pristine(np.zeros(36), np.eye(36)), "lpips": alex})
    values = {name: named.measure(name, small, small, context) for name in named.METRICS}
    assert values["psnr"] == math.inf
    assert all(math.isnan(values[name]) for name in ("ssim", "ssim_y", "niqe", "lpips"))
    assert named.mean([math.nan, 1.0, 3.0]) == 2.0 and math.isnan(named.mean([math.nan]))
