"""What JAX compiles for a program is kept on the disk, so that the program starts faster the next time.

It is JAX's own persistent compilation cache, in a folder of the user's, `~/.cache/kdjax/compiled` (or below
`XDG_CACHE_HOME`). Deleting it costs the time of compiling and nothing else. What the user says through JAX comes first:
`JAX_COMPILATION_CACHE_DIR=FOLDER` chooses another folder, which is then never cleaned up here, and
`JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import jax

_KEPT_DAYS = 30
_KEPT_BYTES = 2 << 30
_WORTH_SECONDS = 0.1  # what compiles faster is not kept
_PLUGINS = ("jax_plugins", "libtpu")  # packages through which JAX finds accelerators


def keep() -> None:
    """Has this process read and write compiled programs; call it before the first one is compiled.

    Nothing is kept where the folder cannot be made, or where others than the user can write: it holds machine code.
    """
    settings: Any = jax.config  # which makes its attributes at run time
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache or _is_refused_by_xla():
        return
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return
        _clean_up(folder.parent)
    except (OSError, RuntimeError, AttributeError):  # no home, a disk that is full or read-only, Windows
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)
    # An entry that was cut short by a kill is compiled again; its user can do nothing about it.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _folder() -> Path:
    """One for each kind of machine: homes can be shared, and code for one CPU may crash on another."""
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = hashlib.sha256(f"{platform.machine()} {_cpu_says('model name')} {_cpu_says('flags')}".encode())
    return parent / "kdjax" / "compiled" / machine.hexdigest()[:12]


def _is_refused_by_xla() -> bool:
    """Whether XLA would load nothing and print errors: on Intel CPUs (github.com/openxla/xla/issues/44565)."""
    chosen = getattr(jax.config, "jax_platforms", "") or os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = chosen != "cpu" and any(importlib.util.find_spec(name) for name in _PLUGINS)
    return _cpu_says("vendor_id") == "GenuineIntel" and not has_accelerator


def _cpu_says(field: str) -> str:
    """What Linux says of the first CPU; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _clean_up(folder: Path) -> None:
    """Removes what was compiled long ago, and the oldest of what is too much."""
    files = sorted(((path.stat(), path) for path in folder.glob("*/*")), key=lambda found: -found[0].st_mtime)
    total, oldest = 0, time.time() - _KEPT_DAYS * 86_400
    for status, path in files:
        total += status.st_size
        if status.st_mtime < oldest or total > _KEPT_BYTES:
            path.unlink(missing_ok=True)
