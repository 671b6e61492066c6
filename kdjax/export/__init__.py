"""Exports a model to other formats, checking each file against the model before it gets its name.

    .pth, .safetensors   the weights alone, in torch's names and layouts: BasicSR, spandrel, chaiNNer
    .onnx                the network, NCHW, any batch, height and width: ONNX Runtime, also on phones and in browsers
    .stablehlo           the network serialised by `jax.export`, NHWC, any size, for cpu, cuda and tpu

`python -m kdjax.export` is the program; docs/exporting.md shows how to load each format.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from kdjax import models
from kdjax.files import whole_file
from kdjax.weights import load_weights, save_model

PLATFORMS = ("cpu", "cuda", "tpu")
# Images (batch, height, width) on which file and model must agree: even sides, odd sides, a batch.
CHECKED_SIZES = ((1, 48, 48), (1, 37, 21), (2, 24, 40))
BOUND = 1e-4  # on the largest difference, for outputs in [-1, 1]; scaled up for larger outputs


class ExportError(ValueError):
    """A file cannot be written, or does not reproduce the model; the message is meant for the user."""


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A file that was written and verified.

    Attributes:
      checks: what it was compared on, in words and numbers, as in the report.
      versions: of the packages that wrote or ran it.
    """

    path: Path
    sha256: str
    num_bytes: int
    checks: dict[str, Any]
    versions: dict[str, str]


def export_model(model: models.Model, path: Path, *, about: Mapping[str, str] | None = None) -> Artefact:
    """Exports a model to `path`, in the format of its suffix; the file appears complete and verified, or not at all.

    Args:
      about: strings for the metadata of formats that have it (ONNX), such as the sha256 of the model's file.

    Raises:
      ExportError: if the suffix is unknown, a package is not installed, the format lacks an operation, the folder
        cannot be written to, or the file differs from the model.
    """
    if path.suffix not in FORMATS:
        raise ExportError(f"{path}: cannot write {path.suffix or 'a file without a suffix'}; use {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist; create it first")
    write, verify = FORMATS[path.suffix]
    try:
        with whole_file(path) as temporary:
            versions = write(model, temporary, dict(about or {}))
            checks = verify(model, temporary)
            content = temporary.read_bytes()
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from error
    except OSError as error:
        raise ExportError(f"{path}: cannot be written: {error.strerror or error}") from error
    return Artefact(path, hashlib.sha256(content).hexdigest(), len(content), checks, versions)


# ---- weights -----------------------------------------------------------------------------------------------------


def _write_weights(model: models.Model, path: Path, about: dict[str, str]) -> dict[str, str]:
    save_model(model, path)
    return {}


def verify_weights(model: models.Model, path: Path) -> dict[str, Any]:
    """Reads the file back and compares architecture, hyper-parameters and every bit of every parameter.

    Raises:
      ExportError: if anything differs.
    """
    back = load_weights(path, arch=model.arch).model
    bits = [[np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)] for params in (model.params, back.params)]
    if (back.arch, back.hparams) != (model.arch, model.hparams) or bits[0] != bits[1]:
        raise ExportError("the written file reads back as a different model; nothing was kept")
    return {"read_back": "identical, bit for bit"}


# ---- ONNX --------------------------------------------------------------------------------------------------------


