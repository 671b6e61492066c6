"""Teachers that other programs run, and training from what they have answered."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import load
from weight_files import random_model

from kdjax import cache, config, data, distill, export, sharding
from kdjax.config import ConfigError
from kdjax.models import Model
from kdjax.teacher import foreign, load_teacher
from kdjax.training import preparation
from kdjax.weights import save_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TEACHER = dict(num_feat=4, depth=17)
STUDENT = random_model("dncnn", dict(num_feat=4, depth=2))
IMAGE = np.random.default_rng(1).random((8, 12, 16, 3), np.float32)


def calm(arch: str, hparams: dict) -> Model:
    """A network whose outputs are near its inputs."""
    model = random_model(arch, hparams)
    shrunk = jax.tree.map(lambda leaf: leaf / np.float32(np.sqrt(leaf.size / leaf.shape[-1] + 1)), model.params)
    return Model(model.network, shrunk)


@pytest.fixture(scope="module")
def teacher() -> Model:
    return calm("dncnn", TEACHER)


@pytest.fixture(scope="module")
def files(teacher: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    export.export_model(teacher, folder / "teacher.onnx")
    save_model(teacher, folder / "teacher.pth")
    export.export_model(calm("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)), folder / "twice.onnx")
    export.export_model(calm("dncnn", dict(num_in_ch=1, num_feat=4, depth=3)), folder / "grey.onnx")
    ffdnet = dict(num_feat=4, depth=3, unshuffle=2, noise_map=True, residual=False)
    save_model(calm("dncnn", ffdnet), folder / "ffdnet.pth")
    export.export_model(calm("dncnn", ffdnet), folder / "ffdnet.onnx")
    (folder / "damaged.onnx").write_bytes((folder / "teacher.onnx").read_bytes()[:500])
    (folder / "gt").mkdir()
    for i in range(3):
        photograph = np.random.default_rng(i).integers(0, 256, (24, 28, 3), dtype=np.uint8)
        data.write_image(folder / "gt" / f"{i}.png", photograph)
    return folder


def convolutions(path: Path) -> list[str]:
    """The tensors in an ONNX file that hold what our `model.0`, `model.2`, ... do."""
    return [node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Conv"]


# ---- running -------------------------------------------------------------------------------------------------------


def test_an_onnx_file_gives_the_networks_image_and_features(teacher: Model, files: Path) -> None:
    name = convolutions(files / "teacher.onnx")[1]
    found = load_teacher(config.Teacher(weights=str(files / "teacher.onnx"), features=(name,)), STUDENT)
    wanted, features = teacher(jnp.asarray(IMAGE))
    output, theirs = jax.jit(found.apply)(found.params, IMAGE)
    np.testing.assert_allclose(output, wanted, atol=1e-5)
    np.testing.assert_allclose(theirs[name], features["model.2"], atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(found.apply(found.params, x)[0]))(jnp.asarray(IMAGE))
    assert not np.any(gradient)  # it is a constant


def test_devices_ask_it_for_their_own_samples(teacher: Model, files: Path) -> None:
    found = load_teacher(config.Teacher(weights=str(files / "teacher.onnx")), STUDENT)
    wanted = teacher(jnp.asarray(IMAGE))[0]
    mesh = sharding.data_mesh(jax.devices()[:4])
    run = sharding.on_mesh(mesh, jax.jit(lambda x: found.apply(found.params, x)[0]))
    np.testing.assert_allclose(run(jax.device_put(IMAGE, sharding.split_batch(mesh))), wanted, atol=1e-5)


def test_it_is_told_the_noise_level(files: Path) -> None:
    told = load_teacher(config.Teacher(weights=str(files / "ffdnet.onnx")), STUDENT)
    settings = config.to_dict(configured(files, "ffdnet.onnx", "")) | {"degrade": {"name": "jpeg"}}
    settings["terms"] = {"output": dict(criterion="l1", weight=1.0)}
    with pytest.raises(ConfigError, match=r"ffdnet\.onnx is told the noise level.*not known for degrade='jpeg'"):
        preparation.prepare(config.parse(settings))
    native = load_teacher(config.Teacher(weights=str(files / "ffdnet.pth")), STUDENT)
    sigma = np.linspace(5, 50, 8).astype(np.float32)
    wanted = native.apply(native.params, IMAGE, sigma)[0]
    np.testing.assert_allclose(told.apply(told.params, IMAGE, sigma)[0], wanted, atol=1e-5)
    assert np.abs(native.apply(native.params, IMAGE, sigma[::-1])[0] - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(weights="nowhere.onnx"), "'nowhere.onnx' is not a file"),
        (dict(weights="damaged.onnx"), "damaged.onnx' cannot be read: "),
        (dict(weights="twice.onnx"), "has 2 times enlargement, the student 1"),
        (dict(weights="grey.onnx"), "has 1 colour channels, the student 3"),
        (dict(weights="teacher.onnx", features=("model.2",)), "has no tensor 'model.2'"),
        (
            dict(weights="teacher.onnx", hparams=dict(depth=3)),
            "config.teacher.hparams is not for a teacher that another",
        ),
        (dict(weights="teacher.onnx", also=("x.pth",)), "config.teacher.also is not for a teacher that another"),
        (dict(weights="teacher.pth", features=("model.2",)), "is for a teacher that another program runs"),
    ],
)
def test_what_cannot_be_run_is_refused(
    options: dict, message: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_teacher(config.Teacher(**options), STUDENT)


# ---- through a cache -----------------------------------------------------------------------------------------------


def configured(files: Path, weights: str, feature: str, **teacher: object) -> config.Config:
    values = load("denoise", "debug").to_dict()
    values["terms"] = {
        "output": dict(criterion="l1", weight=1.0),
        "hint": dict(pairs=(("body.0", feature, 1.0),), weight=0.1),
    }
    values["data"] |= {"gt": str(files / "gt"), "crop": 16, "batch_size": 4}
    values["teacher"] = {"weights": str(files / weights)} | teacher
    return config.parse(values)


def written(settings: config.Config, out: Path) -> preparation.Setup:
    """The setup of a run that trains from the cache of its first 8 samples."""
    setup = preparation.prepare(settings)
    assert cache.write(cache.plan(setup, out, 8), tell=lambda line: None)
    values = config.to_dict(settings)
    values["teacher"] |= {"cache": str(out)}
    return preparation.prepare(config.parse(values))


def losses_of(setup: preparation.Setup) -> list[float]:
    state = distill.init_state(setup.recipe, setup.student.params)
    frozen = distill.make_frozen(setup.recipe.terms, None)
    step = jax.jit(lambda state, batch: distill.train_step(setup.recipe, state, frozen, batch, jax.random.key(0)))
    found = []
    with preparation.open_batches(setup, start_step=0) as batches:
        for _ in range(2):
            state, values = step(state, next(batches))
            found.append([float(values["loss/output"]), float(values["loss/hint"])])
    return found


@pytest.fixture(scope="module")
def native(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    settings = configured(files, "teacher.pth", "model.2")
    return losses_of(written(settings, tmp_path_factory.mktemp("native") / "cache"))


def test_training_from_its_answers_needs_nothing_but_them(
    files: Path, native: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = convolutions(files / "teacher.onnx")[1]
    settings = configured(files, "teacher.onnx", name, features=(name,))
    written(settings, tmp_path / "cache")
    monkeypatch.setattr(foreign, "Onnx", None)  # calling it would fail
    values = config.to_dict(settings)
    values["teacher"] |= {"cache": str(tmp_path / "cache")}
    setup = preparation.prepare(config.parse(values))
    np.testing.assert_allclose(losses_of(setup), native, rtol=1e-3)
    assert setup.teacher.paths == [str(files / "teacher.onnx")] and not setup.teacher.can_run
    with caplog.at_level("INFO", logger="kdjax"):
        preparation.report(setup)
        preparation.check_answers(setup)
    assert "its answers are in the cache" in caplog.text
    assert re.search(r"teacher on the first 4 samples: [\d.]+ dB, its input [\d.]+ dB", caplog.text)
    values["terms"]["hint"]["pairs"] = (("body.0", "other", 1.0),)
    with pytest.raises(ValueError, match=f"no feature 'other'.*{re.escape(name)}"):
        preparation.prepare(config.parse(values))


def test_a_student_cannot_begin_as_a_foreign_teacher(files: Path) -> None:
    settings = configured(files, "teacher.onnx", "")
    values = config.to_dict(settings)
    values["terms"] = {"task": dict(criterion="l1", weight=1.0)}
    values["student"] |= {"weights": "teacher"}
    with pytest.raises(ConfigError, match=r"teacher\.onnx \(ONNX Runtime\) is not a network of kdjax"):
        preparation.prepare(config.parse(values))


# ---- spandrel ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """spandrel imports it for networks that are not tried here; without it, the other process gets a stand-in."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("spandrel") is None:
        pytest.skip("needs spandrel")
    if importlib.util.find_spec("torchvision") is None:
        module = tmp_path / "stand_in" / "torchvision" / "transforms" / "functional.py"
        module.parent.mkdir(parents=True)
        module.write_text("InterpolationMode = rotate = normalize = None\n")
        for folder in (module.parent, module.parent.parent):
            (folder / "__init__.py").touch()
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))


