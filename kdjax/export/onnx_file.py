"""A model as an ONNX file, traced with symbolic batch, height and width so that no size is baked in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.interpreters.partial_eval import dce_jaxpr

import kdjax
from kdjax import models
from kdjax.export.onnx_graph import NCHW, Constant, Graph, Tensor
from kdjax.export.onnx_rules import FUNCTIONS, PRIMITIVES

OPSET = 17
IR_VERSION = 8  # the one of that operator set: older runtimes refuse newer ones


def onnx_model(model: models.Model, inputs: Sequence[jax.ShapeDtypeStruct], about: dict[str, str]) -> onnx.ModelProto:
    """Converts the model to one ONNX graph: `input` (batch, channels, height, width) to `output`, float32, any size.

    A model that is told the noise level has a second input, `sigma` (batch, 1, 1, 1), on the scale of 0 to 255.

    Args:
      inputs: what the network is traced with: an NHWC image with the symbolic sizes b, h and w, and sigma (b,).
      about: added to the file's metadata, along with what the model itself provides.

    Raises:
      UnsupportedOperation: if the network uses an operation without a rule.
    """
    channels, scale = model.network.channels, model.network.scale
    apply = model.network.make_apply()
    params = jax.tree.map(np.asarray, model.params)
    closed = jax.make_jaxpr(lambda params, *inputs: apply(params, *inputs)[0])(params, *inputs)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True], instantiate=True)  # drops features that the image does not need
    named = [Constant(leaf, _dotted(path)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]

    graph = Graph(PRIMITIVES, FUNCTIONS)
    tensors = [Tensor("input"), Tensor("sigma", axes=(0,))][: len(inputs)]
    infos = [_image_info("input", ["batch", channels, "height", "width"]), _image_info("sigma", ["batch", 1, 1, 1])]
    (output,) = graph.run(jaxpr, closed.consts, [*named, *tensors])
    shape = closed.out_avals[0].shape
    graph.node("Identity", graph.operand(output, NCHW), output="output")
    graph.merge_biases()
    spatial = {name: name if scale == 1 else f"{scale}*{name}" for name in ("height", "width")}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            model.arch,
            infos[: len(inputs)],
            [_image_info("output", ["batch", int(shape[3]), spatial["height"], spatial["width"]])],
            graph.used_initializers(),
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="kdjax",
        producer_version=kdjax.__version__,
    )
    tells = {"arch": model.arch, "hparams": json.dumps(model.hparams), "scale": str(scale), "channels": str(channels)}
    onnx.helper.set_model_props(proto, tells | about)
    return proto


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(entry.key) for entry in path)


def _image_info(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
