"""Networks that are told the noise level: FFDNet and FDnCNN, and every way in which the level reaches them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weight_files import random_model, state_dict, write, zip_file

import kdjax
from kdjax import assets, config, data, degradations, distill, evaluate, models, restore, validation
from kdjax.models import Model, shrinking
from kdjax.models.ensemble import self_ensemble
from kdjax.noise_level import estimate_sigma
from kdjax.tiles import Restorer, restore_image
from kdjax.training import preparation
from kdjax.weights import WeightsError, load_weights, save_model

FFDNET = dict(num_feat=4, depth=4, unshuffle=2, noise_map=True, residual=False)
PHOTOGRAPHS = sorted(Path(assets.locate("embedded", assets.VAL_PHOTOGRAPHS)).glob("*.png"))


@pytest.fixture(scope="module")
def ffdnet() -> Model:
    return random_model("dncnn", FFDNET)


@pytest.fixture(scope="module")
def teller() -> Model:
    """A network whose image is sigma / 255 everywhere: it says what it is told."""
    model = random_model("dncnn", dict(num_feat=1, depth=2, noise_map=True, residual=False))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.params)
    params["model"]["0"]["kernel"][1, 1, 3] = 1
    params["model"]["2"]["kernel"][1, 1] = 1
    return dataclasses.replace(model, params=params)


@pytest.fixture(scope="module")
def teller_file(teller: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teller") / "teller.pth"
    save_model(teller, path)
    return path


def told(image: np.ndarray) -> np.ndarray:
    """What a teller was told, of its float or uint8 image."""
    return np.asarray(image)[..., :1].mean((-3, -2, -1)) * (1 if image.dtype == np.uint8 else 255)


# ---- files -------------------------------------------------------------------------------------------------------


def by_definition(state: dict[str, np.ndarray], image: np.ndarray, sigma: np.ndarray, factor: int) -> np.ndarray:
    """FFDNet as KAIR writes it, in NumPy and double precision: pad, un-shuffle, append the map, convolve, shuffle."""
    b, h, w, c = image.shape
    x = np.pad(image.astype(np.float64), ((0, 0), (0, -h % factor), (0, -w % factor), (0, 0)), mode="edge")
    rows, columns = x.shape[1] // factor, x.shape[2] // factor
    x = x.reshape(b, rows, factor, columns, factor, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, rows, columns, -1)
    x = np.concatenate([x, np.broadcast_to(sigma.reshape(-1, 1, 1, 1) / 255, (b, rows, columns, 1))], -1)
    indices = sorted({int(key.split(".")[1]) for key in state})
    for index in indices:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        weight = state[f"model.{index}.weight"].astype(np.float64)
        x = np.einsum("bhwiyx,oiyx->bhwo", windows, weight) + state[f"model.{index}.bias"]
        x = x if index == indices[-1] else np.maximum(x, 0)
    x = x.reshape(b, rows, columns, c, factor, factor).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, rows * factor, columns * factor, c)[:, :h, :w]


@pytest.mark.versions
@pytest.mark.parametrize("size", [(10, 12), (9, 7), (1, 2)])
@pytest.mark.parametrize(
    ("hparams", "factor"),
    [
        (FFDNET, 2),  # FFDNet
        (FFDNET | dict(num_in_ch=1, num_feat=64, depth=15), 2),  # the published grey one
        (FFDNET | dict(unshuffle=1), 1),  # FDnCNN
        (FFDNET | dict(num_in_ch=1, unshuffle=1), 1),
    ],
)
def test_a_file_with_a_noise_map_is_ffdnet_or_fdncnn(
    hparams: dict, factor: int, size: tuple[int, int], tmp_path: Path
) -> None:
    state = state_dict(random_model("dncnn", hparams))
    loaded = load_weights(write(tmp_path, zip_file(state)))  # another program's: it says nothing about itself
    assert {name: loaded.model.hparams[name] for name in hparams} == hparams and loaded.layout == "KAIR"
    assert not any("un-shuffled" in note for note in loaded.notes)
    rng = np.random.default_rng(0)
    image = rng.random((2, *size, loaded.model.network.channels), np.float32)
    sigma = np.array([5.0, 50.0], np.float32)
    expected = by_definition(state, image, sigma, factor)
    output, _ = loaded.model(jnp.asarray(image), jnp.asarray(sigma))
    np.testing.assert_allclose(output, expected, atol=1e-5 * np.abs(expected).max())
    one, _ = loaded.model(jnp.asarray(image[1:]), 50.0)
    np.testing.assert_allclose(one, expected[1:], atol=1e-5 * np.abs(expected).max())


def test_what_such_a_file_may_say_about_itself(tmp_path: Path) -> None:
    for hparams in (FFDNET, FFDNET | dict(residual=True), FFDNET | dict(noise_map=False)):
        model = random_model("dncnn", hparams)
        save_model(model, tmp_path / "own.pth")
        assert load_weights(tmp_path / "own.pth").model.hparams == model.hparams


def test_a_level_is_needed(ffdnet: Model) -> None:
    with pytest.raises(ValueError, match=r"dncnn is told the noise level of its input: give sigma.*0 to 255"):
        ffdnet(jnp.zeros((1, 8, 8, 3)))
    blind = random_model("dncnn", dict(num_feat=4, depth=3))
    np.testing.assert_array_equal(blind(jnp.ones((1, 8, 8, 3)), 25.0)[0], blind(jnp.ones((1, 8, 8, 3)))[0])


def test_the_mean_over_flips_is_told_too(teller: Model) -> None:
    output, _ = self_ensemble(teller.network.make_apply())(teller.params, jnp.zeros((2, 4, 6, 3)), jnp.array([10, 20]))
    np.testing.assert_allclose(told(np.asarray(output)), [10, 20], rtol=1e-6)


# ---- estimating --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [5.0, 15.0, 25.0, 50.0])
def test_the_estimate_is_within_two_percent(sigma: float) -> None:
    for path in PHOTOGRAPHS:
        noisy = validation.add_noise(data.read_image(path)[:256, :256], sigma)
        assert abs(estimate_sigma(noisy) - sigma) < 0.02 * sigma + 0.1


def test_estimates_of_images_of_any_kind() -> None:
    noisy = np.clip(np.random.default_rng(0).normal(128, 20, (64, 64, 3)), 0, 255)
    for image in (noisy.astype(np.uint8), (noisy * 257).astype(np.uint16), noisy / 255, noisy[..., :1] / 255):
        assert abs(estimate_sigma(image) - 20) < 1
    assert estimate_sigma(np.zeros((64, 64, 3), np.uint8)) == 0
    for shape in ((1, 1, 3), (7, 200, 3), (8, 8, 3), (8, 9, 1)):
        assert estimate_sigma(np.zeros(shape, np.float32)) == 0


# ---- restoring and measuring ---------------------------------------------------------------------------------------


def test_tiles_are_told(teller: Model, ffdnet: Model) -> None:
    noisy = validation.add_noise(data.read_image(PHOTOGRAPHS[0])[:192, :160], 30)
    restorer = Restorer(teller, tile=32, tile_pad=4)
    np.testing.assert_allclose(restorer(noisy, 12.5), 12.5 / 255, rtol=1e-5)
    assert abs(told(restorer(noisy)) - 30) < 1  # estimated, from the whole image
    whole = np.asarray(ffdnet(jnp.asarray(noisy[None]), 25.0)[0][0])
    tiled = Restorer(ffdnet, tile=32, tile_pad=10)(noisy, 25.0)
    np.testing.assert_allclose(tiled, whole, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(24, 20, 3), (24, 20), (24, 20, 4)])
def test_strength_blends_the_image_with_the_restored_one(dtype: type, shape: tuple[int, ...]) -> None:
    model = random_model("dncnn", dict(num_feat=4, depth=3))
    model = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf / 10, model.params))  # nothing is clipped
    image = np.random.default_rng(0).uniform(0.4, 0.6, shape)
    image = (image * 255).astype(np.uint8) if dtype == np.uint8 else image.astype(np.float32)
    whole, half, none = (restore_image(model, image, strength=part).astype(np.float64) for part in (1.0, 0.5, 0.0))
    np.testing.assert_allclose(none, image, atol=1e-6)
    np.testing.assert_allclose(half, (whole + image) / 2, atol=1.01 if dtype == np.uint8 else 1e-6)
    assert np.abs(whole - image).max() > 0.01 * (255 if dtype == np.uint8 else 1)


def test_strength_is_checked() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"strength=1\.5: wanted a number from 0 to 1"):
        restore_image(random_model("dncnn", dict(num_feat=2, depth=2)), image, strength=1.5)
    twice = random_model("srvggnetcompact", dict(num_feat=2, num_conv=1, upscale=2))
    with pytest.raises(ValueError, match="1 for a model that enlarges"):
        restore_image(twice, image, strength=0.5)


def test_the_program_restores_with_a_given_and_an_estimated_level(
    teller_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy = validation.add_noise(data.read_image(PHOTOGRAPHS[0])[:128, :128], 20)
    data.write_image(tmp_path / "a.png", np.clip(np.round(noisy * 255), 0, 255).astype(np.uint8))

    def run(*options: str) -> np.ndarray:
        output = tmp_path / "-".join(("out", *options))
        restore.main([str(tmp_path / "a.png"), "--model", str(teller_file), "--output", str(output), *options])
        return data.read_image(output / "a.png")

    assert told(run("--sigma", "40")) == 40 and abs(told(run()) - 20) <= 2
    half = run("--sigma", "40", "--strength", "0.5").astype(int)
    np.testing.assert_allclose(half, (40 + data.read_image(tmp_path / "a.png").astype(int)) / 2, atol=1)
    for options, message in (
        (("--sigma", "300"), "--sigma 300 must be from 0 to 255"),
        (("--strength", "2"), "--strength 2 must be from 0 to 1"),
        (("--sigma", "9", "--model", "embedded"), "is not told the noise level; use --strength"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*options)
        assert message in f"{capsys.readouterr().err} {ended.value}"


def test_evaluation_tells_the_level_of_the_noise_it_adds(teller: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    gt = data.read_image(PHOTOGRAPHS[0])[:192, :192]
    noisy = np.clip(np.round(validation.add_noise(gt, 20) * 255), 0, 255).astype(np.uint8)
    samples = [validation.make_sample(name, gt, None, sigma) for name, sigma in (("a", 15), ("b", 50))]
    samples.append(validation.make_sample("c", gt, noisy, 0))  # a pair: it is estimated
    samples += validation.degraded_samples(["d"], [gt], dict(name="awgn", sigma=33.0))
    samples += validation.degraded_samples(
        ["e"], [gt], dict(name="poisson_gauss", gain=(1e-6, 1e-6), read_sigma=(9, 9))
    )
    for tile in (0, 128):
        run = evaluate.make_restore(teller, tile=tile, tile_pad=4, x8=False, dtype=jnp.float32)
        outputs = dict(run([sample.lq for sample in samples], [sample.sigma for sample in samples]))
        levels = [float(told(outputs[i])) for i in range(len(samples))]
        np.testing.assert_allclose(levels, [15, 50, 20, 33, 9], atol=1.5)


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [dict(name="awgn", sigma=20.0), dict(name="awgn_blind", sigma=(5.0, 50.0))])
def test_networks_are_told_the_noise_that_was_drawn(spec: dict, teller: Model) -> None:
    """The student's image is what it was told: it has to be the noise in each lq, however a batch is split."""
    seen = []
    recipe = distill.Recipe(
        student=teller.network.make_apply(),
        teacher=teller.network.make_apply(),
        terms=(),
        optimizer=distill.make_optimizer("adam", lambda step: jnp.float32(0)),
        learning_rate=lambda step: jnp.float32(0),
        ema_decay=0.0,
        degrade=degradations.make_degrade(spec),
        sigma=degradations.make_sigma(spec),
    )
    batch = {"gt": np.full((8, 96, 96, 3), 128, np.uint8), "index": np.arange(5, 13, dtype=np.int32)}
    for parts in (1, 2):
        split = dataclasses.replace(recipe, accumulate=parts)
        scene = distill.observe(
            [split], [jnp.int32(0)], {"teacher": teller.params, "terms": {}}, batch, jax.random.key(3)
        )
        deviations = 255 * np.std(np.asarray(scene.lq - scene.gt), axis=(1, 2, 3))
        np.testing.assert_allclose(scene.sigma, deviations, rtol=0.03)
        output = distill.forward(recipe.student, teller.params, scene.lq, scene.sigma).output
        np.testing.assert_allclose(told(np.asarray(output)), scene.sigma, rtol=1e-5)
        seen.append(np.asarray(scene.sigma))
    np.testing.assert_array_equal(*seen)


