"""Where the reference vectors are, and one thread and four virtual devices for every test process."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import numpy as np
import pytest

# Reference vectors computed with BasicSR. Another folder of the same form can be tried through KDJAX_GOLDEN:
# tests take every name and size from the files.
GOLDEN = Path(os.environ.get("KDJAX_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, which is closed again."""
    with np.load(path) as archive:
        return dict(archive)
