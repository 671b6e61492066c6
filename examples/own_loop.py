"""A training loop of your own: distil a teacher into a small student, with a loss term that kdjax does not have.

    python examples/own_loop.py

The teacher is kdjax's denoiser `fast`; the photographs are those in the package. It takes about 15 seconds on two CPU
cores and writes `student.pth`.
"""

import functools

import jax
import jax.numpy as jnp

import kdjax
from kdjax import assets, data, degradations, distill, models, schedules, terms

STEPS, BATCH, CROP = 60, 8, 48
SPECS = {"task": {"criterion": "l1", "weight": 1.0}, "output": {"criterion": "l1", "weight": 1.0}}


def edges(context: terms.Context, *_: object) -> jax.Array:
    """L1 between the gradients of the student's image and those of the teacher's."""
    error = context.student.output - context.teacher.output
    return jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))


init_key, terms_key, noise_key = jax.random.split(jax.random.key(0), 3)
teacher = kdjax.load_model("fast")
student = models.network("srvggnetcompact", {"num_feat": 16, "num_conv": 4, "upscale": 1}).init(init_key)
ours, theirs = student.network.make_apply(), teacher.network.make_apply()
setting = distill.make_setting(ours, student.params, theirs, teacher.params, (BATCH, CROP, CROP, 3), terms_key)
learning_rate = schedules.cosine(2e-3, STEPS)
recipe = distill.Recipe(
    student=ours,
    teacher=theirs,
    terms=(
        *terms.make_terms(SPECS, setting),
        terms.Term("edges", terms.Loss(edges), weight=schedules.constant(0.5), needs_teacher=True),
    ),
    optimizer=distill.make_optimizer("adam", learning_rate),
    learning_rate=learning_rate,
    ema_decay=0.9,
    degrade=degradations.make_degrade({"name": "awgn", "sigma": 25.0}),
)
step = jax.jit(functools.partial(distill.train_step, recipe), donate_argnums=0)
state = distill.init_state(recipe, student.params)
frozen = distill.make_frozen(recipe.terms, teacher.params)
with data.training_batches(
    data.find_pairs(gt=assets.TRAIN_PHOTOGRAPHS), crop=CROP, batch_size=BATCH, seed=0
) as batches:
    for number in range(1, STEPS + 1):
        state, metrics = step(state, frozen, next(batches), noise_key)
        if number % 10 == 0:
            print(f"step {number}: loss {metrics['loss/total']:.4f}, edges {metrics['loss/edges']:.4f}")
kdjax.save_model(models.Model(student.network, jax.device_get(state.params_ema)), "student.pth")
