"""JAX's persistent compilation cache, so that programs start faster the second time.

The cache is in the user's folder `~/.cache/kdjax/compiled` (or under `XDG_CACHE_HOME`). Deleting it only costs compile
time. JAX's own settings take precedence: `JAX_COMPILATION_CACHE_DIR=FOLDER` chooses another folder, which is never
cleaned up here, and `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off.
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
_WORTH_SECONDS = 0.1  # faster compilations are not cached
_PLUGINS = ("jax_plugins", "libtpu")  # packages through which JAX finds accelerators


def keep() -> None:
    """Turns on the compilation cache for this process. Call it before the first compilation.

    Does nothing if the folder cannot be created or is writable by other users: it holds machine code.
    """
    settings: Any = jax.config  # typed as Any: it creates its attributes at run time
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache or _is_refused_by_xla():
        return
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            return
        _clean_up(folder.parent)
    except (OSError, RuntimeError, AttributeError):  # no home folder, a full or read-only disk, Windows
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)
    # An entry truncated by a kill is simply recompiled. There is nothing for the user to do.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def _folder() -> Path:
    """Returns a folder per kind of machine: home folders can be shared, and code for one CPU may crash on another."""
    parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    machine = hashlib.sha256(f"{platform.machine()} {_cpu_says('model name')} {_cpu_says('flags')}".encode())
    return parent / "kdjax" / "compiled" / machine.hexdigest()[:12]


def _is_refused_by_xla() -> bool:
    """Whether XLA would reject every entry and print errors: on Intel CPUs (github.com/openxla/xla/issues/44565)."""
    chosen = getattr(jax.config, "jax_platforms", "") or os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = chosen != "cpu" and any(importlib.util.find_spec(name) for name in _PLUGINS)
    return _cpu_says("vendor_id") == "GenuineIntel" and not has_accelerator


def _cpu_says(field: str) -> str:
    """Returns a field of the first CPU from Linux's /proc/cpuinfo; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _clean_up(folder: Path) -> None:
    """Removes old entries, then the oldest ones until the cache is within its size limit."""
    files = sorted(((path.stat(), path) for path in folder.glob("*/*")), key=lambda found: -found[0].st_mtime)
    total, oldest = 0, time.time() - _KEPT_DAYS * 86_400
    for status, path in files:
        total += status.st_size
        if status.st_mtime < oldest or total > _KEPT_BYTES:
            path.unlink(missing_ok=True)
