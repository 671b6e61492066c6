"""ONNX rules for JAX operations: primitives, and the functions of `kdjax.ops`, which trace as one named call.

A rule takes the graph, the equation and the values of its inputs, adds nodes and returns the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx

from kdjax.export.onnx_graph import NCHW, Constant, Graph, Rule, Size, Tensor, UnsupportedOperation, Value

# ---- primitives --------------------------------------------------------------------------------------------------


def _elementwise(operator: str) -> Rule:
    """Returns the rule of an operator on arrays of equal or broadcastable shapes."""

    def rule(graph: Graph, equation: Any, *inputs: Value) -> Tensor:
        axes = next((value.axes for value in inputs if isinstance(value, Tensor)), None)
        if axes is None:
            raise UnsupportedOperation(f"{equation.primitive.name!r} with the size of the image is not supported")
        return Tensor(graph.node(operator, *(graph.operand(value, axes) for value in inputs)), axes)

    return rule


def _max(graph: Graph, equation: Any, x: Value, y: Value) -> Tensor:
    for value, other in ((x, y), (y, x)):
        if isinstance(other, Constant) and other.array.ndim == 0 and other.array == 0:
            return _elementwise("Relu")(graph, equation, value)
    return _elementwise("Max")(graph, equation, x, y)


def _square(graph: Graph, equation: Any, x: Value) -> Tensor:
    return _elementwise("Mul")(graph, equation, x, x)


def _integer_pow(graph: Graph, equation: Any, x: Value) -> Tensor:
    power = equation.params["y"]
    if power == 2:
        return _square(graph, equation, x)
    return _elementwise("Pow")(graph, equation, x, Constant(np.array(power, np.float32)))


def _rsqrt(graph: Graph, equation: Any, x: Value) -> Tensor:
    return _elementwise("Reciprocal")(graph, equation, _elementwise("Sqrt")(graph, equation, x))


def _not_equal(graph: Graph, equation: Any, x: Value, y: Value) -> Tensor:
    return _elementwise("Not")(graph, equation, _elementwise("Equal")(graph, equation, x, y))


def _log1p(graph: Graph, equation: Any, x: Value) -> Tensor:
    return _elementwise("Log")(
        graph, equation, _elementwise("Add")(graph, equation, x, Constant(np.array(1, np.float32)))
    )


def _select_n(graph: Graph, equation: Any, which: Value, if_false: Value, if_true: Value) -> Tensor:
    return _elementwise("Where")(graph, equation, which, if_true, if_false)


def _clamp(graph: Graph, equation: Any, low: Value, x: Value, high: Value) -> Tensor:
    return _elementwise("Min")(graph, equation, _elementwise("Max")(graph, equation, x, low), high)


def _as_it_is(graph: Graph, equation: Any, x: Value) -> Value:
    return x


def _convert(graph: Graph, equation: Any, x: Value) -> Value:
    wanted, given = equation.params["new_dtype"], equation.invars[0].aval.dtype
    if wanted != jnp.float32:
        raise UnsupportedOperation(f"a conversion from {given} to {wanted} is not supported")
    if given == jnp.float32 or not isinstance(x, Tensor):
        return x
    return Tensor(graph.node("Cast", graph.operand(x, x.axes), to=onnx.TensorProto.FLOAT), x.axes)


def _dim_as_value(graph: Graph, equation: Any) -> Size:
    return Size(equation.params["dim"])


def _conv(graph: Graph, equation: Any, x: Value, kernel: Value) -> Tensor:
    params, f = equation.params, x.unshuffle if isinstance(x, Tensor) else 1
    lhs, rhs, out = params["dimension_numbers"]
    if not (isinstance(x, Tensor) and isinstance(kernel, Constant) and kernel.array.ndim == 4):
        raise UnsupportedOperation("a convolution is supported with a kernel of weights and over two dimensions only")
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
        raise UnsupportedOperation("transposed convolutions are not supported; use a convolution and ops.pixel_shuffle")
    if tuple(x.axes[axis] for axis in lhs) != (0, 1, 2, 3):
        raise UnsupportedOperation("a convolution over other axes than height and width is not supported")
    if not all(isinstance(pad, int) for pair in params["padding"] for pad in pair):
        raise UnsupportedOperation("padding that depends on the size of the image is not supported; give it as numbers")
    weight = kernel.array.transpose(rhs)  # OIHW
    strides, pads = np.array(params["window_strides"]), np.array(params["padding"]).T.reshape(-1)
    if f > 1:
        # A k x k convolution of the unshuffled image is a kf x kf convolution of the image with stride f, at equal
        # cost.
        if params["feature_group_count"] != 1 or set(params["rhs_dilation"]) != {1}:
            raise UnsupportedOperation("pixel_unshuffle in front of a grouped or dilated convolution is not supported")
        o, i, k, m = weight.shape
        weight = weight.reshape(o, i // f**2, f, f, k, m).transpose(0, 1, 4, 2, 5, 3)  # o, c, k, row, m, column
        weight = weight.reshape(o, i // f**2, k * f, m * f)
        strides, pads = strides * f, pads * f
    name = graph.node(
        "Conv",
        x.name,
        graph.initializer(weight, kernel.name.removesuffix("kernel") + "weight" if kernel.name else ""),
        kernel_shape=weight.shape[2:],
        strides=strides.tolist(),
        pads=pads.tolist(),
        dilations=params["rhs_dilation"],
        group=params["feature_group_count"],
    )
    return Tensor(name, tuple(int(axis) for axis in np.argsort(out)))


def _dot(graph: Graph, equation: Any, x: Value, kernel: Value) -> Tensor:
    (contracted, batch) = equation.params["dimension_numbers"]
    fits = isinstance(x, Tensor) and isinstance(kernel, Constant) and kernel.array.ndim == 2
    if not fits or batch != ((), ()) or len(contracted[0]) != 1 or x.axes[contracted[0][0]] != 1:
        raise UnsupportedOperation("a product is supported of the channels of an image and a matrix of weights only")
    weight = kernel.array if contracted[1][0] == 1 else kernel.array.T
    name = graph.node("Conv", graph.operand(x, x.axes), graph.initializer(weight[:, :, None, None], kernel.name))
    return Tensor(name, (*(axis for axis in x.axes if axis != 1), 1))


def _reduce(operator: str, *, axes_are_input: bool = False) -> Rule:
    def rule(graph: Graph, equation: Any, x: Tensor) -> Tensor:
        reduced = [x.axes[axis] for axis in equation.params["axes"]]
        name = graph.operand(x, x.axes)
        if axes_are_input:
            name = graph.node(operator, name, graph.initializer(np.array(reduced, np.int64)), keepdims=1)
        else:
            name = graph.node(operator, name, axes=reduced, keepdims=1)
        return Tensor(name, tuple(axis for axis in x.axes if axis not in reduced))

    return rule


def _broadcast(graph: Graph, equation: Any, x: Value, *_: Value) -> Tensor:
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    old = [1] * len(shape)
    for place, size in zip(places, equation.invars[0].aval.shape, strict=True):
        old[place] = size
    if isinstance(x, Tensor):
        axes: list[int | None] = [None] * len(shape)
        for place, axis in zip(places, x.axes, strict=True):
            axes[place] = axis
        result = Tensor(graph.operand(x, x.axes), _placed(axes))
    elif len(shape) == 4:
        result = Tensor(graph.operand(Constant(x.array.reshape(old)) if isinstance(x, Constant) else x, NCHW))
    else:
        raise UnsupportedOperation(f"a broadcast of a constant to {shape} is not supported")
    if tuple(old) == tuple(shape):
        return result
    sizes = [shape[result.axes.index(i)] if i in result.axes else 1 for i in range(4)]
    name = graph.node("Expand", result.name, graph.node("Concat", *map(graph.size, sizes), axis=0))
    return Tensor(name, result.axes)


def _reshape(graph: Graph, equation: Any, x: Tensor, *_: Value) -> Tensor:
    """Adds or removes axes of size 1; no other reshape is supported."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        raise UnsupportedOperation(
            f"a reshape from {old} to {new} is not supported; to rearrange pixels, use the functions of kdjax.ops"
        )
    kept = iter([axis for axis, size in zip(x.axes, old, strict=True) if size != 1])
    return Tensor(graph.operand(x, x.axes), _placed([None if size == 1 else next(kept) for size in new]))


