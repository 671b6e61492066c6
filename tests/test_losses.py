"""Criteria against BasicSR's values and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_npz

from kdjax.losses import make_criterion

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
    value, grad = jax.value_and_grad(lambda x: reduction(compare(x, vectors["target"])))(vectors["pred"])
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
        ("charbonnier", {"eps": 0.0}, "must be positive"),
    ],
)
def test_bad_criteria_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_criterion(name, **options)
