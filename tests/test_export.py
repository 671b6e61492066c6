"""Every format gives what the model gives; what does not leaves nothing behind; report and card say what is known."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from test_config import load

from kdjax import config as config_lib
from kdjax import models, ops
from kdjax.export import FORMATS, ExportError, card, export_model, verify_onnx, verify_stablehlo, verify_weights
from kdjax.export.__main__ import main
from kdjax.files import write_json
from kdjax.models.layers import conv3x3
from kdjax.training import folder as run_files
from kdjax.training import preparation
from kdjax.training.logbook import Logbook
from kdjax.weights import load_weights, save_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parent.parent
# Every architecture, with every way to enlarge, to un-shuffle and to pad.
CASES = {
    "rrdbnet": ("rrdbnet", dict(num_feat=4, num_block=2, num_grow_ch=4, scale=1)),
    "srvggnetcompact": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2, unshuffle=2)),
    "srvggnetcompact-leaky": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=1, act_type="leakyrelu")),
    "ffdnet": ("dncnn", dict(num_feat=4, depth=3, unshuffle=2, noise_map=True, residual=False)),
    "drunet": ("drunet", dict(num_feat=(4, 5, 6, 7), num_block=1)),
    "dncnn-grey": ("dncnn", dict(num_in_ch=1, num_feat=4, depth=3)),
    "rrdbnet-plus": ("rrdbnet", dict(num_feat=4, num_block=1, num_upsample=1, scale=2, plus=True)),
    "rrdbnet-ranks": ("rrdbnet", dict(scale=2, num_feat=4, num_block=1, num_grow_ch=4, ranks=(0, 2, 3, 2, 1) * 3)),
    "edsr": ("edsr", dict(num_feat=4, num_block=1, upscale=3, res_scale=0.1)),
    "msrresnet": ("msrresnet", dict(num_feat=4, num_block=1, upscale=2)),
    "nafnet": ("nafnet", dict(width=4, enc_blk_nums=(1,), dec_blk_nums=(1,))),
    "unet": ("unet", dict(num_feat=4, num_level=2, num_conv=1)),
    "span": ("span", dict(feature_channels=4, upscale=2)),
    "span-grey": ("span", dict(num_in_ch=1, num_out_ch=1, feature_channels=4, upscale=1, norm=False)),
    "rcan": ("rcan", dict(num_feat=8, num_group=2, num_block=2, squeeze_factor=4, upscale=2)),
    "mosr": ("mosr", dict(dim=8, n_block=1, upscale=2, kernel_size=5)),
    "mosr-gps": ("mosr", dict(dim=8, n_block=1, upscale=1, kernel_size=3, upsampler="gps", expansion_ratio=1.0)),
    "realplksr": ("realplksr", dict(dim=8, n_blocks=1, upscale=2, kernel_size=5)),
    "realplksr-layers": ("realplksr", dict(dim=8, n_blocks=1, upscale=1, kernel_size=5, use_ea=False, layer_norm=True)),
    "unet-unshuffled": ("unet", dict(num_feat=4, num_level=1, num_conv=2, num_conv_up=1, unshuffle=2)),
}


def make_model(arch: str, hparams: dict) -> models.Model:
    """A model with random parameters, none of them zero or one; many times faster than `Network.init`."""
    rng = np.random.default_rng(0)
    net = models.network(arch, hparams)
    scale = lambda shape: 1 / math.sqrt(max(4, math.prod(shape[:-1])))  # noqa: E731
    draw = lambda leaf: np.float32(scale(leaf.shape) * rng.normal(size=leaf.shape))  # noqa: E731
    return models.Model(net, jax.tree.map(draw, net.abstract_params))


@pytest.fixture(scope="module")
def student() -> models.Model:
    return make_model("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=1))


@pytest.fixture(scope="module")
def student_file(student: models.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "net.pth"
    save_model(student, path)
    return path


@pytest.fixture(scope="module")
def exported(student: models.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student in every format, by suffix."""
    folder = tmp_path_factory.mktemp("exported")
    return {suffix: export_model(student, folder / f"net{suffix}").path for suffix in FORMATS}


