"""Builds an ONNX graph from a jaxpr: its nodes and constants, and the walk through the equations.

The caller passes the rules that translate primitives and named functions (`kdjax.export.onnx_rules`). Every other call
is inlined, and whatever depends only on the weights is evaluated immediately.

A JAX array of any rank is a four-dimensional ONNX tensor, with size 1 for the axes it lacks, plus a record of where
each axis went. So transposing, or adding an axis of size 1, costs no operator.
"""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

SYMBOLS = {"b": 0, "h": 2, "w": 3}  # the symbolic sizes of the trace, and their axes in NCHW
NCHW = (0, 2, 3, 1)  # where the axes of an NHWC array are
CALLS = {
    "jit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat2",
    "checkpoint",
}  # primitives that hold one jaxpr


class UnsupportedOperation(ValueError):
    """The network uses an operation without a rule; the message names it."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in the graph.

    Attributes:
      name: of the four-dimensional ONNX tensor.
      axes: axes[i] is the tensor axis that holds axis i of the JAX array.
      unshuffle: factor of an `ops.pixel_unshuffle` still to be applied to the tensor; a convolution absorbs it.
      channels: of the tensor, where there is such a factor.
    """

    name: str
    axes: tuple[int, ...] = NCHW
    unshuffle: int = 1
    channels: int = 0


@dataclasses.dataclass(frozen=True)
class Constant:
    """A known array: a parameter (then it has a name), or computed from parameters."""

    array: np.ndarray
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Size:
    """A number that depends on the image size."""

    dim: Any


Value = Tensor | Constant | Size
Rule = Callable[..., Any]  # (graph, equation, *inputs) -> the result or the list of results


