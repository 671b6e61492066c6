"""Runs a trained model on images of any size: equal tiles, on all devices, blended where they overlap.

    restored = restore_image("student.pth", photograph)             # uint8 in, uint8 out
    restorer = Restorer(model, tile=256, tile_pad=16)               # for many images
    for top, rows in restorer.bands(np.memmap(...)): ...            # for images larger than memory

The network sees windows of tile + 2 x tile_pad pixels a side: a tile and its surroundings. The outer tile_pad pixels of
its output are discarded, because there the network could not see that the image goes on. Tiles overlap by a few pixels
and are cross-faded there. The outermost windows end at the image border, so the network pads there as it would for a
whole image. A side of the image that fits into one window is not split.

If tile_pad covers the receptive field, the result equals that of the whole image up to float rounding. Deep networks
reach further, but with little weight. Measured 2026-11-25 in float32 on two CPU cores: PSNR in dB between the tiled and
the whole-image output, both unclipped, and the largest difference in 8-bit levels:

    tile / tile_pad                  128/8     128/16    128/32    256/8     256/16    256/32
    embedded RRDBNet 64x2, x1        59  5.7   65  5.7   82  0.7   66  5.7   74  2.7   91  0.3
    KAIR's DnCNN of depth 20, x1     75  1.1   101 0.1   163 0.0   84  0.6   109 0.0   168 0.0
    RealESRGAN_x4plus_anime_6B, x4   51  37    57  26    74  2.1   65  9.8   69  3.5   91  0.4

The first two rows use the embedded astronaut, 512x512, with noise of sigma 25; the last uses 200x321 pixels of CBSD68's
101085. A network as deep as the last needs tile_pad=32. On a large image the network processes ((tile + 2 tile_pad) /
(tile - 8))^2 times as many pixels: 1.35 with 256/16, 1.66 with 256/32, 1.78 with 128/16.

NAFNet is different: its blocks average over everything they see, so no tile_pad makes tiles match the whole image.
Which of the two is closer to what it learned depends on its training crops; the published weights saw 256 pixels (Chu
et al., 2022, "Improving image restoration by revisiting global information aggregation", arXiv:2112.04491).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import models, ops, sharding
from kdjax.models.ensemble import self_ensemble
from kdjax.noise_level import estimate_sigma
from kdjax.weights import load_model

FEATHER = 8  # input pixels over which neighbouring tiles cross-fade, rounded up to the model's multiple
_LARGEST_FLOAT = 16.0  # for images meant to be in [0, 1]: noise reaches 2 or 3, an image in [0, 255] exceeds this

_ESTIMATED_SIDE = 1024  # pixels a side, for estimating the noise level

Told = Callable[[int, int], None]  # called with (tiles done, tiles in total)


class Restorer:
    """A model ready for images of any size; its weights stay on the devices.

    The first image of at least tile + 2 x tile_pad pixels a side compiles the model for all larger ones. Shorter sides
    compile once per size.

    Attributes:
      scale: output pixels per input pixel, along each side.
      channels: of the images it takes: 3 for RGB, 1 for grey.
      takes_sigma: whether the model is told the noise level.

    Args:
      tile: side of a tile in input pixels; 0 runs the whole image at once, compiling once per size.
      tile_pad: context on each side of a tile, in input pixels. tile and tile_pad are rounded up to the multiple the
        model pads image sides to (`kdjax.models.Network.multiple`).
      x8: averages over the eight flips and quarter turns of every tile, at eight times the cost
        (`kdjax.models.ensemble.self_ensemble`).
      dtype: of weights and activations; images stay float32.
      devices: by default, those of this process.
      tiles_per_device: tiles per device and batch.

    Raises:
      ValueError: if tile, tile_pad or tiles_per_device is out of range.
    """

    def __init__(
        self,
        model: models.Model,
        *,
        tile: int = 256,
        tile_pad: int = 16,
        x8: bool = False,
        dtype: jnp.dtype = jnp.float32,
        devices: Sequence[jax.Device] | None = None,
        tiles_per_device: int = 1,
    ) -> None:
        sizes = {"tile": (tile, 0), "tile_pad": (tile_pad, 0), "tiles_per_device": (tiles_per_device, 1)}
        for name, (value, least) in sizes.items():
            if not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        self.scale, self.channels = model.network.scale, model.network.channels
        self.takes_sigma = model.network.takes_sigma
        self._multiple = model.network.multiple
        self._pad_mode: Any = model.network.pad_mode
        self._tile, self._tile_pad = (ops.round_up(int(size), self._multiple) for size in (tile, tile_pad))
        self._step = _compiled_step(model.network, x8, jnp.dtype(dtype))
        devices = list(jax.local_devices() if devices is None else devices)
        every, first = sharding.data_mesh(devices), sharding.data_mesh(devices[:1])
        params = sharding.replicate(model.params, every)
        self._every, self._first = (every, params), (first, sharding.replicate(params, first))  # share memory
        self._tiles_per_device = int(tiles_per_device)

    def __call__(self, image: np.ndarray, sigma: float | None = None, *, progress: Told | None = None) -> np.ndarray:
        """Restores one image.

        Args:
          image: (h, w, channels): float in about [0, 1], or uint8 or uint16, which are divided by 255 or 65535.
          sigma: the standard deviation of its noise on the scale of 0 to 255, for models that are told it
            (`kdjax.models.Network.takes_sigma`); for them, None estimates it (`kdjax.noise_level`).
          progress: called after each batch with the number of tiles done and the total.

        Returns:
          float32 (h x scale, w x scale, channels), not clipped.

        Raises:
          ValueError: if the image has another shape or dtype, or contains nan or inf.
        """
        output = np.empty((0, 0, 0), np.float32)  # width and channels are set by the first rows
        for top, rows in self.bands(image, sigma, progress=progress):
            if not output.size:
                output = np.empty((image.shape[0] * self.scale, *rows.shape[1:]), np.float32)
            output[top : top + len(rows)] = rows
        return output

    def bands(
        self, image: np.ndarray, sigma: float | None = None, *, progress: Told | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Restores one image from top to bottom, holding at most two rows of tiles.

        Args:
          image: as for `__call__`; anything with a shape, a dtype and slicing, such as np.memmap. It is read in
            windows.
          sigma: as for `__call__`.
          progress: as for `__call__`.

        Returns:
          An iterator over (top, rows): the finished output rows from `top` on, float32 (n, w x scale, channels), not
          clipped. In order, they make up the whole image.

        Raises:
          ValueError: as for `__call__`; nan and inf only when the iterator reaches them.
        """
        self._check(image)
        if sigma is None and self.takes_sigma:
            sigma = _estimated(image)
        return self._bands(image, np.float32(sigma or 0), progress)

    def _bands(self, image: np.ndarray, sigma: np.float32, progress: Told | None) -> Iterator[tuple[int, np.ndarray]]:
        height, width = (self._divide(size) for size in image.shape[:2])
        outputs = self._run(image, sigma, height, width, progress)
        scale, unfinished = self.scale, np.zeros((0, 0, 0), np.float32)
        for i, top in enumerate(height.starts):
            band = np.zeros((0, 0, 0), np.float32)
            for j, left in enumerate(width.starts):
                output = next(outputs)
                if not band.size:
                    columns = width.starts[-1] + width.window
                    band = np.zeros((height.window * scale, columns * scale, output.shape[-1]), np.float32)
                weights = height.weights[i][:, None, None] * width.weights[j][:, None]
                band[:, left * scale : (left + width.window) * scale] += weights * output
            if unfinished.size:
                band[: len(unfinished)] += unfinished
            end = image.shape[0] if i + 1 == len(height.starts) else height.starts[i + 1]
            finished = (end - top) * scale
            yield top * scale, band[:finished, : image.shape[1] * scale]
            unfinished = band[finished:]

    def _run(
        self, image: np.ndarray, sigma: np.float32, height: _Side, width: _Side, progress: Told | None
    ) -> Iterator[np.ndarray]:
        """Yields the model's outputs for the windows, one row of windows at a time."""
        places = list(itertools.product(height.starts, width.starts))
        dispatched = self._dispatch(image, sigma, places, (height.window, width.window))
        done = 0
        # pairwise asks for the next batch before yielding this one, so the host cuts tiles while the devices compute.
        for batch, _ in itertools.pairwise(itertools.chain(dispatched, [None])):
            assert batch is not None  # only the last one is None, and it is never first in a pair
            output, count = batch
            tiles = np.asarray(output)[:count]
            if not np.isfinite(tiles).all():  # these would turn into white or black pixels
                raise ValueError("the model returns nan or inf for this image; if it ran in bfloat16, try float32")
            done += count
            if progress:
                progress(done, len(places))
            yield from tiles

    def _dispatch(
        self, image: np.ndarray, sigma: np.float32, places: Sequence[tuple[int, int]], window: tuple[int, int]
    ) -> Iterator[tuple[jax.Array, int]]:
        """Yields batches of outputs, possibly still being computed, with the number of windows in each."""
        alone = len(places) == 1  # more devices would only repeat the work
        mesh, params = self._first if alone else self._every
        batch_size = 1 if alone else mesh.size * self._tiles_per_device
        for first in range(0, len(places), batch_size):
            chunk = places[first : first + batch_size]
            batch = np.zeros((batch_size, *window, self.channels), np.float32)  # the last batch is padded with black
            for position, place in enumerate(chunk):
                batch[position] = self._cut(image, place, window)
            output = self._step(params, jax.device_put(batch, sharding.split_batch(mesh)), sigma)
            if output.shape[1:3] != (window[0] * self.scale, window[1] * self.scale):
                raise ValueError(
                    f"the model returned {output.shape[1]}x{output.shape[2]} for {window[0]}x{window[1]} pixels, wanted"
                    f" {self.scale}x; is the network's hyper-parameter scale or upscale right?"
                )
            yield output, len(chunk)

    def _check(self, image: np.ndarray) -> None:
        shape = tuple(image.shape)
        if len(shape) != 3 or shape[2] != self.channels or 0 in shape:
            raise ValueError(f"the image has the shape {shape}; this model takes (height, width, {self.channels})")
        if _largest_value(image.dtype) is None:
            raise ValueError(f"the image is {image.dtype}; wanted uint8, uint16, or float in [0, 1]")

    def _cut(self, image: np.ndarray, place: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
        """Returns one window as float32, padded beyond the image border as the model itself pads."""
        top, left = place
        pixels = np.asarray(image[top : top + window[0], left : left + window[1]])
        pixels = pixels.astype(np.float32) / np.float32(_largest_value(pixels.dtype))
        if not np.isfinite(pixels).all():
            row, column, _ = np.argwhere(~np.isfinite(pixels))[0]
            raise ValueError(f"the image has nan or inf at row {top + row}, column {left + column}; replace them first")
        missing = [(0, size - there) for size, there in zip(window, pixels.shape, strict=False)]
        return np.pad(pixels, [*missing, (0, 0)], mode=self._pad_mode)

    def _divide(self, size: int) -> _Side:
        """Splits `size` input pixels into windows."""
        window = self._tile + 2 * self._tile_pad
        if self._tile == 0 or size <= window:
            return _Side(size, (0,), np.ones((1, size * self.scale), np.float32))
        # Keep the overlap a multiple and at most half a tile, so that the stride is at least the other half.
        overlap = min(ops.round_up(FEATHER, self._multiple), self._tile // 2 // self._multiple * self._multiple)
        padded = ops.round_up(size, self._multiple)
        starts = (*range(0, padded - window, self._tile - overlap), padded - window)
        inside = (np.arange(window * self.scale) + 1) / self.scale
        rise = np.clip((inside - self._tile_pad) / (overlap + 1 / self.scale), 0, 1)
        weights = np.tile(np.minimum(rise, rise[::-1]), (len(starts), 1))
        # The image border has no neighbour to fade into.
        weights[0] = rise[::-1]
        weights[-1] = rise
        total = np.zeros(padded * self.scale)
        parts = [slice(start * self.scale, (start + window) * self.scale) for start in starts]
        for part, weight in zip(parts, weights, strict=True):
            total[part] += weight
        shares = [weight / total[part] for part, weight in zip(parts, weights, strict=True)]
        return _Side(window, starts, np.array(shares, np.float32))


def _estimated(image: np.ndarray) -> float:
    """Returns the noise level of an image, estimated from its centre."""
    top, left = (max(0, size - _ESTIMATED_SIDE) // 2 for size in image.shape[:2])
    return estimate_sigma(np.asarray(image[top : top + _ESTIMATED_SIDE, left : left + _ESTIMATED_SIDE]))


class _Side(NamedTuple):
    """How one side of an image is split: windows of `window` pixels, at `starts`.

    `weights` (windows, window x scale) is the blending weight of each output pixel in a window; they sum to 1.
    """

    window: int
    starts: tuple[int, ...]
    weights: np.ndarray


def restore_image(
    model: models.Model | str | os.PathLike[str],
    image: np.ndarray,
    *,
    tile: int = 256,
    tile_pad: int = 16,
    x8: bool = False,
    dtype: jnp.dtype = jnp.float32,
    sigma: float | None = None,
    strength: float = 1.0,
    progress: Told | None = None,
) -> np.ndarray:
    """Restores an image array and returns the same kind of array.

    Arguments not listed here are those of `Restorer`, which is the better choice for many images.

    Examples:
      >>> noisy = np.random.default_rng(0).normal(128, 25, (24, 32, 3)).astype(np.uint8)  # a grey wall
      >>> restored = restore_image("embedded", noisy)
      >>> restored.shape, restored.dtype, bool(restored.std() < noisy.std() / 4)
      ((24, 32, 3), dtype('uint8'), True)

    Args:
      model: a model, a weight file that `kdjax.load_model` reads, or the name of a model in the package: "fast" or
        "embedded".
      image: (h, w) grey, or (h, w, c) with c of 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha); uint8,
        uint16, or float in about [0, 1].
      sigma: as for `Restorer.__call__`.
      strength: 1 for the restored image, 0 for the image as it is, or a blend of both; for models that do not enlarge.

    Returns:
      The image at h x scale, w x scale pixels, with the dtype and number of dimensions of `image`. Integers are clipped
      and rounded; floats are neither. An RGB model gets a grey image repeated three times, and its output channels
      are averaged; a grey model restores each colour separately. Alpha is kept, and enlarged bilinearly if scale > 1.

    Raises:
      ValueError: if the image has another shape or dtype, contains nan, inf or floats far outside [0, 1], or if the
        model returns nan or inf.
      WeightsError: if the file cannot be read.
    """
    if not isinstance(model, models.Model):
        model = load_model(model)
    restorer = Restorer(model, tile=tile, tile_pad=tile_pad, x8=x8, dtype=dtype)
    if not 0 <= strength <= 1 or (strength != 1 and restorer.scale > 1):
        raise ValueError(
            f"strength={strength:g}: wanted a number from 0 to 1, and 1 for a model that enlarges: it blends the image"
            " with the restored one"
        )
    image = np.asarray(image)
    planes = image[..., None] if image.ndim == 2 else image
    if planes.ndim != 3 or planes.shape[2] not in (1, 2, 3, 4) or 0 in planes.shape:
        raise ValueError(f"the image has the shape {image.shape}; wanted (h, w), or (h, w, c) with c from 1 to 4")
    if image.dtype.kind == "f" and np.max(np.abs(image)) > _LARGEST_FLOAT:
        raise ValueError(
            f"the image is {image.dtype} with values up to {np.max(np.abs(image)):g}; wanted [0, 1]: scale it, or give"
            " uint8 or uint16"
        )
    number = planes.shape[2] - (planes.shape[2] in (2, 4))  # colours, without alpha
    inputs = _as_channels(planes[..., :number], restorer.channels)
    height, width = (size * restorer.scale for size in planes.shape[:2])
    restored = np.empty((height, width, planes.shape[2]), image.dtype)
    for i, colours in enumerate(inputs):
        into = slice(i, i + 1) if len(inputs) > 1 else slice(number)
        told = progress and (lambda done, total, i=i: progress(i * total + done, len(inputs) * total))
        for top, rows in restorer.bands(colours, sigma, progress=told):
            rows = rows.mean(2, keepdims=True) if number == 1 else rows
            if strength != 1:
                before = planes[top : top + len(rows), :, into]
                rows = before / np.float32(_largest_value(image.dtype)) * np.float32(1 - strength) + strength * rows
            restored[top : top + len(rows), :, into] = _as_dtype(rows, image.dtype)
    if number < planes.shape[2]:
        alpha = planes[..., number:]
        if restorer.scale > 1:
            largest = np.float32(_largest_value(image.dtype))
            enlarged = jax.image.resize(alpha.astype(np.float32) / largest, (height, width, 1), "bilinear")
            alpha = _as_dtype(np.asarray(enlarged), image.dtype)
        restored[..., number:] = alpha
    return restored[..., 0] if image.ndim == 2 else restored


def _as_channels(colours: np.ndarray, channels: int) -> list[np.ndarray]:
    """Converts a grey or RGB image (h, w, c) to one image of `channels` channels, or to one per colour."""
    number = colours.shape[2]
    if number == channels:
        return [colours]
    if channels == 1:
        return [colours[..., i : i + 1] for i in range(number)]
    if number == 1:
        return [np.broadcast_to(colours, (*colours.shape[:2], channels))]
    raise ValueError(f"the image has {number} colours, but the model takes {channels} channels")


def _largest_value(dtype: np.dtype) -> int | None:
    """Returns the value that stands for 1.0 in images of this dtype; None if images cannot have it."""
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return np.iinfo(dtype).max
    return 1 if dtype.kind == "f" else None


def _as_dtype(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Converts a float image to an image dtype; integers are clipped and rounded."""
    if dtype.kind == "f":
        return image.astype(dtype)
    return np.round(np.clip(image, 0, 1) * np.float32(_largest_value(dtype))).astype(dtype)


@functools.lru_cache(maxsize=32)
def _compiled_step(
    network: models.Network, x8: bool, dtype: jnp.dtype
) -> Callable[[models.Params, jax.Array, np.float32], jax.Array]:
    """Returns the model as a jitted function of parameters, images and sigma, shared by all its Restorers."""
    apply = network.make_apply(dtype=dtype)
    if x8:
        apply = self_ensemble(apply)
    return jax.jit(lambda params, x, sigma: apply(params, x, sigma)[0])