def tiny_run(tmp_path: Path, teller_file: Path, **changes: object) -> config.Config:
    values = {
        "student": dict(arch="dncnn", hparams=FFDNET),
        "teacher": dict(weights=str(teller_file)),
        "terms": dict(output=dict(criterion="l1", weight=1.0)),
        "degrade": dict(name="awgn_blind", sigma=(5.0, 50.0)),
        "data": dict(gt="embedded", crop=16, batch_size=4, workers=0),
        "val": dict(gt="embedded", crop=32, limit=1),
    }
    return config.parse(values | changes)


def test_a_run_prepares_teacher_and_student_with_a_noise_map(tmp_path: Path, teller_file: Path) -> None:
    setup = preparation.prepare(tiny_run(tmp_path, teller_file))
    step = jax.jit(
        lambda state, frozen, batch: distill.train_step(setup.recipe, state, frozen, batch, jax.random.key(0))
    )
    state = distill.init_state(setup.recipe, setup.student.params)
    frozen = distill.make_frozen(setup.recipe.terms, setup.teacher.params)
    with preparation.open_batches(setup, start_step=0) as batches:
        _, metrics = step(state, frozen, next(batches))
    assert bool(metrics["finite"])


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_noise_of_unknown_level_is_refused_for_training(who: str, tmp_path: Path, teller_file: Path) -> None:
    blind = dict(arch="dncnn", hparams=dict(num_feat=4, depth=3))
    changes = {"student": blind} if who == "teacher" else {"terms": dict(task=dict(criterion="l1", weight=1.0))}
    with pytest.raises(config.ConfigError, match=rf"the {who}.* is told the noise level.*not known for degrade='jpeg'"):
        preparation.prepare(tiny_run(tmp_path, teller_file, degrade=dict(name="jpeg"), **changes))


