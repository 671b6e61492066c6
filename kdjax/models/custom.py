"""User-defined networks: `arch="my_package.my_net:MyNet"`, any importable Flax module class.

A Flax NNX module is built as `MyNet(**hparams, rngs=rngs)` (plus `remat=` if it accepts that), a Linen module as
`MyNet(**hparams)`. Called with a float NHWC image, it returns `(output, features)`. All its variables must be trained
parameters. If it pads images, its attributes `multiple` and `pad_mode` say how. `docs/your_own_student.md` is the
guide.
"""

from __future__ import annotations

import functools
import importlib
import inspect

from flax import linen, nnx

from kdjax.models.model import Architecture


def is_custom(arch: str) -> bool:
    """Whether the name is a path to a class."""
    return ":" in arch


@functools.cache
def architecture(arch: str) -> Architecture:
    """Returns the architecture for the class at "module.path:Class".

    Raises:
      ValueError: it cannot be imported, or is not a Flax module class.
    """
    module_name, _, class_name = arch.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing the user's module can raise anything
        raise ValueError(
            f"architecture {arch!r}: the module {module_name!r} cannot be imported ({type(error).__name__}: {error});"
            " is it on PYTHONPATH or in the current folder?"
        ) from error
    found = getattr(module, class_name, None)
    if not (inspect.isclass(found) and issubclass(found, nnx.Module | linen.Module)):
        classes = [name for name, value in vars(module).items()
                   if inspect.isclass(value) and issubclass(value, nnx.Module | linen.Module)]  # fmt: skip
        raise ValueError(
            f"architecture {arch!r}: {class_name!r} is not a Flax module class of {module_name} (it has:"
            f" {', '.join(classes) or 'none'})"
        )
    return Architecture(found, name=arch, is_checked=False)
