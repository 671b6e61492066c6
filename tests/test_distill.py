"""The step against BasicSR's own training runs, and what must not change it: devices, batch position, the teacher."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_npz
from flax import traverse_util

from kdjax import distill, models, sharding
from kdjax.degradations import make_degrade
from kdjax.schedules import make_schedule
from kdjax.weights import load_model

TASK = dict(criterion="charbonnier", weight=1.0, eps=1e-12)


def as_schedule(values: np.ndarray) -> Callable:
    """A schedule that reads its value from a table by step."""
    return lambda count: jnp.asarray(values)[count]


@pytest.mark.parametrize("name", ["output_l2", "progressive"])
def test_reproduces_the_reference_training_run(golden: Path, name: str) -> None:
    vectors = {key.split(":")[1]: value for key, value in load_npz(golden / "train.npz").items() if name in key}
    student = load_model(golden / f"train_{name}_student_init.pth")
    teacher = load_model(golden / f"train_{name}_teacher.pth")
    (task,) = distill.make_terms({"task": TASK})
    (output,) = distill.make_terms({"output": dict(criterion="mse", weight=1.0)})
    learning_rate = as_schedule(vectors["lr"].astype(np.float32))
    recipe = distill.Recipe(
        student=models.make_apply(student.arch, student.hparams),
        teacher=models.make_apply(teacher.arch, teacher.hparams),
        terms=(task, distill.Term("output", output.value, as_schedule(vectors["distill_weight"]), True)),
        optimizer=distill.make_optimizer("adam", learning_rate, betas=(0.9, 0.99)),
        learning_rate=learning_rate,
        ema_decay=0.9,
    )
    step = jax.jit(functools.partial(distill.train_step, recipe))
    state = distill.init_state(recipe, student.params)
    for i in range(len(vectors["l_pix"])):
        batch = {"lq": vectors["lq"][i], "gt": vectors["gt"][i]}
        state, metrics = step(state, teacher.params, batch, jax.random.key(0))
        np.testing.assert_allclose(metrics["loss/task"], vectors["l_pix"][i], rtol=1e-5)
        weighted = metrics["loss/output"] * metrics["weight/output"]
        np.testing.assert_allclose(weighted, vectors["l_distill"][i], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss/total"], metrics["loss/task"] + weighted, rtol=1e-6)
    for key, params in (("params", state.params["student"]), ("params_ema", state.params_ema)):
        expected = traverse_util.flatten_dict(load_model(golden / f"train_{name}_student_final.pth", key=key).params)
        for path, leaf in traverse_util.flatten_dict(params).items():
            np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=f"{key} {path}")
            # Much nearer to the end of the reference run than to its start: the updates were really made.
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, student.params)
        assert max(jax.tree.leaves(moved)) > 5e-4


def test_reference_schedules_are_ours(golden: Path) -> None:
    vectors = load_npz(golden / "train.npz")
    for key in ("output_l2:lr", "progressive:distill_weight"):
        values = vectors[key]
        milestones = tuple(int(i) for i in np.flatnonzero(values[1:] != values[:-1]) + 1)
        gamma = float(values[milestones[0]] / values[0])
        schedule = make_schedule(dict(name="multistep", value=float(values[0]), milestones=milestones, gamma=gamma))
        np.testing.assert_allclose([schedule(i) for i in range(len(values))], values, rtol=1e-6)


class Tiny:
    """A small denoising problem with every part of a recipe in it."""

    student = models.init_model("dncnn", dict(num_feat=8, depth=3), jax.random.key(0))
    teacher = models.init_model("rrdbnet", dict(scale=1, num_feat=8, num_block=1, num_grow_ch=4), jax.random.key(1))
    gt = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)

    def recipe(self, **changes: object) -> distill.Recipe:
        learning_rate = make_schedule(1e-3)
        parts = dict(
            student=models.make_apply(self.student.arch, self.student.hparams),
            teacher=models.make_apply(self.teacher.arch, self.teacher.hparams),
            terms=distill.make_terms({"task": TASK, "output": dict(criterion="l1", weight=0.5)}),
            optimizer=distill.make_optimizer("adam", learning_rate),
            learning_rate=learning_rate,
            ema_decay=0.9,
            degrade=make_degrade(dict(name="awgn_blind", sigma=(5.0, 50.0))),
        )
        return distill.Recipe(**(parts | changes))

    def run(self, recipe: distill.Recipe, *, steps: int = 3, num_devices: int = 1, order: np.ndarray | None = None):
        """The states after every step, the last metrics, and the teacher's parameters afterwards."""
        mesh = sharding.data_mesh(jax.devices()[:num_devices])
        state = sharding.replicate(distill.init_state(recipe, self.student.params), mesh)
        teacher_params = sharding.replicate(self.teacher.params, mesh)
        key = sharding.replicate(jax.random.key(7), mesh)
        step = jax.jit(functools.partial(distill.train_step, recipe))
        states = [state]
        for i in range(steps):
            batch = {"gt": self.gt, "index": np.arange(8, dtype=np.int32) + 8 * i}
            if order is not None:
                batch = {name: array[order] for name, array in batch.items()}
            state, metrics = step(state, teacher_params, sharding.shard_batch(batch, mesh), key)
            states.append(state)
        return states, jax.device_get(metrics), teacher_params


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture(scope="module")
def base(tiny: Tiny) -> tuple:
    return tiny.run(tiny.recipe())


