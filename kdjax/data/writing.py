"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the same folder, with the same suffix, for a `with` block to write.

    When the block ends it is renamed to `path`; when the block raises, it is removed and `path` stays as it was. The
    name starts with a dot, so that what a killed process leaves behind is not seen as data.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
