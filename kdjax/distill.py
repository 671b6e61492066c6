"""The training step: teacher, student, every loss term, gradients, optimizer and EMA in one pure function.

    total loss = sum over terms of weight(step) x value(student, teacher, batch)

The step knows no files, no config object and no model classes: `Recipe` holds the functions, `State` the arrays that
change, `frozen` those that do not: {"teacher": its parameters, "terms": {name: constants of that term}}. They are an
argument of the step, and never in the state, the optimizer or a checkpoint. The caller jits:

    step = jax.jit(functools.partial(train_step, recipe), donate_argnums=0)
    state, metrics = step(state, frozen, batch, key)

`kdjax.batch.Batch` says what a batch has. The noise of a sample depends on the key and its number only, not on devices,
processes or workers.

`train_step` is `observe` and then `learn`; `joint_step` lets several students learn from one teacher's forward pass.

Both can take a batch in `accumulate` parts, one after another: every loss is a mean over samples, so that the mean over
parts of equal size is that of the batch, and so is its gradient, while activations take the memory of one part.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from kdjax import losses, ops, sharding
from kdjax.batch import Batch
from kdjax.degradations import Degrade, Window, cut, usm_sharpen
from kdjax.models import Apply, Params
from kdjax.names import pick
from kdjax.schedules import Schedule
from kdjax.streams import Stream
from kdjax.terms import Context, Forward, Setting, Term

Metrics = dict[str, jax.Array]
T = TypeVar("T")

# A weight given as a share of the gradient is measured anew after so many steps: it costs one backward pass a term.
SHARES_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a run that is not an array.

    Attributes:
      student: a pure function `apply(params, x) -> (output, features)`, as `Network.make_apply` returns it.
      teacher: the same; None where no term needs one, or where its answers come with the batch.
      terms: from `kdjax.terms.make_terms`, and your own.
      optimizer: any optax transformation; `make_optimizer` has those of a config.
      learning_rate: only to be reported; the optimizer already contains it.
      ema_decay: of the moving average of the student's parameters, in [0, 1); 0 follows them.
      degrade: `degrade(key, image, window)` makes the lq of one (h, w, c) image where a batch has none.
      crop: the side of the gt square that is learnt from, cut from larger images as if after they were degraded; 0
        takes them whole.
      sharpen: sharpens gt first.
      accumulate: the number of parts that a batch is taken in; it has to divide the batch.
    """

    student: Apply
    teacher: Apply | None
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    ema_decay: float
    degrade: Degrade | None = None
    crop: int = 0
    sharpen: bool = False
    accumulate: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes; a pytree of arrays, so that it can be jitted, donated and checkpointed.

    Attributes:
      step: int32 scalar, the number of updates so far.
      params: {"student": ..., "adapters": {term: ...}}, all trained; only the student is exported.
      params_ema: the moving average of the student's parameters.
      opt_state: of `Recipe.optimizer`, for `params`.
      balance: the present weight of every term whose weight is a share of the gradient.
    """

    step: jax.Array
    params: Params
    params_ema: Params
    opt_state: optax.OptState
    balance: dict[str, jax.Array]


class Scene(NamedTuple):
    """What a step looks at: the images of a batch, what the teacher says of them, and a key for each sample.

    `labelled` is as in `kdjax.terms.Context`.
    """

    gt: jax.Array
    lq: jax.Array
    labelled: jax.Array | None
    teacher: Forward | None
    keys: jax.Array


def make_setting(
    student: Apply,
    student_params: Params,
    teacher: Apply | None,
    teacher_params: Params | None,
    lq: tuple[int, ...],
    key: jax.Array,
) -> Setting:
    """The setting for `kdjax.terms.make_terms`: shapes of both networks' results. Nothing is computed.

    Args:
      teacher: None where no term needs one, and then so are `teacher_params`.
      lq: the shape (b, h, w, c) of the degraded images of a training batch.
      key: for the initial values of adapters.
    """
    image = jax.ShapeDtypeStruct(lq, jnp.float32)
    run = lambda apply, params: Forward(*jax.eval_shape(apply, params, image))  # noqa: E731
    theirs: Any = teacher and run(teacher, teacher_params)
    return Setting(run(student, student_params), theirs, lq, key)


def make_frozen(terms: Iterable[Term], teacher_params: Params | None) -> Params:
    """The constant arrays of a step: {"teacher": its parameters, "terms": {name: constants of that term}}."""
    return {"teacher": teacher_params, "terms": {term.name: term.loss.frozen for term in terms}}


def make_optimizer(
    name: str,
    learning_rate: Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam as torch has it, eps 1e-8 outside the root.

    Args:
      name: "adam" (weight decay is added to the gradient: torch's Adam, L2) or "adamw" (decoupled decay).
      grad_clip: the largest norm of the whole gradient; 0 for no clipping.

    Raises:
      ValueError: an unknown name.

    Examples:
      >>> optimizer = make_optimizer("adam", lambda count: jnp.float32(0.1))
      >>> gradient = {"kernel": jnp.array([0.5, -2.0])}
      >>> updates, _ = optimizer.update(gradient, optimizer.init(gradient))
      >>> [round(float(update), 3) for update in updates["kernel"]]  # the first step of Adam is the learning rate
      [-0.1, 0.1]
    """
    b1, b2 = betas
    optimizers = {
        "adam": lambda: optax.chain(
            optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity(),
            optax.adam(learning_rate, b1, b2),
        ),
        "adamw": lambda: optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay),
    }
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, pick(optimizers, name, "optimizer")())


