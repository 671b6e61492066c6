"""Architecture, network (an architecture with its hyper-parameters) and model (a network with its weights)."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util

from kdjax import macs
from kdjax.models.reading import Files
from kdjax.names import brief, nearest

Params = dict[str, Any]
# (params, x, sigma=None) -> (output, features); see `Network.make_apply`.
Apply = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Shrink:
    """How a network relates to a smaller one of its architecture; see `kdjax.models.shrinking`.

    Attributes:
      sizes: the hyper-parameters that may be smaller.
      is_joint: they are reduced together, in place of each alone and in every combination.
      stack: the list of a plain stack: convolution, activation, ..., convolution; each has a number in `ranks`.
      blocks: a pattern for the lists of blocks along a residual stream, each of which adds something to its input.
      writer: within a block, the path of the last convolution, whose outputs are added.
      ranked: within a block, the paths of the convolutions that have a number in `ranks`, the same in every block.
      trunk: a pattern for the paths of all convolutions whose outputs are added to the residual stream.
      is_linear: nothing but convolutions reads or makes the stream, so that its channels can be rotated.
      shuffled: a pattern for the paths of convolutions whose outputs a pixel shuffle makes a larger image of.
      inputs: hyper-parameters for additional inputs, which a smaller network may do without.
    """

    sizes: tuple[str, ...]
    is_joint: bool = False
    stack: str = ""
    blocks: str = ""
    writer: str = ""
    ranked: tuple[str, ...] = ()
    trunk: str = ""
    is_linear: bool = True
    shuffled: str = ""
    inputs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """Everything kdjax knows about an architecture; `models/X.py` defines X's.

    Attributes:
      module: the Flax class. Its constructor's arguments, except `rngs` and `remat`, are the hyper-parameters. Called
        with a float NHWC image, it returns (output, features). Its attributes `multiple` and `pad_mode` say how it
        pads, and `takes_sigma` that the image's last channel is a noise level map.
      files: how to read other programs' weight files; None if only kdjax writes them.
      order: the names of its parts in torch's registration order, for writing files.
      shrink: how it can be made smaller; None if it cannot.
      name: its name in configs and files.
      is_checked: hyper-parameters must have their default's type, and numbers must be positive. User-defined networks
        have their own rules.
    """

    module: type[nnx.Module] | type[linen.Module]
    files: Files | None = None
    order: tuple[str, ...] = ()
    shrink: Shrink | None = None
    name: str = ""
    is_checked: bool = True

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.module.__name__.lower())

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters and their defaults, in order; `inspect.Parameter.empty` where there is no default."""
        module: Any = self.module
        if issubclass(module, linen.Module):
            return {
                field.name: field.default if field.default is not dataclasses.MISSING else inspect.Parameter.empty
                for field in dataclasses.fields(module)
                if field.init and field.name not in ("parent", "name")
            }
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.module.__init__).parameters.items()
            if name not in ("self", "rngs", "remat") and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }

    def complete(self, hparams: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `hparams` with the defaults filled in, in the constructor's order.

        Raises:
          ValueError: an unknown name, or a value that has the wrong type or is not positive.
        """
        known = self.defaults
        if missing := [name for name in known if known[name] is inspect.Parameter.empty and name not in hparams]:
            raise ValueError(f"{self.name} needs the hyper-parameters {', '.join(missing)}, which have no default")
        completed = dict(known)
        for name, value in hparams.items():
            if name not in known:
                raise ValueError(
                    f"{self.name} has no hyper-parameter {brief(name)}{nearest(name, known)} (it has:"
                    f" {', '.join(known)})"
                )
            completed[name] = self._checked(name, value, known[name])
        return completed

    def _checked(self, name: str, value: Any, default: Any) -> Any:
        if isinstance(value, list):  # JSON and ConfigDict turn tuples into lists
            value = tuple(value)
        if type(default) is tuple and type(value) is int:  # a single level on the command line
            value = (value,)
        if type(default) is float and type(value) is int:
            value = float(value)
        if not self.is_checked:
            return value
        if type(value) is not type(default):
            raise ValueError(
                f"{self.name}: {name}={brief(value)} is a {type(value).__name__}, wanted {type(default).__name__}"
            )
        least = 0 if name == "num_upsample" or default == 0 else 1e-9
        if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < math.inf:
            raise ValueError(f"{self.name}: {name}={brief(value)} must be positive and finite")
        if isinstance(value, tuple):
            if not all(type(count) is int and count >= 0 for count in value):
                raise ValueError(f"{self.name}: {name}={brief(value)} must be whole numbers")
            if default == () and not any(value):  # DnCNN's ranks; a file cannot tell zeros from none
                return ()
        return value


class Network:
    """A network without its weights. Create it with `kdjax.models.network`; equal networks are the same object.

    Attributes:
      architecture, hparams: complete and checked.
    """

    def __init__(self, architecture: Architecture, hparams: dict[str, Any]) -> None:
        self.architecture, self.hparams = architecture, hparams

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and (self.architecture, self.hparams) == (other.architecture, other.hparams)

    def __hash__(self) -> int:
        return hash((self.architecture, tuple(self.hparams.items())))

    def __repr__(self) -> str:
        return f"{self.arch}({', '.join(f'{name}={value!r}' for name, value in self.hparams.items())})"

    @property
    def arch(self) -> str:
        """The name of the architecture."""
        return self.architecture.name

    @property
    def channels(self) -> int:
        """The number of input channels: 3 for RGB, 1 for grey.

        The hyper-parameter `num_in_ch` or `img_channel`; 3 for a user-defined network that has neither.
        """
        return self.hparams.get("num_in_ch", self.hparams.get("img_channel", 3))

    @property
    def scale(self) -> int:
        """The upscaling factor; 1 for denoising."""
        return self.hparams.get("scale", self.hparams.get("upscale", 1))

    @property
    def multiple(self) -> int:
        """Height and width are padded to a multiple of this; 1 if the network takes any size.

        It is the factor of `unshuffle`, or 2^levels of a U-Net. A tile that starts at a multiple of it is processed
        exactly as it is within the whole image. Read from the module's attribute `multiple`; 1 if it has none.
        """
        return getattr(self._module, "multiple", 1)

    @property
    def pad_mode(self) -> str:
        """The padding mode at the bottom and right, as in `np.pad`: "reflect", "edge", or "constant" for zeros.

        Read from the module's attribute `pad_mode`; "reflect" if it has none.
        """
        return getattr(self._module, "pad_mode", "reflect")

    @property
    def takes_sigma(self) -> bool:
        """Whether it is told the noise level of its input, as FFDNet is.

        Read from the module's attribute `takes_sigma`; False if it has none.
        """
        return getattr(self._module, "takes_sigma", False)

    def make_apply(self, *, remat: bool = False, dtype: jnp.dtype = jnp.float32) -> Apply:
        """Returns the network as a pure function `apply(params, x, sigma=None) -> (output, features)`.

        x is (b, h, w, c); sigma is the standard deviation of its noise on the scale of 0 to 255, a number or (b,). A
        network that `takes_sigma` needs it, others ignore it.

        Args:
          remat: recompute each block's activations in the backward pass instead of storing them.
          dtype: of parameters and activations inside; the output is always float32.
        """
        if self._is_linen:
            run = lambda params, x: self._module.apply({"params": params}, x)  # noqa: E731
        else:
            split = self._split_with_remat if remat else self._split
            run = lambda params, x: _merged(*split, params)(x)  # noqa: E731

        def apply(
            params: Params, x: jax.Array, sigma: jax.Array | float | None = None
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            x = self.module_input(x, sigma)
            result = run(jax.tree.map(lambda leaf: leaf.astype(dtype), params), x.astype(dtype))
            output, features = result if self.architecture.is_checked else self._checked_result(result, x)
            return output.astype(jnp.float32), features

        return apply

    def bind(self, params: Params) -> nnx.Module:
        """Returns the Flax module with these weights, to be called layer by layer (`kdjax.models.layers.intercept`)."""
        return _merged(*self._split, jax.tree.map(jnp.asarray, params))

    @functools.cached_property
    def jitted(self) -> Apply:
        """`make_apply()`, compiled once per image shape."""
        return jax.jit(self.make_apply())

    @functools.cached_property
    def abstract_params(self) -> Params:
        """The parameter tree with `jax.ShapeDtypeStruct` leaves; nothing is computed."""
        if self._is_linen:
            return jax.eval_shape(self._linen_params, jax.random.key(0))
        return _pure_dict(self._split[1])

    def init(self, key: jax.Array) -> Model:
        """Returns a model with fresh weights, drawn from the same distributions as in torch and BasicSR."""
        if self._is_linen:
            return Model(self, self._linen_params(key))
        # Not jitted: the 351 convolutions of an RRDBNet have few distinct shapes, which compile faster one by one.
        return Model(self, _pure_dict(nnx.to_flat_state(nnx.state(self._build(rngs=nnx.Rngs(key))))))

    def count_macs(self, height: int, width: int) -> int:
        """Returns one forward pass's multiply-accumulates in convolutions and matrix products, for this image size."""
        apply = self.make_apply()
        image = jax.ShapeDtypeStruct((1, height, width, self.channels), jnp.float32)
        return macs.count(lambda params, x: apply(params, x, 0.0)[0], self.abstract_params, image)

    def module_input(self, x: jax.Array, sigma: jax.Array | float | None) -> jax.Array:
        """Returns what the module takes: x (b, h, w, c), with sigma / 255 as one more channel if it `takes_sigma`.

        Raises:
          ValueError: it needs sigma, which is None.
        """
        if not self.takes_sigma:
            return x
        if sigma is None:
            raise ValueError(
                f"{self.arch} is told the noise level of its input: give sigma, the standard deviation of the noise on"
                " the scale of 0 to 255, a number or one for each image"
            )
        level = jnp.reshape(jnp.asarray(sigma, jnp.float32) / 255, (-1, 1, 1, 1))
        return jnp.concatenate([x, jnp.broadcast_to(level, (*x.shape[:3], 1))], axis=-1)

    @property
    def _is_linen(self) -> bool:
        return issubclass(self.architecture.module, linen.Module)

    def _build(self, *, rngs: nnx.Rngs, remat: bool = False) -> nnx.Module:
        module: Any = self.architecture.module
        takes_remat = "remat" in inspect.signature(module.__init__).parameters
        return module(**self.hparams, **({"remat": remat} if takes_remat else {}), rngs=rngs)

    @functools.cached_property
    def _module(self) -> Any:
        """The module without values. Building it takes half a second for the 351 convolutions of an RRDBNet.

        Raises:
          ValueError: its padding attributes are invalid.
        """
        module = self.architecture.module(**self.hparams) if self._is_linen else self._shapes_only(remat=False)
        multiple, mode = getattr(module, "multiple", 1), getattr(module, "pad_mode", "reflect")
        if type(multiple) is not int or multiple < 1:
            raise ValueError(f"{self.arch}: its attribute multiple={multiple!r} must be a positive whole number")
        if mode not in ("reflect", "edge", "constant"):
            raise ValueError(
                f'{self.arch}: its attribute pad_mode={mode!r} must be "reflect", "edge" or "constant" (zeros)'
            )
        return module

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, Any]:
        return self._parts(self._module)

    @functools.cached_property
    def _split_with_remat(self) -> tuple[nnx.GraphDef, Any]:
        return self._parts(self._shapes_only(remat=True))

    def _shapes_only(self, *, remat: bool) -> nnx.Module:
        def build() -> nnx.Module:
            rngs = nnx.Rngs(0)
            rngs.default = _OneKey(0, tag="default")  # ty: ignore[missing-attribute] (made at run time)
            return self._build(rngs=rngs, remat=remat)

        return nnx.eval_shape(build)

    def _parts(self, module: nnx.Module) -> tuple[nnx.GraphDef, Any]:
        """Returns a module's structure, and the shapes of its parameters by path.

        Raises:
          ValueError: it has variables that are not parameters, such as those of batch normalisation or dropout.
        """
        graphdef, state = nnx.split(module)
        variables = nnx.to_flat_state(state)
        if others := sorted({type(leaf).__name__ for _, leaf in variables if not isinstance(leaf, nnx.Param)}):
            raise ValueError(
                f"{self.arch} has variables of type {', '.join(others)}; only trained parameters (nnx.Param) are"
                " supported"
            )
        return graphdef, variables

    def _linen_params(self, key: jax.Array) -> Params:
        """Returns the initial parameters of a Linen module as a plain dict.

        Raises:
          ValueError: it has variables besides its parameters, such as those of batch normalisation.
        """
        variables = self._module.init(key, jnp.zeros((1, 64, 64, self.channels + self.takes_sigma)))
        if others := sorted(set(variables) - {"params"}):
            raise ValueError(
                f"{self.architecture.module.__name__} has {', '.join(others)} besides its parameters; only trained"
                " parameters are supported"
            )
        flat = traverse_util.flatten_dict(variables["params"])
        return traverse_util.unflatten_dict({tuple(map(str, path)): leaf for path, leaf in flat.items()})

    def _checked_result(self, result: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns a user-defined network's result, after checking it.

        Raises:
          ValueError: the result is not (output, features), or the output does not fit the input.
        """
        is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        if not is_pair or not hasattr(result[0], "shape"):
            raise ValueError(
                f"{self.arch} returned {type(result).__name__}, wanted (output, features): an image and a dict of named"
                " arrays"
            )
        output, features = result
        fits = output.ndim == 4 and output.shape[0] == x.shape[0]
        if not fits or any(ours % theirs for ours, theirs in zip(output.shape[1:3], x.shape[1:3], strict=True)):
            raise ValueError(
                f"{self.arch} returned {output.shape} for an image of shape {x.shape}; wanted (b, h x scale, w x scale,"
                " channels)"
            )
        return output, features


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights; `model(x)` returns (output, features) for float NHWC x in [0, 1].

    `model(x, sigma)` tells it the noise level, which a network that `takes_sigma` needs; see `Network.make_apply`.

    Attributes:
      params: a nested dict of arrays whose path is the torch module path
        (`params["body"]["0"]["rdb1"]["conv1"]["kernel"]`).
    """

    network: Network
    params: Params

    @property
    def arch(self) -> str:
        return self.network.arch

    @property
    def hparams(self) -> dict[str, Any]:
        return self.network.hparams

    def __call__(self, x: jax.Array, sigma: jax.Array | float | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.network.jitted(self.params, x, sigma)


def count_params(params: Params) -> int:
    """Returns the number of scalars in a parameter tree (arrays or ShapeDtypeStructs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


class _OneKey(nnx.RngStream):
    """Returns the same key every time, for shapes only: under a trace, the counter of Flax's stream is quadratic."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def _merged(graphdef: nnx.GraphDef, variables: Iterable[tuple[Any, Any]], params: Params) -> Any:
    """Returns the module of this structure with these parameters."""
    flat = traverse_util.flatten_dict(params)
    leaves = [(path, leaf.replace(flat[tuple(map(str, path))])) for path, leaf in variables]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def params_of(module: nnx.Module) -> Params:
    """Returns the parameters of a bound module; see `Network.bind`."""
    return _pure_dict(nnx.to_flat_state(nnx.state(module)))


def _pure_dict(variables: Iterable[tuple[Any, Any]]) -> Params:
    """Returns the parameters as a nested dict with string keys (NNX uses integers for list indices)."""
    return traverse_util.unflatten_dict({tuple(map(str, path)): leaf.get_value() for path, leaf in variables})
