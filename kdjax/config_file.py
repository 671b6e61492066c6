"""Config files and command-line overrides of their keys.

A config file is a Python file with a function `get_config(variant)` that returns an `ml_collections.ConfigDict`. It can
import other files of its folder, as configs/hint.py imports denoise.py. Any key can be set, whether or not the file
mentions it:

    --config.train.steps=500                      a number, text, True or False
    --config.train.betas="(0.9, 0.999)"           a tuple
    --config.train.lr=1e-4                        a number in place of a schedule
    --config.train.lr="dict(name='cosine', value=1e-3, steps=1000)"     and the reverse
    --config.terms.fft.weight=0.1                 a loss term that the file does not have
    --config.degrade={}                           an empty group
    --config.data.hflip, --noconfig.data.hflip    True, False
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdjax.names import brief

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_MISSING = object()
# Exceptions that count as mistakes in the config file. Anything else keeps its traceback.
_FAULTS = (ValueError, TypeError, AttributeError, KeyError, OSError, ImportError, SyntaxError, RecursionError)


class ConfigFileError(ValueError):
    """A config file that cannot be read, or a flag that cannot be set; the message is for the user."""


def load(path: str) -> ConfigDict:
    """Returns the result of the file's `get_config`.

    Args:
      path: FILE or FILE:VARIANT. A missing file in `configs/` is looked up beside the package.

    Raises:
      ConfigFileError: there is no such file or variant, or running the file failed.
    """
    name, _, variant = path.partition(":")
    file = _found(Path(name))
    if not file.is_file():
        raise ConfigFileError(f"config file {name!r} does not exist; give a path such as configs/denoise.py")
    try:
        with _importing_from(file.parent.resolve()):  # modules know their files by absolute paths
            spec = importlib.util.spec_from_file_location(file.stem, file)
            if spec is None or spec.loader is None:
                raise ConfigFileError("it is not a Python file; its name must end in .py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(*([variant] if variant else []))
    except _FAULTS as error:
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ConfigFileError(f"{name}: {what}{error.args[0] if error.args else error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigFileError(f"{name}: get_config() returned {brief(config)}; it must return a ConfigDict")
    return config


def set_key(config: ConfigDict, path: str, text: str | bool, kind_of: Callable[[str], Any]) -> None:
    """Sets a key from command-line text, creating the groups above it as needed.

    Args:
      path: "train.lr.value".
      text: True or False for a flag without a value.
      kind_of: maps a key's path to its type, or to None if any type is allowed; see `kdjax.config.kind_of`. Where a
        number may also be a range or a schedule, who uses it checks it.

    Raises:
      ConfigFileError: the text is not a valid value of the key's type.
    """
    *groups, name = path.split(".")
    if not all((*groups, name)):
        raise ConfigFileError(f"--config.{path} has an empty part; write --config.GROUP.KEY=VALUE")
    node = config
    for group in groups:
        if not isinstance(_get(node, group), ConfigDict):
            _put(node, group, ConfigDict(type_safe=False))
        node = _get(node, group)
    before = _get(node, name)
    kind = kind_of(path)
    if kind is None and isinstance(before, str | bool):
        kind = type(before)
    value = _read(text, kind, path)
    if isinstance(before, float) and type(value) is int:
        value = float(value)
    _put(node, name, value)


def plain(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as a nested dict, with references resolved."""
    return config.copy_and_resolve_references().to_dict()


def _read(text: str | bool, kind: Any, path: str) -> Any:
    """Parses a value of the given kind. If the kind is unknown, parses a Python literal or keeps the text."""
    if kind is bool:
        value = _WORDS.get(str(text).lower(), _MISSING)
        if value is _MISSING:
            raise ConfigFileError(f"--config.{path}={brief(text)} must be True or False")
        return value
    if isinstance(text, bool):
        if kind is None:
            return text
        raise ConfigFileError(f"--config.{path} needs a value: --config.{path}=VALUE")
    if kind is str:
        return text
    try:
        value = _literal(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind in (int, float) and type(value) is not kind:
        raise ConfigFileError(f"--config.{path}={brief(text)} must be {'a whole' if kind is int else 'a'} number")
    if kind is tuple and not isinstance(value, tuple | list):
        raise ConfigFileError(f'--config.{path}={brief(text)} must be a tuple, such as --config.{path}="(1, 2)"')
    return value


def _literal(node: ast.AST) -> Any:
    """Like `ast.literal_eval`, but also accepts dict(name=value)."""
    match node:
        case ast.Call(func=ast.Name("dict"), args=[], keywords=entries) if all(entry.arg for entry in entries):
            return {entry.arg: _literal(entry.value) for entry in entries}
        case ast.Dict(keys=names, values=values) if all(names):
            return {_literal(name): _literal(value) for name, value in zip(names, values, strict=True) if name}
        case ast.Tuple(elts=parts) | ast.List(elts=parts):
            return tuple(map(_literal, parts))
        case ast.Name("inf" | "nan" as name):
            return float(name)
        case ast.Name("true" | "false" as name):
            return name == "true"
    return ast.literal_eval(node)


def _get(node: ConfigDict, name: str) -> Any:
    return node[name] if name in node else _MISSING  # noqa: SIM401  (.get of a ConfigDict knows no references)


def _put(node: ConfigDict, name: str, value: Any) -> None:
    with node.unlocked(), node.ignore_type():
        node[name] = value


def _found(path: Path) -> Path:
    """Returns the file, or the packaged one if it does not exist: wheels include `configs/`."""
    if not path.exists() and path.parts[:1] == ("configs",):
        for place in (Path(__file__).parent, Path(__file__).parent.parent):  # in a wheel, in a clone
            if (place / path).is_file():
                return place / path
    return path


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Makes the folder's files importable by name, as for a Python script, and removes those imports afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]