def init_state(recipe: Recipe, student_params: Params) -> State:
    """The state before the first update; the EMA starts as a copy of the student.

    `train_step` donates the state when it is jitted as above; `student_params` are part of it and gone after the first
    update, unless they are NumPy arrays.
    """
    # Real copies of everything that comes from elsewhere: donating one buffer twice would fail.
    adapters = {term.name: jax.tree.map(jnp.copy, term.loss.adapters) for term in recipe.terms if term.loss.adapters}
    params = {"student": student_params, "adapters": adapters}
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        params_ema=jax.tree.map(jnp.copy, student_params),
        opt_state=recipe.optimizer.init(params),
        balance={term.name: jnp.zeros(()) for term in recipe.terms if term.share},
    )


def train_step(recipe: Recipe, state: State, frozen: Params, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
    """One update. Jit it with the recipe bound, as the module's docstring shows.

    Args:
      frozen: from `make_frozen`.
      batch: `gt` (b, h, w, c), uint8 or float in [0, 1], with `lq` or `index`; see `kdjax.batch.Batch`.
      key: the run's key for noise; the same at every step.

    Returns:
      The next state, and scalars: `loss/total`, and of every term `loss/NAME` (raw), `weight/NAME` and `weighted/NAME`;
      `lr`, `grad_norm`, and `finite`, false when the loss or the gradient is not a finite number. Nothing is raised for
      a loss that is not finite: look at `finite` before you save.
    """
    return learn(recipe, state, frozen, observe([recipe], [state.step], frozen, batch, key))


def joint_step(
    recipes: Mapping[str, Recipe], states: Mapping[str, State], frozen: Params, batch: Batch, key: jax.Array
) -> tuple[dict[str, State], dict[str, Metrics]]:
    """`train_step` of several students, by name, with one forward pass of the teacher for all of them.

    Args:
      recipes: which have the same data.
      frozen: {"teacher": its parameters, "terms": {student: {term: its constants}}}.
    """
    scene = observe(recipes.values(), [states[name].step for name in recipes], frozen, batch, key)
    updated, metrics = {}, {}
    for name, recipe in recipes.items():
        own = {"teacher": frozen["teacher"], "terms": frozen["terms"][name]}
        updated[name], metrics[name] = learn(recipe, states[name], own, scene)
    return updated, metrics


def observe(
    recipes: Iterable[Recipe], steps: Iterable[jax.Array], frozen: Params, batch: Batch, key: jax.Array
) -> Scene:
    """Degrades the batch, and runs the teacher if one of the `recipes`, at its step, has use for it and its answers did
    not come with the batch.

    The recipes have the same data; the batch is taken in the parts that the first one wants.
    """
    recipes, steps = list(recipes), list(steps)
    batch = batch | {"index": _sample_numbers(batch)}
    if "labelled" in batch:
        labelled = batch["labelled"].astype(jnp.float32)[:, None, None, None]
        batch["labelled"] = labelled / jnp.maximum(jnp.mean(labelled), 1 / len(labelled))
    return _map_parts(lambda part: _observe(recipes, steps, frozen, part, key), batch, recipes[0].accumulate)


def _observe(recipes: list[Recipe], steps: list[jax.Array], frozen: Params, batch: Batch, key: jax.Array) -> Scene:
    """`observe` of one part, whose `labelled` are weights."""
    gt, lq = make_pair(recipes[0], batch, key)
    keys = sample_keys(jax.random.fold_in(key, Stream.TERMS), batch["index"])
    labelled = batch.get("labelled")
    users = [(t, step) for recipe, step in zip(recipes, steps, strict=True) for t in recipe.terms if t.needs_teacher]
    if not users:
        return Scene(gt, lq, labelled, None, keys)
    if "teacher" in batch:
        answers = jax.tree.map(lambda array: array.astype(jnp.float32), batch["teacher"])
        return Scene(gt, lq, labelled, Forward(answers["output"], answers["features"]), keys)
    teacher_apply = next(recipe.teacher for recipe in recipes if recipe.teacher)
    run = lambda: Forward(*teacher_apply(frozen["teacher"], lq))  # noqa: E731
    if not all(term.sometimes_off for term, _ in users):
        return Scene(gt, lq, labelled, run(), keys)
    wanted = jnp.any(jnp.stack([term.weight(step) != 0 for term, step in users]))
    nothing = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))  # noqa: E731
    return Scene(gt, lq, labelled, jax.lax.cond(wanted, run, nothing), keys)


