"""A network of the user's: docs/your_own_student.md as written, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import programs
import pytest

from kdjax.models import network
from kdjax.weights import WeightsError, load_model, save_model

PAGE = Path(__file__).parent.parent / "docs" / "your_own_student.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in re.findall(r"`(\w+\.py)`[^`]*?(?:`[^`\n]*`:?)?\n*```python\n(.*?)```", PAGE.read_text(), re.S):
        (folder / name).write_text(content)
    assert {path.name for path in folder.iterdir()} == {"my_net.py", "my_config.py", "my_linen_net.py"}
    return folder


@pytest.fixture
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.once
def test_the_page_runs_as_written(folder: Path) -> None:
    (command,) = re.findall(r"```sh\n(.*?)\n```", PAGE.read_text(), re.S)
    last_python = re.findall(r"```python\n(import kdjax.*?)```", PAGE.read_text(), re.S)[0]
    module, *arguments = command.removeprefix("python -m ").split()
    result = programs.run(module, *arguments, f"--config.teacher.weights={programs.RANDOM_TEACHER}", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    shares = [row["share/hint"] for row in map(json.loads, lines) if "share/hint" in row]
    assert len(shares) == 2 and all(0.02 < share < 0.5 for share in shares), lines  # 0.2 at step 0 and every 20 steps
    code = last_python + "\nimport numpy as np\nprint(model(np.ones((1, 9, 7, 3), np.float32))[0].shape)"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert "(1, 9, 7, 3)" in result.stdout, result.stderr


@pytest.mark.parametrize("arch", ["my_net:MyNet", "my_linen_net:MyLinenNet"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_and_import_is_the_identity(importable: Path, tmp_path: Path, arch: str, suffix: str) -> None:
    model = network(arch, dict(num_feat=5)).init(jax.random.key(0))
    assert network(arch).hparams["num_feat"] == 8
    path = tmp_path / f"model{suffix}"
    save_model(model, path)
    with pytest.raises(WeightsError, match=f"custom network, '{arch}'; to import"):
        load_model(path)
    loaded = load_model(path, arch=arch)
    assert loaded.hparams == model.hparams
    x = jax.random.uniform(jax.random.key(1), (1, 6, 9, 3))
    np.testing.assert_array_equal(loaded(x)[0], model(x)[0])
    assert loaded(x)[1]["first"].shape == (1, 6, 9, 5)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), model.network.abstract_params, model.params
    )
    assert model.network.count_macs(8, 8) >= 64 * 9 * (3 * 5 + 5 * 3)
    gradient = jax.grad(lambda p: model.network.make_apply()(p, x)[0].sum())(model.params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


BAD = """
from flax import linen, nnx
import jax.numpy as jnp

class Norm(nnx.Module):
    def __init__(self, *, rngs): self.norm = nnx.BatchNorm(3, rngs=rngs)
    def __call__(self, x): return self.norm(x), {}

class LinenNorm(linen.Module):
    @linen.compact
    def __call__(self, x): return linen.BatchNorm(use_running_average=False)(x), {}

class Plain(nnx.Module):
    def __init__(self, width: int, *, rngs): self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)
    def __call__(self, x): return self.conv(x)

class Vector(Plain):
    def __call__(self, x): return x.mean((1, 2)), {}

class Other: pass
"""


@pytest.mark.parametrize(
    ("arch", "hparams", "message"),
    [
        ("bad_nets:Norm", {}, "BatchStat.*only trained parameters"),
        ("bad_nets:LinenNorm", {}, "batch_stats.*only trained parameters"),
        ("bad_nets:Plain", {}, "needs the hyper-parameters width"),
        ("bad_nets:Plain", {"width": 1}, r"returned .*, wanted \(output, features\)"),
        ("bad_nets:Plain", {"width": 1, "depth": 2}, "has no hyper-parameter 'depth'"),
        ("bad_nets:Vector", {"width": 1}, r"returned \(1, 3\) for an image"),
        ("bad_nets:Other", {}, "not a Flax module class of bad_nets .it has: Norm, LinenNorm, Plain, Vector"),
        ("bad_nets:Missing", {}, "not a Flax module class"),
        ("no_such_module:Net", {}, "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_a_student_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, hparams: dict, message: str
) -> None:
    (tmp_path / "bad_nets.py").write_text(BAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("bad_nets", None)
    with pytest.raises(ValueError, match=message):
        apply = network(arch, hparams).make_apply()
        jax.eval_shape(apply, network(arch, hparams).abstract_params, jax.ShapeDtypeStruct((1, 8, 8, 3), "float32"))