def _write_onnx(model: models.Model, path: Path, about: dict[str, str]) -> dict[str, str]:
    try:
        import onnx
        import onnxruntime

        from kdjax.export.onnx_file import OPSET, onnx_model
    except ImportError as error:
        raise ExportError(
            f"ONNX needs the packages onnx and onnxruntime ({error}): pip install 'kdjax[onnx]'"
        ) from error
    path.write_bytes(onnx_model(model, _any_inputs(model), about).SerializeToString(deterministic=True))
    return {"opset": str(OPSET), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def verify_onnx(model: models.Model, path: Path) -> dict[str, Any]:
    """Checks the file against the ONNX specification and runs it in ONNX Runtime, on the CPU.

    Raises:
      ExportError: if it cannot be run or differs from the model.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(x: np.ndarray, *sigma: np.ndarray) -> np.ndarray:
            inputs = dict(
                zip(
                    ("input", "sigma"),
                    (x.transpose(0, 3, 1, 2), *(s.reshape(-1, 1, 1, 1) for s in sigma)),
                    strict=False,
                )
            )
            (output,) = session.run(["output"], inputs)
            return np.asarray(output).transpose(0, 2, 3, 1)

        return _compare(model, run)
    except ExportError:
        raise
    except Exception as error:  # one of a dozen classes with no common base
        raise ExportError(f"ONNX Runtime cannot run it: {error}") from error


# ---- StableHLO ---------------------------------------------------------------------------------------------------


def _write_stablehlo(model: models.Model, path: Path, about: dict[str, str]) -> dict[str, str]:
    apply = model.network.make_apply()

    def restore(*inputs: jax.Array) -> jax.Array:
        return apply(model.params, *inputs)[0]

    inputs = _any_inputs(model)
    before = jax.config.jax_traceback_in_locations_limit  # ty: ignore[missing-attribute]
    jax.config.update("jax_traceback_in_locations_limit", 0)  # keeps local source paths out of the file
    try:
        exported = export.export(jax.jit(restore), platforms=PLATFORMS)(*inputs)
        path.write_bytes(exported.serialize())
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
    return {"jax": jax.__version__, "calling_convention": str(exported.calling_convention_version)}


def verify_stablehlo(model: models.Model, path: Path) -> dict[str, Any]:
    """Reads the file back and calls it, on the CPU.

    Raises:
      ExportError: if it differs from the model.
    """
    return _compare(model, export.deserialize(bytearray(path.read_bytes())).call)


# ---- shared ------------------------------------------------------------------------------------------------------


def _any_inputs(model: models.Model) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns an NHWC image of symbolic batch, height and width, and sigma (batch,) if the model is told it.

    Raises:
      ExportError: if the network cannot be traced with them.
    """
    sizes = export.symbolic_shape("b, h, w")
    image = jax.ShapeDtypeStruct((*sizes, model.network.channels), jnp.float32)
    inputs = (image, jax.ShapeDtypeStruct(sizes[:1], jnp.float32)) if model.network.takes_sigma else (image,)
    try:
        jax.eval_shape(model.network.make_apply(), model.params, *inputs)
    except Exception as error:  # a user's network may raise anything for a symbolic size
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ExportError(f"the network cannot be traced for all sizes of image at once: {reason}") from error
    return inputs


def _compare(model: models.Model, run: Callable[..., Any]) -> dict[str, Any]:
    """Compares `run` with the model on images of CHECKED_SIZES, both on the CPU in float32."""
    rng = np.random.default_rng(0)
    differences, bound = [], BOUND
    with jax.default_device(jax.devices("cpu")[0]):
        for batch, height, width in CHECKED_SIZES:
            image = rng.random((batch, height, width, model.network.channels), np.float32)
            sigma = [rng.uniform(5, 50, batch).astype(np.float32)] if model.network.takes_sigma else []
            wanted = np.asarray(model(jnp.asarray(image), *map(jnp.asarray, sigma))[0])
            found = np.asarray(run(image, *sigma))
            if found.shape != wanted.shape:
                raise ExportError(
                    f"for an image of shape {image.shape} it returns {found.shape}, the model {wanted.shape}"
                )
            differences.append(float(np.abs(found - wanted).max()))
            bound = max(bound, BOUND * float(np.abs(wanted).max()))
    if not max(differences) <= bound:  # also catches nan
        raise ExportError(
            f"it differs from the model by up to {max(differences):.3g}, more than {bound:.3g}; nothing was kept"
        )
    return {
        "sizes": [list(size) for size in CHECKED_SIZES],
        "largest_differences": differences,
        "bound": bound,
    }


FORMATS: dict[str, tuple[Callable[..., dict[str, str]], Callable[..., dict[str, Any]]]] = {
    ".pth": (_write_weights, verify_weights),
    ".safetensors": (_write_weights, verify_weights),
    ".stablehlo": (_write_stablehlo, verify_stablehlo),
    ".onnx": (_write_onnx, verify_onnx),
}
