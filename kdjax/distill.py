"""The training step: teacher, student, loss terms, gradients, optimizer and EMA in one pure function.

    total loss = sum over terms of weight(step) x value(student, teacher, batch)

The step does no I/O and sees neither config objects nor model classes. `Recipe` holds the functions, `State` the arrays
that change, and `frozen` the arrays that don't: {"teacher": its parameters, "terms": {name: constants of that term}}.
Frozen arrays are an argument of the step; they never enter the state, the optimizer or a checkpoint. The caller jits:

    step = jax.jit(functools.partial(train_step, recipe), donate_argnums=0)
    state, metrics = step(state, frozen, batch, key)

See `kdjax.batch.Batch` for the contents of a batch. A sample's noise depends only on the key and the sample number, not
on devices, processes or workers.

`train_step` is `observe` followed by `learn`. `joint_step` trains several students on one forward pass of the teacher.

Both can split a batch into `accumulate` parts and process them in sequence (gradient accumulation). Every loss is a
mean over samples, so averaging over equal parts gives the loss and gradient of the whole batch, with the activation
memory of one part.
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

# Weights given as a share of the update are re-measured this often, in steps: it costs one backward pass per term.
SHARES_EVERY = 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a run that is not an array.

    Attributes:
      student: a pure function `apply(params, x, sigma) -> (output, features)`, as returned by `Network.make_apply`;
        without `sigma` below, it is called with two arguments.
      teacher: likewise; None if no term needs a teacher, or if the batch already has its outputs.
      terms: from `kdjax.terms.make_terms`, and any of your own.
      optimizer: any optax transformation; `make_optimizer` builds those a config can name.
      learning_rate: for logging only; the optimizer already contains it.
      ema_decay: decay of the EMA of the student's parameters, in [0, 1); 0 copies them.
      ema_warmup: limit the decay to (1 + step) / (10 + step), as in TensorFlow. Otherwise the average is one of the
        initial values for the first 1 / (1 - decay) steps, as in BasicSR.
      degrade: `degrade(key, image, window)` makes the lq of one (h, w, c) image if the batch has none.
      sigma: `sigma(key)` is the noise level that `degrade` draws for this key, for networks that are told it; None if
        it makes something else than white noise.
      crop: side of the gt crop to train on, cut from larger images as if after degrading them; 0 uses whole images.
      sharpen: sharpens gt first.
      accumulate: number of parts to split a batch into; must divide the batch size.
    """

    student: Apply
    teacher: Apply | None
    terms: tuple[Term, ...]
    optimizer: optax.GradientTransformation
    learning_rate: Schedule
    ema_decay: float
    degrade: Degrade | None = None
    sigma: Callable[[jax.Array], jax.Array] | None = None
    crop: int = 0
    sharpen: bool = False
    accumulate: int = 1
    ema_warmup: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What training changes: a pytree of arrays that can be jitted, donated and checkpointed.

    Attributes:
      step: int32 scalar, the number of updates so far.
      params: {"student": ..., "adapters": {term: ...}}, all trained; only the student is exported.
      params_ema: EMA of the student's parameters.
      opt_state: state of `Recipe.optimizer` for `params`.
      balance: current weight of each term whose weight is a share of the update.
    """

    step: jax.Array
    params: Params
    params_ema: Params
    opt_state: optax.OptState
    balance: dict[str, jax.Array]


class Scene(NamedTuple):
    """The inputs of `learn`: a batch's images, the teacher's outputs for them, and a key per sample.

    `sigma` is the noise level of each lq (b,), None if it is not known; `labelled` is as in `kdjax.terms.Context`.
    """

    gt: jax.Array
    lq: jax.Array
    sigma: jax.Array | None
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
    *,
    sigma: float | None = None,
) -> Setting:
    """Returns the setting for `kdjax.terms.make_terms`: the output shapes of both networks. Runs neither of them.

    Args:
      teacher: None if no term needs one; then `teacher_params` is None too.
      lq: shape (b, h, w, c) of the degraded images of a training batch.
      key: for initialising adapters.
      sigma: any noise level, for networks that are told it.
    """
    image = jax.ShapeDtypeStruct(lq, jnp.float32)

    def run(apply: Apply, params: Params | None) -> Forward:
        return jax.eval_shape(lambda params, x: forward(apply, params, x, sigma), params, image)

    theirs: Any = teacher and run(teacher, teacher_params)
    return Setting(run(student, student_params), theirs, lq, key)


def forward(apply: Apply, params: Any, images: jax.Array, sigma: jax.Array | float | None) -> Forward:
    """Runs a network; without a noise level, it may be a function of two arguments."""
    return Forward(*(apply(params, images) if sigma is None else apply(params, images, sigma)))


def make_frozen(terms: Iterable[Term], teacher_params: Params | None) -> Params:
    """Returns the constant arrays of a step: {"teacher": its parameters, "terms": {name: constants of that term}}."""
    return {"teacher": teacher_params, "terms": {term.name: term.loss.frozen for term in terms}}


def make_optimizer(
    name: str,
    learning_rate: Schedule,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    grad_clip: float = 0.0,
) -> optax.GradientTransformation:
    """Adam as in torch, with eps = 1e-8 outside the square root.

    Args:
      name: "adam" (weight decay is L2, added to the gradient, as in torch's Adam) or "adamw" (decoupled decay).
      grad_clip: maximum global gradient norm; 0 disables clipping.

    Raises:
      ValueError: if the name is unknown.

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
    """Returns the state before the first update; the EMA starts as a copy of the student.

    The state includes `student_params`. If `train_step` is jitted as above it donates the state, so the first update
    invalidates them unless they are NumPy arrays.
    """
    # Copy everything that comes from elsewhere: donating the same buffer twice fails.
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
    """Performs one update. Jit it with the recipe bound, as in the module docstring.

    Args:
      frozen: from `make_frozen`.
      batch: `gt` (b, h, w, c), uint8 or float in [0, 1], with `lq` or `index`; see `kdjax.batch.Batch`.
      key: the run's noise key, the same at every step.

    Returns:
      The next state, and scalar metrics: `loss/total`; per term `loss/NAME` (unweighted), `weight/NAME` and
      `weighted/NAME`; `lr`, `grad_norm`, and `finite`, which is false if the loss or the gradient is not finite. A
      non-finite loss raises nothing: check `finite` before saving.
    """
    return learn(recipe, state, frozen, observe([recipe], [state.step], frozen, batch, key))


def joint_step(
    recipes: Mapping[str, Recipe], states: Mapping[str, State], frozen: Params, batch: Batch, key: jax.Array
) -> tuple[dict[str, State], dict[str, Metrics]]:
    """`train_step` for several named students, sharing one forward pass of the teacher.

    Args:
      recipes: by student; all must use the same data.
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
    """Degrades the batch, and runs the teacher if any recipe needs it.

    The teacher is skipped if the batch already has its outputs, or if no recipe uses it at its current step. All
    recipes must use the same data; the first one's `accumulate` decides how the batch is split.
    """
    recipes, steps = list(recipes), list(steps)
    batch = batch | {"index": _sample_numbers(batch)}
    if "labelled" in batch:
        labelled = batch["labelled"].astype(jnp.float32)[:, None, None, None]
        batch["labelled"] = labelled / jnp.maximum(jnp.mean(labelled), 1 / len(labelled))
    return _map_parts(lambda part: _observe(recipes, steps, frozen, part, key), batch, recipes[0].accumulate)


def _observe(recipes: list[Recipe], steps: list[jax.Array], frozen: Params, batch: Batch, key: jax.Array) -> Scene:
    """`observe` for one part; here `labelled` holds weights."""
    gt, lq = make_pair(recipes[0], batch, key)
    sigma = noise_levels(recipes[0], batch, key)
    keys = sample_keys(jax.random.fold_in(key, Stream.TERMS), batch["index"])
    labelled = batch.get("labelled")
    users = [(t, step) for recipe, step in zip(recipes, steps, strict=True) for t in recipe.terms if t.needs_teacher]
    if not users:
        return Scene(gt, lq, sigma, labelled, None, keys)
    if "teacher" in batch:
        answers = jax.tree.map(ops.to_float, batch["teacher"])
        return Scene(gt, lq, sigma, labelled, Forward(answers["output"], answers["features"]), keys)
    teacher_apply = next(recipe.teacher for recipe in recipes if recipe.teacher)
    run = lambda: forward(teacher_apply, frozen["teacher"], lq, sigma)  # noqa: E731
    if not all(term.sometimes_off for term, _ in users):
        return Scene(gt, lq, sigma, labelled, run(), keys)
    wanted = jnp.any(jnp.stack([term.weight(step) != 0 for term, step in users]))
    nothing = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))  # noqa: E731
    return Scene(gt, lq, sigma, labelled, jax.lax.cond(wanted, run, nothing), keys)


def learn(recipe: Recipe, state: State, frozen: Params, scene: Scene) -> tuple[State, Metrics]:
    """The student's half of `train_step`."""
    values_of = functools.partial(term_values, recipe, state.step, frozen)
    balance = state.balance
    if balance:
        norms = lambda: update_norms(values_of, state, scene, recipe.accumulate)  # noqa: E731
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
    decay = recipe.ema_decay
    if recipe.ema_warmup:
        decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
    params_ema: Any = optax.incremental_update(params["student"], state.params_ema, 1 - decay)
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
    """Returns the unweighted value of every term; one whose weight is 0 at this step is not computed and gives 0."""
    teacher = recipe.teacher
    ask_teacher: Any = teacher and (lambda images: forward(teacher, frozen["teacher"], images, scene.sigma))
    student = forward(recipe.student, params["student"], scene.lq, scene.sigma)
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
    """Returns the weight of every term at this step."""
    return {term.name: balance[term.name] if term.share else term.weight(step) for term in recipe.terms}


def update_norms(values_of: Callable[[Params, Scene], Metrics], state: State, scene: Scene, parts: int) -> Metrics:
    """Returns, for every unweighted term, the norm of its part of the student's update at a learning rate of 1."""
    return {name: optax.tree.norm(update) for name, update in term_updates(values_of, state, scene, parts).items()}


def term_updates(
    values_of: Callable[[Params, Scene], Metrics], state: State, scene: Scene, parts: int
) -> dict[str, Params]:
    """Returns, for every unweighted term, what it contributes to the student's update, at a learning rate of 1.

    Adam divides the gradient of each parameter by the root of its mean square. So a term that reaches only layers whose
    gradients are small moves these layers as much as any other term moves its own, however small its gradient is.
    Before the first step, and with an optimizer that does not scale, a contribution is the term's gradient.

    Costs one forward pass and one backward pass per term, in sequence. Gradients are averaged over the `parts`.
    """
    params = state.params
    names = list(jax.eval_shape(values_of, params, scene))

    def gradients(part: Scene) -> Params:
        def student_only(student: Params) -> jax.Array:
            values = values_of(params | {"student": student}, part)
            return jnp.stack([values[name] for name in names])

        _, backward = jax.vjp(student_only, params["student"])
        return jax.lax.map(lambda one: backward(one)[0], jnp.eye(len(names)))

    found = _mean_over_parts(gradients, scene, parts)
    mean_squares = [nu for _, nu in optax.tree_utils.tree_get_all_with_path(state.opt_state, "nu")]
    if len(mean_squares) == 1 and jax.tree.structure(mean_squares[0]) == jax.tree.structure(params):  # not of a part
        scale = lambda square: jnp.where(state.step > 0, 1 / (jnp.sqrt(square) + 1e-8), 1.0)  # noqa: E731
        found = jax.tree.map(lambda each, square: each * scale(square), found, mean_squares[0]["student"])
    return {name: jax.tree.map(lambda each, i=i: each[i], found) for i, name in enumerate(names)}


def rebalance(recipe: Recipe, step: jax.Array, norms: Metrics) -> dict[str, jax.Array]:
    """Returns the weights that give every term with a `share` r the fraction r of the summed weighted norms.

    Let R be the sum of the shares and B the sum of weight x norm over the other terms. Then weight = r / (1 - R) x B /
    norm. A term with zero gradient gets weight 0.

    Args:
      norms: from `update_norms`.
    """
    weighted = [abs(term.weight(step)) * norms[term.name] for term in recipe.terms if not term.share]
    rest = sum(weighted) / (1 - sum(term.share for term in recipe.terms))
    return {
        term.name: jnp.where(norms[term.name] > 0, term.share * rest / jnp.maximum(norms[term.name], 1e-30), 0.0)
        for term in recipe.terms
        if term.share
    }


def diagnose(recipe: Recipe, state: State, frozen: Params, batch: Batch, key: jax.Array) -> Metrics:
    """Returns metrics too expensive for `train_step`: they cost one backward pass per term. Changes nothing.

    Returns:
      `share/NAME`: the term's fraction of the sum of all weighted norms (`update_norms`). With a teacher also
      `psnr_student_teacher`, in dB, and `teacher_better`, the fraction of pixels (of samples with a clean image)
      where the teacher is closer to the clean image than the student.
    """
    scene = observe([recipe], [state.step], frozen, batch, key)
    values_of = functools.partial(term_values, recipe, state.step, frozen)
    norms = update_norms(values_of, state, scene, recipe.accumulate)
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
        output = forward(recipe.student, state.params["student"], part.lq, part.sigma).output
        better = losses.teacher_is_better(output, part.teacher.output, part.gt)
        return {
            "teacher_better": jnp.mean(better if part.labelled is None else better * part.labelled),
            "psnr_student_teacher": losses.psnr_between(output, part.teacher.output),
        }

    return metrics | _mean_over_parts(compare, scene, recipe.accumulate)


def make_pair(recipe: Recipe, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the clean and the degraded images of a batch, float in [0, 1]."""
    samples = {name: batch[name] for name in ("gt", "lq", "is_paired") if name in batch}
    return sharding.per_sample(jax.vmap(functools.partial(_pair_of, recipe, key)), _sample_numbers(batch), samples)


def _pair_of(recipe: Recipe, key: jax.Array, index: jax.Array, sample: Batch) -> tuple[jax.Array, jax.Array]:
    """`make_pair` for one sample."""
    degrade: Any = recipe.degrade  # not None if this is reached
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


def noise_levels(recipe: Recipe, batch: Batch, key: jax.Array) -> jax.Array | None:
    """Returns the noise level of each of a batch's degraded images (b,), None if they are not known."""
    return jax.vmap(recipe.sigma)(sample_keys(key, _sample_numbers(batch))) if recipe.sigma else None


def sample_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """Returns one key per sample number in `index`; from the run's key, these are the degradation keys."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)


def _sample_numbers(batch: Batch) -> jax.Array:
    return batch.get("index", jnp.arange(len(batch["gt"])))


def _in_parts(batch: T, parts: int) -> T:
    """Reshapes every array (b, ...) to (parts, b / parts, ...).

    Sample i goes to part i % parts. Each device holds consecutive samples, so it contributes equally to every part and
    no image moves between devices.
    """
    return jax.tree.map(lambda array: array.reshape(-1, parts, *array.shape[1:]).swapaxes(0, 1), batch)


def _map_parts(function: Callable[[Batch], Scene], batch: Batch, parts: int) -> Scene:
    """Applies the function to each part of a batch in sequence and reassembles the result."""
    if parts == 1:
        return function(batch)
    results = jax.lax.map(function, _in_parts(batch, parts))
    return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(-1, *array.shape[2:]), results)


def _mean_over_parts(function: Callable[[Scene], Any], scene: Scene, parts: int) -> Any:
    """Returns the mean of the function, a tree of arrays, over the parts of a scene, computed in sequence."""
    if parts == 1:
        return function(scene)
    scenes = _in_parts(scene, parts)
    shapes = jax.eval_shape(function, jax.tree.map(lambda array: array[0], scenes))
    nothing = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), nothing, scenes)
    return jax.tree.map(lambda array: array / parts, total)


def eval_step(apply: Apply, params: Params, lq: jax.Array, sigma: jax.Array | None = None) -> jax.Array:
    """Returns the restored images as uint8 (b, h*scale, w*scale, c); sigma is as in `Network.make_apply`."""
    return ops.to_uint8(apply(params, ops.to_float(lq), sigma)[0])
