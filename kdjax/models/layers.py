"""Layers shared by several architectures, with torch's initialisation and parameter names."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from kdjax import ops
from kdjax.ops.convolution import convolve
from kdjax.ops.winograd import narrow_conv3x3

Init = Callable[..., jax.Array]  # (key, shape, dtype) -> initial values
Run = Callable[[jax.Array], jax.Array]
Interceptor = Callable[[nnx.Module, jax.Array, Run], jax.Array]

_interceptor: ContextVar[Interceptor | None] = ContextVar("interceptor", default=None)


@contextlib.contextmanager
def intercept(interceptor: Interceptor | None) -> Iterator[None]:
    """Calls `interceptor(module, x, run)` in place of every convolution, PReLU and block; `run(x)` runs the module.

    For looking into a network, layer by layer, outside of jit.
    """
    token = _interceptor.set(interceptor)
    try:
        yield
    finally:
        _interceptor.reset(token)


def is_intercepted() -> bool:
    """Whether blocks have to run one by one, instead of in a loop over their stacked weights."""
    return _interceptor.get() is not None


def _run(module: nnx.Module, x: jax.Array, run: Run) -> jax.Array:
    interceptor = _interceptor.get()
    return interceptor(module, x, run) if interceptor else run(x)


class Conv(nnx.Conv):
    """A convolution that can be intercepted."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        return _run(self, inputs, lambda x: super(Conv, self).__call__(x, out_sharding))