def run_onnx(path: Path, image: np.ndarray, *sigma: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {"input": image.transpose(0, 3, 1, 2)}
    if sigma:
        inputs["sigma"] = sigma[0].reshape(-1, 1, 1, 1)
    return session.run(["output"], inputs)[0].transpose(0, 2, 3, 1)


def run_stablehlo(path: Path, image: np.ndarray, *sigma: np.ndarray) -> np.ndarray:
    return np.asarray(jax.export.deserialize(bytearray(path.read_bytes())).call(image, *sigma))


def test_there_is_a_case_of_every_architecture() -> None:
    assert {arch for arch, _ in CASES.values()} == set(models.MODELS)


@pytest.mark.versions
@pytest.mark.parametrize("case", CASES)
def test_every_architecture_in_every_format(case: str, tmp_path: Path) -> None:
    model = make_model(*CASES[case])
    for suffix in FORMATS:
        artefact = export_model(model, tmp_path / f"net{suffix}", about={"source_sha256": "0123"})
        content = artefact.path.read_bytes()
        assert (artefact.sha256, artefact.num_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    for suffix in (".pth", ".safetensors"):  # in and out once more
        back = load_weights(tmp_path / f"net{suffix}").model
        save_model(back, tmp_path / f"back{suffix}")
        assert (tmp_path / f"back{suffix}").read_bytes() == (tmp_path / f"net{suffix}").read_bytes()

    # A size that export did not check: smaller than what the image is padded to.
    image = np.random.default_rng(1).random((2, 1, 3, model.network.channels), np.float32)
    sigma = [np.array([10, 50], np.float32)] if model.network.takes_sigma else []
    wanted = np.asarray(model(image, *sigma)[0])
    for run, suffix in ((run_onnx, ".onnx"), (run_stablehlo, ".stablehlo")):
        np.testing.assert_allclose(run(tmp_path / f"net{suffix}", image, *sigma), wanted, atol=1e-5)

    proto = onnx.load(tmp_path / "net.onnx")
    operators = {node.op_type for node in proto.graph.node}
    assert not operators & {"Transpose", "Where", "Reshape"}  # NCHW from end to end, activations as one operator
    names = [[dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in proto.graph.input]
    assert names == [["batch", model.network.channels, "height", "width"], ["batch", 1, 1, 1]][: 1 + len(sigma)]
    inputs = ["input", "sigma"][: 1 + len(sigma)]
    assert [info.name for info in (*proto.graph.input, *proto.graph.output)] == [*inputs, "output"]
    assert proto.opset_import[0].version == 17
    told = {entry.key: entry.value for entry in proto.metadata_props}
    assert told["arch"] == model.arch and told["scale"] == str(model.network.scale)
    assert told["source_sha256"] == "0123" and json.loads(told["hparams"]) == json.loads(json.dumps(model.hparams))


class Own(nnx.Module):
    """A network of the user's with what the built-in ones do not have."""

    def __init__(self, num_feat: int = 4, *, rngs: nnx.Rngs) -> None:
        self.first = conv3x3(3, num_feat, rngs=rngs)
        self.down = nnx.Conv(num_feat, num_feat, (2, 2), strides=2, padding=0, rngs=rngs)
        self.dilated = nnx.Conv(num_feat, 4 * num_feat, (3, 3), padding=2, kernel_dilation=2, rngs=rngs)
        self.plain = nnx.Conv(num_feat, num_feat, (1, 1), use_bias=False, rngs=rngs)
        self.offset = nnx.Param(jnp.zeros(num_feat))
        self.squeeze = nnx.Linear(num_feat, num_feat, rngs=rngs)
        self.mix = nnx.Linear(num_feat + 1, 3, rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, height, width, _ = image.shape
        x = jax.nn.gelu(self.first(ops.pad_to_multiple(image, 2)))
        x = jax.nn.silu(self.down(x)) + jnp.clip(self.down(x), -0.1, 0.2)
        x = ops.pixel_shuffle(self.dilated(x), 2)
        x = x * jax.nn.sigmoid(self.squeeze(x.mean((1, 2))))[:, None, None, :]
        x = x - x.max(-1, keepdims=True) + jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1) ** 3
        y = self.plain(x)
        x = ((y + self.offset[...]) * y)[:, :height, :width]
        channels_first = jnp.transpose(x, (0, 3, 1, 2)) * (x.max(-1) > 0).astype(jnp.float32)[:, None]
        x = jax.checkpoint(jnp.abs)(jnp.transpose(channels_first, (0, 2, 3, 1)))
        x = jnp.concatenate([jax.nn.relu6(x), jnp.ones_like(x[..., 1:2])], -1)
        return image + jnp.where(image > 0.5, jax.nn.softplus(self.mix(x)), jnp.tanh(self.mix(x))), {}


class Sorting(Own):
    """What ONNX export has no rule for."""

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.sort(self.first(image), -1)[..., :3], {}


class Same(Own):
    """A strided convolution whose padding depends on whether the size is even."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 12, (3, 3), strides=2, padding="SAME", rngs=rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return ops.pixel_shuffle(self.first(image), 2)[:, : image.shape[1], : image.shape[2]], {}


class Stacking(Own):
    """A loop that keeps the result of each pass."""

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        _, each = jax.lax.scan(lambda x, weight: (x * weight, x + weight), image, self.offset[...])
        return each[-1], {}


class Looping(Own):
    """What needs to know the size as a number."""

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return sum(self.first(image[:, i : i + 1]).mean() for i in range(image.shape[1])) + image, {}


class Unsteady(Own):
    """Does another thing when it is traced for all sizes, so that its files are wrong."""

    def __call__(self, image: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return image * (2 if isinstance(image.shape[1], int) else 3), {}


def test_a_network_of_the_users(tmp_path: Path) -> None:
    model = make_model("test_export:Own", {})
    for suffix in FORMATS:
        export_model(model, tmp_path / f"net{suffix}")
    image = np.random.default_rng(1).random((2, 7, 12, 3), np.float32)
    np.testing.assert_allclose(run_onnx(tmp_path / "net.onnx", image), model(image)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Sorting", "there is no rule for the JAX operation 'sort'"),
        ("Same", "padding that depends on the size of the image is not supported; give it as numbers"),
        ("Stacking", "a scan is supported forwards over weights, and without a result of each step"),
    ],
)
def test_what_has_no_rule_is_named(name: str, message: str, tmp_path: Path) -> None:
    model = make_model(f"test_export:{name}", {})
    with pytest.raises(ExportError, match=rf"net\.onnx: {message}"):
        export_model(model, tmp_path / "net.onnx")
    export_model(model, tmp_path / "net.stablehlo")
    assert [path.name for path in tmp_path.iterdir()] == ["net.stablehlo"]


@pytest.mark.parametrize("suffix", [".onnx", ".stablehlo"])
def test_a_network_for_one_size_only_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be traced for all sizes of image at once: "):
        export_model(make_model("test_export:Looping", {}), tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".onnx", ".stablehlo"])
def test_a_file_that_differs_is_not_kept(suffix: str, tmp_path: Path) -> None:
    model = make_model("test_export:Unsteady", {})
    with pytest.raises(ExportError, match=r"differs from the model by up to 1, more than 0\.0002"):
        export_model(model, tmp_path / f"net{suffix}")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_found(student: models.Model, exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    content, proto = exported[".onnx"].read_bytes(), onnx.load(exported[".onnx"])
    weight = proto.graph.initializer[0]
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed.flat[0] += 0.05
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, path)
    with pytest.raises(ExportError, match="differs from the model"):
        verify_onnx(student, path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match="ONNX Runtime cannot run it"):
        verify_onnx(student, path)


def test_a_file_of_another_model_is_found(student: models.Model, exported: dict[str, Path]) -> None:
    larger = make_model("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2))
    with pytest.raises(ExportError, match=r"returns \(1, 48, 48, 3\), the model \(1, 96, 96, 3\)"):
        verify_stablehlo(larger, exported[".stablehlo"])
    nearly = dataclasses.replace(student, params=jax.tree.map(lambda leaf: np.nextafter(leaf, 9), student.params))
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(ExportError, match="a different model"):
            verify_weights(nearly, exported[suffix])


def test_equal_models_give_equal_files(student: models.Model, exported: dict[str, Path], tmp_path: Path) -> None:
    for suffix, path in exported.items():
        assert export_model(student, tmp_path / f"again{suffix}").path.read_bytes() == path.read_bytes()


def test_stablehlo_is_for_all_platforms_and_names_no_file_of_this_machine(exported: dict[str, Path]) -> None:
    content = exported[".stablehlo"].read_bytes()
    read = jax.export.deserialize(bytearray(content))
    assert read.platforms == ("cpu", "cuda", "tpu")
    assert str(read.out_avals[0].shape) == "(b, h, w, 3)"
    assert b".py" not in content and str(ROOT).encode() not in content


def test_the_program_writes_report_and_card(student_file: Path, tmp_path: Path) -> None:
    result = programs.run("kdjax.export", "--model", student_file, "--output", tmp_path, "--license", "apache-2.0")
    assert result.returncode == 0, result.stderr
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"net{suffix}" for suffix in (*FORMATS, ".md", ".export.json")}
    report, text = json.loads((tmp_path / "net.export.json").read_text()), (tmp_path / "net.md").read_text()
    assert {entry["file"] for entry in report["files"]} == {f"net{suffix}" for suffix in FORMATS}
    for entry in report["files"]:
        content = (tmp_path / entry["file"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest() and entry["bytes"] == len(content)
        assert f"| `{entry['file']}` | {len(content):,} | `{entry['sha256']}` |" in text
    checks = {entry["file"]: entry["checks"] for entry in report["files"]}
    assert checks["net.pth"] == {"read_back": "identical, bit for bit"}
    assert max(checks["net.onnx"]["largest_differences"]) < 1e-6 and checks["net.onnx"]["bound"] >= 1e-4
    source = hashlib.sha256(student_file.read_bytes()).hexdigest()
    assert report["model"]["sha256"] == source and source in text and not report["failed"]
    assert text.startswith("---\nlicense: apache-2.0\n") and "| parameters | 379 |" in text
    assert "| teacher | not known |" in text and "Not known." in text


def test_one_file_and_the_model_itself(student_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--model", str(student_file), "--output", str(tmp_path / "small.onnx")])
    assert {path.name for path in tmp_path.iterdir()} == {"small.onnx", "small.md", "small.export.json"}
    source = tmp_path / "own.pth"
    source.write_bytes(student_file.read_bytes())
    before = source.stat()
    main(["--model", str(source), "--output", str(tmp_path), "--format", "pth"])
    assert "own.pth: " in capsys.readouterr().out and source.stat() == before
    (entry,) = json.loads((tmp_path / "own.export.json").read_text())["files"]
    assert entry["checks"] == {"source": "the file that was exported, left as it is"}


def test_without_onnx_the_rest_is_written(student_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    folder = tmp_path / "new" / "folder"
    with pytest.raises(SystemExit, match=r"pip install 'kdjax\[onnx\]'"):
        main(["--model", str(student_file), "--output", str(folder), "--format", "onnx", "safetensors"])
    report = json.loads((folder / "net.export.json").read_text())
    assert [entry["file"] for entry in report["files"]] == ["net.safetensors"] and "net.onnx" in report["failed"]
    assert not (folder / "net.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing.pth", "--output", "{tmp}"], "missing.pth: does not exist"),
        (["--model", "{tmp}/half.pth", "--output", "{tmp}"], "half.pth: the file is damaged"),
        (["--model", "{net}", "--output", "{tmp}/half.pth/deeper"], "half.pth/deeper"),
        (["--model", "{net}", "--output", "{tmp}", "--hparam", "arch=dncnn"], "the file says srvggnetcompact"),
        (["--model", "{net}", "--output", "{tmp}", "--run", "{tmp}"], "is not the folder of a finished run"),
        (["--model", "{net}", "--output", "{tmp}/taken", "--format", "pth"], "net.pth: cannot be written"),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], message: str, student_file: Path, tmp_path: Path) -> None:
    (tmp_path / "half.pth").write_bytes(student_file.read_bytes()[:1000])
    (tmp_path / "taken" / "net.pth").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main([argument.format(tmp=tmp_path, net=student_file) for argument in arguments])
    assert str(ended.value).startswith("error: ") and message in str(ended.value)
    assert not list(tmp_path.glob("*.onnx")) and not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(
    "arguments", [["--output", "a.onnx", "--format", "pth"], ["--output", ".", "--license", "two words"]]
)
def test_what_argparse_refuses(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--model", "embedded", *arguments])
    assert ended.value.code == 2


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a finished run, by the functions that write them, without its steps."""
    folder = tmp_path_factory.mktemp("run")
    config = config_lib.parse(load("denoise", "debug").copy_and_resolve_references().to_dict())
    setup = preparation.prepare(config)
    write_json(folder / "run.json", run_files.identity(setup))
    write_json(folder / "config.json", config_lib.to_dict(config))
    with Logbook(folder, resume_step=0, name="run", tensorboard=False, wandb="") as logbook:
        logbook.write(2, {"val/student_psnr": 11.0})
        logbook.write(4, {"loss/total": 1.0})
        logbook.write(4, {"val/student_psnr": 17.743, "val/student_ssim": float("nan")})
    write_json(folder / "result.json", {"step": 4, "summary": ""})
    run_files.export(setup.student, setup.student.params, folder)
    return folder


def test_the_card_tells_what_the_run_says(run_folder: Path, tmp_path: Path) -> None:
    loaded = load_weights(run_folder / "student.safetensors")
    run = card.find_run(loaded, None)
    text = card.model_card("student", loaded, [], run, license="unknown")
    sha256 = json.loads((run_folder / "run.json").read_text())["teacher"]["identity"]
    assert f"| teacher | `rrdbnet_denoiser.pth`, {sha256} |" in text
    assert '| data | `embedded`, degraded by `{"name": "awgn", "sigma": 25.0}` |' in text
    assert "| recipe | 4 steps of 4 crops of 16 pixels, adam" in text and "output: `{" in text
    assert "| student_psnr | 17.7430 |" in text and "11.0" not in text and "| student_ssim | not defined |" in text
    assert json.loads(text.split("```json\n")[1].split("```")[0])["train"]["steps"] == 4

    # A copy elsewhere is known only when the run is named; another model never is.
    save_model(loaded.model, tmp_path / "copy.pth")
    copy = load_weights(tmp_path / "copy.pth")
    assert card.find_run(copy, None) is None and card.find_run(copy, run_folder).step == 4
    changed = dataclasses.replace(loaded.model, params=jax.tree.map(lambda leaf: leaf + 1, loaded.model.params))
    other = dataclasses.replace(loaded, model=changed)
    assert card.find_run(other, None) is None
    with pytest.raises(ExportError, match=r"its student\.pth is another model"):
        card.find_run(other, run_folder)


# What spandrel 0.4.2 recognises, and under which name: RRDBNet with 32 growth channels, Compact with PReLU, DnCNN of 17
# or 20 convolutions, the last two without `unshuffle`; no EDSR or MSRResNet of BasicSR.
SPANDREL = {
    "ESRGAN": [("rrdbnet", dict(num_feat=4, num_block=1, scale=scale)) for scale in (1, 2, 4)]
    + [CASES["rrdbnet-plus"]],
    "RealESRGAN Compact": [("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=upscale)) for upscale in (1, 2)],
    "DnCNN": [("dncnn", dict(num_feat=4, depth=17)), ("dncnn", dict(num_in_ch=1, num_feat=4, depth=20))],
    "DRUNet": [
        ("drunet", dict(num_feat=(4, 5, 6, 7), num_block=2)),
        ("drunet", dict(num_in_ch=1, num_feat=(2, 3, 4, 5), num_block=2)),
    ],
    "MoSR": [CASES["mosr"], CASES["mosr-gps"]],
    "NAFNet": [CASES["nafnet"]],
    "PLKSR": [CASES["realplksr"], CASES["realplksr-layers"]],
    "RCAN": [CASES["rcan"], ("rcan", dict(num_feat=4, num_group=1, num_block=1, squeeze_factor=2, norm=False))],
    "SPAN": [CASES["span"], ("span", dict(feature_channels=4, upscale=1, norm=False))],
}


@pytest.fixture
def spandrel(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The package; without torchvision, which networks need that are not tried here, and which fits few versions."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        parts = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        for name in parts:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[parts[-1]].__dict__.update(InterpolationMode=None, rotate=None, normalize=None)
    return pytest.importorskip("spandrel")


@pytest.mark.torch
@pytest.mark.parametrize("name", SPANDREL)
def test_spandrel_recognises_the_files(name: str, tmp_path: Path, spandrel: types.ModuleType) -> None:
    import torch

    for case in SPANDREL[name]:
        model = make_model(*case)
        image = np.random.default_rng(1).random((1, 16, 24, model.network.channels), np.float32)
        for suffix in (".pth", ".safetensors"):
            path = export_model(model, tmp_path / f"net{suffix}").path
            found = spandrel.ModelLoader().load_from_file(str(path))
            assert (found.architecture.name, found.scale) == (name, model.network.scale)
            given = torch.tensor(image.transpose(0, 3, 1, 2))
            if model.network.takes_sigma:
                given = torch.cat([given, torch.full_like(given[:, :1], 30 / 255)], 1)
            with torch.no_grad():
                output = found.model.eval()(given).numpy()
            largest = max(1.0, np.abs(output).max())
            np.testing.assert_allclose(output.transpose(0, 2, 3, 1), model(image, 30.0)[0], atol=1e-5 * largest)