class Graph:
    """The nodes so far, and methods to add more.

    Args:
      primitives: rules by name of a JAX primitive.
      functions: rules by name of a jitted function whose arguments after the first are known.
    """

    def __init__(self, primitives: Mapping[str, Rule], functions: Mapping[str, Rule]) -> None:
        self._primitives, self._functions = primitives, functions
        self.nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, np.ndarray] = {}
        self._known: dict[tuple[Any, ...], str] = {}
        self._sizes: dict[str, str] = {}
        self._count: Counter[str] = Counter()

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        return self.split_node(operator, *inputs, outputs=[output or self.new_name(operator)], **attributes)[0]

    def split_node(self, operator: str, *inputs: str, outputs: list[str], **attributes: Any) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        self.nodes.append(onnx.helper.make_node(operator, inputs, outputs, outputs[0], **attributes))
        return outputs

    def initializer(self, array: np.ndarray, name: str = "") -> str:
        """Returns the name of a constant; equal constants share one."""
        array = np.ascontiguousarray(array)
        key = (array.dtype.str, array.shape, array.tobytes(), name)
        if key not in self._known:
            taken = not name or name in self._initializers
            self._known[key] = self.new_name(name or "constant") if taken else name
            self._initializers[self._known[key]] = array
        return self._known[key]

    def size(self, dim: Any) -> str:
        """Returns the name of a one-element int64 tensor for a traced dimension, an expression in b, h and w."""
        return self._evaluate(ast.parse(str(dim).strip(), mode="eval").body)

    def operand(self, value: Value, axes: tuple[int, ...]) -> str:
        """Returns the name of a value as a tensor with the array's axes at `axes`; missing axes broadcast."""
        if isinstance(value, Size):
            return self.node("Cast", self.size(value.dim), to=onnx.TensorProto.FLOAT)
        if isinstance(value, Constant):
            if value.array.ndim == 0:
                return self.initializer(value.array)
            shape = [1, 1, 1, 1]
            for size, axis in zip(value.array.shape, axes[-value.array.ndim :], strict=True):
                shape[axis] = size
            order = np.argsort(axes[-value.array.ndim :])
            return self.initializer(value.array.transpose(order).reshape(shape), value.name)
        if value.axes != axes:
            raise UnsupportedOperation(f"arrays with their axes at {value.axes} and {axes} of NCHW meet")
        return self._unshuffled(value) if value.unshuffle > 1 else value.name

    def _unshuffled(self, value: Tensor) -> str:
        """Moves pixels into channels, with a convolution: ONNX's SpaceToDepth orders the channels differently."""
        f, channels = value.unshuffle, value.channels
        kernel = np.eye(channels * f * f, dtype=np.float32).reshape(-1, channels, f, f)
        return self.node("Conv", value.name, self.initializer(kernel), kernel_shape=[f, f], strides=[f, f])

    def run(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """Adds the nodes of a jaxpr and returns its results."""
        known: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {var: Constant(np.asarray(const)) for var, const in zip(jaxpr.constvars, consts, strict=True)}

        def read(atom: Any) -> Value:
            return Constant(np.asarray(atom.val)) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            results = self._translate(equation, [read(atom) for atom in equation.invars])
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def merge_biases(self) -> None:
        """Turns a constant added to a convolution's result into its bias."""
        uses = Counter(name for node in self.nodes for name in node.input)
        convolutions = {node.output[0]: node for node in self.nodes if node.op_type == "Conv" and len(node.input) == 2}
        kept = []
        for node in self.nodes:
            found = next((name for name in node.input if name in convolutions), None)
            if node.op_type == "Add" and found and uses[found] == 1:
                (bias,) = [name for name in node.input if name != found]
                channels = self._initializers[convolutions[found].input[1]].shape[0]
                array = self._initializers.get(bias)
                if array is not None and array.shape == (1, channels, 1, 1) and uses[bias] == 1:
                    self._initializers[bias] = array.reshape(-1)
                    convolutions[found].input.append(bias)
                    convolutions[found].output[0] = node.output[0]
                    continue
            kept.append(node)
        self.nodes = kept

    def used_initializers(self) -> list[onnx.TensorProto]:
        """Returns the constants that the nodes read."""
        used = {name for node in self.nodes for name in node.input}
        return [onnx.numpy_helper.from_array(array, name) for name, array in self._initializers.items() if name in used]

    def new_name(self, word: str) -> str:
        """Returns a name that no tensor has yet."""
        self._count[word] += 1
        return f"{word}_{self._count[word]}"

    def _translate(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            rest_is_constant = all(isinstance(value, Constant) for value in inputs[1:])
            rule = self._functions.get(params.get("name", ""))
            if rule and isinstance(inputs[0], Tensor) and rest_is_constant:
                return [rule(self, equation, *inputs)]
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        sizes = [size for atom in equation.outvars for size in atom.aval.shape]
        known = [value for value in inputs if isinstance(value, Constant)]
        if known and len(known) == len(inputs) and all(type(size) is int for size in sizes):
            results = equation.primitive.bind(*(value.array for value in known), **params)
            results = results if equation.primitive.multiple_results else [results]
            name = known[0].name if len(known) == 1 else ""  # a reshaped parameter
            return [Constant(np.asarray(result), name) for result in results]
        if name == "scan":
            return self._unroll(equation, inputs)
        if name not in self._primitives:
            raise UnsupportedOperation(f"there is no rule for the JAX operation {name!r}")
        result = self._primitives[name](self, equation, *inputs)
        return result if isinstance(result, list) else [result]

    def _unroll(self, equation: Any, inputs: list[Value]) -> list[Value]:
        """Unrolls a loop over known arrays; its results are those of the last iteration."""
        body, length = equation.params["jaxpr"], equation.params["length"]
        # The inputs are constants, then the state, then what each iteration takes a slice of. The shapes tell how many
        # of each there are: how a scan stores that differs between JAX versions.
        longer = lambda atom, aval: len(atom.aval.shape) > len(aval.shape)  # noqa: E731
        sliced = sum(map(longer, equation.invars, body.in_avals))
        stacked = any(map(longer, equation.outvars, body.out_avals))
        carried = len(inputs) - sliced
        constants = carried - len(equation.outvars)
        known = [value for value in inputs[carried:] if isinstance(value, Constant)]
        if stacked or len(known) < sliced or equation.params["reverse"]:
            raise UnsupportedOperation("a scan is supported forwards over weights, and without a result of each step")
        state = inputs[constants:carried]
        for i in range(length):
            given = [Constant(value.array[i]) for value in known]
            state = self.run(body.jaxpr, body.consts, [*inputs[:constants], *state, *given])
        return state

    def _evaluate(self, expression: ast.expr) -> str:
        text = ast.unparse(expression)
        if text not in self._sizes:
            match expression:
                case ast.Constant(int(number)):
                    found = self.initializer(np.array([number], np.int64))
                case ast.Name(name):
                    axis = SYMBOLS[name]
                    found = self.node("Shape", "input", start=axis, end=axis + 1)
                case ast.UnaryOp(ast.USub(), operand):
                    found = self.node("Neg", self._evaluate(operand))
                case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() as operator, right):
                    word = "Add" if isinstance(operator, ast.Add) else "Sub" if isinstance(operator, ast.Sub) else "Mul"
                    found = self.node(word, self._evaluate(left), self._evaluate(right))
                case ast.Call(ast.Name("mod"), [left, right]):
                    found = self.node("Mod", self._evaluate(left), self._evaluate(right))
                case ast.Call(ast.Name("floordiv"), [left, right]):
                    # ONNX rounds quotients towards zero, so make the division exact: (a - a mod b) / b.
                    left, right = self._evaluate(left), self._evaluate(right)
                    found = self.node("Div", self.node("Sub", left, self.node("Mod", left, right)), right)
                case _:
                    raise UnsupportedOperation(f"there is no rule for the size {text}")
            self._sizes[text] = found
        return self._sizes[text]