@pytest.mark.torch
@pytest.mark.usefixtures("torchvision")
def test_spandrel_runs_in_a_process_of_its_own(files: Path, teacher: Model, native: list, tmp_path: Path) -> None:
    settings = configured(files, "teacher.pth", "model.2", backend="spandrel", features=("model.2",))
    found = load_teacher(settings.teacher, preparation.make_networks(settings)[0])
    output, features = found.apply(found.params, IMAGE)
    wanted, ours = teacher(jnp.asarray(IMAGE))
    np.testing.assert_allclose(output, wanted, atol=1e-5)
    np.testing.assert_allclose(features["model.2"], ours["model.2"], atol=1e-5)  # before the ReLU, which works in place
    assert found.foreign.about == "spandrel's DnCNN"
    np.testing.assert_allclose(losses_of(written(settings, tmp_path / "cache")), native, rtol=1e-3)


@pytest.mark.torch
@pytest.mark.usefixtures("torchvision")
def test_spandrels_errors_are_told(files: Path) -> None:
    for options, message in (
        (dict(features=("model.99",)), "DnCNN has no module 'model.99'; it has"),
        (dict(weights=str(files / "damaged.onnx")), "damaged.onnx, run by spandrel: "),
    ):
        with pytest.raises(ConfigError, match=message):
            load_teacher(
                config.Teacher(**(dict(weights=str(files / "teacher.pth"), backend="spandrel") | options)), STUDENT
            )


