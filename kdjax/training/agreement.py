"""Checks, once before training starts, that the processes of a run agree on their inputs.

Otherwise a run whose hosts have different files or options would train on, or hang without saying why. A single process
always agrees with itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import config as config_lib
from kdjax.files import locked
from kdjax.sharding import AgreedError, exchange, is_first
from kdjax.training.folder import identity
from kdjax.training.monitor import Monitor
from kdjax.training.preparation import Setup

_PATIENCE = 30.0  # seconds for one host's file to become visible to the others: network file systems cache


def check(problem: str, facts: Callable[[], dict[str, Any]], workdir: Path) -> None:
    """Waits for all processes and creates `workdir`, unless one has a problem or differs from the first.

    Args:
      problem: why this process cannot start; "" if it can.
      facts: returns what must be equal on all processes, as JSON values by name; not called if there is a problem.
      workdir: the run's folder, shared by all processes.

    Raises:
      AgreedError: on every process, with the same message.
    """
    alone = jax.process_count() == 1
    everyone = exchange([socket.gethostname(), problem, {} if problem or alone else facts()])
    names = [f"process {number} ({host})" for number, (host, *_) in enumerate(everyone)]
    for name, (_, reason, _) in zip(names, everyone, strict=True):
        if reason:
            raise AgreedError(reason if alone else f"{name}: {reason}")
    for name, (_, _, theirs) in zip(names, everyone, strict=True):
        if different := config_lib.changes(everyone[0][2], theirs):
            raise AgreedError(
                f"{name} differs from {names[0]}: {'; '.join(different)}. Start the same command with the same files"
                " and"
                " versions everywhere"
            )
    _check_shared(workdir, names)


def shared_facts(setup: Setup, monitor: Monitor) -> dict[str, object]:
    """Returns what must be equal on all processes of a run: options, versions, and digests of data read from files."""
    names: dict[str, object] = {
        what: f"{len(found)}, digest {digest(found)}"
        for what, found in (
            ("training images", [pair.name for pair in setup.pairs]),
            ("unlabelled images", [pair.name for pair in setup.unlabelled]),
            ("unpaired images", [pair.name for pair in setup.unpaired]),
            ("validation images", [sample.name for sample in monitor.samples]),
        )
    }
    names["cached samples"] = setup.cache and setup.cache.samples
    terms = [(term.loss.frozen, term.loss.adapters) for term in setup.recipe.terms]
    weights = {"initial weights": digest(jax.tree.leaves((setup.student.params, terms)))}
    versions = {"jax": jax.__version__, "device": jax.local_devices()[0].device_kind}
    return {"config": config_lib.to_dict(setup.config)} | identity(setup) | names | weights | versions


def _check_shared(workdir: Path, names: list[str]) -> None:
    """Creates the folder on the first process, and checks that the others see it."""
    mark, reason = workdir / f".seen-by-all-{secrets.token_hex(8)}", ""
    if is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if len(names) > 1:
                mark.touch()
        except OSError as error:
            reason = str(error)
    mark_name, reason = exchange([mark.name, reason])[0]
    if reason:
        raise AgreedError(reason)
    if len(names) == 1:
        return
    until = time.monotonic() + _PATIENCE
    while not (seen := (workdir / mark_name).exists()) and time.monotonic() < until:
        time.sleep(0.5)
    sees = exchange(seen)
    if is_first():
        mark.unlink()
    if not all(sees):
        blind = names[sees.index(False)]
        raise AgreedError(
            f"{blind} does not see what {names[0]} writes to {workdir}: a run of several processes needs one folder"
            " that all hosts share (NFS, Lustre, a mounted bucket); give it as --workdir"
        )


@contextlib.contextmanager
def one_writer(workdir: Path, claim: Callable[[], None]) -> Iterator[None]:
    """Locks the run's folder, created by `check`, for the processes of this run.

    Args:
      claim: called by the first process once it holds the lock; raises ValueError if the folder must not be written to.

    Raises:
      AgreedError: on every process, if another run is writing there, or the folder must not or cannot be written to.
    """
    with contextlib.ExitStack() as held:
        problem = ""
        if is_first():
            try:
                held.enter_context(locked(workdir))
                claim()
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := exchange(problem)[0]:
            raise AgreedError(problem)
        yield


def digest(parts: Iterable[Any]) -> str:
    """Returns a short hash of strings and arrays, in order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode(errors="surrogatepass") if isinstance(part, str) else np.asarray(part).tobytes())
        found.update(b"\0")
    return found.hexdigest()[:16]
