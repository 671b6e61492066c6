"""The step against BasicSR's own training runs, and what must not change it: devices, batch position, the teacher."""

import dataclasses
import functools
import re
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
from kdjax.degradations import Window, cut, make_degrade, usm_sharpen
from kdjax.schedules import make_schedule
from kdjax.terms import Setting, make_terms
from kdjax.weights import load_model

TASK = dict(criterion="charbonnier", weight=1.0, eps=1e-12)


def as_schedule(values: np.ndarray) -> Callable:
    """A schedule that reads its value from a table by step."""
    return lambda count: jnp.asarray(values)[count]


# The guide's loss of each reference run, but for its weight, which is in the vectors.
REFERENCE_TERMS = {
    "output_l2": {"output": dict(criterion="mse")},
    "progressive": {"output": dict(criterion="mse")},
    "attention": {
        "feature": dict(pairs=(("body.0", "body.0", 1.0), ("body.1", "body.1", 1.0))),
        "attention": dict(pairs=(("body.0", "body.0", 0.5), ("body.1", "body.1", 0.5)), mode="guide"),
    },
    "hint": {"hint": dict(pairs=(("body.0", "body.0", 1.0),))},
}


@pytest.mark.parametrize("name", REFERENCE_TERMS)
def test_reproduces_the_reference_training_run(golden: Path, name: str) -> None:
    prefix = f"{name}:"
    vectors = {k.removeprefix(prefix): v for k, v in load_npz(golden / "train.npz").items() if k.startswith(prefix)}
    student = load_model(golden / f"train_{name}_student_init.pth")
    teacher = load_model(golden / f"train_{name}_teacher.pth")
    student_apply, teacher_apply = (model.network.make_apply() for model in (student, teacher))
    setting = distill.make_setting(
        student_apply, student.params, teacher_apply, teacher.params, vectors["lq"][0].shape, jax.random.key(0)
    )
    specs = {"task": TASK} | {term: spec | {"weight": 1.0} for term, spec in REFERENCE_TERMS[name].items()}
    task, *distillation = make_terms(specs, setting)
    weight = as_schedule(vectors["distill_weight"])
    learning_rate = as_schedule(vectors["lr"].astype(np.float32))
    recipe = distill.Recipe(
        student=student_apply,
        teacher=teacher_apply,
        terms=(task, *(dataclasses.replace(term, weight=weight) for term in distillation)),
        optimizer=distill.make_optimizer("adam", learning_rate, betas=(0.9, 0.99)),
        learning_rate=learning_rate,
        ema_decay=0.9,
    )
    step = jax.jit(functools.partial(distill.train_step, recipe))
    state = distill.init_state(recipe, student.params)
    if name == "hint":  # the regressor of the reference starts from its own random weights
        assert jax.tree.map(jnp.shape, state.params["adapters"]) == {
            "hint": {"0": {"bias": (16,), "kernel": (1, 1, 12, 16)}}
        }
        kernel, bias = vectors["regressor_weight_oihw"].transpose(2, 3, 1, 0), vectors["regressor_bias"]
        adapters = {"hint": {"0": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}
        state = dataclasses.replace(state, params=state.params | {"adapters": adapters})
    frozen = distill.make_frozen(recipe.terms, teacher.params)
    for i in range(len(vectors["l_pix"])):
        batch = {"lq": vectors["lq"][i], "gt": vectors["gt"][i]}
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        np.testing.assert_allclose(metrics["loss/task"], vectors["l_pix"][i], rtol=1e-5)
        weighted = sum(metrics[f"weighted/{term.name}"] for term in distillation)
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

    def __init__(self) -> None:
        teacher = dict(scale=1, num_feat=8, num_block=1, num_grow_ch=4)
        self.student = models.network("dncnn", dict(num_feat=8, depth=3)).init(jax.random.key(0))
        self.teacher = models.network("rrdbnet", teacher).init(jax.random.key(1))
        self.gt = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        self.student_apply = self.student.network.make_apply()
        self.teacher_apply = self.teacher.network.make_apply()

    def setting(self) -> Setting:
        return distill.make_setting(
            self.student_apply,
            self.student.params,
            self.teacher_apply,
            self.teacher.params,
            self.gt.shape,
            jax.random.key(2),
        )

    def recipe(self, specs: dict | None = None, **changes: object) -> distill.Recipe:
        learning_rate = make_schedule(1e-3)
        specs = specs or {"task": TASK, "output": dict(criterion="l1", weight=0.5)}
        parts = dict(
            student=self.student_apply,
            teacher=self.teacher_apply,
            terms=make_terms(specs, self.setting()),
            optimizer=distill.make_optimizer("adam", learning_rate),
            learning_rate=learning_rate,
            ema_decay=0.9,
            degrade=make_degrade(dict(name="awgn_blind", sigma=(5.0, 50.0))),
        )
        return distill.Recipe(**(parts | changes))

    def compiled(self, recipe: distill.Recipe, num_devices: int, per_device: int = 2) -> jax.stages.Compiled:
        """The compiled step for batches of `per_device` images a device."""
        mesh = sharding.data_mesh(jax.devices()[:num_devices])
        arguments = (
            distill.init_state(recipe, self.student.params),
            distill.make_frozen(recipe.terms, self.teacher.params),
            jax.random.key(7),
        )
        state, frozen, key = sharding.replicate(arguments, mesh)
        size = per_device * num_devices
        batch = {"gt": np.resize(self.gt, (size, *self.gt.shape[1:])), "index": np.arange(size, dtype=np.int32)}
        step = jax.jit(functools.partial(distill.train_step, recipe), donate_argnums=0)
        with jax.set_mesh(mesh):
            return step.lower(state, frozen, sharding.shard_batch(batch, mesh), key).compile()

    def run(self, recipe: distill.Recipe, *, steps: int = 3, num_devices: int = 1, order: np.ndarray | None = None):
        """The states after every step, the last metrics, and the teacher's parameters afterwards."""
        mesh = sharding.data_mesh(jax.devices()[:num_devices])
        state = sharding.replicate(distill.init_state(recipe, self.student.params), mesh)
        frozen = sharding.replicate(distill.make_frozen(recipe.terms, self.teacher.params), mesh)
        key = sharding.replicate(jax.random.key(7), mesh)
        step = sharding.on_mesh(mesh, jax.jit(functools.partial(distill.train_step, recipe)))
        states = [state]
        for i in range(steps):
            batch = {"gt": self.gt, "index": np.arange(8, dtype=np.int32) + 8 * i}
            if order is not None:
                batch = {name: array[order] for name, array in batch.items()}
            state, metrics = step(state, frozen, sharding.shard_batch(batch, mesh), key)
            states.append(state)
        return states, jax.device_get(metrics), frozen["teacher"]


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
    student = tiny.student.network.make_apply(remat=True)
    states, _, _ = tiny.run(tiny.recipe(student=student))
    assert_trees_close(states[-1].params, base[0][-1].params, 1e-5)


def test_noise_depends_on_key_and_sample_number_only(tiny: Tiny) -> None:
    degrade = make_degrade(dict(name="awgn", sigma=25.0))
    make = functools.partial(distill.make_pair, tiny.recipe(degrade=degrade))
    index = np.arange(8, dtype=np.int32)
    _, lq = make({"gt": tiny.gt, "index": index}, jax.random.key(0))
    _, part = make({"gt": tiny.gt[3:5], "index": index[3:5]}, jax.random.key(0))
    np.testing.assert_array_equal(part, lq[3:5])
    for other in (make({"gt": tiny.gt, "index": index + 8}, jax.random.key(0)),
                  make({"gt": tiny.gt, "index": index}, jax.random.key(1))):  # fmt: skip
        assert np.abs(np.asarray(other[1]) - lq).mean() > 0.05


def test_a_given_lq_is_used_as_it_is(tiny: Tiny) -> None:
    gt, lq = distill.make_pair(tiny.recipe(), {"gt": tiny.gt, "lq": 255 - tiny.gt}, jax.random.key(0))
    np.testing.assert_allclose(gt + lq, 1.0, atol=1e-6)


def test_a_hybrid_batch_degrades_only_what_has_no_lq(tiny: Tiny) -> None:
    recipe = tiny.recipe(degrade=lambda key, image, window: 1 - image)
    is_paired = np.arange(8) % 3 == 0
    batch = {"gt": tiny.gt, "lq": tiny.gt // 2, "is_paired": is_paired, "index": np.arange(8, dtype=np.int32)}
    gt, lq = distill.make_pair(recipe, batch, jax.random.key(0))
    np.testing.assert_allclose(lq[is_paired] * 255, (tiny.gt // 2)[is_paired], atol=1e-4)
    np.testing.assert_allclose(lq[~is_paired] + gt[~is_paired], 1, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 2])
def test_crops_are_cut_after_degrading_at_the_same_place_of_both(tiny: Tiny, scale: int) -> None:
    def degrade(key: jax.Array, image: jax.Array, window: Window | None = None) -> jax.Array:
        small = image[::scale, ::scale]
        return cut(small, window) if window else small

    recipe = tiny.recipe(degrade=degrade, crop=6)
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32)}
    gt, lq = distill.make_pair(recipe, batch, jax.random.key(0))
    assert gt.shape == (8, 6, 6, 3) and lq.shape == (8, 6 // scale, 6 // scale, 3)
    np.testing.assert_array_equal(gt[:, ::scale, ::scale], lq)
    places = {
        (top, left)
        for i in range(8)
        for top in range(11)
        for left in range(11)
        if np.allclose(gt[i] * 255, tiny.gt[i, top : top + 6, left : left + 6], atol=1e-3)
    }
    assert len(places) > 3 and all(top % scale == left % scale == 0 for top, left in places)
    _, part = distill.make_pair(recipe, {name: array[3:5] for name, array in batch.items()}, jax.random.key(0))
    np.testing.assert_array_equal(part, lq[3:5])


@pytest.mark.once
def test_sharpened_targets_are_what_is_degraded(tiny: Tiny) -> None:
    recipe = tiny.recipe(degrade=lambda key, image, window: image, sharpen=True)
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32)}
    gt, lq = distill.make_pair(recipe, batch, jax.random.key(0))
    np.testing.assert_array_equal(gt, lq)
    np.testing.assert_allclose(gt[0], usm_sharpen(jnp.float32(tiny.gt[0]) / 255), atol=1e-6)
    assert np.abs(np.asarray(gt) * 255 - tiny.gt).mean() > 1


