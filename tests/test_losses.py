"""Losses against the values and gradients of BasicSR and the guide, and their properties."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_npz

from kdjax import losses
from kdjax.losses import make_criterion
from kdjax.terms.features import adapt

CASES = {  # name in the reference file -> criterion, options, reduction
    "l1": ("l1", {}, jnp.mean),
    "mse": ("mse", {}, jnp.mean),
    "charbonnier_1e-12": ("charbonnier", {"eps": 1e-12}, jnp.mean),
    "charbonnier_1e-3": ("charbonnier", {"eps": 1e-3}, jnp.mean),
    "charbonnier_sum": ("charbonnier", {"eps": 1e-12}, jnp.sum),
    "smooth_l1": ("smooth_l1", {"beta": 1.0}, jnp.mean),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_basicsr(golden: Path, name: str) -> None:
    criterion, options, reduction = CASES[name]
    vectors = load_npz(golden / "losses.npz")
    compare = make_criterion(criterion, **options)
    loss = jax.jit(jax.value_and_grad(lambda x: reduction(compare(x, vectors["target"]))))
    value, grad = loss(vectors["pred"])
    np.testing.assert_allclose(value, vectors[name], rtol=1e-5)
    np.testing.assert_allclose(grad, vectors[f"{name}:grad"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_smooth_l1_is_continuous_and_linear_outside_beta(beta: float) -> None:
    d = jnp.array([0.0, 0.999 * beta, 1.001 * beta, 3 * beta])
    values = make_criterion("smooth_l1", beta=beta)(d, jnp.zeros(4))
    np.testing.assert_allclose(values[1], values[2], rtol=5e-3)
    np.testing.assert_allclose(values[3], 2.5 * beta, rtol=1e-6)


@pytest.mark.parametrize("name", ["l1", "mse", "charbonnier", "smooth_l1"])
def test_bfloat16_images_are_compared_in_float32_and_equal_ones_have_a_finite_gradient(name: str) -> None:
    x = jnp.linspace(0, 1, 8, dtype=jnp.bfloat16)
    compare = make_criterion(name)
    assert compare(x, x).dtype == jnp.float32
    assert np.isfinite(np.asarray(jax.grad(lambda a: compare(a, x).sum())(x), np.float32)).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("charbonier", {}, "did you mean 'charbonnier'"),
        ("l1", {"eps": 1e-3}, "no option 'eps'"),
        ("charbonnier", {"eps": 0.0}, "must be a positive number"),
        ("charbonnier", {"eps": True}, "must be a positive number"),
        ("charbonnier", {"eps": "x"}, "eps='x' must be a positive number"),
    ],
)
def test_bad_criteria_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_criterion(name, **options)


def test_an_option_may_be_a_number_of_numpys() -> None:
    a, b = jnp.array([0.5]), jnp.array([0.2])
    ours, plain = (make_criterion("charbonnier", eps=eps)(a, b) for eps in (np.float32(0.25), 0.25))
    np.testing.assert_array_equal(ours, plain)


# ---- losses of features, softened targets and other bases --------------------------------------------------------

# What the guide's formulas give; name in the reference file -> (loss, argument it is a function of, the fixed one).
REFERENCES = {
    "attention": (functools.partial(losses.attention, mode="guide"), "feat_student", "feat_teacher"),
    "attention_wide_teacher": (functools.partial(losses.attention, mode="guide"), "feat_student", "feat_teacher_wide"),
    "feature_plus_attention_0.5": (
        lambda s, t: jnp.mean(losses.mse(s, t)) + 0.5 * losses.attention(s, t, mode="guide"),
        "feat_student",
        "feat_teacher",
    ),
    "soft_target_T3": (
        functools.partial(losses.soft_target_rgb, temperature=3.0, reduction="batchmean"),
        "pred",
        "target",
    ),
    "soft_target_T5": (
        functools.partial(losses.soft_target_rgb, temperature=5.0, reduction="batchmean"),
        "pred",
        "target",
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_value_and_gradient_equal_the_guides(golden: Path, name: str) -> None:
    loss, argument, fixed = REFERENCES[name]
    vectors = load_npz(golden / "losses.npz")
    value, grad = jax.jit(jax.value_and_grad(loss))(vectors[argument], vectors[fixed])
    expected = vectors[f"{name}:grad"]
    np.testing.assert_allclose(value, vectors[name], rtol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())


def test_hint_of_the_guide_is_the_mse_behind_a_1x1_convolution(golden: Path) -> None:
    vectors = load_npz(golden / "losses.npz")
    kernel, bias = vectors["hint_weight_oihw"][:, :, 0, 0].T, vectors["hint_bias"]
    teacher = vectors["feat_teacher_wide"]

    def hint(student: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        adapter = {"kernel": kernel[None, None], "bias": bias}
        return jnp.mean(losses.mse(adapt(adapter, student), teacher))

    value, grads = jax.jit(jax.value_and_grad(hint, argnums=(0, 1, 2)))(vectors["feat_student"], kernel, bias)
    np.testing.assert_allclose(value, vectors["hint"], rtol=1e-5)
    expected = vectors["hint:grad"], vectors["hint:grad_weight_oihw"][:, :, 0, 0].T, vectors["hint:grad_bias"]
    for grad, wanted in zip(grads, expected, strict=True):
        np.testing.assert_allclose(grad, wanted, atol=1e-5 * np.abs(wanted).max())


LOSSES = {
    "attention paper": losses.attention,
    "attention code": functools.partial(losses.attention, mode="code"),
    "affinity": losses.affinity,
    "soft_target_rgb": functools.partial(losses.soft_target_rgb, temperature=3.0),
    "soft_target_spatial": functools.partial(losses.soft_target_spatial, temperature=2.0),
    "laplace_nll": lambda s, t: losses.laplace_nll(s, jnp.float32(0.3), t),
    "wavelet": losses.wavelet,
    "fft": losses.fft,
    "contrastive": lambda s, t: losses.contrastive([s], [t], [[1 - t]], weights=[1.0]),
}
random = np.random.default_rng(0)
OURS, THEIRS = (random.uniform(size=(3, 8, 6, 4)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("name", LOSSES)
def test_properties_of_every_loss(name: str) -> None:
    """A mean over the batch, float32 from bfloat16, finite gradients where it has kinks, and larger when more wrong."""
    loss = jax.jit(LOSSES[name])
    slope_at = jax.jit(jax.value_and_grad(LOSSES[name]))
    value, grad = slope_at(OURS, THEIRS)
    np.testing.assert_allclose(value, np.mean([loss(OURS[i : i + 1], THEIRS[i : i + 1]) for i in range(3)]), rtol=1e-5)
    low = loss(jnp.bfloat16(OURS), jnp.bfloat16(THEIRS))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, value, rtol=0.02)
    direction = grad / jnp.linalg.norm(grad)  # along it the slope is largest, and rounding matters least
    slope = float((loss(OURS + 1e-2 * direction, THEIRS) - loss(OURS - 1e-2 * direction, THEIRS)) / 2e-2)
    assert float(jnp.linalg.norm(grad)) == pytest.approx(slope, rel=0.02)
    for student in (THEIRS, np.zeros_like(OURS)):
        assert np.isfinite(slope_at(student, THEIRS)[1]).all()
    same, far = (float(loss(THEIRS + size * (OURS - THEIRS), THEIRS)) for size in (0, 1))
    assert far > same + 1e-6
    assert name == "laplace_nll" or same == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["soft_target_rgb", "soft_target_spatial", "wavelet", "fft"])
def test_shapes_must_be_equal(name: str) -> None:
    with pytest.raises(ValueError, match=r"equal shape, got \(3, 8, 6, 4\) and \(3, 8, 6, 3\)"):
        LOSSES[name](OURS, THEIRS[..., :3])


@pytest.mark.parametrize("name", ["attention paper", "affinity"])
def test_channel_counts_may_differ_and_sizes_may_not(name: str) -> None:
    assert LOSSES[name](OURS, THEIRS[..., :3]) > 0
    with pytest.raises(ValueError, match=r"equal height and width, got \(8, 6\) and \(7, 6\)"):
        LOSSES[name](OURS, THEIRS[:, :7])


def test_the_guides_attention_vanishes_with_the_resolution_and_the_papers_does_not() -> None:
    values = {}
    for side in (16, 128):
        maps = (random.normal(size=(1, side, side, 8)).astype(np.float32) for _ in range(2))
        ours, theirs = maps
        values[side] = {mode: float(losses.attention(ours, theirs, mode=mode)) for mode in ("guide", "code", "paper")}
    assert values[16]["paper"] == pytest.approx(values[128]["paper"], rel=0.2)
    assert values[16]["guide"] / values[128]["guide"] == pytest.approx(64, rel=0.3)
    assert values[128]["code"] == pytest.approx(1000 * values[128]["guide"], rel=1e-4)


def test_softmax_over_colours_is_half_the_mse_of_colour_differences_at_any_temperature() -> None:
    difference = 0.02 * random.normal(size=(1, 8, 8, 3)).astype(np.float32)
    image = random.uniform(size=(1, 8, 8, 3)).astype(np.float32)
    formula = 0.5 * np.mean(difference.var(-1))
    for temperature in (1.0, 5.0, 20.0):
        value = losses.soft_target_rgb(image + difference, image, temperature=temperature)
        assert float(value) == pytest.approx(formula, rel=0.15)
        assert float(losses.soft_target_rgb(image + 0.3, image, temperature=temperature)) == pytest.approx(0, abs=1e-6)


def test_affinity_is_the_naive_one_without_its_matrix() -> None:
    ours, theirs = (random.normal(size=(2, 5, 7, c)).astype(np.float32) for c in (4, 6))
    expected = []
    for a, b in zip(ours, theirs, strict=True):
        unit = [x.reshape(35, -1) / np.linalg.norm(x.reshape(35, -1), axis=1, keepdims=True) for x in (a, b)]
        expected.append(np.mean((unit[0] @ unit[0].T - unit[1] @ unit[1].T).astype(np.float64) ** 2))
    np.testing.assert_allclose(losses.affinity(ours, theirs), np.mean(expected), rtol=1e-5)
    text = str(jax.make_jaxpr(losses.affinity)(ours, theirs))
    assert "35,35" not in text and "35,4" in text


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_haar_is_orthonormal_and_its_bands_are_what_they_are_called(size: tuple[int, int]) -> None:
    x = random.normal(size=(1, *size, 2)).astype(np.float32)
    bands = losses.haar(x)
    assert {band.shape for band in bands} == {(1, -(-size[0] // 2), -(-size[1] // 2), 2)}
    padded = np.pad(x, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)), mode="edge")
    np.testing.assert_allclose(sum(np.sum(np.square(band)) for band in bands), np.sum(padded**2), rtol=1e-5)
    rows = np.tile(np.array([1.0, -1.0])[:, None, None], (4, 6, 1))[None]  # changes along the height only
    energies = [float(np.abs(band).max()) for band in losses.haar(rows)]
    assert energies == [0, 2, 0, 0]
    assert [float(np.abs(band).max()) for band in losses.haar(rows.swapaxes(1, 2))] == [0, 0, 2, 0]


def test_wavelet_weights_its_bands() -> None:
    rows = np.tile(np.array([1.0, -1.0])[:, None, None], (4, 8, 1))[None].astype(np.float32)
    zero = np.zeros_like(rows)
    assert float(losses.wavelet(rows, zero, levels=1, bands=(1, 0, 1, 1))) == 0
    assert float(losses.wavelet(rows, zero, levels=1, bands=(0, 0.5, 0, 0))) == 1
    flat = np.ones_like(rows)  # only in the last level's ll, which doubles at every level
    assert [float(losses.wavelet(flat, zero, levels=n, bands=(1, 1, 1, 1))) for n in (1, 2, 3)] == [2, 4, 8]
    for options in (dict(levels=0), dict(levels=4), dict(bands=(1, 1)), dict(bands=(0, 0, 0, 0))):
        with pytest.raises(ValueError, match=r"levels=|bands="):
            losses.wavelet(rows, zero, **options)


@pytest.mark.parametrize("width", [6, 7])
def test_fft_is_that_of_the_whole_spectrum(width: int) -> None:
    a, b = (random.normal(size=(2, 5, width, 3)) for _ in range(2))
    spectrum = np.fft.fft2(a - b, axes=(1, 2), norm="ortho")
    expected = np.mean(np.abs(spectrum.real) + np.abs(spectrum.imag))
    np.testing.assert_allclose(losses.fft(np.float32(a), np.float32(b)), expected, rtol=1e-5)


def test_laplace_likelihood_is_smallest_at_the_true_width() -> None:
    target = random.laplace(scale=0.3, size=(1, 64, 64, 1)).astype(np.float32)
    values = {b: float(losses.laplace_nll(jnp.zeros_like(target), jnp.float32(b), target)) for b in (0.2, 0.3, 0.45)}
    assert min(values, key=values.get) == 0.3


def test_contrastive_prefers_what_is_far_from_the_negatives() -> None:
    anchor, positive = [THEIRS + 0.1], [THEIRS]
    near, far = ([[THEIRS + away]] for away in (0.2, 2.0))
    values = [float(losses.contrastive(anchor, positive, negatives, weights=[1.0])) for negatives in (near, far)]
    np.testing.assert_allclose(values, [1.0, 0.1 / 1.9], rtol=1e-4)


def test_teacher_is_better_where_its_error_is_smaller() -> None:
    gt = np.zeros((1, 1, 3, 2), np.float32)
    student = np.array([[0.2, 0.2], [0.1, 0.1], [0.0, 0.3]], np.float32)[None, None]
    teacher = np.array([[0.1, -0.2], [0.1, 0.1], [0.2, 0.2]], np.float32)[None, None]
    assert losses.teacher_is_better(student, teacher, gt)[0, 0, :, 0].tolist() == [1, 0, 0]


def test_psnr_between() -> None:
    a = np.zeros((2, 4, 4, 3), np.float32)
    b = a + np.array([0.1, 0.01])[:, None, None, None]
    assert float(losses.psnr_between(a, b)) == pytest.approx(30, rel=1e-4)
    assert float(losses.psnr_between(a, a)) == 100
