"""Networks, and the one interface through which the rest of kdjax sees them.

A model is data: an architecture name, its hyper-parameters and a nested dict of arrays whose path is the torch
module path (`params["body"]["0"]["rdb1"]["conv1"]["kernel"]`). `make_apply` turns the first two into a pure function

    apply(params, x) -> (output, features)

with x float NHWC in [0, 1] and `features` a dict from module path ("body.3") to array. Flax NNX lives inside this
folder only. Leaves are named `kernel` (HWIO) and `bias` for convolutions; every other leaf has its torch name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.interpreters.partial_eval import dce_jaxpr

from kdjax.models import custom
from kdjax.models.dncnn import DnCNN
from kdjax.models.edsr import EDSR
from kdjax.models.msrresnet import MSRResNet
from kdjax.models.nafnet import NAFNet
from kdjax.models.rrdbnet import RRDBNet
from kdjax.models.srvgg import SRVGGNetCompact
from kdjax.models.unet import UNet
from kdjax.names import brief, nearest

Params = dict[str, Any]
Apply = Callable[[Params, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

MODELS: dict[str, type[nnx.Module]] = {
    "rrdbnet": RRDBNet,
    "srvggnetcompact": SRVGGNetCompact,
    "dncnn": DnCNN,
    "edsr": EDSR,
    "msrresnet": MSRResNet,
    "nafnet": NAFNet,
    "unet": UNet,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights; `model(x)` returns (output, features) for float NHWC x in [0, 1]."""

    arch: str
    hparams: dict[str, Any]
    params: Params

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _jitted_apply(self.arch, tuple(self.hparams.items()))(self.params, x)


def canonical_arch(name: str) -> str:
    """The key of MODELS for `name`, which may also be BasicSR's class name ("RRDBNet"); "module:Class" stays as it is.

    Raises:
      ValueError: the name is unknown; the message lists the valid ones.
    """
    if custom.is_custom(name):
        custom.find_class(name)
        return name
    if name.lower() in MODELS:
        return name.lower()
    raise ValueError(f"unknown architecture {name!r}{nearest(name.lower(), MODELS)} (known: {', '.join(MODELS)})")


def architecture(arch: str) -> type:
    """The class of a canonical name."""
    return custom.find_class(arch) if custom.is_custom(arch) else MODELS[arch]


def complete_hparams(arch: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """`hparams` with the defaults of the architecture filled in, in the order of its constructor.

    Raises:
      ValueError: a name the architecture does not have, or a value of the wrong type or not positive.
    """
    known = custom.signature(architecture(arch))
    missing = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in hparams]
    if missing:
        raise ValueError(f"{arch} needs the hyper-parameters {', '.join(missing)}, which have no default")
    completed = dict(known)
    for name, value in hparams.items():
        if name not in known:
            raise ValueError(
                f"{arch} has no hyper-parameter {brief(name)}{nearest(name, known)} (it has: {', '.join(known)})"
            )
        if isinstance(value, list):  # what JSON and ConfigDict make of a tuple
            value = tuple(value)
        if type(known[name]) is tuple and type(value) is int:  # one level, on a command line
            value = (value,)
        if type(known[name]) is float and type(value) is int:
            value = float(value)
        if custom.is_custom(arch):  # its own rules
            completed[name] = value
            continue
        if type(value) is not type(known[name]):
            raise ValueError(
                f"{arch}: {name}={brief(value)} is a {type(value).__name__}, wanted {type(known[name]).__name__}"
            )
        if isinstance(value, int | float) and not (0 if name == "num_upsample" else 1e-9) <= value < math.inf:
            raise ValueError(f"{arch}: {name}={brief(value)} must be positive and finite")
        if isinstance(value, tuple) and not all(type(count) is int and count >= 0 for count in value):
            raise ValueError(f"{arch}: {name}={brief(value)} must be whole numbers")
        completed[name] = value
    return completed