def learn(recipe: Recipe, state: State, frozen: Params, scene: Scene) -> tuple[State, Metrics]:
    """The student's part of `train_step`."""
    values_of = functools.partial(term_values, recipe, state.step, frozen)
    balance = state.balance
    if balance:
        norms = lambda: gradient_norms(values_of, state.params, scene, recipe.accumulate)  # noqa: E731
        measure = lambda: rebalance(recipe, state.step, norms())  # noqa: E731
        balance = jax.lax.cond(state.step % SHARES_EVERY == 0, measure, lambda: state.balance)
    weights = term_weights(recipe, state.step, balance)

    def total_loss(params: Params, part: Scene) -> tuple[jax.Array, Metrics]:
        values = values_of(params, part)
        return jnp.asarray(sum(weights[name] * value for name, value in values.items())), values

    gradient = functools.partial(jax.value_and_grad(total_loss, has_aux=True), state.params)
    (total, values), grads = _mean_over_parts(gradient, scene, recipe.accumulate)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    params_ema: Any = optax.incremental_update(params["student"], state.params_ema, 1 - recipe.ema_decay)
    grad_norm = optax.tree.norm(grads)
    metrics = {
        "loss/total": total,
        **{f"loss/{name}": value for name, value in values.items()},
        **{f"weight/{name}": weight for name, weight in weights.items()},
        **{f"weighted/{name}": weights[name] * value for name, value in values.items()},
        "lr": recipe.learning_rate(state.step),
        "grad_norm": grad_norm,
        "finite": jnp.isfinite(total) & jnp.isfinite(grad_norm),
    }
    next_state = State(
        step=state.step + 1,
        params=params,
        params_ema=params_ema,
        opt_state=opt_state,
        balance=balance,
    )
    return next_state, metrics