def test_a_non_finite_loss_is_reported(tiny: Tiny) -> None:
    recipe = tiny.recipe(degrade=lambda key, image, window: image * jnp.nan)
    _, metrics, _ = tiny.run(recipe, steps=1)
    assert not metrics["finite"]


def test_a_finite_loss_is_reported_as_such(base: tuple) -> None:
    assert base[1]["finite"]


PAIR = (("model.1", "body.0", 1.0),)


@pytest.mark.once
@pytest.mark.parametrize("devices", [1, 4])
def test_a_batch_in_parts_gives_the_update_of_the_whole(tiny: Tiny, devices: int) -> None:
    """With terms over some of the samples, of a share and of a phase; in less memory; no image changes its device."""
    phase = dict(name="piecewise", values=(1.0, 0.0), boundaries=(1,))
    base = tiny.recipe(
        {
            "task": TASK,
            "output": dict(criterion="l1", weight=0.5, gate=True),
            "hint": dict(pairs=PAIR, weight=dict(share=0.2)),
            "label_consistency": dict(criterion="l1", weight=phase),
        }
    )
    mesh = sharding.data_mesh(jax.devices()[:devices])
    frozen = sharding.replicate(distill.make_frozen(base.terms, tiny.teacher.params), mesh)
    key = sharding.replicate(jax.random.key(7), mesh)
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32), "labelled": np.arange(8) % 3 != 1}
    batch = sharding.shard_batch(batch, mesh)
    results, bytes_between = {}, {}
    for parts in (1, 8 // devices):
        recipe = dataclasses.replace(base, accumulate=parts)
        state = sharding.replicate(distill.init_state(recipe, tiny.student.params), mesh)
        step = jax.jit(functools.partial(distill.train_step, recipe), out_shardings=sharding.replicated(mesh))
        step = step.lower(state, frozen, batch, key).compile()
        assert not set(re.findall("all-to-all|all-gather|collective-permute", step.as_text()))
        bytes_between[parts] = step.memory_analysis().temp_size_in_bytes
        for _ in range(2):
            state, metrics = step(state, frozen, batch, key)
        results[parts] = state.params, state.balance, metrics
    whole, in_parts = results.values()
    assert_trees_close(whole[0], in_parts[0], 1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole[1:], in_parts[1:])
    assert bytes_between[8 // devices] < 0.6 * bytes_between[1]


@pytest.mark.once
def test_a_diagnosis_in_parts_is_that_of_the_whole(tiny: Tiny) -> None:
    base = tiny.recipe()
    state = distill.init_state(base, tiny.student.params)
    frozen = distill.make_frozen(base.terms, tiny.teacher.params)
    batch = {"gt": tiny.gt, "labelled": np.arange(8) % 3 != 1}
    whole, in_parts = (
        jax.jit(functools.partial(distill.diagnose, dataclasses.replace(base, accumulate=parts)))(
            state, frozen, batch, jax.random.key(7)
        )
        for parts in (1, 4)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, in_parts)


@pytest.mark.once
@pytest.mark.parametrize("devices", [1, 4])
def test_a_weight_given_as_a_share_keeps_the_term_at_it(tiny: Tiny, devices: int) -> None:
    """Measured on the step at which the weights are set, by the gradients of each term on its own."""
    specs = {
        "task": TASK,
        "output": dict(criterion="l1", weight=0.5),
        "hint": dict(pairs=PAIR, weight=dict(share=0.2)),
        "fft": dict(weight=dict(share=0.3)),
    }
    recipe = tiny.recipe(specs)
    states, metrics, teacher = tiny.run(recipe, steps=1, num_devices=devices)
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32)}
    frozen = distill.make_frozen(recipe.terms, teacher)

    @jax.jit
    def norms(student: dict) -> dict[str, jax.Array]:
        scene = distill.observe([recipe], [jnp.int32(0)], frozen, batch, jax.random.key(7))

        def value(student: dict, name: str) -> jax.Array:
            only = dataclasses.replace(recipe, terms=tuple(term for term in recipe.terms if term.name == name))
            return distill.term_values(only, jnp.int32(0), frozen, states[0].params | {"student": student}, scene)[name]

        return {name: optax.tree.norm(jax.grad(value)(student, name)) for name in specs}

    weighted = {
        name: float(metrics[f"weight/{name}"] * norm) for name, norm in norms(states[0].params["student"]).items()
    }
    total = sum(weighted.values())
    assert weighted["hint"] / total == pytest.approx(0.2, rel=1e-3)
    assert weighted["fft"] / total == pytest.approx(0.3, rel=1e-3)
    diagnosis = jax.jit(functools.partial(distill.diagnose, recipe))(states[0], frozen, batch, jax.random.key(7))
    for name in specs:
        assert float(diagnosis[f"share/{name}"]) == pytest.approx(weighted[name] / total, rel=1e-3)
    assert states[-1].balance == {name: pytest.approx(metrics[f"weight/{name}"]) for name in ("hint", "fft")}


