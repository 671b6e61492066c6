"""One thread and four virtual devices for every test process; the reference vectors; a browser.

The environment stays as it was found: programs that tests start get that of a user.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
import pytest

from kdjax import compiled, sharding

if TYPE_CHECKING:
    from selenium import webdriver


def _start_jax() -> None:
    """Fixes the devices of this process, and how it compiles."""
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", 4)
    compiled.keep()
    # By default, a tenth of the time goes into searching the millions of objects of JAX's traces for garbage.
    gc.set_threshold(100_000)
    # Much of the time of a first run is compiling; optimising less saves a third of it, and another third where XLA
    # still has the older way to emit fusions. What is given comes last, and counts. XLA reads the variable once, when
    # the devices are first asked for, and only up to the first word that does not start with "--".
    given = os.environ.get("XLA_FLAGS")
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_multi_thread_eigen=false"]
    if jax.__version_info__ < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*flags, given or ""])
    jax.devices()
    if given is None:
        del os.environ["XLA_FLAGS"]
    else:
        os.environ["XLA_FLAGS"] = given


_start_jax()

# Reference vectors computed with BasicSR. Another folder of the same form can be tried through KDJAX_GOLDEN:
# tests take every name and size from the files.
GOLDEN = Path(os.environ.get("KDJAX_GOLDEN", Path(__file__).parent / "golden"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-of-each", action="store_true", help="run each test with the first of its parameters only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """The pages of the docs take longest: each worker begins with its share, so that nobody waits for the last of them.

    pytest-xdist gives the workers equal parts of the list, and lets those who are done take from the others' ends.
    """
    if config.getoption("one_of_each"):
        first = {(item.path, item.originalname): item for item in reversed(items)}
        kept = [
            item for item in items if first[item.path, item.originalname] is item or item.get_closest_marker("versions")
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    pages = [item for item in items if "commands_of_a_page" in item.nodeid]
    others = [item for item in items if "commands_of_a_page" not in item.nodeid]
    size = -(-len(others) // workers)
    items[:] = [item for i in range(workers) for item in (*pages[i::workers], *others[i * size : (i + 1) * size])]


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets what a file of tests has compiled: gigabytes by the end, and the folder still has it."""
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run on the first device, where it is not the point that there are more: it compiles faster."""
    first = sharding.data_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "data_mesh", lambda *_: first)


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, which is closed again."""
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def started_browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium, started once."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        message = "chromium (or google-chrome) and chromedriver are not both on the PATH"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def browser(started_browser: webdriver.Chrome) -> webdriver.Chrome:
    """Headless Chromium, which keeps what the pages of this test write to the console and what they fetch."""
    started_browser.get("about:blank")  # a page of another test may still be writing
    for kind in ("browser", "performance"):
        started_browser.get_log(kind)
    return started_browser
