"""Teachers that other programs run: an ONNX file (ONNX Runtime), or any network that spandrel reads (PyTorch).

JAX calls them from within its compiled programs, on the host. That is slow, so such a teacher answers once, into a
cache (`python -m kdjax.cache`); training from the cache needs neither program.
"""

from __future__ import annotations

import abc
import atexit
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import sharding
from kdjax.config import ConfigError
from kdjax.data import Cache
from kdjax.data.cache import FEATURE
from kdjax.models import Apply, Params
from kdjax.names import brief, nearest
from kdjax.teacher import spandrel_worker

_PROBE = 64  # side of the image that tells the scale of an ONNX file


def backend_of(weights: str, chosen: str) -> str:
    """Returns the program that runs a teacher: "onnx", "spandrel", or "" for kdjax itself."""
    return chosen or ("onnx" if Path(weights).suffix.lower() == ".onnx" else "")


class Backend(abc.ABC):
    """A network that another program runs.

    Attributes:
      path: its file.
      features: the names of the features it returns.
      about: what it is, in words.
      channels, scale: of its images.
      takes_sigma: whether it is told the noise level.
    """

    takes_sigma = False

    def __init__(self, path: str, features: Sequence[str]) -> None:
        self.path, self.features = path, tuple(features)
        self.about, self.channels, self.scale = "", 3, 1
        self._lock = threading.Lock()  # JAX calls from a thread for each device

    @abc.abstractmethod
    def _run(self, images: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
        """Returns the output and the features for a batch (b, h, w, c); all of them (b, h, w, c)."""

    def run(self, images: Any, sigma: Any) -> list[np.ndarray]:
        """Runs the network on a batch (b, h, w, c) of floats in [0, 1], with noise of sigma (b,) on the 0..255 scale.

        Raises:
          ConfigError: it fails.
        """
        with self._lock:
            return [
                np.ascontiguousarray(array, np.float32) for array in self._run(np.asarray(images), np.asarray(sigma))
            ]

    def _sizes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """Returns the shapes (h, w, c) of the output and the features for one image."""
        if not self.features:
            return [(height * self.scale, width * self.scale, self.channels)]
        images = np.zeros((1, height, width, self.channels), np.float32)
        return [array.shape[1:] for array in self.run(images, np.zeros(1, np.float32))]

    def make_apply(self) -> Apply:
        """Returns it as `apply(params, x, sigma)`, without parameters; gradients do not pass."""

        def apply(
            params: Params, x: jax.Array, sigma: jax.Array | float | None = None
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            sizes = self._sizes(*x.shape[1:3])
            levels = jnp.broadcast_to(jnp.asarray(0 if sigma is None else sigma, jnp.float32), x.shape[:1])

            def call(x: jax.Array, levels: jax.Array) -> list[jax.Array]:
                shapes = [jax.ShapeDtypeStruct((x.shape[0], *size), jnp.float32) for size in sizes]
                return jax.pure_callback(self.run, shapes, x, levels)

            output, *features = sharding.per_sample(call, jax.lax.stop_gradient(x), levels)
            return output, dict(zip(self.features, features, strict=True))

        return apply


class Onnx(Backend):
    """An ONNX file with one image as its input, NCHW, and possibly a second input `sigma`."""

    def __init__(self, path: str, features: Sequence[str]) -> None:
        super().__init__(path, features)
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise ConfigError(
                f"config.teacher.weights={path!r} needs the packages onnx and onnxruntime ({error}): pip install"
                " 'kdjax[onnx]'"
            ) from error
        try:
            proto = onnx.load(path)
            known = {name for node in proto.graph.node for name in node.output}
            if unknown := [name for name in self.features if name not in known]:
                raise ConfigError(
                    f"config.teacher.features: {path} has no tensor {unknown[0]!r}{nearest(unknown[0], known)}"
                )
            proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.features)
            self._session = onnxruntime.InferenceSession(proto.SerializeToString())
        except ConfigError:
            raise
        except Exception as error:  # one of a dozen classes with no common base
            raise ConfigError(f"config.teacher.weights={path!r} cannot be read: {brief(str(error), 300)}") from error
        image, *others = self._session.get_inputs()
        if len(image.shape) != 4 or [other.name for other in others] not in ([], ["sigma"]):
            shapes = ", ".join(f"{one.name} {one.shape}" for one in self._session.get_inputs())
            raise ConfigError(
                f"{path} takes {shapes}; wanted one image (batch, channels, height, width), and `sigma` if needed"
            )
        self._image, self.takes_sigma = image.name, bool(others)
        self._output = self._session.get_outputs()[0].name
        self.channels = image.shape[1] if isinstance(image.shape[1], int) else 3
        self.about = "ONNX Runtime"
        probe = self.run(np.zeros((1, _PROBE, _PROBE, self.channels), np.float32), np.zeros(1, np.float32))[0]
        self.scale = probe.shape[1] // _PROBE

    def _run(self, images: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
        inputs = {self._image: images.transpose(0, 3, 1, 2)}
        if self.takes_sigma:
            inputs["sigma"] = sigma.reshape(-1, 1, 1, 1)
        try:
            arrays = list(map(np.asarray, self._session.run([self._output, *self.features], inputs)))
        except Exception as error:
            raise ConfigError(
                f"{self.path} cannot run on images of {images.shape}: {brief(str(error), 300)}"
            ) from error
        if wrong := [n for n, array in zip(("", *self.features), arrays, strict=True) if array.ndim != 4]:
            raise ConfigError(f"config.teacher.features: the tensor {wrong[0]!r} of {self.path} is not (b, c, h, w)")
        return [array.transpose(0, 2, 3, 1) for array in arrays]


class Spandrel(Backend):
    """A network of spandrel, in a process of its own."""

    def __init__(self, path: str, features: Sequence[str]) -> None:
        super().__init__(path, features)
        if importlib.util.find_spec("spandrel") is None:
            raise ConfigError(
                "config.teacher.backend='spandrel' needs the packages spandrel and torch: pip install 'kdjax[spandrel]'"
            )
        self._process = subprocess.Popen(
            [sys.executable, spandrel_worker.__file__, path, *features], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        atexit.register(self._process.kill)
        kind, _ = self._receive()
        self.channels, self.scale = kind["channels"], kind["scale"]
        self.about = f"spandrel's {kind['arch']}"

    def _run(self, images: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
        try:
            assert self._process.stdin is not None
            spandrel_worker.send(self._process.stdin, {}, [images])
        except OSError as error:
            raise ConfigError(f"{self.path}: the process that runs it has ended: {error}") from error
        return self._receive()[1]

    def _receive(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            assert self._process.stdout is not None
            about, arrays = spandrel_worker.receive(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise ConfigError(f"{self.path}: the process that runs it has ended with code {code}") from None
        if "error" in about:
            raise ConfigError(f"{self.path}, run by spandrel: {about['error']}")
        return about, arrays


class Cached(Backend):
    """A network whose answers are in a cache; it is not run."""

    def __init__(self, path: str, cache: Cache) -> None:
        super().__init__(path, cache.features)
        self.about = "its answers are in the cache"
        self.channels, self.scale = (cache.settings["student"][what] for what in ("channels", "scale"))
        self._shapes = {field.name.removeprefix(FEATURE): field.shape for field in cache.fields}

    def _sizes(self, height: int, width: int) -> list[tuple[int, ...]]:
        return [self._shapes[name] for name in ("output", *self.features)]

    def _run(self, images: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
        raise ConfigError(f"{self.path} is not run, since config.teacher.cache is set")


class Folder(Backend):
    """Images that some program, or a person, has made of a run's degraded images."""

    def __init__(self, path: str, *, channels: int, scale: int) -> None:
        super().__init__(path, ())
        self.about, self.channels, self.scale = "images that were made of the degraded ones", channels, scale

    @property
    def identity(self) -> str:
        """A digest of the names and sizes of its files."""
        files = sorted(file for file in Path(self.path).rglob("*") if file.is_file())
        listing = "\n".join(f"{file.relative_to(self.path)} {file.stat().st_size}" for file in files)
        return f"{len(files)} files (names and sizes {hashlib.sha256(os.fsencode(listing)).hexdigest()[:16]})"

    def _run(self, images: np.ndarray, sigma: np.ndarray) -> list[np.ndarray]:
        raise ConfigError(f"{self.path} has images, and no network that could be run on others")


def open_backend(path: str, backend: str, features: Sequence[str], cache: Cache | None) -> Backend:
    """Opens a foreign teacher.

    Raises:
      ConfigError: it cannot be read or run; the message says what to do.
    """
    if not Path(path).is_file():
        raise ConfigError(f"config.teacher.weights={path!r} is not a file")
    if cache:
        return Cached(path, cache)
    return {"onnx": Onnx, "spandrel": Spandrel}[backend](path, features)
