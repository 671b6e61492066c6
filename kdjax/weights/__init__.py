"""Weights in and out: `.pth` and `.safetensors` files to models and back, without torch.

    loaded = load_weights("RealESRGAN_x4plus.pth")     # architecture and hyper-parameters come from the tensors
    output, features = loaded.model(image)
    save_model(loaded.model, "student.pth")            # opens in BasicSR, spandrel, torch.load(weights_only=True)

Files are read as data: nothing in them is executed, and any problem with one raises a `WeightsError`. Parameters are
float32 NumPy arrays; other precisions are converted. Files written by `save_model` also state their architecture and
hyper-parameters, in an entry "kdjax" that other tools ignore.
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

from kdjax import assets
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
      model: with float32 NumPy parameters.
      path: the file.
      sha256: of the whole file.
      layout: the file's naming scheme: "BasicSR", "BSRGAN", "old ESRGAN", "KAIR", "EDSR-PyTorch", ...
      key: which of the file's sets of weights this is: "params_ema", "state_dict/net_g", ..., or "bare" for the only
        one.
      notes: what was assumed because no tensor tells it, and why; empty for files that kdjax wrote.
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
    """Loads a weight file; the format is recognised by content, not by suffix.

    Assumptions are logged as warnings, and are in `notes`.

    Args:
      path: a `.pth`, `.pt`, `.ckpt` or `.safetensors` file, or the name of a model in `kdjax.assets.MODELS`.
      key: which set of weights to take if the file has several: an entry ("params"), a path of entries
        ("state_dict/params"), or a prefix of the tensors' names ("net_g"). "auto" prefers a moving average of the
        generator, then the generator, then an entry called params, model, ...; then the only set of tensors.
      arch: the architecture, in place of the recognised one from the keys. BasicSR's class names work too.
      **hparams_overrides: hyper-parameters that the tensors do not tell, such as act_type="relu" or scale=3.

    Raises:
      WeightsError: the file cannot be read, does not fit, or leaves something open that must be stated. The message
        names the file, what was found and what to do.
      ValueError: `arch` is not a known architecture.
    """
    chosen = None if arch is None else architecture(arch)
    path = assets.model(path)
    data = _read(path)
    with _blaming(path):
        content, about = _parse(data)
        said_by_file, said = _said(about, chosen)
        if chosen and said_by_file and chosen is not said_by_file:
            raise WeightsError(f"the file says {said_by_file.name}, not {chosen.name}")
        chosen = chosen or said_by_file
        state, found_key = _one_network(content, key, chosen, len(data))
        model, layout, notes = to_model(state, architecture=chosen, said=said, given=hparams_overrides)
    for note in notes:
        log.warning(f"{printable(os.fspath(path))}: {note}")
    return Loaded(model, os.fspath(path), hashlib.sha256(data).hexdigest(), layout, found_key, notes)


def weights_options(options: argparse.Namespace) -> dict[str, Any]:
    """Converts the options `--key`, `--arch` and `--hparam` to arguments of `load_weights`.

    Raises:
      WeightsError: a --hparam is not NAME=VALUE.
    """
    return {"key": options.key, "arch": options.arch, **parse_hparams(options.hparam)}


def load_model(
    path: str | os.PathLike[str], /, *, key: str = "auto", arch: str | None = None, **hparams_overrides: Any
) -> Model:
    """Loads the model in a weight file; see `load_weights`.

    Examples:
      >>> model = load_model("embedded")
      >>> model.arch, model.hparams["num_block"]
      ('rrdbnet', 2)
    """
    return load_weights(path, key=key, arch=arch, **hparams_overrides).model


def load_tensors(path: str | os.PathLike[str], /, read: Callable[[Mapping[Any, Any]], T]) -> T:
    """Applies `read` to a file's best set of tensors, for a known kind of network; errors then name the file.

    Raises:
      WeightsError: the file cannot be read, or `read` raises it.
    """
    data = _read(path)
    with _blaming(path):
        tensors, _, _ = unwrap(_parse(data)[0], "auto")
        check_cost(tensors, len(data))
        return read(tensors)


def save_model(model: Model, path: str | os.PathLike[str]) -> None:
    """Writes a model as `.pth` (BasicSR's layout, under "params") or `.safetensors`, depending on the suffix.

    The same weights always produce the same bytes. The write is atomic: on any failure, an existing file of that name
    is left untouched.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_model(load_model("embedded"), f"{folder}/copy.safetensors")
      ...     load_model(f"{folder}/copy.safetensors").hparams["num_block"]
      2

    Raises:
      WeightsError: unknown suffix, parameters that do not fit the architecture or are not finite, or no such folder.
    """
    path = check_target(path)
    shown = printable(str(path))
    try:
        about = {"arch": model.arch, "hparams": {name: _plain(value) for name, value in model.hparams.items()}}
        data = WRITERS[path.suffix](to_state_dict(model), about)
    except ValueError as error:
        raise WeightsError(f"{shown}: {error}") from None
    try:
        write_bytes(path, data)
    except OSError as error:
        raise WeightsError(f"{shown}: cannot be written: {printable(error.strerror or str(error))}") from error


def check_target(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file to write, after checking its suffix and its folder; raises like `save_model`."""
    path = Path(path)
    shown = printable(str(path))
    if path.suffix not in WRITERS:
        suffix = printable(path.suffix) or "a file without a suffix"
        raise WeightsError(f"{shown}: cannot write {suffix}; use {' or '.join(WRITERS)}")
    if not path.parent.is_dir():
        raise WeightsError(f"{shown}: the folder {printable(str(path.parent))} does not exist; create it first")
    return path


def _read(path: str | os.PathLike[str]) -> bytes:
    file = Path(path)
    shown = printable(str(file))
    try:
        if not file.is_file():  # also avoids blocking on a pipe
            what = "is a folder" if file.is_dir() else "is not a regular file" if file.exists() else "does not exist"
            raise WeightsError(f"{shown}: {what}; wanted a {assets.MODEL_HELP}")
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
    """Adds the file's name to every error about its content."""
    shown = printable(os.fspath(path))
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{shown}: {error}") from None
    except Exception as error:
        # A damaged or hostile file can break any step of zipfile, pickletools, numpy and json. None of that is a bug
        # here, and callers need one kind of error.
        raise WeightsError(
            f"{shown}: the file is damaged ({type(error).__name__}: {printable(str(error)[:200])}); get or write it"
            " again"
        ) from error


def _parse(data: bytes) -> tuple[Any, Any]:
    """Returns the file's content, and what it states about itself if `save_model` wrote it."""
    # Checked first, because the length before a safetensors header can look like a pickle. No torch file has a { after
    # it.
    if is_safetensors_file(data):
        return read_safetensors_file(data)
    if is_torch_file(data):
        content = read_torch_file(data)
        about = content.get("kdjax") if type(content) is dict else None
        return content, about
    raise WeightsError(f"it starts with {data[:8]!r}; wanted a .pth file of torch.save or a .safetensors file")


def _one_network(
    content: Any, key: str, architecture: Architecture | None, file_bytes: int
) -> tuple[dict[str, Tensor], str]:
    """Returns the wanted tensors, by their names in the network, and where in the file they were."""
    tensors, path, rest = unwrap(content, key)
    check_cost(tensors, file_bytes)
    if architecture is not None and architecture.files is None:  # only kdjax writes these, and their names can be any
        return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}, "/".join(
            path
        ) or "bare"
    return one_network(tensors, path, rest, known_part)


