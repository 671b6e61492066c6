"""Slices of teachers: identity, and the same function where what is cut away did nothing."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from kdjax.models import MODELS, Model, network
from kdjax.models.slicing import slice_model

FULL = {
    "rrdbnet": dict(scale=1, num_feat=8, num_block=2, num_grow_ch=6),
    "srvggnetcompact": dict(num_feat=8, num_conv=3, upscale=1),
    "dncnn": dict(num_feat=8, depth=5),
}
NARROW = {
    "rrdbnet": dict(num_feat=5, num_grow_ch=3),
    "srvggnetcompact": dict(num_feat=5),
    "dncnn": dict(num_feat=5),
}


def edited(model: Model, change: Callable[[str, np.ndarray], np.ndarray]) -> Model:
    flat = traverse_util.flatten_dict(model.params, sep=".")
    params = {path: change(path, np.array(leaf)) for path, leaf in flat.items()}
    return Model(model.network, traverse_util.unflatten_dict(params, sep="."))


@pytest.fixture(scope="module", params=FULL)
def teacher(request: pytest.FixtureRequest) -> Model:
    return network(request.param, FULL[request.param]).init(jax.random.key(0))


def test_every_slicer_is_tried() -> None:
    assert set(FULL) == {name for name, known in MODELS.items() if known.slice}


def test_a_slice_of_full_size_is_the_teacher(teacher: Model) -> None:
    sliced = slice_model(teacher, teacher.hparams)
    jax.tree.map(np.testing.assert_array_equal, sliced.params, jax.tree.map(np.asarray, teacher.params))


def test_channels_that_do_nothing_are_cut_first(teacher: Model) -> None:
    """Random channels of every inner layer write nothing: the slice without them is the same function."""
    hparams = teacher.hparams | NARROW[teacher.arch]
    random = np.random.default_rng(1)
    dead = {8: random.permutation(8)[:3], 6: random.permutation(6)[:3]}

    def kill(path: str, leaf: np.ndarray) -> np.ndarray:
        if path.endswith(("kernel", "bias")) and leaf.shape[-1] in dead:
            leaf[..., dead[leaf.shape[-1]]] = 0
        return leaf

    whole = edited(teacher, kill)
    sliced = slice_model(whole, hparams)
    assert sliced.hparams == hparams
    x = jax.random.uniform(jax.random.key(1), (1, 12, 16, 3))
    np.testing.assert_allclose(sliced(x)[0], whole(x)[0], atol=1e-6)
    wrong = slice_model(edited(whole, lambda path, leaf: np.roll(leaf, 1, -1)), hparams)
    assert np.abs(np.asarray(wrong(x)[0] - whole(x)[0])).max() > 1e-4


def test_blocks_whose_branches_do_nothing_are_cut() -> None:
    teacher = network("rrdbnet", FULL["rrdbnet"]).init(jax.random.key(0))
    identity = edited(teacher, lambda path, leaf: leaf * 0 if path.startswith("body.1.") else leaf)
    sliced = slice_model(identity, teacher.hparams | {"num_block": 1})
    x = jax.random.uniform(jax.random.key(1), (1, 12, 16, 3))
    np.testing.assert_allclose(sliced(x)[0], identity(x)[0], atol=1e-6)


def test_a_shorter_stack_ends_with_the_teachers_last_layer() -> None:
    teacher = network("dncnn", FULL["dncnn"]).init(jax.random.key(0))
    sliced = slice_model(teacher, dict(num_feat=8, depth=3))
    np.testing.assert_array_equal(sliced.params["model"]["4"]["kernel"], teacher.params["model"]["8"]["kernel"])
    assert jnp.isfinite(sliced(jnp.ones((1, 8, 8, 3)))[0]).all()


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        (dict(num_feat=9, depth=3), "num_feat=9, the teacher has 8"),
        (dict(num_in_ch=1), "num_in_ch=1 is not 3"),
        (dict(width=3), "has no hyper-parameter 'width'"),
    ],
)
def test_what_is_no_slice_is_refused(hparams: dict, message: str) -> None:
    teacher = network("dncnn", FULL["dncnn"]).init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        slice_model(teacher, dict(num_feat=8, depth=5) | hparams)
