"""The user's own network as an architecture: `arch="my_package.my_net:MyNet"`, any importable Flax module.

The class is a Flax NNX module, built as `MyNet(**hparams, rngs=rngs)` (with `remat=` if it takes that), or a Linen
module, built as `MyNet(**hparams)`. Called with a float NHWC image it returns `(output, features)`. It may have
trained parameters only. Attributes `multiple` and `pad_mode` say how it pads images, if it does.
`docs/your_own_student.md` is the guide.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

Params = dict[str, Any]


class Padding(NamedTuple):
    """How a network fills images at the bottom and right: to a `multiple`, with `np.pad`'s `mode`."""

    multiple: int
    mode: str


def is_custom(arch: str) -> bool:
    """Whether the name is a path to a class."""
    return ":" in arch


@functools.cache
def find_class(arch: str) -> type:
    """The class that "module.path:Class" names.

    Raises:
      ValueError: it cannot be imported, or is no Flax module class.
    """
    module_name, _, class_name = arch.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"architecture {arch!r}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error});"
            " is it on PYTHONPATH or in the current folder?"
        ) from error
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, nnx.Module | linen.Module)):
        classes = [name for name, value in vars(module).items()
                   if inspect.isclass(value) and issubclass(value, nnx.Module | linen.Module)]  # fmt: skip
        raise ValueError(
            f"architecture {arch!r}: {class_name!r} is no Flax module class of {module_name} (there are:"
            f" {', '.join(classes) or 'none'})"
        )
    return found


def signature(cls: type) -> dict[str, Any]:
    """The hyper-parameters of a class and their defaults; `inspect.Parameter.empty` for those without."""
    if issubclass(cls, linen.Module):
        return {
            field.name: field.default if field.default is not dataclasses.MISSING else inspect.Parameter.empty
            for field in dataclasses.fields(cls)
            if field.init and field.name not in ("parent", "name")
        }
    return {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name not in ("self", "rngs", "remat") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def build(cls: type, hparams: Mapping[str, Any], *, remat: bool, rngs: nnx.Rngs) -> nnx.Module:
    """An NNX module of the class."""
    takes_remat = "remat" in inspect.signature(cls.__init__).parameters
    return cls(**hparams, **({"remat": remat} if takes_remat else {}), rngs=rngs)


def linen_params(cls: type, hparams: Mapping[str, Any], key: jax.Array, channels: int) -> Params:
    """The initial parameters of a Linen module, as a plain dict.

    Raises:
      ValueError: it has variables besides its parameters, such as those of batch normalisation.
    """
    variables = cls(**hparams).init(key, jnp.zeros((1, 64, 64, channels)))
    others = sorted(set(variables) - {"params"})
    if others:
        raise ValueError(
            f"{cls.__name__} has {', '.join(others)} besides its parameters; only trained parameters are supported"
        )
    flat = traverse_util.flatten_dict(variables["params"])
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})


def linen_apply(cls: type, hparams: Mapping[str, Any], params: Params, x: jax.Array) -> Any:
    """What a Linen module returns."""
    return cls(**hparams).apply({"params": params}, x)


def check_state(arch: str, state: nnx.State) -> None:
    """Refuses an NNX module with variables that are no parameters.

    Raises:
      ValueError: such as those of batch normalisation or dropout.
    """
    others = sorted({type(leaf).__name__ for _, leaf in nnx.to_flat_state(state) if not isinstance(leaf, nnx.Param)})
    if others:
        raise ValueError(
            f"{arch} has variables of type {', '.join(others)}; only trained parameters (nnx.Param) are supported"
        )


def padding(arch: str, module: nnx.Module | linen.Module) -> Padding:
    """What the attributes `multiple` and `pad_mode` of a network say; 1 and "reflect" where it has none.

    Raises:
      ValueError: they say something else.
    """
    found = Padding(getattr(module, "multiple", 1), getattr(module, "pad_mode", "reflect"))
    if type(found.multiple) is not int or found.multiple < 1:
        raise ValueError(f"{arch}: its attribute multiple={found.multiple!r} must be a positive whole number")
    if found.mode not in ("reflect", "constant"):
        raise ValueError(f'{arch}: its attribute pad_mode={found.mode!r} must be "reflect" or "constant" (zeros)')
    return found


def check_result(arch: str, result: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the network returned, if it is what a network has to return.

    Raises:
      ValueError: it is not (output, features), or the output does not fit the input.
    """
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    if not is_pair or not hasattr(result[0], "shape"):
        raise ValueError(
            f"{arch} returned {type(result).__name__}, wanted (output, features): an image and a dict of named arrays"
        )
    output, features = result
    fits = output.ndim == 4 and output.shape[0] == x.shape[0]
    if not fits or any(ours % theirs for ours, theirs in zip(output.shape[1:3], x.shape[1:3], strict=True)):
        raise ValueError(
            f"{arch} made {output.shape} of an image of shape {x.shape}; wanted (b, h x scale, w x scale, channels)"
        )
    return output, features
