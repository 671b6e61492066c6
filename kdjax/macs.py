"""Counts the multiply-accumulates of a JAX function's convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr


def count(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the multiply-accumulates of a JAX function's convolutions and matrix products.

    Dead code is not counted. Loops count every iteration, and a condition counts its most expensive branch.

    Args:
      arguments: arrays or ShapeDtypeStructs; nothing is computed.

    Examples:
      >>> count(lambda a, b: a @ b, jax.ShapeDtypeStruct((2, 3), "float32"), jax.ShapeDtypeStruct((3, 4), "float32"))
      24
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_channels = equation.params["dimension_numbers"].rhs_spec[0]
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[out_channels]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        inner = [_count(value) for value in equation.params.values() if hasattr(value, "eqns")]
        branches = [_count(branch) for branch in equation.params.get("branches", ())]
        total += sum(inner) * equation.params.get("length", 1) + max(branches, default=0)
    return total
