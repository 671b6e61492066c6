"""Restoring many images: any sizes, any number of devices, and a way to end early."""

import jax
import numpy as np
import pytest

from kdjax import models, validation
from kdjax.validation import Sample, Score


@pytest.fixture(scope="module")
def network() -> tuple:
    model = models.network("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)).init(jax.random.key(0))
    return model.network.make_apply(), model.params


def test_every_image_comes_back_once_with_its_own_result(network: tuple) -> None:
    assert jax.device_count() == 4
    rng = np.random.default_rng(0)
    sizes = [(5, 6), (6, 5), (5, 6), (4, 4), (5, 6), (5, 6), (5, 6), (6, 5)]
    images = [rng.random((*size, 3), dtype=np.float32) for size in sizes]
    outputs = dict(validation.restore(*network, images, [0.0] * len(images)))
    assert sorted(outputs) == list(range(len(images)))
    apply, params = network
    for position, image in enumerate(images):
        expected = np.round(np.clip(apply(params, image[None])[0][0], 0, 1) * 255)
        assert outputs[position].shape == (2 * image.shape[0], 2 * image.shape[1], 3)
        assert np.abs(outputs[position] - expected).max() <= 1


def test_it_ends_when_told_to(network: tuple) -> None:
    images = [np.zeros((4, 4, 3), np.float32)] * 12
    going = iter([True, True, False])
    assert len(list(validation.restore(*network, images, [0.0] * 12, keep_going=lambda: next(going)))) == 8


def test_the_input_is_shown_in_the_size_of_gt() -> None:
    lq = np.array([[[-0.1], [0.5]]], np.float32)
    sample = Sample("a", lq, np.zeros((2, 4, 1), np.uint8), 0.0)
    np.testing.assert_array_equal(validation.input_picture(sample)[..., 0], [[0, 0, 128, 128], [0, 0, 128, 128]])


def test_scores_are_averaged_over_images() -> None:
    assert validation.mean_score([Score(20.0, 0.5), Score(30.0, 0.7)]) == Score(25.0, 0.6)


def test_ssim_is_nan_where_its_window_does_not_fit() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    score = validation.score(image, image)
    assert score.psnr == float("inf") and np.isnan(score.ssim)
    assert validation.mean_score([score, Score(30.0, 0.5)]).ssim == 0.5


def test_degraded_samples_are_always_the_same_and_differ_from_each_other() -> None:
    gts = [np.full((8, 8, 3), 100, np.uint8)] * 3
    spec = dict(name="awgn_blind", sigma=(5.0, 50.0))
    samples = validation.degraded_samples(["a", "b", "c"], gts, spec)
    again = validation.degraded_samples(["a", "b"], gts[:2], spec)
    for sample, same in zip(samples, again, strict=False):
        np.testing.assert_array_equal(sample.lq, same.lq)
    sigmas = [sample.lq.std() for sample in samples]
    assert len({round(float(sigma), 4) for sigma in sigmas}) == 3 and 3 / 255 < min(sigmas) < max(sigmas) < 60 / 255
    with pytest.raises(ValueError, match="keeps the size of images"):
        validation.degraded_samples(["a"], gts[:1], spec, scale=2)
