"""Weights in and out: `.pth` and `.safetensors` files to models and back, without torch.

    loaded = load_weights("RealESRGAN_x4plus.pth")     # architecture and hyper-parameters come from the tensors
    output, features = loaded.model(image)
    save_model(loaded.model, "student.pth")            # opens in BasicSR, spandrel, torch.load(weights_only=True)

Files are read as data: nothing in them is executed, and whatever is wrong with one ends in a `WeightsError`.
Parameters are float32 numpy arrays; weights stored in other precisions are converted. Files that `save_model` wrote
also say their architecture and hyper-parameters, under the entry "kdjax" that other tools ignore.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kdjax.files import printable, write_bytes
from kdjax.models import MODELS, Architecture, Model, architecture
from kdjax.models.custom import is_custom
from kdjax.models.reading import WeightsError
from kdjax.names import brief
from kdjax.weights.convert import to_model, to_state_dict
from kdjax.weights.hparams import parse_hparams
from kdjax.weights.layouts import known_part
from kdjax.weights.safetensors_file import is_safetensors_file, read_safetensors_file, safetensors_file_bytes
from kdjax.weights.tensors import Tensor, check_cost
from kdjax.weights.torch_file import is_torch_file, read_torch_file, torch_file_bytes
from kdjax.weights.unwrap import one_network, unwrap

__all__ = [
    "Loaded",
    "WeightsError",
    "load_model",
    "load_tensors",
    "load_weights",
    "parse_hparams",
    "save_model",
    "weights_options",
]

MAX_FILE_BYTES = 8 << 30

T = TypeVar("T")

log = logging.getLogger("kdjax")

WRITERS = {".pth": torch_file_bytes, ".safetensors": safetensors_file_bytes}


@dataclass(frozen=True)
class Loaded:
    """A model and where it came from.

    Attributes:
      model: with float32 numpy parameters.
      path: the file, as it was given.
      sha256: of the whole file.
      layout: how the file names its parameters: "BasicSR", "BSRGAN", "old ESRGAN", "KAIR", "EDSR-PyTorch", ...
      key: which of the file's sets of weights it is: "params_ema", "state_dict/net_g", ..., or "bare" for the only one.
      notes: what was taken that no tensor tells, and why; empty for files that kdjax wrote.
    """

    model: Model
    path: str
    sha256: str
    layout: str
    key: str
    notes: tuple[str, ...] = ()


def load_weights(
    path: str | os.PathLike[str], /, *, key: str = "auto", arch: str | None = None, **hparams_overrides: Any
) -> Loaded:
    """Reads a weight file; the format is recognised by its content, not its suffix.

    What had to be assumed is logged as a warning, and is in `notes`.

    Args:
      path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file.
      key: which set of weights to take when the file has several: an entry ("params"), a path of entries
        ("state_dict/params"), or what the names of its tensors begin with ("net_g"). "auto" takes a moving average of
        the generator, then the generator, then what is called params, model, ...; then the only set of tensors.
      arch: the architecture, when it shall not be recognised from the keys. BasicSR's class names work too.
      **hparams_overrides: hyper-parameters that the tensors do not tell, such as act_type="relu" or scale=3.

    Raises:
      WeightsError: the file cannot be read, does not fit, or leaves open what has to be stated; the message names the
        file, what was found and what to do.
      ValueError: `arch` is not a known architecture.
    """
    chosen = None if arch is None else architecture(arch)
    data = _read(path)
    with _blaming(path):
        content, about = _parse(data)
        said_by_file, said = _said(about, chosen)
        if chosen and said_by_file and chosen is not said_by_file:
            raise WeightsError(f"it says it is {said_by_file.name}, not {chosen.name}")
        chosen = chosen or said_by_file
        state, found_key = _one_network(content, key, chosen, len(data))
        model, layout, notes = to_model(state, architecture=chosen, said=said, given=hparams_overrides)
    for note in notes:
        log.warning(f"{printable(os.fspath(path))}: {note}")
    return Loaded(model, os.fspath(path), hashlib.sha256(data).hexdigest(), layout, found_key, notes)


def weights_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `load_weights` that `--key`, `--arch` and `--hparam` of a command line stand for.

    Raises:
      WeightsError: a --hparam is not NAME=VALUE.
    """
    return {"key": options.key, "arch": options.arch, **parse_hparams(options.hparam)}


def load_model(
    path: str | os.PathLike[str], /, *, key: str = "auto", arch: str | None = None, **hparams_overrides: Any
) -> Model:
    """The model in a weight file; see `load_weights`.

    Examples:
      >>> from kdjax import assets
      >>> model = load_model(assets.TEACHER)
      >>> model.arch, model.hparams["num_block"]
      ('rrdbnet', 2)
    """
    return load_weights(path, key=key, arch=arch, **hparams_overrides).model


def load_tensors(path: str | os.PathLike[str], /, read: Callable[[Mapping[Any, Any]], T]) -> T:
    """What `read` makes of the best set of tensors of a file whose network is known; its errors then name the file.

    Raises:
      WeightsError: the file cannot be read, or `read` raises it.
    """
    data = _read(path)
    with _blaming(path):
        tensors, _, _ = unwrap(_parse(data)[0], "auto")
        check_cost(tensors, len(data))
        return read(tensors)


