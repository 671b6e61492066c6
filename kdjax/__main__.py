"""`python -m kdjax` lists the programs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

PROGRAMS = (
    "kdjax.train", "kdjax.study", "kdjax.show", "kdjax.cache", "kdjax.evaluate", "kdjax.compare", "kdjax.restore",
    "kdjax.export", "kdjax.demo", "kdjax.data.check", "kdjax.data.pack",
)  # fmt: skip


def summary(program: str) -> str:
    """The first line of a program's docstring, which is read without importing what the program needs."""
    origin = Path(importlib.util.find_spec(program).origin)
    source = origin.with_name("__main__.py") if origin.name == "__init__.py" else origin
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))).splitlines()[0].rstrip(":.")


def main() -> None:
    lines = ["usage: python -m PROGRAM [OPTION ...]; PROGRAM --help says more", ""]
    lines += [f"  {program:<17} {summary(program)}" for program in PROGRAMS]
    lines += ["", "for example: python -m kdjax.train --config configs/denoise.py:quick"]
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print("\n".join(lines))
    else:
        print("\n".join(lines), file=sys.stderr)
        print(f"error: unexpected argument {sys.argv[1]!r}; programs are started by their own names", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
