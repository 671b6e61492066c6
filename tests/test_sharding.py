"""Cores as devices, tried in programs of their own: the number of devices is fixed at JAX's first use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax
from kdjax import sharding
sharding.use_all_cores({batch_size})
print(len(jax.devices()))
"""


@pytest.mark.parametrize("batch_size, given, wanted", [(0, None, 6), (16, None, 4), (7, None, 1), (16, 2, 2)])
def test_every_core_is_a_device_as_far_as_the_batch_divides(batch_size: int, given: int | None, wanted: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    if given:
        environment["JAX_NUM_CPU_DEVICES"] = str(given)
    six_cores = "import os; os.sched_getaffinity = lambda pid: set(range(6))"
    program = six_cores + PROGRAM.format(batch_size=batch_size)
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == [str(wanted)], result.stderr