def test_a_term_updates_what_adam_makes_of_its_gradient(tiny: Tiny) -> None:
    """Known mean squares; before the first step and without Adam, its gradient."""
    recipe = tiny.recipe()
    frozen = distill.make_frozen(recipe.terms, tiny.teacher.params)
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32)}
    scene = distill.observe([recipe], [jnp.int32(0)], frozen, batch, jax.random.key(7))
    values_of = functools.partial(distill.term_values, recipe, jnp.int32(0), frozen)
    updates = jax.jit(lambda state: distill.term_updates(values_of, state, scene, 1))
    start = distill.init_state(recipe, tiny.student.params)
    value = lambda student: values_of({"student": student, "adapters": {}}, scene)["output"]  # noqa: E731
    gradient = jax.jit(jax.grad(value))(tiny.student.params)
    assert_trees_close(updates(start)["output"], gradient, 1e-6)
    later = dataclasses.replace(start, step=jnp.int32(5))
    square = {"student": jax.tree.map(lambda leaf: jnp.linspace(1e-4, 4e-4, leaf.size).reshape(leaf.shape), gradient)}
    square |= {"adapters": {}}
    later = dataclasses.replace(later, opt_state=optax.tree_utils.tree_set(later.opt_state, nu=square))
    expected = jax.tree.map(lambda each, mean: each / jnp.sqrt(mean), gradient, square["student"])
    assert_trees_close(updates(later)["output"], expected, 1e-4)
    plain = dataclasses.replace(later, opt_state=optax.sgd(0.1).init(later.params))
    assert_trees_close(updates(plain)["output"], gradient, 1e-6)