# ---- a folder of images --------------------------------------------------------------------------------------------


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """Clean, degraded and restored images, which say which they are: 100 + i, 50 + i and 200 + i, and where."""
    rows, columns = np.mgrid[:40, :48] // 8
    for kind, level, suffix in (("gt", 100, "png"), ("lq", 50, "png"), ("restored", 200, "jpg")):
        (tmp_path / kind / "sub").mkdir(parents=True)
        for i in range(3):
            image = np.repeat((level + 5 * (rows + columns))[..., None], 3, 2).astype(np.uint8)
            data.write_image(tmp_path / kind / "sub" / f"{i}.{suffix}", image)
    return tmp_path


def with_outputs(folder: Path, **changes: dict) -> config.Config:
    values = load("denoise", "debug").to_dict()
    values["terms"] = {"output": dict(criterion="l1", weight=1.0)}
    values["data"] |= {"gt": str(folder / "gt"), "lq": str(folder / "lq"), "crop": 16, "batch_size": 8}
    values["teacher"] = {"outputs": str(folder / "restored")}
    for name, entries in changes.items():
        values[name] = values[name] | entries
    return config.parse(values)


def test_images_of_a_teacher_are_cut_and_turned_with_the_others(
    answered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup = preparation.prepare(with_outputs(answered))
    with caplog.at_level("INFO", logger="kdjax"):
        preparation.check_answers(setup)
    said = re.search(r"first 8 samples: ([\d.]+) dB, its input ([\d.]+) dB", caplog.text)
    assert said and abs(float(said[1]) - 8.1) < 0.3 and abs(float(said[2]) - 14.2) < 0.1  # 100 and 50 levels away
    assert setup.teacher.identity.startswith("3 files (names and sizes ") and not setup.teacher.can_run
    with preparation.open_batches(setup, start_step=0) as batches:
        batch = next(batches)
    theirs = batch["teacher"]["output"].astype(int)
    assert theirs.shape == batch["gt"].shape and len(np.unique(theirs[:, 0, 0, 0])) > 2
    assert np.abs(theirs - batch["gt"] - 100).max() <= 3  # JPEG
    assert np.abs(batch["gt"].astype(int) - batch["lq"] - 50).max() == 0
    assert preparation.batch_shapes(setup)["teacher"]["output"].shape == theirs.shape
    state = distill.init_state(setup.recipe, setup.student.params)
    frozen = distill.make_frozen(setup.recipe.terms, None)
    _, values = jax.jit(lambda s, b: distill.train_step(setup.recipe, s, frozen, b, jax.random.key(0)))(state, batch)
    output = setup.student(jnp.asarray(batch["lq"] / np.float32(255)))[0]
    np.testing.assert_allclose(values["loss/output"], np.abs(output - theirs / 255).mean(), rtol=1e-4)


def test_images_of_a_teacher_that_do_not_fit_are_told(answered: Path) -> None:
    feature = {"hint": dict(pairs=(("body.0", "conv", 1.0),), weight=1.0)}
    for changes, message in (
        (dict(data=dict(lq="")), "are made of the images in config.data.lq, so that is needed"),
        (dict(teacher=dict(weights="embedded")), "takes the place of config.teacher.weights"),
        (dict(teacher=dict(outputs=str(answered / "lq"))), "is the degraded image itself"),
        (dict(teacher=dict(outputs="nowhere")), "'nowhere' does not exist"),
        (dict(terms=feature), "the teacher has no feature 'conv'"),
        (
            dict(terms={"label_consistency": dict(weight=1.0)}),
            "nothing can replace the teacher for the loss terms label",
        ),
    ):
        with pytest.raises((ValueError, data.DataError), match=message):
            preparation.prepare(with_outputs(answered, **changes))
    with pytest.raises(ConfigError, match="has the answers already"):
        cache.plan(preparation.prepare(with_outputs(answered)), answered / "cache", 8)
    (answered / "restored" / "sub" / "1.jpg").unlink()
    with pytest.raises(data.DataError, match=r"1 of 3 degraded images have none of their name"):
        preparation.prepare(with_outputs(answered))
    data.write_image(answered / "restored" / "sub" / "1.png", np.zeros((40, 40, 3), np.uint8))
    setup = preparation.prepare(with_outputs(answered))
    with preparation.open_batches(setup, start_step=0) as batches:
        next(batches)
        assert "the teacher's image is 40x40 pixels (width x height), gt" in batches.damaged["sub/1.png"]
