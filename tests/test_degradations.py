"""Degradations: noise by its moments, the parts of Real-ESRGAN's by reference values, its draws by frequencies."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import load_npz

from kdjax.degradations import (
    Window,
    draw_choices,
    is_8_bit,
    kernels,
    make_degrade,
    noise,
    preset,
    realesrgan,
    usm_sharpen,
)
from kdjax.degradations.canvas import reflected, whole
from kdjax.degradations.jpeg import jpeg
from kdjax.degradations.resize import MODES, num_taps, resize, resize_taps
from kdjax.ops import to_float, to_uint8

SETTINGS = realesrgan.Settings()


def draw(spec: dict, count: int = 400, value: float = 0.5) -> np.ndarray:
    """The noise that is added to `count` grey images, in 0..255."""
    degrade = make_degrade(spec)
    keys = jax.random.split(jax.random.key(0), count)
    image = jnp.full((16, 16, 3), value)
    return (np.asarray(jax.vmap(degrade, in_axes=(0, None))(keys, image)) - value) * 255


# ---- noise alone -----------------------------------------------------------------------------------------------


def test_awgn_has_the_sigma_it_is_given_and_is_white() -> None:
    noise = draw(dict(name="awgn", sigma=25.0))
    assert noise.std() == pytest.approx(25, rel=0.01)
    assert abs(noise.mean()) < 0.2
    flat = noise.reshape(len(noise), -1)
    assert abs(np.corrcoef(flat[:, 0], flat[:, 1])[0, 1]) < 0.2  # channels of one pixel
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1])) < 3  # neighbours: 625 if they were equal


def test_awgn_blind_draws_sigma_uniformly_per_image() -> None:
    sigmas = draw(dict(name="awgn_blind", sigma=(10.0, 50.0))).std(axis=(1, 2, 3))
    assert 9 < sigmas.min() < 12 and 48 < sigmas.max() < 53
    assert sigmas.mean() == pytest.approx(30, abs=2)
    assert sigmas.std() == pytest.approx(40 / np.sqrt(12), rel=0.1)


def test_results_are_not_clipped() -> None:
    noise = draw(dict(name="awgn", sigma=250.0), count=2)
    assert noise.min() < -200 and noise.max() > 200


@pytest.mark.once
@pytest.mark.parametrize("value", [0.1, 0.9])
def test_sensor_noise_grows_with_the_brightness(value: float) -> None:
    noise = draw(dict(name="poisson_gauss", gain=(0.004, 0.004), read_sigma=(5.0, 5.0)), value=value)
    assert noise.std() == pytest.approx(255 * math.sqrt(0.004 * value + (5 / 255) ** 2), rel=0.02)
    assert abs(noise.mean()) < 0.2


def test_sensor_noise_draws_its_gain_log_uniformly() -> None:
    noise = draw(dict(name="poisson_gauss", gain=(1e-4, 1e-2), read_sigma=(0.0, 0.0)))
    gains = np.log10((noise / 255).var((1, 2, 3)) / 0.5)
    assert -4.1 < gains.min() < -3.8 and -2.2 < gains.max() < -1.9
    assert np.mean(gains < -3) == pytest.approx(0.5, abs=0.08)


def test_jpeg_is_8_bit_data_of_drawn_quality() -> None:
    image = np.random.default_rng(0).uniform(size=(24, 17, 1)).astype(np.float32).repeat(3, -1)
    degrade = jax.jit(jax.vmap(make_degrade(preset("jpeg")), in_axes=(0, None)))
    lq = np.asarray(degrade(jax.random.split(jax.random.key(0), 50), image))
    np.testing.assert_array_equal(lq, to_float(to_uint8(lq)))
    assert is_8_bit(preset("jpeg"))
    errors = np.abs(lq - image).mean((1, 2, 3))
    assert errors.max() > 1.5 * errors.min()


# ---- parts, against reference values ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(golden: Path) -> dict[str, np.ndarray]:
    return load_npz(golden / "degradations.npz")


KERNELS = [*(f"gauss_{i}" for i in range(4)), *(f"{s}_{i}" for s in ("generalized", "plateau") for i in range(2))]


@pytest.mark.parametrize("name", KERNELS)
def test_bivariate_kernels_equal_basicsr(name: str, vectors: dict) -> None:
    size, sigma_x, sigma_y, theta, *beta = vectors[f"{name}:params"]
    side, shape = len(vectors[name]), ("gauss", "generalized", "plateau").index(name.split("_")[0])
    kernel = kernels.bivariate_kernel(side, int(size), (sigma_x, sigma_y), theta, shape, *beta)
    np.testing.assert_allclose(kernel, vectors[name], atol=1e-6)


@pytest.mark.parametrize("name", ["sinc_0", "sinc_1", "sinc_2"])
def test_sinc_kernels_equal_basicsr(name: str, vectors: dict) -> None:
    cutoff, size = vectors[f"{name}:params"]
    kernel = kernels.sinc_kernel(21, int(size), jnp.float32(cutoff))
    np.testing.assert_allclose(kernel, vectors[name], atol=1e-6, rtol=4e-6)  # its largest value is 0.55
    assert float(kernel.sum()) == pytest.approx(1, abs=3e-6)  # 441 numbers in float32, added in an order of XLA's


def test_j1_is_scipys() -> None:
    for side in (7, 21, 51):
        x = np.linspace(0, math.pi * math.hypot(side // 2, side // 2), 2000, dtype=np.float32)
        np.testing.assert_allclose(kernels._j1(jnp.asarray(x), side + 24), scipy.special.j1(x), atol=5e-6)


def test_filter2d_equals_basicsr_also_on_a_canvas(vectors: dict) -> None:
    images = jnp.asarray(vectors["image"].transpose(0, 3, 1, 2))
    blurred = [kernels.filter2d(x, k, x.shape[1:]) for x, k in zip(images, vectors["filter2d:kernels"], strict=True)]
    np.testing.assert_allclose(np.stack(blurred).transpose(0, 2, 3, 1), vectors["filter2d"], atol=1e-5)
    canvas = jnp.pad(images[0], ((0, 0), (0, 19), (0, 8)), constant_values=7.0)  # beyond the image, whatever it is
    there = jax.jit(kernels.filter2d)(canvas, vectors["filter2d:kernels"][0], images.shape[2:])
    np.testing.assert_allclose(there[:, :45, :62], blurred[0], atol=1e-5)


def test_delta_changes_nothing_and_images_may_be_smaller_than_the_kernel() -> None:
    image = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 5, 4)), jnp.float32)
    delta = kernels.bivariate_kernel(21, 21, (0.01, 0.01), 0.0)
    np.testing.assert_allclose(kernels.filter2d(image, delta, (5, 4)), image, atol=1e-6)
    assert np.isfinite(kernels.filter2d(image, kernels.sinc_kernel(21, 21, 2.0), (5, 4))).all()
    np.testing.assert_array_equal(reflected(jnp.arange(-4, 9), 4), [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2])
    np.testing.assert_array_equal(reflected(jnp.arange(-4, 9), 1), np.zeros(13))


@pytest.mark.parametrize("what", ["0.37", "0.8", "1.45", "to32x40"])
@pytest.mark.parametrize("mode", MODES)
def test_resize_equals_torch(mode: str, what: str, vectors: dict) -> None:
    expected = vectors[f"resize_{mode}_{what}"]
    images = jnp.asarray(vectors["image"].transpose(0, 3, 1, 2))
    out = expected.shape[1:3]
    factor = tuple(n / m for n, m in zip(out, (45, 62), strict=True)) if what.startswith("to") else (float(what),) * 2
    canvas = jnp.pad(images, ((0, 0), (0, 0), (0, 3), (0, 9)), constant_values=7.0)
    axes = zip((45, 62), (out[0] + 5, out[1] + 2), out, factor, map(num_taps, (45, 62), out), strict=True)
    taps = [jax.jit(resize_taps, static_argnums=(2, 5))(list(MODES).index(mode), *axis) for axis in axes]
    resized = jax.vmap(lambda x: resize(x, *taps))(canvas)[:, :, : out[0], : out[1]]
    np.testing.assert_allclose(resized.transpose(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_equals_diffjpeg(quality: int, vectors: dict) -> None:
    images = jnp.asarray(vectors["image"].transpose(0, 3, 1, 2))
    expected = vectors[f"jpeg_q{quality}"]
    difference = np.abs(jax.vmap(lambda x: jpeg(x, quality))(images).transpose(0, 2, 3, 1) - expected)
    # A coefficient that lies half-way between two integers may be rounded otherwise on another processor: one block.
    assert np.mean(difference > 1e-5) < 0.012 and difference.max() < 2 / 255
    canvas = jnp.pad(images[0], ((0, 0), (0, 20), (0, 1)), constant_values=1.0)
    part = jpeg(canvas, quality, (45, 62))[:, :45, :62]
    np.testing.assert_allclose(part.transpose(1, 2, 0), expected[0], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_of_quality_100_is_finite_and_nearly_lossless(channels: int) -> None:
    smooth = jnp.broadcast_to(jnp.linspace(0.1, 0.9, 32)[None, :, None], (channels, 32, 32))
    assert float(jnp.abs(jpeg(smooth, 100.0) - smooth).max()) < 0.5 / 255
    assert float(jnp.abs(jpeg(smooth, 10.0) - smooth).max()) > 2 / 255


def test_jpeg_passes_gradients_through_rounding_only_if_asked() -> None:
    image = jnp.asarray(np.random.default_rng(0).uniform(0.3, 0.7, size=(1, 16, 16)), jnp.float32)
    grads = [
        jax.grad(lambda x, through=through: jnp.sum(jpeg(x, 75.0, straight_through=through) ** 2))(image)
        for through in (False, True)
    ]
    assert float(jnp.abs(grads[0]).max()) == 0
    # As if nothing were rounded: twice the image.
    assert np.corrcoef(np.asarray(grads[1]).ravel(), np.asarray(image).ravel())[0, 1] > 0.9


def test_usm_equals_real_esrgan(vectors: dict) -> None:
    sharp = usm_sharpen(jnp.asarray(vectors["usm_sharp:image"][0]))
    np.testing.assert_allclose(sharp, vectors["usm_sharp"][0], atol=1e-5)


# ---- noise fields ----------------------------------------------------------------------------------------------


def test_uniform_field_is_threefry_and_does_not_depend_on_the_canvas() -> None:
    key = jax.random.key(5)
    field = np.asarray(noise.uniform(key, (3, 300, 200)))
    np.testing.assert_array_equal(noise.uniform(key, (3, 7, 9)), field[:, :7, :9])
    assert scipy.stats.kstest(field.ravel(), "uniform").pvalue > 0.01
    assert np.abs(np.corrcoef(field.reshape(3, -1)) - np.eye(3)).max() < 0.02
    assert abs(np.corrcoef(field[0, 1:].ravel(), field[0, :-1].ravel())[0, 1]) < 0.02
    other = np.asarray(noise.uniform(jax.random.key(6), (3, 300, 200)))
    assert abs(np.corrcoef(other.ravel(), field.ravel())[0, 1]) < 0.02
    from jax.extend.random import threefry_2x32

    counter = jnp.array([2 * 2**16 + 3, 0], jnp.uint32)  # of row 2, column 3
    words = np.asarray(threefry_2x32(jax.random.key_data(key), counter))
    np.testing.assert_allclose(field[:2, 2, 3], ((words >> 9) + 0.5) / 2**23, rtol=1e-6)


@pytest.mark.parametrize("mean", [0.0, 0.03, 0.7, 5.0, 9.9, 10.1, 40.0, 256.0])
def test_poisson_quantile_is_scipys(mean: float) -> None:
    u = (np.arange(100_000, dtype=np.float64) + 0.5) / 100_000
    counts = np.asarray(noise.poisson_quantile(jnp.asarray(u, jnp.float32), jnp.float32(mean)))
    expected = scipy.stats.poisson.ppf(u, mean) if mean else np.zeros_like(u)
    assert np.mean(counts != expected) < 0.003 and np.abs(counts - expected).max() <= 1
    assert counts.mean() == pytest.approx(mean, abs=0.002 * (mean + 1))
    top = float(noise.poisson_quantile(jnp.float32(1 - 2.0**-24), jnp.float32(mean)))
    assert top <= (scipy.stats.poisson.ppf(1 - 2.0**-24, mean) if mean else 0)


def test_gaussian_noise_has_its_sigma_and_is_grey_where_it_should_be() -> None:
    image = jnp.zeros((3, 128, 128))
    for gray in (False, True):
        field = np.asarray(noise.gaussian_noise(jax.random.key(1), image, 20.0, gray)) * 255
        assert field.std() == pytest.approx(20, rel=0.02) and abs(field.mean()) < 0.5
        assert np.array_equal(field[0], field[1]) == gray


@pytest.mark.once
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 200, 256])
def test_poisson_noise_counts_levels_as_basicsr(levels: int) -> None:
    """vals is 2^ceil(log2(number of levels)), and the variance of the noise is scale^2 x / vals."""
    values = np.linspace(40, 255, levels).round().astype(np.float32)
    image = jnp.asarray(np.resize(values, (1, 128, 128)).repeat(3, 0) / 255)
    canvas = jnp.pad(image, ((0, 0), (0, 5), (0, 0)), constant_values=0.1)  # a level that is not in the image
    vals = 2 ** math.ceil(math.log2(levels))
    field = np.asarray(noise.poisson_noise(jax.random.key(2), canvas, 2.0, False, (128, 128)))[:, :128]
    assert field.var() == pytest.approx(4 * float(image.mean()) / vals, rel=0.05)
    assert abs(field.mean()) < 4 * 2 * math.sqrt(1 / vals / field.size)
    grey = np.asarray(noise.poisson_noise(jax.random.key(2), canvas, 2.0, True, (128, 128)))[:, :128]
    np.testing.assert_array_equal(grey, np.broadcast_to(grey[:1], grey.shape))


# ---- Real-ESRGAN: what is drawn --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> realesrgan.Choices:
    keys = jax.random.split(jax.random.key(0), 3000)
    choices, _ = jax.jit(jax.vmap(functools.partial(realesrgan.draw, settings=SETTINGS)))(keys)
    return jax.tree.map(np.asarray, choices)


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    return scipy.stats.kstest(values, "uniform", (low, high - low)).pvalue > 0.001


@pytest.mark.once
@pytest.mark.parametrize("number", [1, 2])
def test_draws_of_a_round_have_their_frequencies_and_ranges(number: int, drawn: realesrgan.Choices) -> None:
    stage, suffix = (drawn.first, "") if number == 1 else (drawn.second, "2")
    option = lambda name: getattr(SETTINGS, name + suffix)  # noqa: E731
    np.testing.assert_allclose(stage.kernel.sum((1, 2)), 1, atol=1e-5)
    up, down, keep = stage.factor > 1, stage.factor < 1, stage.factor == 1
    np.testing.assert_allclose([up.mean(), down.mean(), keep.mean()], option("resize_prob"), atol=0.03)
    low, high = option("resize_range")
    assert is_uniform(stage.factor[up], 1, high) and is_uniform(stage.factor[down], low, 1)
    np.testing.assert_allclose(np.bincount(stage.mode, minlength=3) / len(stage.mode), 1 / 3, atol=0.03)
    assert stage.is_gaussian.mean() == pytest.approx(option("gaussian_noise_prob"), abs=0.03)
    assert stage.gray.mean() == pytest.approx(option("gray_noise_prob"), abs=0.03)
    assert is_uniform(stage.sigma, *option("noise_range"))
    assert is_uniform(stage.poisson_scale, *option("poisson_scale_range"))
    assert is_uniform(stage.quality, *option("jpeg_range"))


def test_draws_are_independent_of_each_other(drawn: realesrgan.Choices) -> None:
    """All but the two strengths of noise, of which one is used."""
    both = [(number, name, getattr(stage, name)) for number, stage in enumerate((drawn.first, drawn.second))
            for name in ("blurs", "mode", "factor", "is_gaussian", "sigma", "gray", "quality")]  # fmt: skip
    values = [value for number, name, value in both if (number, name) != (0, "blurs")]  # which are all true
    values += [drawn.mode, drawn.has_sinc, drawn.jpeg_first, drawn.sinc.max((1, 2))]
    values += [drawn.first.kernel.max((1, 2)), drawn.second.kernel.max((1, 2))]
    correlations = np.abs(np.corrcoef(values) - np.eye(len(values)))
    assert correlations.max() < 0.08


def test_draws_of_kernels_and_order(drawn: realesrgan.Choices) -> None:
    ringing = (drawn.first.kernel.min((1, 2)) < -1e-4).mean()  # only sinc filters have negative values
    assert ringing == pytest.approx(SETTINGS.sinc_prob, abs=0.03)
    assert drawn.first.blurs.all() and drawn.second.blurs.mean() == pytest.approx(0.8, abs=0.03)
    assert drawn.has_sinc.mean() == pytest.approx(0.8, abs=0.03)
    assert drawn.jpeg_first.mean() == pytest.approx(0.5, abs=0.03)
    # The part of a sinc kernel that is used has 7, 9, ..., 21 pixels, equally often.
    used = 2 * np.abs(drawn.sinc).max(1)[:, :11].astype(bool).sum(1) - 1
    np.testing.assert_allclose(np.bincount(used, minlength=22)[7::2] / len(used), 1 / 8, atol=0.03)
    u = np.linspace(0, 1, 101)
    np.testing.assert_allclose(realesrgan._beta(False, u, (0.5, 4.0)), 0.5 + 0.5 * u, rtol=1e-6)
    np.testing.assert_allclose(realesrgan._beta(True, u, (0.5, 4.0)), 1 + 3 * u)
    np.testing.assert_array_equal(realesrgan._beta(False, u, (1.0, 2.0)), np.ones(101))


@pytest.mark.once
def test_isotropic_kernels_are_round_and_others_are_not() -> None:
    def kernel(key: jax.Array, name: str) -> jax.Array:
        numbers = iter(jax.random.uniform(key, (10,)))
        return realesrgan._draw_kernel(numbers, 21, 21, (name,), (1.0,), 0.0, (0.5, 3.0), (0.5, 4.0), (1.0, 2.0))

    keys = jax.random.split(jax.random.key(3), 50)
    for name in kernels.KINDS:
        drawn = np.asarray(jax.jit(jax.vmap(functools.partial(kernel, name=name)))(keys))
        differ = np.abs(drawn - drawn.transpose(0, 2, 1)).max((1, 2)) > 1e-5
        assert differ.mean() < 0.01 if name.endswith("_iso") or name == "iso" else differ.mean() > 0.9


# ---- Real-ESRGAN: what is done ---------------------------------------------------------------------------------

SHAPE = (48, 36, 3)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    low = np.random.default_rng(0).uniform(size=(6, 6, 5, 3))
    return np.stack([scipy.ndimage.zoom(image, (8, 7.2, 1), order=1) for image in low]).astype(np.float32)


@pytest.fixture(scope="module")
def degrade() -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """The process over a batch; what a CPU does: one sample after another. Images as small as these have one canvas."""
    return jax.jit(jax.vmap(make_degrade(preset("realesrgan"))))


def side_by_side(keys: jax.Array, images: np.ndarray, scale: int) -> np.ndarray:
    """What accelerators do: all samples at once, on the largest canvas."""

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        choices, noise_key = realesrgan.draw(key, SETTINGS)
        window = whole((image.shape[0] // scale, image.shape[1] // scale))
        return realesrgan.apply_on(choices, noise_key, image, SETTINGS, scale, window, small_canvases=False)

    return np.asarray(jax.jit(jax.vmap(one))(keys, images))


def assert_almost_equal(a: np.ndarray, b: np.ndarray) -> None:
    """But for sums in another order, after which a rounding may fall to the other side."""
    difference = np.abs(np.asarray(a) - np.asarray(b))
    assert np.mean(difference > 1e-6) < 0.005 and difference.max() < 3 / 255


@pytest.mark.once
@pytest.mark.parametrize("scale", [1, 2])
def test_process_makes_8_bit_images_of_the_right_size(scale: int, degrade: Callable, images: np.ndarray) -> None:
    keys = jax.random.split(jax.random.key(0), len(images))
    lq = np.asarray(degrade(keys, images) if scale == 1 else side_by_side(keys, images, scale))
    assert lq.shape == (len(images), SHAPE[0] // scale, SHAPE[1] // scale, 3)
    np.testing.assert_array_equal(lq, to_float(to_uint8(lq)))
    assert is_8_bit(preset("realesrgan")) and not is_8_bit(preset("poisson_gauss"))
    small = images.reshape(len(images), 48 // scale, scale, 36 // scale, scale, 3).mean((2, 4))
    agreement = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(lq, small, strict=True)]
    assert min(agreement) > 0.4 and max(agreement) < 0.999, agreement


@pytest.mark.once
def test_a_sample_is_the_same_alone_in_any_batch_and_on_any_canvas(
    degrade: Callable, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = jax.random.split(jax.random.key(1), len(images))
    batch = np.asarray(degrade(keys, images))
    np.testing.assert_array_equal(degrade(keys[2:4], images[2:4]), batch[2:4])
    assert_almost_equal(side_by_side(keys, images, 1), batch)
    for name in ("_FIRST_CANVASES", "_SECOND_CANVASES"):
        monkeypatch.setattr(realesrgan, name, (0.6, 1.0))
    monkeypatch.setattr(realesrgan, "_LEAST", 0)  # several canvases for these small images as well
    one = jax.jit(make_degrade(preset("realesrgan")))
    assert_almost_equal([one(key, image) for key, image in zip(keys, images, strict=True)], batch)


@pytest.mark.once
def test_a_window_is_a_part_of_the_whole(degrade: Callable, images: np.ndarray) -> None:
    keys = jax.random.split(jax.random.key(1), len(images))
    starts = np.array([[0, 0], [32, 20], [17, 3], [31, 19], [15, 16], [16, 7], [5, 20], [32, 0]])[: len(images)]
    make = make_degrade(preset("realesrgan"))
    windows = jax.jit(jax.vmap(lambda key, image, start: make(key, image, Window(start, (16, 16)))))
    batch = np.asarray(degrade(keys, images))
    parts = [x[top : top + 16, left : left + 16] for x, (top, left) in zip(batch, starts, strict=True)]
    assert_almost_equal(windows(keys, images, starts), parts)


@pytest.mark.once
def test_three_devices_degrade_as_one(degrade: Callable, images: np.ndarray) -> None:
    keys = jax.random.split(jax.random.key(1), len(images))
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    spread = degrade(jax.device_put(keys, sharding), jax.device_put(images, sharding))
    assert_almost_equal(spread, degrade(keys, images))


def one_after_another(choices: realesrgan.Choices, key: jax.Array, image: jax.Array) -> jax.Array:
    """The process of Real-ESRGAN as its training code reads, on arrays of exactly the size of the image."""
    height, width = image.shape[:2]
    first_key, second_key = jax.random.split(key)
    clip = lambda x: jnp.clip(x, 0, 1)  # noqa: E731

    def resized(x: jax.Array, mode: int, out: tuple[int, int], factor: float | None = None) -> jax.Array:
        by = (factor, factor) if factor else tuple(new / old for new, old in zip(out, x.shape[1:], strict=True))
        axes = zip(x.shape[1:], out, out, by, map(num_taps, x.shape[1:], out), strict=True)
        return resize(x, *(resize_taps(mode, *axis) for axis in axes))

    def noisy(x: jax.Array, stage: realesrgan.Stage, key: jax.Array) -> jax.Array:
        if stage.is_gaussian:
            return clip(x + noise.gaussian_noise(key, x, stage.sigma, stage.gray))
        return clip(x + noise.poisson_noise(key, x, stage.poisson_scale, stage.gray, x.shape[1:]))

    first, second = choices.first, choices.second
    x = image.transpose(2, 0, 1)
    x = kernels.filter2d(x, first.kernel, x.shape[1:])
    x = resized(x, first.mode, (int(height * first.factor), int(width * first.factor)), float(first.factor))
    x = jpeg(noisy(x, first, first_key), first.quality)
    if second.blurs:
        x = kernels.filter2d(x, second.kernel, x.shape[1:])
    x = resized(x, second.mode, (int(height * second.factor), int(width * second.factor)))
    x = noisy(x, second, second_key)
    if choices.jpeg_first:
        x = jpeg(clip(x), second.quality)
    x = resized(x, choices.mode, (height, width))
    if choices.has_sinc:
        x = kernels.filter2d(x, choices.sinc, x.shape[1:])
    if not choices.jpeg_first:
        x = jpeg(clip(x), second.quality)
    return (jnp.round(clip(x) * 255) / 255).transpose(1, 2, 0)


@pytest.mark.once
def test_process_is_that_of_real_esrgan_step_by_step(degrade: Callable, images: np.ndarray) -> None:
    keys = jax.random.split(jax.random.key(1), len(images))
    batch = np.asarray(degrade(keys, images))
    kinds = set()
    for i in (2, 3):
        choices, noise_key = (
            jax.device_get(realesrgan.draw(keys[i], SETTINGS)[0]),
            realesrgan.draw(keys[i], SETTINGS)[1],
        )
        kinds |= {("order", bool(choices.jpeg_first)), ("noise", bool(choices.first.is_gaussian))}
        # Compiled as a whole, with these choices in it: a hundred small programs would take longer.
        by_hand = jax.jit(functools.partial(one_after_another, choices, noise_key))
        assert_almost_equal(by_hand(images[i]), batch[i])
    assert len(kinds) == 4  # both orders, both kinds of noise


def test_choices_can_be_told_of_a_sample() -> None:
    spec, key = dict(name="awgn_blind", sigma=(5.0, 50.0)), jax.random.key(3)
    lq = make_degrade(spec)(key, jnp.full((64, 64, 3), 0.5))
    assert float(lq.std() * 255) == pytest.approx(float(draw_choices(spec, key)["sigma"]), rel=0.03)
    assert isinstance(draw_choices(preset("realesrgan"), key), realesrgan.Choices)


@pytest.mark.once
def test_settings_that_do_nothing_change_nothing(images: np.ndarray) -> None:
    nothing = dict(
        sinc_prob=0.0, blur_sigma=(0.01, 0.01), kernel_list=("iso",), kernel_prob=(1.0,), resize_range=(1.0, 1.0),
        gaussian_noise_prob=1.0, noise_range=(0.0, 0.0), jpeg_range=(100.0, 100.0), second_blur_prob=0.0,
        resize_range2=(1.0, 1.0), gaussian_noise_prob2=1.0, noise_range2=(0.0, 0.0), jpeg_range2=(100.0, 100.0),
        final_sinc_prob=0.0,
    )  # fmt: skip
    grey = np.broadcast_to(images[0].mean(-1, keepdims=True), images[0].shape)  # chroma is halved whatever is set
    lq = jax.jit(make_degrade(preset("realesrgan", **nothing)))(jax.random.key(0), jnp.asarray(grey))
    assert np.abs(np.asarray(lq) - grey).max() < 1.01 / 255


# ---- configs ---------------------------------------------------------------------------------------------------


def test_a_preset_is_complete_and_its_overrides_count() -> None:
    spec = preset("realesrgan", noise_range=(1.0, 15.0))
    assert spec["name"] == "realesrgan" and spec["noise_range"] == (1.0, 15.0) and spec["jpeg_range2"] == (30.0, 95.0)
    assert len(spec) == 31
    make_degrade({key: list(value) if isinstance(value, tuple) else value for key, value in spec.items()})
    assert preset("awgn", sigma=25.0) == dict(name="awgn", sigma=25.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(name="awgm", sigma=25.0), "did you mean 'awgn'"),
        (dict(), "unknown degradation None"),
        (dict(name="awgn"), "degradation 'awgn' needs sigma"),
        (dict(name="awgn", sigma=25.0, sigme=3), "no setting 'sigme'; did you mean 'sigma'"),
        (dict(name="awgn", sigma=-1.0), "from 0 to 255"),
        (dict(name="awgn", sigma=(0.0, 50.0)), "must be a number"),
        (dict(name="awgn_blind", sigma=(50.0, 0.0)), "low <= high"),
        (dict(name="awgn_blind", sigma=25.0), "two numbers"),
        (dict(name="poisson_gauss", gain=(0.0, 1.0)), "gain"),
        (dict(name="jpeg", quality=(0, 95)), "from 1 to 100"),
        (dict(name="realesrgan", noise_rang=(1, 30)), "did you mean 'noise_range'"),
        (dict(name="realesrgan", jpeg_range2=(95, 30)), r"jpeg_range2=\(95, 30\) must be two numbers, low <= high"),
        (dict(name="realesrgan", resize_range=(0.5, 0.9)), "must include 1"),
        (dict(name="realesrgan", resize_prob=(0.5, 0.5)), "scaling up, scaling down and keeping"),
        (dict(name="realesrgan", kernel_prob=(0.5, 0.6)), "sum to 1"),
        (dict(name="realesrgan", kernel_list=("iso", "anisotropic")), "did you mean 'aniso'"),
        (dict(name="realesrgan", kernel_list="iso"), "must be a tuple of kernels"),
        (dict(name="realesrgan", kernel_list2=("iso",)), "kernel_list2 has 1 kernels and kernel_prob2 6"),
        (dict(name="realesrgan", blur_kernel_size=20), "odd number"),
        (dict(name="realesrgan", second_blur_prob=80), "from 0 to 1"),
    ],
)
def test_bad_specs_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_degrade(spec)


@pytest.mark.once
def test_noise_alone_cannot_make_small_images() -> None:
    with pytest.raises(ValueError, match="'awgn' keeps the size of images, but the student upscales 2x"):
        make_degrade(dict(name="awgn", sigma=25.0), scale=2)