class LowRankConv(nnx.Module):
    """A 3x3 convolution to `rank` channels, without bias, and a 1x1 convolution to num_out ones.

    As torch's `nn.Sequential(Conv2d(num_in, rank, 3, bias=False), Conv2d(rank, num_out, 1))`.

    Raises:
      ValueError: the rank is larger than the number of output channels.
    """

    def __init__(self, num_in: int, num_out: int, rank: int, *, rngs: nnx.Rngs) -> None:
        if rank > num_out:
            raise ValueError(f"rank {rank} of a convolution with {num_out} outputs; it can be at most {num_out}")
        setattr(self, "0", conv(num_in, rank, 3, bias=False, rngs=rngs))
        setattr(self, "1", conv(rank, num_out, 1, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _run(self, x, self._both)

    def _both(self, x: jax.Array) -> jax.Array:
        with intercept(None):  # the two are one layer
            return getattr(self, "1")(getattr(self, "0")(x))


def _compiled_quickly(draw: Init) -> Init:
    """Returns a version that draws the same numbers but compiles faster.

    XLA takes a second to compile random numbers for each shape, and a fifth of that at this optimisation level.
    """
    compiled = jax.jit(draw, static_argnums=(1, 2), compiler_options={"xla_backend_optimization_level": 1})

    def call(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        traced = isinstance(key, Tracer)  # tracing for shapes only, where nothing is compiled
        return (draw if traced else compiled)(key, shape, dtype)

    return call


_normal = _compiled_quickly(jax.random.normal)
# torch's default for a convolution: weight and bias uniform in +-1/sqrt(fan_in).
TORCH_KERNEL_INIT = _compiled_quickly(nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"))


# He et al., 2015, arXiv:1502.01852: keeps the size of activations through a stack of convolutions and ReLUs.
RELU_KERNEL_INIT = _compiled_quickly(nnx.initializers.variance_scaling(2, "fan_in", "normal"))


SMALL_KERNEL_INIT = _compiled_quickly(nnx.initializers.normal(0.02))


def residual_kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """BasicSR's `default_init_weights(scale=0.1)`: 0.1 x Kaiming normal (gain sqrt 2), for residual branches."""
    return _normal(key, shape, dtype) * jnp.sqrt(jnp.array(0.02 / math.prod(shape[:-1]), dtype))


@functools.cache
def torch_bias_init(fan_in: int) -> Init:
    """torch's default for a convolution's bias: uniform in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return _compiled_quickly(lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound))


def conv3x3(
    num_in: int, num_out: int, *, rngs: nnx.Rngs, init: str = "torch", narrow: bool = False, rank: int = 0
) -> Conv | LowRankConv:
    """Returns a zero-padded 3x3 convolution with bias.

    `init` is "torch" (torch's default), "residual" (`residual_kernel_init`) or "relu" (`RELU_KERNEL_INIT`); the latter
    two have a zero bias. `narrow` is for many input channels and few output channels (`kdjax.ops.winograd`). With a
    `rank`, it is a `LowRankConv` with torch's initialisation.
    """
    if rank:
        return LowRankConv(num_in, num_out, rank, rngs=rngs)
    kernel_inits = {"torch": TORCH_KERNEL_INIT, "residual": residual_kernel_init, "relu": RELU_KERNEL_INIT}
    return Conv(
        num_in,
        num_out,
        (3, 3),
        padding=1,
        kernel_init=kernel_inits[init],
        bias_init=torch_bias_init(9 * num_in) if init == "torch" else nnx.initializers.zeros_init(),
        conv_general_dilated=_narrow if narrow else _same,
        rngs=rngs,
    )


def _same(x: jax.Array, kernel: jax.Array, *_: object, **__: object) -> jax.Array:
    """Replaces `jax.lax.conv_general_dilated`, for size-preserving arguments."""
    return convolve(x, kernel)


def _narrow(x: jax.Array, kernel: jax.Array, *_: object, **__: object) -> jax.Array:
    """Replaces `jax.lax.conv_general_dilated`, for the arguments `conv3x3` always passes."""
    return narrow_conv3x3(x, kernel)


def conv(
    num_in: int,
    num_out: int,
    size: int,
    *,
    rngs: nnx.Rngs,
    stride: int = 1,
    groups: int = 1,
    bias: bool = True,
    init: str = "torch",
) -> Conv:
    """Returns a `size` x `size` convolution, zero-padded to keep the size at stride 1.

    `init` is "torch" (torch's default) or "small" (normal, 0.02, with torch's bias).
    """
    return Conv(
        num_in,
        num_out,
        (size, size),
        strides=stride,
        padding=(size - 1) // 2,
        feature_group_count=groups,
        use_bias=bias,
        conv_general_dilated=_same if stride == groups == 1 and size % 2 else jax.lax.conv_general_dilated,
        kernel_init={"torch": TORCH_KERNEL_INIT, "small": SMALL_KERNEL_INIT}[init],
        bias_init=torch_bias_init(size * size * num_in // groups),
        rngs=rngs,
    )


class UpConv(nnx.Module):
    """A transposed convolution of 2x2 pixels at stride 2, without bias: a product, and a pixel shuffle.

    The kernel is (2, 2, num_out, num_in), torch's `ConvTranspose2d.weight` as a convolution's would be stored.
    """

    def __init__(self, num_in: int, num_out: int, *, rngs: nnx.Rngs) -> None:
        # torch's default takes the outputs for inputs here.
        self.kernel = nnx.Param(TORCH_KERNEL_INIT(rngs.params(), (2, 2, num_out, num_in), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        product = x @ kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1)
        return ops.pixel_shuffle(product, 2)


@jax.jit  # a single call in the jaxpr, which `kdjax.export` recognises by name
def prelu(x: jax.Array, weight: jax.Array) -> jax.Array:
    """max(x, 0) + weight * min(x, 0) for (b, h, w, c), with one slope per channel."""
    return jnp.where(x >= 0, x, weight * x)


def mish(x: jax.Array) -> jax.Array:
    """x tanh(log(1 + e^x)) (Misra, 2019, arXiv:1908.08681), as a quotient of polynomials of e^x."""
    e = jnp.exp(jnp.minimum(x, 10))  # beyond, the quotient is 1 in float32
    n = e * (e + 2)
    return x * (n / (n + 2))


class PReLU(nnx.Module):
    """`prelu` with one learnt slope per channel, as in torch; Flax's PReLU has a single slope."""

    def __init__(self, num_channels: int) -> None:
        self.weight = nnx.Param(jnp.full((num_channels,), 0.25, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _run(self, x, lambda x: prelu(x, self.weight[...].astype(x.dtype)))


class LayerNorm2d(nnx.Module):
    """Normalises the channels of each pixel, in float32: the residual stream overflows lower precisions."""

    def __init__(self, num_channels: int) -> None:
        self.weight, self.bias = nnx.Param(jnp.ones(num_channels)), nnx.Param(jnp.zeros(num_channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        centred = y - y.mean(-1, keepdims=True)
        y = centred / jnp.sqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class MeanOverImage(nnx.Module):
    """(b, h, w, c) -> (b, 1, 1, c)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x.mean((1, 2), keepdims=True)


class Activation(nnx.Module):
    """An activation without parameters, as a module, so that layer lists are numbered as in torch."""

    def __init__(self, function: Callable[[jax.Array], jax.Array]) -> None:
        self.function = function

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x)


def call(module: nnx.Module, x: jax.Array, *, remat: bool) -> jax.Array:
    """Returns `module(x)`; with `remat`, its inner activations are recomputed in the backward pass instead of stored.

    Uses `nnx.remat`, not `jax.checkpoint`, which silently drops what an NNX module writes to itself.
    """
    if remat:
        return nnx.remat(lambda module, x: module(x))(module, x)
    return module(x) if isinstance(module, Conv | LowRankConv | PReLU) else _run(module, x, module)


def run_blocks(blocks: nnx.List, x: jax.Array, *, remat: bool) -> tuple[jax.Array, jax.Array]:
    """Runs blocks of equal structure one after another; `remat` is as in `call`.

    Returns the last block's output, and the outputs of all blocks: (number of blocks, b, h, w, c). Uses a loop:
    unrolled, 23 blocks of 15 convolutions take ten times as long to compile.
    """
    if is_intercepted():
        outputs = [x := call(block, x, remat=False) for block in blocks]
        return x, jnp.stack(outputs)
    graphdef, _ = nnx.split(blocks[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(block) for block in blocks))

    def step(x: jax.Array, params: nnx.State) -> tuple[jax.Array, jax.Array]:
        x = call(nnx.merge(graphdef, params), x, remat=remat)
        return x, x

    return jax.lax.scan(step, x, params)
