"""Teachers of several files and views."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import config, models
from kdjax.config import ConfigError
from kdjax.models.ensemble import self_ensemble
from kdjax.teacher import load_teacher
from kdjax.weights import save_model

STUDENT = models.network("dncnn", dict(num_feat=4, depth=2)).init(jax.random.key(0))
IMAGE = jax.random.uniform(jax.random.key(1), (2, 8, 12, 3))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two networks of different families."""
    specs = [("dncnn", dict(num_feat=4, depth=3)), ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=1))]
    paths = []
    for i, (arch, hparams) in enumerate(specs):
        save_model(models.network(arch, hparams).init(jax.random.key(i)), tmp_path / f"{arch}.pth")
        paths.append(str(tmp_path / f"{arch}.pth"))
    return paths


@pytest.mark.parametrize(("mix", "parts"), [((), (0.5, 0.5)), ((3, 1), (0.75, 0.25))])
def test_several_teachers_are_averaged(files: list[str], mix: tuple, parts: tuple) -> None:
    teacher = load_teacher(config.Teacher(weights=files[0], also=(files[1],), mix=mix), STUDENT)
    output, features = teacher.apply(teacher.params, IMAGE)
    each = [file.model(IMAGE) for file in teacher.files]
    np.testing.assert_allclose(output, parts[0] * each[0][0] + parts[1] * each[1][0], atol=1e-6)
    np.testing.assert_allclose(features["model.1"], each[0][1]["model.1"], atol=1e-6)
    assert all(file.sha256 in teacher.identity for file in teacher.files)


@pytest.mark.parametrize("square", [True, False])
def test_self_ensemble_is_the_mean_of_eight_views(files: list[str], square: bool) -> None:
    teacher = load_teacher(config.Teacher(weights=files[0], self_ensemble=True), STUDENT)
    plain = teacher.model
    image = IMAGE[:, :, :8] if square else IMAGE
    views = []
    for turns in range(4):
        for flip in (False, True):
            view = jnp.rot90(image[:, ::-1] if flip else image, turns, (1, 2))
            restored = jnp.rot90(plain(view)[0], -turns, (1, 2))
            views.append(restored[:, ::-1] if flip else restored)
    output, features = jax.jit(teacher.apply)(teacher.params, image)
    np.testing.assert_allclose(output, np.mean(views, 0), atol=1e-6)
    np.testing.assert_allclose(features["model.1"], plain(image)[1]["model.1"], atol=1e-6)
    assert np.abs(output - plain(image)[0]).max() > 1e-3
    assert "eight" in teacher.identity


def test_self_ensemble_does_not_care_how_its_input_is_turned() -> None:
    model = models.network("dncnn", dict(num_feat=4, depth=3)).init(jax.random.key(3))
    apply = jax.jit(self_ensemble(model.network.make_apply()))
    turned = apply(model.params, IMAGE.swapaxes(1, 2)[:, ::-1])[0]
    np.testing.assert_allclose(turned[:, ::-1].swapaxes(1, 2), apply(model.params, IMAGE)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "set config.teacher.weights"),
        (dict(mix=(1.0, 2.0)), "one positive number per teacher, 1 in all"),
        (dict(mix=(0,)), "one positive number"),
    ],
)
def test_bad_teachers_are_refused(files: list[str], options: dict, message: str) -> None:
    weights = files[0] if options else ""
    with pytest.raises(ConfigError, match=message):
        load_teacher(config.Teacher(weights=weights, **options), STUDENT)


def test_a_teacher_of_grey_images_cannot_teach_colour(tmp_path: Path) -> None:
    grey = models.network("dncnn", dict(num_in_ch=1, num_feat=4, depth=3)).init(jax.random.key(0))
    save_model(grey, tmp_path / "grey.pth")
    with pytest.raises(ConfigError, match="has 1 colour channels, the student 3"):
        load_teacher(config.Teacher(weights=str(tmp_path / "grey.pth")), STUDENT)
