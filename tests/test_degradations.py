"""Noise by its moments over many draws, and by what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.degradations import make_degrade


def draw(spec: dict, count: int = 400) -> np.ndarray:
    """The noise that is added to `count` grey images, in 0..255."""
    degrade = make_degrade(spec)
    keys = jax.random.split(jax.random.key(0), count)
    image = jnp.full((16, 16, 3), 0.5)
    return (np.asarray(jax.vmap(degrade, in_axes=(0, None))(keys, image)) - 0.5) * 255


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(name="awgm", sigma=25.0), "did you mean 'awgn'"),
        (dict(), "unknown degradation None"),
        (dict(name="awgn"), "sigma"),
        (dict(name="awgn", sigma=25.0, sigme=3), "sigme"),
        (dict(name="awgn", sigma=-1.0), "from 0 to 255"),
        (dict(name="awgn", sigma=(0.0, 50.0)), "must be a number"),
        (dict(name="awgn_blind", sigma=(50.0, 0.0)), "low <= high"),
        (dict(name="awgn_blind", sigma=25.0), "two numbers"),
    ],
)
def test_bad_specs_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_degrade(spec)