def _placed(axes: Sequence[int | None]) -> tuple[int, ...]:
    """Returns where the axes of an array are; new axes take the places of an image's, or the free ones in order."""
    if len(axes) > 4:
        raise UnsupportedOperation(f"arrays of {len(axes)} axes are not supported")
    if len(axes) == 4 and all(axis in (None, place) for axis, place in zip(axes, NCHW, strict=True)):
        return NCHW
    free = iter(sorted(set(range(4)) - set(axes)))
    return tuple(next(free) if axis is None else axis for axis in axes)


def _transpose(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    return Tensor(graph.operand(x, x.axes), tuple(x.axes[axis] for axis in equation.params["permutation"]))


def _concatenate(graph: Graph, equation: Any, *inputs: Value) -> Tensor:
    axes = next(value.axes for value in inputs if isinstance(value, Tensor))
    names = [graph.operand(value, axes) for value in inputs]
    return Tensor(graph.node("Concat", *names, axis=axes[equation.params["dimension"]]), axes)


def _split(graph: Graph, equation: Any, x: Tensor) -> list[Value]:
    sizes = np.array(equation.params["sizes"], np.int64)
    outputs = [graph.new_name("Split") for _ in sizes]
    axis = x.axes[equation.params["axis"]]
    graph.split_node("Split", graph.operand(x, x.axes), graph.initializer(sizes), outputs=outputs, axis=axis)
    return [Tensor(name, x.axes) for name in outputs]


def _slice(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    params = equation.params
    strides = params["strides"] or [1] * len(x.axes)
    return _cut(graph, equation, x, params["start_indices"], params["limit_indices"], strides)


def _gather(graph: Graph, equation: Any, x: Value, indices: Value) -> Tensor:
    """Handles x[:, :h] with symbolic h: a slice of a given size from constant start indices."""
    params = equation.params
    numbers = params["dimension_numbers"]
    if (
        not (isinstance(x, Tensor) and isinstance(indices, Constant))
        or indices.array.ndim != 1
        or numbers.collapsed_slice_dims
    ):
        raise UnsupportedOperation("indexing is supported with constant slices only")
    starts = np.zeros(len(x.axes), int)
    starts[list(numbers.start_index_map)] = indices.array
    limits = [int(start) + size for start, size in zip(starts, params["slice_sizes"], strict=True)]
    return _cut(graph, equation, x, starts.tolist(), limits, [1] * len(x.axes))


def _cut(graph: Graph, equation: Any, x: Tensor, starts: Sequence, limits: Sequence, strides: Sequence) -> Tensor:
    sizes = equation.invars[0].aval.shape
    cuts = list(zip(x.axes, starts, limits, strides, strict=True))
    cuts = [cut for cut, size in zip(cuts, sizes, strict=True) if cut[1:] != (0, size, 1)]
    name = graph.operand(x, x.axes)
    if cuts:
        axes, starts, limits, strides = zip(*cuts, strict=True)
        ints = lambda values: graph.initializer(np.array(values, np.int64))  # noqa: E731
        ends = graph.node("Concat", *map(graph.size, limits), axis=0)
        name = graph.node("Slice", name, ints(starts), ends, ints(axes), ints(strides))
    return Tensor(name, x.axes)


def _pad(graph: Graph, equation: Any, x: Value, fill: Value) -> Tensor:
    config = equation.params["padding_config"]
    if not (isinstance(x, Tensor) and isinstance(fill, Constant)) or any(inner for _, _, inner in config):
        raise UnsupportedOperation("padding is supported around an image and with a constant only")
    sides = [(0, 0)] * 4
    for axis, (low, high, _) in zip(x.axes, config, strict=True):
        sides[axis] = (low, high)
    pads = graph.node("Concat", *(graph.size(side[end]) for end in (0, 1) for side in sides), axis=0)
    return Tensor(graph.node("Pad", graph.operand(x, x.axes), pads, graph.initializer(fill.array)), x.axes)


PRIMITIVES: dict[str, Rule] = {
    **{name: _elementwise(operator) for name, operator in {
        "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "min": "Min", "pow": "Pow", "neg": "Neg", "abs": "Abs",
        "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "tanh": "Tanh",
        "logistic": "Sigmoid", "erf": "Erf", "sin": "Sin", "cos": "Cos", "ge": "GreaterOrEqual", "gt": "Greater",
        "le": "LessOrEqual", "lt": "Less", "eq": "Equal", "and": "And", "or": "Or", "not": "Not",
    }.items()},
    "max": _max, "square": _square, "integer_pow": _integer_pow, "rsqrt": _rsqrt, "ne": _not_equal, "log1p": _log1p,
    "select_n": _select_n, "clamp": _clamp, "copy": _as_it_is,
    "convert_element_type": _convert, "dim_as_value": _dim_as_value,
    "conv_general_dilated": _conv, "dot_general": _dot,
    "reduce_sum": _reduce("ReduceSum", axes_are_input=True), "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "broadcast_in_dim": _broadcast, "reshape": _reshape, "squeeze": _reshape,
    "transpose": _transpose, "concatenate": _concatenate, "split": _split, "slice": _slice, "gather": _gather,
    "pad": _pad,
}  # fmt: skip


# ---- functions ---------------------------------------------------------------------------------------------------


def _channels(atom: Any) -> int:
    return atom.aval.shape[3]


def _factor(equation: Any) -> int:
    """Returns the upscaling factor."""
    return int(equation.outvars[0].aval.shape[1] // equation.invars[0].aval.shape[1])


def _pixel_shuffle(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    factor = math.isqrt(_channels(equation.invars[0]) // _channels(equation.outvars[0]))
    name = graph.operand(x, NCHW)
    return Tensor(graph.node("DepthToSpace", name, blocksize=factor, mode="CRD") if factor > 1 else name)


def _pixel_unshuffle(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    factor = math.isqrt(_channels(equation.outvars[0]) // _channels(equation.invars[0]))
    return Tensor(graph.operand(x, NCHW), NCHW, factor, _channels(equation.invars[0]))


def _upsample_nearest(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    return _resize(
        graph, equation, x, mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"
    )


def _upsample_bilinear(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    return _resize(graph, equation, x, mode="linear", coordinate_transformation_mode="half_pixel")


def _resize(graph: Graph, equation: Any, x: Tensor, **how: str) -> Tensor:
    factor = _factor(equation)
    name = graph.operand(x, NCHW)
    scales = graph.initializer(np.array([1, 1, factor, factor], np.float32))
    return Tensor(graph.node("Resize", name, "", scales, **how) if factor > 1 else name)


def _pad_to_multiple(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    """Gathers pixels, as in `ops`: ONNX's padding modes cannot reflect an image smaller than its border."""

    def index(position: str, size: Any) -> str:
        period = graph.node("Max", graph.size(2 * (size - 1)), graph.size(1))
        position = graph.node("Mod", position, period)
        return graph.node("Min", position, graph.node("Sub", period, position))

    return _padded(graph, equation, x, index)


def _repeat_to_multiple(graph: Graph, equation: Any, x: Tensor) -> Tensor:
    return _padded(graph, equation, x, lambda position, size: graph.node("Min", position, graph.size(size - 1)))


def _padded(graph: Graph, equation: Any, x: Tensor, index: Callable[[str, Any], str]) -> Tensor:
    """Pads at the bottom and right; `index(position, size)` is where a pixel at each position comes from."""
    name = graph.operand(x, NCHW)
    scalar = lambda number: graph.initializer(np.array(number, np.int64))  # noqa: E731
    for axis in (1, 2):
        size, padded = (atom.aval.shape[axis] for atom in (equation.invars[0], equation.outvars[0]))
        if size != padded:
            positions = graph.node("Range", scalar(0), graph.node("Squeeze", graph.size(padded)), scalar(1))
            name = graph.node("Gather", name, index(positions, size), axis=NCHW[axis])
    return Tensor(name)


def _leaky_relu(graph: Graph, equation: Any, x: Tensor, slope: Constant) -> Tensor:
    return Tensor(graph.node("LeakyRelu", graph.operand(x, x.axes), alpha=float(slope.array)), x.axes)


def _prelu(graph: Graph, equation: Any, x: Tensor, slope: Constant) -> Tensor:
    slopes = graph.initializer(slope.array.reshape(-1, 1, 1), slope.name)
    return Tensor(graph.node("PRelu", graph.operand(x, NCHW), slopes))


FUNCTIONS: dict[str, Rule] = {
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "upsample_nearest": _upsample_nearest,
    "upsample_bilinear": _upsample_bilinear,
    "pad_to_multiple": _pad_to_multiple,
    "repeat_to_multiple": _repeat_to_multiple,
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
}
