"""The `kdjax` command, also `python -m kdjax`: lists the programs and starts one of them."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import kdjax
from kdjax import commandline
from kdjax.names import nearest

PROGRAMS = {
    "train": "kdjax.train",
    "study": "kdjax.study",
    "distill": "kdjax.autodistill",
    "shrink": "kdjax.shrink",
    "show": "kdjax.show",
    "cache": "kdjax.cache",
    "evaluate": "kdjax.evaluate",
    "compare": "kdjax.compare",
    "restore": "kdjax.restore",
    "export": "kdjax.export",
    "demo": "kdjax.demo",
    "convert": "kdjax.convert",
    "check": "kdjax.data.check",
    "pack": "kdjax.data.pack",
}


def summary(module: str) -> str:
    """Returns the first line of a program's docstring without importing the program's dependencies."""
    source = _source(module)
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(":.")


def usage() -> str:
    lines = ["usage: kdjax PROGRAM [OPTION ...]", ""]
    lines += [f"  {name:<9} {summary(module)}" for name, module in PROGRAMS.items()]
    lines += [
        "",
        "kdjax PROGRAM --help lists its options; python -m kdjax.PROGRAM starts it as well.",
        "For example: kdjax train --config configs/denoise.py:quick",
    ]
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console script."""
    commandline.run(_dispatch)


def _dispatch() -> None:
    match sys.argv[1:]:
        case [] | ["-h" | "--help"]:
            print(usage())
        case ["--version"]:
            print(f"kdjax {kdjax.__version__}")
        case [name, *arguments] if name in PROGRAMS:
            sys.argv = [f"kdjax {name}", *arguments]  # the name shown in its help
            module = PROGRAMS[name]
            program = importlib.import_module(f"{module}.__main__" if _is_package(module) else module)
            commandline.after_imports()
            program.main()
        case [name, *_]:
            print(usage(), file=sys.stderr)
            print(f"error: there is no program {name!r}{nearest(name, PROGRAMS)}", file=sys.stderr)
            sys.exit(2)


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    origin = Path(spec.origin)
    return origin.with_name("__main__.py") if origin.name == "__init__.py" else origin


def _is_package(module: str) -> bool:
    return _source(module).name == "__main__.py"


if __name__ == "__main__":
    main()
