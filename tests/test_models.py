"""Architectures against BasicSR's outputs and parameter counts, and the properties every model must have."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, load_npz

from kdjax.models import abstract_params, count_macs, count_params, init_model, make_apply
from kdjax.weights import load_model

TINY = {
    "rrdbnet": dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4),
    "srvggnetcompact": dict(num_feat=8, num_conv=2, upscale=1),
    "dncnn": dict(num_feat=8, depth=4),
}
REFERENCES = sorted(path.stem for arch in TINY for path in (GOLDEN / "archs").glob(f"{arch}*.npz"))


def load_reference(folder: Path, name: str) -> tuple:
    """The model in a reference file; relu and leakyrelu have the same keys, so the file's name decides."""
    told = {"act_type": name.split("_")[1]} if name.startswith("srvggnetcompact") else {}
    return load_model(folder / "archs" / f"{name}.pth", **told), load_npz(folder / "archs" / f"{name}.npz")


@pytest.mark.parametrize("name", REFERENCES)
def test_output_and_features_equal_the_reference(golden: Path, name: str) -> None:
    model, vectors = load_reference(golden, name)
    output, features = model(vectors["x"])
    np.testing.assert_allclose(output, vectors["y"], atol=1e-5)
    for key, expected in vectors.items():
        if key.startswith("feat:"):
            np.testing.assert_allclose(features[key.removeprefix("feat:")], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "hparams", "expected"),
    [
        ("RRDBNet", dict(scale=4), 16_697_987),
        ("RRDBNet", dict(scale=2), 16_703_171),
        ("RRDBNet", dict(scale=1), 16_723_907),
        ("RRDBNet", dict(scale=4, num_block=6), 4_467_779),
        ("RRDBNet", dict(scale=1, num_feat=32, num_block=8, num_grow_ch=16), 1_491_715),
        ("SRVGGNetCompact", dict(upscale=1), 595_459),
        ("SRVGGNetCompact", dict(upscale=4, num_conv=32), 1_213_296),
        ("SRVGGNetCompact", dict(upscale=1, num_feat=32, num_conv=8), 76_035),
        ("DnCNN", {}, 668_227),
    ],
)
def test_parameter_counts_are_the_published_ones(arch: str, hparams: dict, expected: int) -> None:
    assert count_params(abstract_params(arch, hparams)) == expected


def test_macs_are_those_of_the_formula() -> None:
    assert count_macs("dncnn", {}, (1, 256, 256, 3)) == 256 * 256 * 9 * (2 * 3 * 64 + 18 * 64 * 64)
    # All of RRDBNet's trunk runs at a quarter of the side at scale 1: 73.5 GMAC, not the 1,089 of the full size.
    assert count_macs("rrdbnet", dict(scale=1), (1, 256, 256, 3)) == pytest.approx(73.5e9, rel=1e-3)


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple:
    return request.param, TINY[request.param], init_model(request.param, TINY[request.param], jax.random.key(0))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3)])
def test_any_height_and_width_works(tiny: tuple, size: tuple[int, int]) -> None:
    _, _, model = tiny
    assert model(jnp.ones((2, *size, 3)))[0].shape == (2, *size, 3)


def test_padding_to_a_multiple_does_not_change_the_image_it_covers() -> None:
    model = init_model("rrdbnet", TINY["rrdbnet"], jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (1, 6, 7, 3))
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 1), (0, 0)), mode="reflect")
    np.testing.assert_allclose(model(x)[0], model(padded)[0][:, :6, :7], atol=1e-6)


def test_feature_names_are_module_paths() -> None:
    x = jnp.ones((1, 8, 8, 3))
    names = {arch: list(jax.eval_shape(make_apply(arch, TINY[arch]), abstract_params(arch, TINY[arch]), x)[1])
             for arch in TINY}  # fmt: skip
    assert names == {
        "rrdbnet": ["body.0", "body.1", "conv_body", "conv_first"],
        "srvggnetcompact": [f"body.{i}" for i in range(7)],
        "dncnn": [f"model.{i}" for i in range(7)],
    }


def test_remat_changes_neither_output_nor_gradient_but_what_is_stored(tiny: tuple) -> None:
    arch, hparams, model = tiny
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3))

    def loss(remat: bool):
        apply = make_apply(arch, hparams, remat=remat)
        return lambda params: jnp.sum(jnp.square(apply(params, x)[0]))

    (value, grads), (value_remat, grads_remat) = (
        jax.jit(jax.value_and_grad(loss(remat)))(model.params) for remat in (False, True)
    )
    np.testing.assert_allclose(value, value_remat, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, grads_remat)
    assert "remat" in str(jax.make_jaxpr(loss(True))(model.params))
    assert "remat" not in str(jax.make_jaxpr(loss(False))(model.params))


def test_bfloat16_inside_stays_near_and_comes_out_as_float32(tiny: tuple) -> None:
    arch, hparams, model = tiny
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3))
    output, features = make_apply(arch, hparams, dtype=jnp.bfloat16)(model.params, x)
    assert output.dtype == jnp.float32
    assert all(feature.dtype == jnp.bfloat16 for feature in features.values())
    np.testing.assert_allclose(output, model(x)[0], atol=0.03)


def test_initialisation_is_torchs() -> None:
    params = init_model("rrdbnet", dict(scale=1, num_block=1), jax.random.key(0)).params
    dense = params["body"]["0"]["rdb1"]["conv4"]  # normal, std 0.1 * sqrt(2 / fan_in), bias 0
    fan_in = 9 * dense["kernel"].shape[2]
    assert np.std(dense["kernel"]) == pytest.approx(0.1 * np.sqrt(2 / fan_in), rel=0.02)
    assert np.max(np.abs(dense["kernel"])) > 3.5 * np.std(dense["kernel"])  # not truncated
    assert not np.any(dense["bias"])
    plain = params["conv_hr"]  # weight and bias uniform within 1/sqrt(fan_in)
    bound = 1 / np.sqrt(9 * 64)
    for leaf in plain.values():
        assert 0.9 * bound < np.max(np.abs(leaf)) <= bound
    assert np.std(plain["kernel"]) == pytest.approx(bound / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(
    ("arch", "hparams", "message"),
    [
        ("rrdb", {}, "did you mean 'rrdbnet'"),
        ("rrdbnet", dict(num_feats=3), "did you mean 'num_feat'"),
        ("rrdbnet", dict(num_feat="64"), "is a str, wanted int"),
        ("rrdbnet", dict(num_block=0), "must be positive"),
        ("rrdbnet", dict(scale=3), "scale=3 does not divide"),
        ("srvggnetcompact", dict(act_type="swish"), "relu, prelu, leakyrelu"),
        ("srvggnetcompact", dict(num_out_ch=1), "must be equal"),
        ("dncnn", dict(depth=1), "at least 2"),
    ],
)
def test_bad_requests_are_refused(arch: str, hparams: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abstract_params(arch, hparams)
