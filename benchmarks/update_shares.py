"""Shows, for every layer of a student, which loss term moves it: shares of the gradient, and of Adam's update.

    pip install -e .
    python benchmarks/update_shares.py --config configs/attention.py:quick [--steps 200] [--config.KEY=VALUE ...]

The config is trained for `--steps` steps on one device. Then the next batches are measured: of every term, the norm of
its weighted gradient in each layer, and the norm of what that gradient becomes in Adam's update, which divides it by
the root of its mean square. A share is a term's part of the sum over all terms; where two terms point in opposite
directions, both count. A layer whose update is mostly one term's follows that term, however small its gradient is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kdjax import commandline, distill
from kdjax import config as config_lib
from kdjax.training import preparation

BATCHES = 8  # over which norms are averaged
Norms = dict[str, dict[str, float]]  # by layer and term; "" stands for all layers together


def measure(setup: preparation.Setup, steps: int) -> tuple[Norms, Norms]:
    """Trains for some steps; returns the norms of weighted gradients and of updates, averaged over the next batches."""
    recipe = setup.recipe
    key = jax.random.key(setup.config.seed)
    frozen = distill.make_frozen(recipe.terms, setup.teacher and setup.teacher.params)
    state = distill.init_state(recipe, setup.student.params)
    train = jax.jit(functools.partial(distill.train_step, recipe), donate_argnums=0)
    norms = jax.jit(functools.partial(_norms, recipe))
    totals: tuple[Norms, Norms] = (defaultdict(dict), defaultdict(dict))
    with preparation.open_batches(setup, start_step=0) as batches:
        for _ in range(steps):
            state, _ = train(state, frozen, next(batches), key)
        for _ in range(BATCHES):
            for total, found in zip(totals, jax.device_get(norms(state, frozen, next(batches), key)), strict=True):
                for term, layers in found.items():
                    for layer, norm in layers.items():
                        total[layer][term] = total[layer].get(term, 0.0) + float(norm) / BATCHES
    return totals


def _norms(recipe: distill.Recipe, state: distill.State, frozen: dict, batch: dict, key: jax.Array) -> list[dict]:
    """Returns the norms of gradients and of updates, by term and layer."""
    scene = distill.observe([recipe], [state.step], frozen, batch, key)
    values_of = functools.partial(distill.term_values, recipe, state.step, frozen)
    weights = distill.term_weights(recipe, state.step, state.balance)
    found = []
    for at in (
        dataclasses.replace(state, step=jnp.zeros_like(state.step)),
        state,
    ):  # before the first step it is the gradient
        updates = distill.term_updates(values_of, at, scene, recipe.accumulate)
        found.append({term: _by_layer(update, jnp.abs(weights[term])) for term, update in updates.items()})
    return found


def _by_layer(update: dict, weight: jax.Array) -> dict[str, jax.Array]:
    squares: dict[str, jax.Array] = defaultdict(lambda: jnp.zeros(()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        layer = ".".join(str(part.key) for part in path[:-1])
        for name in (layer, ""):
            squares[name] += jnp.sum(jnp.square(leaf))
    return {layer: weight * jnp.sqrt(square) for layer, square in squares.items()}


def table(gradients: Norms, updates: Norms) -> str:
    """Returns a Markdown table: by layer, each term's share of the gradient and of the update."""
    terms = list(gradients[""])
    lines = [
        "| layer | " + " | ".join(f"{term}: gradient | update" for term in terms) + " |",
        "| --- |" + " ---: |" * (2 * len(terms)),
    ]
    for layer in sorted(gradients, key=_in_order):
        shares = [[norms[layer][term] / sum(norms[layer].values()) for norms in (gradients, updates)] for term in terms]
        cells = " | ".join(f"{gradient:.1%} | {update:.1%}" for gradient, update in shares)
        lines.append(f"| {f'`{layer}`' if layer else 'all'} | {cells} |")
    return "\n".join(lines)


def _in_order(layer: str) -> list[tuple[int, str]]:
    return [(int(part) if part.isdigit() else -1, part) for part in layer.split(".")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = commandline.Parser("benchmarks.update_shares", __doc__)
    parser.add_config(example="configs/attention.py:quick")
    parser.add_argument("--steps", type=int, default=200, help="steps to train before measuring")
    options, values = parser.parse(arguments)
    try:
        config = config_lib.parse(values)
        setup = preparation.prepare(config)
    except (ValueError, OSError) as error:
        commandline.fail(str(error))
    gradients, updates = measure(setup, options.steps)
    print(table(gradients, updates))
    print(f"\n{config.name}, after {options.steps} steps, mean of {BATCHES} batches of {config.data.batch_size}")


if __name__ == "__main__":
    commandline.run(main)