def test_a_warm_average_follows_from_the_first_step(tiny: Tiny) -> None:
    """By hand: decays of 1/10, 2/11, 3/12, ... until the one given."""
    states, _, _ = tiny.run(tiny.recipe(ema_decay=0.2, ema_warmup=True), steps=4)
    average = states[0].params["student"]
    for state, decay in zip(states[1:], (1 / 10, 2 / 11, 0.2, 0.2), strict=True):
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, state.params["student"])
        assert_trees_close(state.params_ema, average, 1e-6)


def test_shares_hold_between_measurements(tiny: Tiny) -> None:
    recipe = tiny.recipe({"task": TASK, "output": dict(criterion="l1", weight=dict(share=0.4))})
    states, _, _ = tiny.run(recipe, steps=distill.SHARES_EVERY + 1)
    weights = [float(state.balance["output"]) for state in states[1:]]
    assert len(set(weights[:-1])) == 1 and weights[-1] != weights[0]


def test_diagnosis_tells_how_far_student_and_teacher_are(tiny: Tiny) -> None:
    recipe = tiny.recipe()
    state, frozen = (
        distill.init_state(recipe, tiny.student.params),
        distill.make_frozen(recipe.terms, tiny.teacher.params),
    )
    batch = {"gt": tiny.gt, "index": np.arange(8, dtype=np.int32)}
    diagnosis = jax.jit(functools.partial(distill.diagnose, recipe))(state, frozen, batch, jax.random.key(7))
    gt, lq = distill.make_pair(recipe, batch, jax.random.key(7))
    ours = np.asarray(tiny.student_apply(tiny.student.params, lq)[0])
    theirs = np.asarray(tiny.teacher_apply(tiny.teacher.params, lq)[0])
    psnr = np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(ours, theirs, strict=True)])
    better = np.abs(theirs - gt).mean(-1) < np.abs(ours - gt).mean(-1)
    assert float(diagnosis["psnr_student_teacher"]) == pytest.approx(psnr, rel=1e-4)
    assert float(diagnosis["teacher_better"]) == pytest.approx(better.mean(), abs=2e-3)
    assert sum(float(diagnosis[f"share/{name}"]) for name in ("task", "output")) == pytest.approx(1, rel=1e-5)


