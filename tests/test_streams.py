"""No two random streams meet: what the table names is drawn from keys and seeds that nothing else has."""

import ast
from pathlib import Path

import jax
import numpy as np

import kdjax
from kdjax import distill
from kdjax.streams import SAMPLES, Kind, Stream, generator

SEEDS = (0, 1, 2, 3, 2**32 - 1)
FIRST = 32  # of the samples, images and epochs


def test_no_two_keys_of_a_run_meet() -> None:
    keys = {}
    for seed in SEEDS:
        run = jax.random.key(seed)
        keys[seed] = run
        numbers = np.uint32([*range(FIRST), SAMPLES - 1])
        keys[seed, "degradation"] = distill.sample_keys(run, numbers)
        for stream in Stream:
            key = jax.random.fold_in(run, stream)
            keys[seed, stream] = key
            keys[seed, stream, "by number"] = distill.sample_keys(key, numbers)
    words = np.concatenate([np.reshape(jax.random.key_data(key), (-1, 2)) for key in keys.values()])
    assert len(words) == len(SEEDS) * (1 + len(numbers) + len(Stream) * (1 + len(numbers)))
    assert len(np.unique(words, axis=0)) == len(words)


def test_streams_have_numbers_that_no_sample_has() -> None:
    assert all(SAMPLES <= stream < 2**32 for stream in Stream)


def test_no_two_generators_of_the_data_meet() -> None:
    numbers = (*range(FIRST), 2**40)
    streams = [stream for kind in Kind for stream in kind]
    first = [generator(s, stream, n).integers(2**63) for s in SEEDS for stream in streams for n in numbers]
    assert len(set(first)) == len(SEEDS) * 2 * len(Kind) * len(numbers)


def test_every_key_of_a_run_is_in_the_table() -> None:
    """A literal number, folded in somewhere, would be a stream that the table does not know."""
    for path in Path(kdjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "fold_in":
                names = [n for n in ast.walk(node.args[1]) if isinstance(n, ast.Name | ast.Attribute)]
                assert names, f"{path}:{node.lineno} folds in a number of its own"