def _said(about: Any, asked: Architecture | None) -> tuple[Architecture | None, dict[str, Any] | None]:
    """Returns the architecture and hyper-parameters a file states; None if it states nothing."""
    if about is None:
        return None, None
    match about:
        case {"arch": str(arch), "hparams": dict(hparams)} if len(arch) <= 500 and _are_plain(hparams):
            if is_custom(arch) and (asked is None or arch != asked.name):  # a file must not decide what is imported
                raise WeightsError(
                    f"it is for a custom network, {brief(arch)}; to import that code, give arch={brief(arch)}"
                )
            if is_custom(arch) or arch in MODELS:
                return architecture(arch), hparams
    raise WeightsError('its entry "kdjax" does not name an architecture and its hyper-parameters; the file was altered')


def _are_plain(hparams: dict[Any, Any]) -> bool:
    """Whether these can be hyper-parameters: few, with short names and values that cost no more than their size."""
    left = 10_000

    def is_plain(value: Any, depth: int) -> bool:
        nonlocal left
        left -= 1
        if type(value) in (list, tuple) and depth:
            return left > len(value) and all(is_plain(part, depth - 1) for part in value)
        return left > 0 and (value is None or type(value) in (bool, int, float) or type(value) is str)

    return all(type(name) is str and len(name) <= 100 and is_plain(value, 4) for name, value in hparams.items())


def _plain(value: Any) -> Any:
    """Converts a numpy scalar to the equivalent Python number."""
    return value.item() if isinstance(value, np.generic) else value