def test_a_phase_of_weight_zero_skips_the_teacher_and_the_term(tiny: Tiny) -> None:
    """The teacher counts its forward passes: none while no weight asks for it."""
    calls = []

    def counting(params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        jax.debug.callback(lambda: calls.append(1))
        return tiny.teacher_apply(params, x)

    phases = dict(name="piecewise", values=(0.0, 0.5, 0.0), boundaries=(2, 3))
    specs = {"task": TASK, "output": dict(criterion="l1", weight=phases)}
    recipe = tiny.recipe(specs, teacher=counting)
    states, _, _ = tiny.run(recipe, steps=2)
    jax.effects_barrier()
    assert not calls
    all_states, metrics, _ = tiny.run(recipe, steps=5)
    jax.effects_barrier()
    assert len(calls) == 1 and metrics["loss/output"] == 0
    # And while it is off, training is that of the task alone.
    alone, _, _ = tiny.run(tiny.recipe({"task": TASK}, teacher=None), steps=2)
    assert_trees_close(states[-1].params, alone[-1].params, 1e-6)
    assert_trees_close(all_states[2].params, alone[-1].params, 1e-6)


def test_a_hint_only_first_phase_leaves_the_layers_behind_the_hint_alone(tiny: Tiny) -> None:
    task = dict(criterion="l1", weight=dict(name="piecewise", values=(0.0, 1.0), boundaries=(2,)))
    hint = dict(pairs=PAIR, weight=dict(name="piecewise", values=(1.0, 0.0), boundaries=(2,)))
    states, _, _ = tiny.run(tiny.recipe({"task": task, "hint": hint}), steps=3)
    first, later = "0", "4"  # DnCNN's layers in front of and behind model.1

    def kernel(step: int, layer: str) -> np.ndarray:
        return np.asarray(states[step].params["student"]["model"][layer]["kernel"])

    assert np.abs(kernel(2, first) - kernel(0, first)).max() > 1e-4
    np.testing.assert_array_equal(kernel(2, later), kernel(0, later))
    assert np.abs(kernel(3, later) - kernel(0, later)).max() > 1e-4
    adapter = [np.asarray(states[i].params["adapters"]["hint"]["0"]["kernel"]) for i in (0, 2)]
    assert np.abs(adapter[1] - adapter[0]).max() > 1e-4
    assert set(states[-1].params_ema) == {"model"}  # adapters are in nothing that is exported


def test_unlabelled_samples_train_only_what_does_not_need_their_clean_image(tiny: Tiny) -> None:
    recipe = tiny.recipe({"task": TASK})
    step = jax.jit(functools.partial(distill.train_step, recipe))
    state, frozen = (
        distill.init_state(recipe, tiny.student.params),
        distill.make_frozen(recipe.terms, tiny.teacher.params),
    )
    lq = np.full_like(tiny.gt, 100)
    labelled = np.arange(8) % 2 == 0
    batch = {"gt": tiny.gt, "lq": lq, "index": np.arange(8, dtype=np.int32), "labelled": labelled}
    other = batch | {"gt": np.where(labelled[:, None, None, None], tiny.gt, 0)}
    results = [step(state, frozen, b, jax.random.key(0)) for b in (batch, other)]
    assert_trees_close(results[0][0].params, results[1][0].params, 0)
    np.testing.assert_array_equal(results[0][1]["loss/task"], results[1][1]["loss/task"])


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
