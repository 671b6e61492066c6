"""Tells the user what to change when a run does not fit into memory."""

from __future__ import annotations

import jax

from kdjax.config import Config
from kdjax.terms import needs_teacher


def how_to_save_memory(config: Config, prefix: str = "config.") -> str:
    """Lists what the user can change, cheapest first; flags start with `prefix`."""
    parts, asks_teacher = config.train.accumulate, needs_teacher(config.terms) and not config.teacher.cache
    ways = [
        f"train.accumulate={2 * parts} (the batch in {2 * parts} parts, one after another; the update is the same)",
        "student.remat=True (activations are recomputed, not kept)" * (not config.student.remat),
        "teacher.dtype=bfloat16" * (asks_teacher and config.teacher.dtype != "bfloat16"),
        "teacher.cache=DIR, from python -m kdjax.cache" * asks_teacher,
        f"a smaller data.batch_size (now {config.data.batch_size}) or data.crop (now {config.data.crop})",
        f"a smaller data.cache_mb (now {config.data.cache_mb})" * (jax.default_backend() == "cpu"),
    ]
    return f"Set with --{prefix}KEY=VALUE: {'; '.join(filter(None, ways))}. See docs/memory.md"
