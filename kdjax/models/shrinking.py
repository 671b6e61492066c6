"""Fits a smaller network to a larger one of the same architecture in a single pass, layer by layer, in closed form.

The student runs on a few images. Every layer that differs from the teacher's, or that comes after one, is fitted by
least squares: its inputs are what the student has computed so far, its targets what the teacher's layer makes of the
same images. So a layer makes up for what earlier ones have lost.

Three things can be smaller. *Ranks*: a convolution becomes two (`LowRankConv`). *Width*: of inner channels, those are
kept from which the others are best predicted, and the layers that read them are fitted to do so; a residual stream
keeps its leading principal axes, where it is linear. *Depth*: of residual blocks those are dropped that the output
misses least, and the last convolution of the block before takes over what they add; of a plain stack, layers at equal
distances stay.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from kdjax.models import MODELS, Model, Network, network, regression
from kdjax.models.layers import Conv, LowRankConv, PReLU, Run, intercept
from kdjax.models.model import Shrink, params_of
from kdjax.models.regression import Kernel
from kdjax.names import pick

Sigma = jax.Array | float | None

_PIXELS = 100_000  # of images: 170 times the inputs of a 3x3 convolution of 64 channels
_BYTES = 1 << 30  # of what the teacher computes from them
_DAMAGE_IMAGES, _DAMAGE_SIDE = 2, 32  # images, and their side, on which dropped blocks are tried


def check(teacher: Model, hparams: Mapping[str, Any]) -> Network:
    """Returns the network with these hyper-parameters, after checking that the teacher can be shrunk to it.

    Raises:
      ValueError: the architecture cannot be shrunk, a size exceeds the teacher's, or something else differs.
    """
    shrink = structure_of(teacher)
    student = network(teacher.arch, hparams)
    for name, value in student.hparams.items():
        ours = teacher.hparams[name]
        if name in shrink.inputs and ours and not value:
            continue
        if name not in shrink.sizes and value != ours:
            raise ValueError(
                f"a shrunk network can differ from its teacher in {', '.join(shrink.sizes)} only: {name}={value} is not"
                f" {ours}"
            )
        if name in shrink.sizes and name != "ranks" and not _is_within(value, ours):
            raise ValueError(f"a shrunk network cannot be larger: {name}={value}, the teacher has {ours}")
    return student


def _is_within(value: Any, limit: Any) -> bool:
    if not isinstance(limit, tuple):
        return value <= limit
    return len(value) == len(limit) and all(map(_is_within, value, limit))


def structure_of(teacher: Model) -> Shrink:
    """Returns how the teacher's architecture can be shrunk.

    Raises:
      ValueError: it cannot.
    """
    return pick(
        {name: known.shrink for name, known in MODELS.items() if known.shrink}, teacher.arch, "architecture to shrink"
    )


def num_images(teacher: Model, side: int) -> int:
    """Returns how many images of side x side pixels `fit` should have: of enough pixels, and within its memory."""
    image = jax.ShapeDtypeStruct((1, side, side, teacher.network.channels), jnp.float32)
    outputs = jax.eval_shape(lambda image: trace(teacher, image, 0.0).outputs, image)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(outputs))
    return max(1, min(_PIXELS // side**2, _BYTES // size))


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a model computes from some images, by module path.

    Attributes:
      outputs: of its convolutions and of its blocks.
      weights: of its convolutions (kernel and bias, or those of the two of a `LowRankConv`) and PReLUs.
    """

    outputs: dict[str, jax.Array]
    weights: dict[str, Any]


def trace(model: Model, images: jax.Array, sigma: Sigma = None) -> Trace:
    """Runs the model on images (b, h, w, c) in [0, 1] with noise of sigma, layer by layer."""
    module = model.network.bind(model.params)
    paths = _paths(module)
    blocks = structure_of(model).blocks
    found = Trace({}, {})

    def record(layer: nnx.Module, x: jax.Array, run: Run) -> jax.Array:
        path, y = paths[id(layer)], run(x)
        if isinstance(layer, Conv | LowRankConv | PReLU):
            found.weights[path] = layer
        if isinstance(layer, Conv | LowRankConv) or _block(path, blocks):
            found.outputs[path] = y
        return y

    with intercept(record):
        module(model.network.module_input(images, sigma))
    return found


