"""Perceptual and style losses against BasicSR's, and reading VGG files."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import load_npz

from kdjax.distill import make_setting
from kdjax.losses.perceptual import layer_names, perceptual, style, vgg_features
from kdjax.losses.vgg_file import _convolutions, load_vgg
from kdjax.models import network
from kdjax.terms import Context, Forward, make_terms
from kdjax.weights import WeightsError
from kdjax.weights.torch_file import torch_file_bytes

GUIDE = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}
# name in the reference file -> layers, criterion, style, factor, options of the network
CASES = {
    "perceptual_l1": (GUIDE, "l1", False, 1.0, {}),
    "perceptual_l2": (GUIDE, "l2", False, 1.0, {}),
    "perceptual_fro": (GUIDE, "fro", False, 1.0, {}),
    "style_l1_w2": ({"conv3_4": 1.0}, "l1", True, 2.0, {}),
    "perceptual_conv3_4_w0.5": ({"conv3_4": 1.0}, "l1", False, 0.5, {}),
    "perceptual_relu_pool_range_norm": ({"relu2_2": 1.0, "pool3": 0.3}, "l2", False, 1.0, dict(range_norm=True)),
}


@pytest.fixture(scope="module")
def vgg19() -> dict[str, dict[str, np.ndarray]]:
    """The random weights of the reference vectors."""
    random = np.random.RandomState(0)
    params = {}
    for name, (_, num_in, num_out) in _convolutions("vgg19").items():
        oihw = random.randn(num_out, num_in, 3, 3) * np.sqrt(2 / (9 * num_in))
        params[name] = {"kernel": np.float32(oihw.transpose(2, 3, 1, 0)), "bias": np.zeros(num_out, np.float32)}
    return params


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_basicsr(golden: Path, vgg19: dict, name: str) -> None:
    vectors = load_npz(golden / "losses.npz")
    layer_weights, criterion, is_style, factor, options = CASES[name]

    def loss(params: dict, image: jax.Array) -> jax.Array:
        extract = lambda x: vgg_features(params, x, vgg_type="vgg19", layers=tuple(layer_weights), **options)  # noqa: E731
        compare = style if is_style else perceptual
        return factor * compare(
            extract(image), extract(vectors["vgg_target"]), layer_weights=layer_weights, criterion=criterion
        )

    # In float64: where an activation is within rounding of 0, its ReLU goes either way in float32, and so do a few
    # percent of the gradient.
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, vgg19)
        value, grad = jax.jit(jax.value_and_grad(loss, argnums=1))(params, np.float64(vectors["vgg_pred"]))
    expected = vectors[f"{name}:grad"]
    np.testing.assert_allclose(value, vectors[name], rtol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("criterion", ["l1", "l2", "fro"])
def test_equal_images_cost_nothing_and_have_no_gradient(vgg19: dict, criterion: str) -> None:
    image = jax.random.uniform(jax.random.key(0), (1, 8, 8, 3))
    extract = lambda x: vgg_features(vgg19, x, vgg_type="vgg19", layers=("conv1_2",))  # noqa: E731
    for compare in (perceptual, style):
        loss = lambda x, c=compare: c(  # noqa: E731
            extract(x), extract(image), layer_weights={"conv1_2": 1.0}, criterion=criterion
        )
        value, grad = jax.value_and_grad(loss)(image)
        assert value == 0 and not np.any(grad)
        assert loss(image + 0.1) > 0


@pytest.mark.parametrize(
    ("vgg_type", "last", "count"),
    [("vgg11", "conv5_2", 8), ("vgg13", "conv5_2", 10), ("vgg16", "conv5_3", 13), ("vgg19", "conv5_4", 16)],
)
def test_names_and_numbers_of_torchvision(vgg_type: str, last: str, count: int) -> None:
    convolutions = _convolutions(vgg_type)
    assert len(convolutions) == count and list(convolutions)[-1] == last
    assert layer_names(vgg_type)[-1] == "pool5"
    # torchvision's vgg19: features.0 is conv1_1, features.34 is conv5_4.
    assert vgg_type != "vgg19" or (convolutions["conv1_1"][0], convolutions["conv5_4"][0]) == (0, 34)


def write_vgg(path: Path, vgg_type: str, upto: str, prefix: str = "features.", **more: np.ndarray) -> dict:
    state = {}
    for name, (index, num_in, num_out) in _convolutions(vgg_type).items():
        state[f"{prefix}{index}.weight"] = (
            np.random.default_rng(index).normal(size=(num_out, num_in, 3, 3)).astype("f4")
        )
        state[f"{prefix}{index}.bias"] = np.full(num_out, index, np.float32)
        if name == upto:
            break
    path.write_bytes(torch_file_bytes(state | more, {}))
    return state


@pytest.mark.parametrize("prefix", ["features.", ""])
def test_a_torchvision_file_is_read_up_to_the_deepest_layer(tmp_path: Path, prefix: str) -> None:
    state = write_vgg(tmp_path / "vgg.pth", "vgg16", "conv2_2", prefix)
    params = load_vgg(tmp_path / "vgg.pth", vgg_type="vgg16", layers=("relu2_1",))
    assert list(params) == ["conv1_1", "conv1_2", "conv2_1"]
    np.testing.assert_array_equal(params["conv2_1"]["kernel"], state[f"{prefix}5.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize(
    ("vgg_type", "layers", "more", "message"),
    [
        ("vgg19", ("conv3_4",), {}, "features.12 with weight and bias; it is incomplete"),
        ("vgg11", ("conv1_1",), {}, "are not those of vgg11"),
        ("vgg19", ("conv1_1",), {"features.1.running_mean": np.zeros(64, "f4")}, "batch normalisation"),
        ("vgg19", ("conv3_9",), {}, "layer of vgg19 'conv3_9'; did you mean"),
        ("vgg18", ("conv1_1",), {}, "unknown vgg_type 'vgg18'"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, vgg_type: str, layers: tuple, more: dict, message: str
) -> None:
    write_vgg(tmp_path / "vgg.pth", "vgg19", "conv3_1", **more)
    with pytest.raises(ValueError, match=message):
        load_vgg(tmp_path / "vgg.pth", vgg_type=vgg_type, layers=layers)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vgg.pth").write_bytes(b"text")
    with pytest.raises(WeightsError, match=r"vgg.pth.*wanted a .pth"):
        load_vgg(tmp_path / "vgg.pth", vgg_type="vgg19", layers=("conv1_1",))


@pytest.mark.parametrize("kind", ["perceptual", "style"])
def test_as_terms(tmp_path: Path, kind: str) -> None:
    """They compare with the clean image, or the teacher's; unlabelled samples cost nothing; the wrong costs more."""
    write_vgg(tmp_path / "vgg.pth", "vgg19", "conv1_2")
    student = network("dncnn", dict(num_feat=4, depth=2)).init(jax.random.key(0))
    apply = student.network.make_apply()
    setting = make_setting(apply, student.params, None, None, (2, 16, 16, 3), jax.random.key(1))
    spec = dict(vgg=str(tmp_path / "vgg.pth"), layer_weights={"conv1_2": 1.0}, weight=1.0)
    gt = jax.random.uniform(jax.random.key(2), (2, 16, 16, 3))
    other = gt[:, ::-1]

    def value(output: jax.Array, target: str = "gt", labelled: jax.Array | None = None) -> float:
        (term,) = make_terms({kind: spec | {"target": target}}, setting)
        context = Context(
            Forward(output, {}), Forward(other, {}), gt, gt, labelled, None, jax.random.split(jax.random.key(3))
        )
        low = term.loss.value(context._replace(student=Forward(output.astype("bfloat16"), {})), {}, term.loss.frozen)
        full = term.loss.value(context, {}, term.loss.frozen)
        assert low.dtype == full.dtype and (full == 0 or abs(float(low) / float(full) - 1) < 0.1)
        grad = jax.grad(lambda x: term.loss.value(context._replace(student=Forward(x, {})), {}, term.loss.frozen))(
            output
        )
        assert bool(np.isfinite(grad).all()) and (bool(np.any(grad)) or full == 0)
        return float(full)

    assert value(gt) == 0 and value(other, "teacher") == 0
    assert value(gt + 0.2) > 1e-3 and value(gt, "teacher") > 1e-3
    assert value(gt + 0.2, labelled=np.zeros((2, 1, 1, 1), np.float32)) == 0
    with pytest.raises(ValueError, match="unknown target 'lq'"):
        make_terms({kind: spec | {"target": "lq"}}, setting)
    with pytest.raises(ValueError, match=f"'{kind}'.*'poling'"):
        make_terms({kind: spec | {"poling": 1}}, setting)