def make_apply(arch: str, hparams: Mapping[str, Any], *, remat: bool = False, dtype: jnp.dtype = jnp.float32) -> Apply:
    """The network as a pure function `apply(params, x) -> (output, features)`.

    Args:
      arch: a key of MODELS, BasicSR's class name, or "module:Class" (see `kdjax.models.custom`).
      hparams: constructor arguments; missing ones take their default.
      remat: recompute each block's activations in the backward pass instead of storing them.
      dtype: of parameters and activations inside; the output is always float32.
    """
    arch = canonical_arch(arch)
    hparams = complete_hparams(arch, hparams)
    if _is_linen(arch):
        run = lambda params, x: custom.linen_apply(architecture(arch), hparams, params, x)  # noqa: E731
    else:
        graphdef, variables, _ = _cached_abstract(arch, tuple(hparams.items()), remat)

        def run(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            flat = traverse_util.flatten_dict(params)
            state = nnx.from_flat_state([(path, leaf.replace(flat[tuple(map(str, path))])) for path, leaf in variables])
            return nnx.merge(graphdef, state)(x)

    def apply(params: Params, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        result = run(jax.tree.map(lambda leaf: leaf.astype(dtype), params), x.astype(dtype))
        output, features = custom.check_result(arch, result, x) if custom.is_custom(arch) else result
        return output.astype(jnp.float32), features

    return apply


def abstract_params(arch: str, hparams: Mapping[str, Any]) -> Params:
    """The parameter tree with `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    arch = canonical_arch(arch)
    hparams = complete_hparams(arch, hparams)
    if _is_linen(arch):
        init = functools.partial(custom.linen_params, architecture(arch), hparams, channels=_channels(hparams))
        return jax.eval_shape(init, jax.random.key(0))
    return _pure_dict(_cached_abstract(arch, tuple(hparams.items()), False)[1])


def init_model(arch: str, hparams: Mapping[str, Any], key: jax.Array) -> Model:
    """A freshly initialised model; the initial values are those that torch and BasicSR draw from."""
    arch = canonical_arch(arch)
    hparams = complete_hparams(arch, hparams)
    if _is_linen(arch):
        return Model(arch, hparams, custom.linen_params(architecture(arch), hparams, key, _channels(hparams)))
    # Not jitted: the 351 convolutions of an RRDBNet are a few shapes, which compile faster one by one.
    module = custom.build(architecture(arch), hparams, remat=False, rngs=nnx.Rngs(key))
    return Model(arch, hparams, _pure_dict(nnx.to_flat_state(nnx.state(module))))


def count_params(params: Params) -> int:
    """The number of scalars in a parameter tree (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(arch: str, hparams: Mapping[str, Any], shape: tuple[int, int, int, int]) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one forward pass on an NHWC `shape`."""
    apply = make_apply(arch, hparams)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    return function_macs(lambda params, x: apply(params, x)[0], abstract_params(arch, hparams), image)


def function_macs(function: Callable[..., Any], *arguments: Any) -> int:
    """As `count_macs`, of any JAX function of arrays or ShapeDtypeStructs; what no result depends on is left out.

    Loops count their passes, and of the branches of a condition the most expensive one counts.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _jaxpr_macs(used)


def num_channels(model: Model) -> int:
    """How many colour channels the model reads: 3 for RGB, 1 for grey.

    The hyper-parameter `num_in_ch` or `img_channel`; 3 for a network of the user's that has neither.
    """
    return _channels(model.hparams)


def scale_of(model: Model) -> int:
    """How many times larger than its input the model's output is; 1 for denoising."""
    return model.hparams.get("scale", model.hparams.get("upscale", 1))


def multiple_of(model: Model) -> int:
    """What the model pads the height and width of an image to a multiple of; 1 if it takes them as they are.

    A part of an image that begins at such multiples is seen as it is seen within the image: the factor of `unshuffle`,
    2^levels of a U-Net. The attribute `multiple` of the network, 1 for a network of the user's that has none.

    Raises:
      ValueError: the attribute of a network of the user's is no positive whole number.
    """
    return _padding(model).multiple


def pad_mode_of(model: Model) -> str:
    """How the model pads at the bottom and right, in `np.pad`'s words: "reflect", or "constant" for zeros (NAFNet).

    The attribute `pad_mode` of the network, "reflect" where it has none.

    Raises:
      ValueError: the attribute of a network of the user's is neither.
    """
    return _padding(model).mode


def _padding(model: Model) -> custom.Padding:
    if _is_linen(model.arch):
        return custom.padding(model.arch, architecture(model.arch)(**model.hparams))
    return _cached_abstract(model.arch, tuple(model.hparams.items()), False)[2]


@functools.cache
def _jitted_apply(arch: str, hparams: tuple[tuple[str, Any], ...]) -> Apply:
    return jax.jit(make_apply(arch, dict(hparams)))


def _channels(hparams: Mapping[str, Any]) -> int:
    return hparams.get("num_in_ch", hparams.get("img_channel", 3))


def _is_linen(arch: str) -> bool:
    return custom.is_custom(arch) and not issubclass(architecture(arch), nnx.Module)


@functools.lru_cache(maxsize=32)  # takes half a second for the 351 convolutions of an RRDBNet
def _cached_abstract(
    arch: str, hparams: tuple[tuple[str, Any], ...], remat: bool
) -> tuple[nnx.GraphDef, Any, custom.Padding]:
    """The module's structure, its parameters as shapes only, by path, and how it pads images."""

    def build() -> nnx.Module:
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(0, tag="default")
        return custom.build(architecture(arch), dict(hparams), remat=remat, rngs=rngs)

    module = nnx.eval_shape(build)
    graphdef, state = nnx.split(module)
    custom.check_state(arch, state)
    return graphdef, nnx.to_flat_state(state), custom.padding(arch, module)


class _OneKey(nnx.RngStream):
    """The same key each time, for shapes alone: the count of Flax's own, under a trace, takes time by its square."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def _pure_dict(variables: Iterable[tuple[tuple[str | int, ...], nnx.Variable]]) -> Params:
    """The parameters as a nested dict with string keys (NNX has integers for list positions)."""
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf.get_value() for path, leaf in variables})


def _jaxpr_macs(jaxpr: jax.extend.core.Jaxpr) -> int:
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
        inner = [_jaxpr_macs(value) for value in equation.params.values() if hasattr(value, "eqns")]
        branches = [_jaxpr_macs(branch) for branch in equation.params.get("branches", ())]
        total += sum(inner) * equation.params.get("length", 1) + max(branches, default=0)
    return total