def save_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes a model as `.pth` (BasicSR's layout, under "params") or `.safetensors`, chosen by the suffix.

    The same weights always give the same bytes. The file appears whole or not at all: on any failure an existing file
    of that name stays as it was.

    Examples:
      >>> import tempfile
      >>> from kdjax import assets
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_model(load_model(assets.TEACHER), f"{folder}/copy.safetensors")
      ...     load_model(f"{folder}/copy.safetensors").hparams["num_block"]
      2

    Raises:
      WeightsError: unknown suffix, parameters that do not fit the architecture or are not finite, or no such folder.
    """
    path = Path(path)
    shown = printable(str(path))
    if path.suffix not in WRITERS:
        suffix = printable(path.suffix) or "a file without suffix"
        raise WeightsError(f"{shown}: cannot write {suffix}; use {' or '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise WeightsError(f"{shown}: the folder {printable(str(path.parent))} does not exist; create it first")
    try:
        about = {"arch": model.arch, "hparams": {name: _plain(value) for name, value in model.hparams.items()}}
        data = WRITERS[path.suffix](to_state_dict(model), about)
    except ValueError as error:
        raise WeightsError(f"{shown}: {error}") from None
    try:
        write_bytes(path, data)
    except OSError as error:
        raise WeightsError(f"{shown}: cannot be written: {printable(error.strerror or str(error))}") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    file = Path(path)
    shown = printable(str(file))
    try:
        if not file.is_file():  # also keeps us from waiting on a pipe
            what = "is a folder" if file.is_dir() else "is not a regular file" if file.exists() else "does not exist"
            raise WeightsError(f"{shown}: {what}; wanted a .pth or .safetensors file")
        size = file.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise WeightsError(
                f"{shown}: has {size} bytes; wanted a .pth or .safetensors file of at most {MAX_FILE_BYTES}"
            )
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{shown}: cannot be read: {printable(str(error))}") from error


@contextmanager
def _blaming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in every error about its content."""
    shown = printable(os.fspath(path))
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{shown}: {error}") from None
    except Exception as error:
        # A damaged or hostile file can trip any step of zipfile, pickletools, numpy and json; none of that is a fault
        # of the program, and callers need one kind of error.
        raise WeightsError(
            f"{shown}: the file is damaged ({type(error).__name__}: {printable(str(error)[:200])}); get or write it"
            " again"
        ) from error


def _parse(data: bytes) -> tuple[Any, Any]:
    """What the file holds, and what it says about itself when `save_model` wrote it."""
    # First, since the length in front of a safetensors header can begin like a pickle; no torch file has a { behind it.
    if is_safetensors_file(data):
        return read_safetensors_file(data)
    if is_torch_file(data):
        content = read_torch_file(data)
        about = content.get("kdjax") if type(content) is dict else None
        return content, about
    raise WeightsError(f"it begins with {data[:8]!r}; wanted a .pth file of torch.save or a .safetensors file")


def _one_network(
    content: Any, key: str, architecture: Architecture | None, file_bytes: int
) -> tuple[dict[str, Tensor], str]:
    """The tensors that are wanted, by their names in the network, and where in the file they were."""
    tensors, path, rest = unwrap(content, key)
    check_cost(tensors, file_bytes)
    if architecture is not None and architecture.files is None:  # only kdjax writes them, and their names can be any
        return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}, "/".join(
            path
        ) or "bare"
    return one_network(tensors, path, rest, known_part)


def _said(about: Any, asked: Architecture | None) -> tuple[Architecture | None, dict[str, Any] | None]:
    """The architecture and hyper-parameters that a file states; None when it states nothing."""
    if about is None:
        return None, None
    match about:
        case {"arch": str(arch), "hparams": dict(hparams)} if len(arch) <= 500 and _are_plain(hparams):
            if is_custom(arch) and (asked is None or arch != asked.name):  # a file must not decide what is imported
                raise WeightsError(
                    f"it is a network of your own, {brief(arch)}; say so to have it imported: arch={brief(arch)}"
                )
            if is_custom(arch) or arch in MODELS:
                return architecture(arch), hparams
    raise WeightsError('its entry "kdjax" does not name an architecture and its hyper-parameters; it was altered')


def _are_plain(hparams: dict[Any, Any]) -> bool:
    """Whether these can be hyper-parameters: few, with short names and with values whose cost is that of their size."""
    left = 10_000

    def is_plain(value: Any, depth: int) -> bool:
        nonlocal left
        left -= 1
        if type(value) in (list, tuple) and depth:
            return left > len(value) and all(is_plain(part, depth - 1) for part in value)
        return left > 0 and (value is None or type(value) in (bool, int, float) or type(value) is str)

    return all(type(name) is str and len(name) <= 100 and is_plain(value, 4) for name, value in hparams.items())


def _plain(value: Any) -> Any:
    """A numpy scalar as the Python number it stands for."""
    return value.item() if isinstance(value, np.generic) else value