def fit(
    teacher: Model,
    student: Network,
    images: jax.Array,
    sigma: Sigma = None,
    *,
    blocks: Mapping[str, Sequence[int]] | None = None,
    known: Trace | None = None,
) -> Model:
    """Returns the student with weights that make it approximate the teacher on images (b, h, w, c) in [0, 1].

    Args:
      student: from `check`. It may be blind where the teacher is told the noise level.
      sigma: of the images' noise, on the scale of 0 to 255: a number or (b,), for networks that are told it.
      blocks: the numbers of the teacher's blocks to keep, ascending, by the list they are in, as in
        {"body": (0, 2)}; default: from `choose_blocks`.
      known: the teacher's `trace` of these images, if it is at hand.
    """
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), student.abstract_params)
    module = student.bind(zeros)
    structure = structure_of(teacher)
    if structure.blocks and not blocks:
        blocks = choose_blocks(teacher, images, _counts(dict(_named(module)), structure.blocks), sigma)
    fitting = _Fitting(structure, known or trace(teacher, images, sigma), module, blocks or {})
    fitting.copy_scales(teacher.network.bind(teacher.params))
    with intercept(fitting.layer):
        module(student.module_input(images, sigma))
    return Model(student, jax.tree.map(np.asarray, params_of(module)))


def choose_blocks(
    teacher: Model, images: jax.Array, counts: Mapping[str, int], sigma: Sigma = None
) -> dict[str, tuple[int, ...]]:
    """Returns the numbers of the teacher's blocks to keep, ascending, by the list they are in.

    One after another, that block is dropped without which the output changes least, on a few of the images.

    Args:
      counts: how many to keep, by list; one that is missing loses all.
      sigma: as for `fit`.
    """
    side = min(_DAMAGE_SIDE, *images.shape[1:3])
    images = images[:_DAMAGE_IMAGES, :side, :side]
    sigma = sigma[: len(images)] if isinstance(sigma, jax.Array) and sigma.ndim else sigma
    inputs = teacher.network.module_input(images, sigma)
    module = teacher.network.bind(teacher.params)
    paths, blocks = _paths(module), structure_of(teacher).blocks
    kept = {(name, i) for name, count in _counts(paths.values(), blocks).items() for i in range(count)}
    every, wanted = kept.copy(), teacher(images, sigma)[0]

    def damage(dropped: set[tuple[str, int]]) -> float:
        def skip(layer: nnx.Module, x: jax.Array, run: Run) -> jax.Array:
            y = run(x)
            if _block(paths[id(layer)], blocks) not in dropped:
                return y
            # The best multiple of its input, by channel: an RRDB whose branches do nothing makes 1.2 x.
            return x * (x * y).sum((0, 1, 2)) / jnp.maximum((x * x).sum((0, 1, 2)), 1e-12)

        with intercept(skip):
            return float(jnp.mean((module(inputs)[0] - wanted) ** 2))

    def surplus() -> list[tuple[str, int]]:
        """Returns the blocks of lists that still have more than they are to keep, in order."""
        numbers = Counter(name for name, _ in kept)
        return sorted((name, i) for name, i in kept if numbers[name] > counts.get(name, 0))

    while candidates := surplus():
        kept.remove(min(candidates, key=lambda block: damage(every - kept | {block})))
    return {name: tuple(sorted(i for of, i in kept if of == name)) for name, _ in sorted(every)}