def term_values(recipe: Recipe, step: jax.Array, frozen: Params, params: Params, scene: Scene) -> Metrics:
    """The raw value of every term; 0, and no work, for one whose weight is 0 at this step."""
    teacher = recipe.teacher
    ask_teacher: Any = teacher and (lambda images: Forward(*teacher(frozen["teacher"], images)))
    student = Forward(*recipe.student(params["student"], scene.lq))
    theirs: Any = scene.teacher
    context = Context(student, theirs, scene.gt, scene.lq, scene.labelled, ask_teacher, scene.keys)
    values = {}
    for term in recipe.terms:
        adapters, constants = params["adapters"].get(term.name, {}), frozen["terms"][term.name]
        compute = lambda term=term, adapters=adapters, constants=constants: term.loss.value(  # noqa: E731
            context, adapters, constants
        )
        if term.sometimes_off:
            values[term.name] = jax.lax.cond(term.weight(step) != 0, compute, lambda: jnp.zeros(()))
        else:
            values[term.name] = compute()
    return values


def term_weights(recipe: Recipe, step: jax.Array, balance: dict[str, jax.Array]) -> Metrics:
    """The weight of every term at this step."""
    return {term.name: balance[term.name] if term.share else term.weight(step) for term in recipe.terms}


def gradient_norms(values_of: Callable[[Params, Scene], Metrics], params: Params, scene: Scene, parts: int) -> Metrics:
    """The norm of the gradient of every raw term with respect to the student's parameters.

    One forward pass, then one backward pass a term, one after another; of each of the `parts`, before norms are taken.
    """
    names = list(jax.eval_shape(values_of, params, scene))

    def gradients(part: Scene) -> Params:
        def student_only(student: Params) -> jax.Array:
            values = values_of(params | {"student": student}, part)
            return jnp.stack([values[name] for name in names])

        _, backward = jax.vjp(student_only, params["student"])
        return jax.lax.map(lambda one: backward(one)[0], jnp.eye(len(names)))

    norms = jax.vmap(optax.tree.norm)(_mean_over_parts(gradients, scene, parts))
    return dict(zip(names, norms, strict=True))


def rebalance(recipe: Recipe, step: jax.Array, norms: Metrics) -> dict[str, jax.Array]:
    """The weights that give every term with a `share` r the part r of the sum of all weighted gradient norms.

    With R the sum of the shares and B that of weight x norm over the other terms: weight = r / (1 - R) x B / norm.
    A term without gradient gets 0.
    """
    weighted = [abs(term.weight(step)) * norms[term.name] for term in recipe.terms if not term.share]
    rest = sum(weighted) / (1 - sum(term.share for term in recipe.terms))
    return {
        term.name: jnp.where(norms[term.name] > 0, term.share * rest / jnp.maximum(norms[term.name], 1e-30), 0.0)
        for term in recipe.terms
        if term.share
    }