def assert_trees_close(a: object, b: object, atol: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def test_four_devices_give_what_one_gives(tiny: Tiny, base: tuple) -> None:
    states, metrics, _ = tiny.run(tiny.recipe(), num_devices=4)
    assert len(states[-1].step.sharding.device_set) == 4
    assert_trees_close(states[-1].params, base[0][-1].params, 1e-5)
    assert_trees_close(metrics, base[1], 1e-5)


def test_order_within_the_batch_does_not_matter(tiny: Tiny, base: tuple) -> None:
    states, _, _ = tiny.run(tiny.recipe(), order=np.array([5, 2, 7, 0, 1, 6, 3, 4]))
    assert_trees_close(states[-1].params, base[0][-1].params, 1e-5)


def test_teacher_is_bit_identical_afterwards(tiny: Tiny, base: tuple) -> None:
    jax.tree.map(np.testing.assert_array_equal, base[2], tiny.teacher.params)


def test_ema_is_the_closed_form_of_the_students(base: tuple) -> None:
    states, _, _ = base
    expected = states[0].params["student"]
    for state in states[1:]:
        expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params["student"])
    assert_trees_close(states[-1].params_ema, expected, 1e-7)
    difference = jax.tree.map(lambda e, p: float(np.abs(e - p).max()), states[-1].params_ema, states[0].params_ema)
    assert max(jax.tree.leaves(difference)) > 1e-5


def test_remat_and_no_remat_train_alike(tiny: Tiny, base: tuple) -> None:
    student = models.make_apply(tiny.student.arch, tiny.student.hparams, remat=True)
    states, _, _ = tiny.run(tiny.recipe(student=student))
    assert_trees_close(states[-1].params, base[0][-1].params, 1e-5)


def test_noise_depends_on_key_and_sample_number_only(tiny: Tiny) -> None:
    degrade = make_degrade(dict(name="awgn", sigma=25.0))
    make = functools.partial(distill.make_pair, degrade)
    index = np.arange(8, dtype=np.int32)
    _, lq = make({"gt": tiny.gt, "index": index}, jax.random.key(0))
    _, part = make({"gt": tiny.gt[3:5], "index": index[3:5]}, jax.random.key(0))
    np.testing.assert_array_equal(part, lq[3:5])
    for other in (make({"gt": tiny.gt, "index": index + 8}, jax.random.key(0)),
                  make({"gt": tiny.gt, "index": index}, jax.random.key(1))):  # fmt: skip
        assert np.abs(np.asarray(other[1]) - lq).mean() > 0.05


def test_a_given_lq_is_used_as_it_is(tiny: Tiny) -> None:
    gt, lq = distill.make_pair(None, {"gt": tiny.gt, "lq": 255 - tiny.gt}, jax.random.key(0))
    np.testing.assert_allclose(gt + lq, 1.0, atol=1e-6)


def test_a_non_finite_loss_is_reported(tiny: Tiny) -> None:
    recipe = tiny.recipe(degrade=lambda key, image: image * jnp.nan)
    _, metrics, _ = tiny.run(recipe, steps=1)
    assert not metrics["finite"]


def test_a_finite_loss_is_reported_as_such(base: tuple) -> None:
    assert base[1]["finite"]


def test_terms_with_zero_weight_are_left_out_and_the_teacher_with_them() -> None:
    terms = distill.make_terms({"task": TASK, "output": dict(criterion="l1", weight=0.0)})
    assert [term.name for term in terms] == ["task"]
    assert not any(term.needs_teacher for term in terms)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"outputs": dict(criterion="l1", weight=1.0)}, "did you mean 'output'"),
        ({"task": dict(criterion="l1")}, "'task' has no weight"),
        ({"task": dict(criterion="l3", weight=1.0)}, "'task'.*unknown criterion 'l3'"),
        ({"task": dict(criterion="l1", weight=1.0, layer="x")}, "'task'.*'layer'"),
        ({"task": dict(criterion="l1", weight=dict(name="cosin", value=1.0))}, "did you mean 'cosine'"),
        ({"task": dict(criterion="l1", weight=0)}, "no loss term has a weight above 0"),
        ({}, "no loss term has a weight above 0"),
    ],
)
def test_bad_terms_are_refused(specs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.make_terms(specs)


def adam_by_hand(params: np.ndarray, grads: list[np.ndarray], *, l2: float, decoupled: float) -> np.ndarray:
    """torch.optim.Adam and AdamW written out in float64, lr 0.1, betas (0.9, 0.99), eps 1e-8."""
    first = second = np.zeros_like(params)
    for t, grad in enumerate(grads, start=1):
        grad = grad + l2 * params
        first, second = 0.9 * first + 0.1 * grad, 0.99 * second + 0.01 * grad**2
        corrected = (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.99**t)) + 1e-8)
        params = params * (1 - 0.1 * decoupled) - 0.1 * corrected
    return params


@pytest.mark.parametrize(
    ("name", "options"), [("adam", dict(l2=0.3, decoupled=0)), ("adamw", dict(l2=0, decoupled=0.3))]
)
def test_optimizers_are_torchs(name: str, options: dict) -> None:
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=5), [rng.normal(size=5) for _ in range(4)]
    optimizer = distill.make_optimizer(name, make_schedule(0.1), weight_decay=0.3)
    params = jnp.asarray(start)
    opt_state = optimizer.init(params)
    for grad in grads:
        updates, opt_state = optimizer.update(jnp.asarray(grad), opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, adam_by_hand(start, grads, **options), rtol=1e-5)


def test_gradient_clipping_limits_the_norm_that_adam_sees() -> None:
    optimizer = distill.make_optimizer("adam", make_schedule(1.0), grad_clip=0.5)
    params = jnp.zeros(2)
    _, opt_state = optimizer.update(jnp.array([30.0, 40.0]), optimizer.init(params), params)
    first_moment = optax.tree_utils.tree_get(opt_state, "mu")
    np.testing.assert_allclose(first_moment, 0.1 * np.array([0.3, 0.4]), rtol=1e-5)