# ---- shrinking -----------------------------------------------------------------------------------------------------


def test_a_shrunk_student_may_be_blind(ffdnet: Model) -> None:
    rng = np.random.default_rng(0)
    sigma = jnp.asarray(rng.uniform(5, 50, 24), jnp.float32)
    noise = rng.normal(size=(24, 16, 16, 3)) * np.asarray(sigma)[:, None, None, None] / 255
    images = jnp.asarray(rng.random(noise.shape) + noise, jnp.float32)
    wanted = ffdnet(images, sigma)[0]

    def error(hparams: dict) -> float:
        student = shrinking.fit(ffdnet, shrinking.check(ffdnet, ffdnet.hparams | hparams), images, sigma)
        return float(jnp.mean((student(images, sigma)[0] - wanted) ** 2) / jnp.var(wanted))

    assert error({}) < 1e-10
    assert error(dict(noise_map=False)) < 0.02
    assert error(dict(num_feat=3)) <= error(dict(num_feat=2)) < 1
    blind = random_model("dncnn", FFDNET | dict(noise_map=False))
    with pytest.raises(ValueError, match="noise_map=True is not False"):
        shrinking.check(blind, blind.hparams | dict(noise_map=True))


def test_the_package_reads_what_is_exported(ffdnet: Model, tmp_path: Path) -> None:
    save_model(ffdnet, tmp_path / "net.safetensors")
    again = kdjax.load_model(tmp_path / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, ffdnet.params)
    assert models.network("dncnn", FFDNET).takes_sigma and not models.network("dncnn").takes_sigma
    with pytest.raises(WeightsError, match="noise_map"):
        load_weights(tmp_path / "net.safetensors", noise_map=False)