def diagnose(recipe: Recipe, state: State, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
    """What `train_step` does not tell because it costs more: one backward pass a term. Changes nothing.

    Returns:
      `share/NAME`: the part of the term in the sum of all weighted gradient norms; and where there is a teacher
      `psnr_student_teacher`, in dB, and `teacher_better`, the part of the pixels (of samples with a clean image) where
      the teacher is nearer to the clean image than the student.
    """
    scene = observe([recipe], [state.step], frozen, batch, key)
    values_of = functools.partial(term_values, recipe, state.step, frozen)
    norms = gradient_norms(values_of, state.params, scene, recipe.accumulate)
    balance = jax.lax.cond(
        state.step % SHARES_EVERY == 0, lambda: rebalance(recipe, state.step, norms), lambda: state.balance
    )
    weights = term_weights(recipe, state.step, balance)
    weighted = {name: abs(weights[name]) * norm for name, norm in norms.items()}
    total = jnp.maximum(sum(weighted.values()), 1e-30)
    metrics = {f"share/{name}": value / total for name, value in weighted.items()}
    if scene.teacher is None:
        return metrics

    def compare(part: Scene) -> Metrics:
        assert part.teacher is not None
        output = recipe.student(state.params["student"], part.lq)[0]
        better = losses.teacher_is_better(output, part.teacher.output, part.gt)
        return {
            "teacher_better": jnp.mean(better if part.labelled is None else better * part.labelled),
            "psnr_student_teacher": losses.psnr_between(output, part.teacher.output),
        }

    return metrics | _mean_over_parts(compare, scene, recipe.accumulate)


def make_pair(recipe: Recipe, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The clean and the degraded images of a batch, as float [0, 1]."""
    samples = {name: batch[name] for name in ("gt", "lq", "is_paired") if name in batch}
    return sharding.per_sample(jax.vmap(functools.partial(_pair_of, recipe, key)), _sample_numbers(batch), samples)


def _pair_of(recipe: Recipe, key: jax.Array, index: jax.Array, sample: Batch) -> tuple[jax.Array, jax.Array]:
    """`make_pair` of one sample."""
    degrade: Any = recipe.degrade  # there, where it is needed
    whole_gt = gt = ops.to_float(sample["gt"])
    if recipe.sharpen:
        whole_gt = gt = usm_sharpen(gt)
    lq, window = ops.to_float(sample["lq"]) if "lq" in sample else None, None
    degrade_key = jax.random.fold_in(key, index)
    if recipe.crop and recipe.crop < gt.shape[0]:
        small = jax.eval_shape(degrade, degrade_key, gt) if lq is None else lq
        scale = gt.shape[0] // small.shape[0]
        crop_key = jax.random.fold_in(jax.random.fold_in(key, Stream.CROP), index)
        corner = jax.random.randint(crop_key, (2,), 0, (gt.shape[0] - recipe.crop) // scale + 1)
        window = Window(corner, (recipe.crop // scale,) * 2)
        gt = cut(gt, Window(scale * corner, (recipe.crop,) * 2))
        lq = None if lq is None else cut(lq, window)
    if lq is None:
        lq = degrade(degrade_key, whole_gt, window)
    elif "is_paired" in sample:
        lq = jnp.where(sample["is_paired"], lq, degrade(degrade_key, whole_gt, window))
    return gt, lq


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """The key of every sample number in `index`; with the run's key, that of its degradation."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def _sample_numbers(batch: Batch) -> jax.Array:
    return batch.get("index", jnp.arange(len(batch["gt"])))


def _in_parts(batch: T, parts: int) -> T:
    """Every array (b, ...) as (parts, b / parts, ...).

    Sample i is in part i % parts. A device has its samples side by side, so it has as many in every part, and no image
    moves to another device.
    """
    return jax.tree.map(lambda array: array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1), batch)


def _map_parts(function: Callable[[Batch], Scene], batch: Batch, parts: int) -> Scene:
    """The function of every part of a batch, one after another, put together again."""
    if parts == 1:
        return function(batch)
    results = jax.lax.map(function, _in_parts(batch, parts))
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(-1, *array.shape[2:]), results)


def _mean_over_parts(function: Callable[[Scene], Any], scene: Scene, parts: int) -> Any:
    """The mean of the function, a tree of arrays, over the parts of a scene, one after another."""
    if parts == 1:
        return function(scene)
    scenes = _in_parts(scene, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda array: array[0], scenes))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), nothing, scenes)
    return jax.tree.map(lambda array: array / parts, total)


def eval_step(apply: Apply, params: Params, lq: jax.Array) -> jax.Array:
    """The restored images as uint8 (b, h*scale, w*scale, c)."""
    return ops.to_uint8(apply(params, ops.to_float(lq))[0])