class _Fitting:
    """The state of one pass over a student's layers, in the order in which they run."""

    def __init__(
        self, structure: Shrink, teacher: Trace, module: nnx.Module, blocks: Mapping[str, Sequence[int]]
    ) -> None:
        self._structure, self._teacher = structure, teacher
        self._modules = dict(_named(module))
        self._paths = {id(layer): path for path, layer in self._modules.items()}
        self._has_changed = False  # whether the student has computed anything else than the teacher so far
        self._num_blocks = _counts(teacher.outputs, structure.blocks)
        self._kept = self._which_blocks(blocks)
        self._trunk: np.ndarray | None = None
        self._channels: np.ndarray | None = None  # the teacher's channels that the last convolution made
        self._forced: jax.Array | None = None  # what a block's last convolution is to return
        self._last: tuple[jax.Array, jax.Array] | None = None  # inputs and outputs of a block's last convolution

    def copy_scales(self, teacher: nnx.Module) -> None:
        """Takes over what is neither a convolution's nor a PReLU's: normalisations, and the scales of branches."""
        theirs = dict(_named(teacher))
        for path, layer in self._modules.items():
            own = {name: value for name, value in vars(layer).items() if isinstance(value, nnx.Param)}
            if own and not isinstance(layer, Conv | PReLU):
                for name, value in own.items():
                    value[...] = getattr(theirs[self._source(path)], name)[...]

    def layer(self, layer: nnx.Module, x: jax.Array, run: Run) -> jax.Array:
        path = self._paths[id(layer)]
        if isinstance(layer, PReLU):
            return self._prelu(layer, path, x, run)
        if isinstance(layer, Conv | LowRankConv):
            return self._convolution(layer, path, x, run)
        place = _block(path, self._structure.blocks)
        return self._block(layer, path, *place, x, run) if place else run(x)

    def _prelu(self, layer: PReLU, path: str, x: jax.Array, run: Run) -> jax.Array:
        slopes = self._teacher.weights[self._source(path)].weight[...]
        layer.weight[...] = slopes if self._channels is None else slopes[self._channels]
        return run(x)

    def _convolution(self, layer: Conv | LowRankConv, path: str, x: jax.Array, run: Run) -> jax.Array:
        if self._is_last_of_block(path) and self._forced is not None:
            return self._forced
        if self._forced is not None:
            return run(x)
        source = self._source(path)
        target, theirs = self._teacher.outputs[source], self._teacher.weights[source]
        is_same = isinstance(layer, LowRankConv) == isinstance(theirs, LowRankConv) and all(
            ours.shape == other.shape
            for ours, other in zip(jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(nnx.state(theirs)), strict=True)
        )
        target = self._in_basis(target, path, _num_outputs(layer))
        is_kept = is_same and self._follows(path)
        if is_kept:
            nnx.update(layer, nnx.state(theirs))
        # Of a block, the last convolution makes up for all.
        may_adapt = not _within(path, self._structure.blocks) and _can_be_fitted(layer)
        if not is_kept or (self._has_changed and may_adapt):
            self._has_changed = True
            self._fit(layer, x, target, has_prior=is_kept)
        y = run(x)
        if self._is_last_of_block(path):
            self._last = x, y
        return y

    def _block(self, block: nnx.Module, path: str, name: str, number: int, x: jax.Array, run: Run) -> jax.Array:
        """Runs a block; if something has changed, its last convolution makes up for it, and for the blocks left out."""
        numbers = self._kept[name]
        kept, end = numbers[number], (*numbers, self._num_blocks[name])[number + 1] - 1
        self._has_changed |= kept != end or (number == 0 and kept > 0)
        y = run(x)
        if not self._has_changed:
            return y
        target = self._teacher.outputs[f"{name}.{end}"]
        target = self._in_basis(target, path, x.shape[-1])
        assert self._last is not None
        inputs, outputs = self._last
        # y = what the block adds up without its last convolution + gain x outputs; the gain is found by trying.
        self._forced = outputs + 1
        gain = (run(x) - y).mean((0, 1, 2))
        self._forced = None
        layer = self._modules[f"{path}.{self._structure.writer}"]
        missing = jnp.where(jnp.abs(gain) > 1e-6, (target - y) / gain, 0)  # a channel may be scaled by 0
        self._fit(layer, inputs, outputs + missing, has_prior=True)
        self._forced = layer(inputs)
        y = run(x)
        self._forced = None
        return y

    def _fit(self, layer: Any, x: jax.Array, target: jax.Array, *, has_prior: bool) -> None:
        if isinstance(layer, LowRankConv):
            first, second = getattr(layer, "0"), getattr(layer, "1")
            kernel, (mix, bias) = regression.fit_low_rank(x, target, 3, first.kernel.shape[-1])
            first.kernel[...], second.kernel[...], second.bias[...] = map(jnp.asarray, (kernel, mix, bias))
            return
        if not _can_be_fitted(layer):
            raise ValueError(f"{type(layer).__name__} with strides, with groups or without a bias cannot be fitted")
        prior = Kernel(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) if has_prior else None
        fitted = regression.fit(x, target, layer.kernel.shape[0], prior)
        layer.kernel[...], layer.bias[...] = jnp.asarray(fitted.kernel), jnp.asarray(fitted.bias)

    # ---- which layer of the teacher, and in which channels -----------------------------------------------------

    def _source(self, path: str) -> str:
        """Returns the path of the teacher's layer that this one stands for."""
        number = _number(path, self._structure.stack)
        if number is not None:
            index, is_activation = divmod(number, 2)
            return f"{self._structure.stack}.{2 * self._stack()[index] + is_activation}"
        if within := _within(path, self._structure.blocks):
            name, number, rest = within
            return f"{name}.{self._kept[name][number]}{rest}"
        return path

    def _follows(self, path: str) -> bool:
        """Whether the layer reads what the teacher's layer reads: false after layers of a stack that were left out."""
        number = _number(path, self._structure.stack)
        if not number:
            return True
        stack = self._stack()
        return stack[number // 2] == stack[number // 2 - 1] + 1

    def _stack(self) -> list[int]:
        """Returns the numbers of a stack's convolutions that are kept: the ends, and others at equal distances."""
        ours, theirs = (
            max(number for path in paths if (number := _number(path, self._structure.stack)) is not None) // 2
            for paths in (self._modules, self._teacher.outputs)
        )
        return [round(i * theirs / ours) for i in range(ours + 1)]

    def _which_blocks(self, blocks: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        counts = _counts(self._modules, self._structure.blocks)
        for name, theirs in self._num_blocks.items():
            count, kept = counts.get(name, 0), [*blocks.get(name, ())]
            if not count:
                raise ValueError(f"of the {theirs} blocks of {name}, at least one must stay")
            if len(kept) != count or sorted({*kept}) != kept or not 0 <= kept[0] <= kept[-1] < theirs:
                raise ValueError(
                    f"blocks[{name!r}]={kept} must be {count} different numbers from 0 to {theirs - 1}, ascending"
                )
        return {name: [*blocks[name]] for name in self._num_blocks}

    def _is_last_of_block(self, path: str) -> bool:
        within = _within(path, self._structure.blocks)
        return within is not None and within[2] == f".{self._structure.writer}"

    def _in_basis(self, target: jax.Array, path: str, count: int) -> jax.Array:
        """Returns the teacher's outputs in the student's channels, of which there are `count`."""
        is_trunk = bool(re.fullmatch(self._structure.trunk, path) or _block(path, self._structure.blocks))
        if not is_trunk:
            self._channels = None
        if count == target.shape[-1]:
            return target
        if is_trunk:
            if self._trunk is None:
                self._trunk = self._axes_of_trunk(count)
            return target @ self._trunk
        if re.fullmatch(self._structure.shuffled, path):
            return target[..., _best_shuffled(target, count, self._modules[path].kernel.shape[2])]
        self._channels = regression.best_channels(jax.nn.relu(target), count)
        return target[..., self._channels]

    def _axes_of_trunk(self, count: int) -> np.ndarray:
        """Returns (c, count): the student's channels of the residual stream in terms of the teacher's."""
        stream = [y for name, y in self._teacher.outputs.items() if self._writes_stream(name)]
        if self._structure.is_linear:
            return regression.principal_axes(stream, count)
        blocks = [y for name, y in self._teacher.outputs.items() if _block(name, self._structure.blocks)]
        return np.eye(blocks[0].shape[-1], dtype=np.float32)[
            :, regression.best_channels(jnp.concatenate(blocks), count)
        ]

    def _writes_stream(self, name: str) -> bool:
        """Whether an output of the teacher is the stream itself, or outside of blocks is added to it."""
        if within := _within(name, self._structure.blocks):
            return not within[2]
        return bool(re.fullmatch(self._structure.trunk, name))


def _best_shuffled(outputs: jax.Array, count: int, num_feat: int) -> np.ndarray:
    """Returns which of a convolution's channels to keep, so that `num_feat` channels are left after a pixel shuffle."""
    each = count // num_feat  # neighbours that a pixel becomes; a channel's are next to each other
    batch, height, width, channels = outputs.shape
    image = outputs.reshape(batch, height, width, channels // each, each).swapaxes(3, 4)
    kept = regression.best_channels(image.reshape(batch, height, width * each, -1), num_feat)
    return (kept[:, None] * each + np.arange(each)).ravel()


def _num_outputs(layer: Conv | LowRankConv) -> int:
    return (getattr(layer, "1") if isinstance(layer, LowRankConv) else layer).kernel.shape[-1]


def _named(module: nnx.Module) -> Iterable[tuple[str, Any]]:
    for path, node in nnx.iter_graph(module):
        if isinstance(node, nnx.Module):
            yield ".".join(map(str, path)), node


def _paths(module: nnx.Module) -> dict[int, str]:
    return {id(layer): path for path, layer in _named(module)}


def _can_be_fitted(layer: Conv | LowRankConv) -> bool:
    is_plain = isinstance(layer, Conv) and layer.strides in (1, (1, 1)) and layer.feature_group_count == 1
    return isinstance(layer, LowRankConv) or (is_plain and layer.bias is not None)


def _number(path: str, stack: str) -> int | None:
    """Returns N of the path `stack.N`; None for other paths."""
    match = re.fullmatch(rf"{re.escape(stack)}\.([0-9]+)", path) if stack else None
    return int(match[1]) if match else None


def _within(path: str, blocks: str) -> tuple[str, int, str] | None:
    """Returns the list, the number and the rest (".conv2", or "") of the path of a block or of a part of it."""
    match = re.fullmatch(rf"(?P<list>{blocks})\.(?P<number>[0-9]+)(?P<rest>(\..+)?)", path) if blocks else None
    return (match["list"], int(match["number"]), match["rest"]) if match else None


def _block(path: str, blocks: str) -> tuple[str, int] | None:
    """Returns the list and the number of a block; None for other paths."""
    within = _within(path, blocks)
    return within[:2] if within and not within[2] else None


def _counts(paths: Iterable[str], blocks: str) -> dict[str, int]:
    """Returns the number of blocks in each list."""
    return dict(Counter(name for name, _ in filter(None, (_block(path, blocks) for path in paths))))


class _Ranked(NamedTuple):
    """A convolution that can have a rank: its cost with one rank and in full, and what part each rank explains."""

    step: int
    full: int
    spectrum: np.ndarray


def spread_ranks(teacher: Model, known: Trace, hparams: Mapping[str, Any], part: float) -> tuple[int, ...]:
    """Returns ranks for the convolutions of a network with these hyper-parameters, which cost `part` of full ones.

    The first and the last convolution of a stack stay full, and so does the last one of a block. The others get ranks
    in steps of 4, where a step explains most of what the teacher's convolutions compute, for what it costs.
    """
    convolutions = _ranked(teacher, known, hparams)
    layers = {i: layer for i, layer in enumerate(convolutions) if layer}
    ranks = dict.fromkeys(layers, 4)
    left = sum(part * layer.full - 4 * layer.step for layer in layers.values())

    def gain(i: int) -> float:
        layer, rank = layers[i], ranks[i]
        return float(layer.spectrum[rank : rank + 4].sum()) / layer.step if rank * layer.step < layer.full else 0.0

    while layers and gain(best := max(layers, key=gain)) > 0 and left >= 4 * layers[best].step:
        ranks[best] += 4
        left -= 4 * layers[best].step
    worth = {i: rank for i, rank in ranks.items() if rank * layers[i].step < layers[i].full}
    return tuple(worth.get(i, 0) for i in range(len(convolutions)))


def _ranked(teacher: Model, known: Trace, hparams: Mapping[str, Any]) -> list[_Ranked | None]:
    """Returns the convolutions in the order of `ranks`; None for those that stay full."""
    structure, params = structure_of(teacher), network(teacher.arch, {**hparams, "ranks": ()}).abstract_params
    shapes = {path: leaf.shape for path, leaf in flatten_dict(params, sep=".").items()}
    if structure.stack:
        ours = [path for i in range(len(shapes)) if f"{(path := f'{structure.stack}.{2 * i}')}.kernel" in shapes]
        last = max(number for path in known.outputs if (number := _number(path, structure.stack)) is not None) // 2
        sources = [[f"{structure.stack}.{2 * round(i * last / (len(ours) - 1))}"] for i in range(len(ours))]
        stay = {ours[0], ours[-1]}
    else:
        ours = [f"{structure.blocks}.0.{name}" for name in structure.ranked]
        blocks = range(_counts(known.outputs, structure.blocks)[structure.blocks])
        sources = [[f"{structure.blocks}.{block}.{name}" for block in blocks] for name in structure.ranked]
        stay = {f"{structure.blocks}.0.{structure.writer}"}

    def layer(path: str, sources: Sequence[str]) -> _Ranked:
        *_, num_in, num_out = shapes[f"{path}.kernel"]
        spectra = [regression.explained(known.outputs[source])[:num_out] for source in sources]
        explained = np.mean([spectrum / max(spectrum.sum(), 1e-30) for spectrum in spectra], axis=0)
        return _Ranked(9 * num_in + num_out, 9 * num_in * num_out, explained)

    return [None if path in stay else layer(path, of) for path, of in zip(ours, sources, strict=True)]
