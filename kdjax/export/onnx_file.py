"""A model as an ONNX file, traced with symbolic batch, height and width so that no size is baked in."""

from __future__ import annotations

import json
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


def onnx_model(model: models.Model, image: jax.ShapeDtypeStruct, about: dict[str, str]) -> onnx.ModelProto:
    """Converts the model to one ONNX graph: `input` (batch, channels, height, width) to `output`, float32, any size.

    Args:
      image: what the network is traced with: NHWC, with the symbolic sizes b, h and w.
      about: added to the file's metadata, along with what the model itself provides.

    Raises:
      UnsupportedOperation: if the network uses an operation without a rule.
    """
    channels, scale = model.network.channels, model.network.scale
    apply = model.network.make_apply()
    params = jax.tree.map(np.asarray, model.params)
    closed = jax.make_jaxpr(lambda params, x: apply(params, x)[0])(params, image)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True], instantiate=True)  # drops features that the image does not need
    named = [Constant(leaf, _dotted(path)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]

    graph = Graph(PRIMITIVES, FUNCTIONS)
    (output,) = graph.run(jaxpr, closed.consts, [*named, Tensor("input")])
    shape = closed.out_avals[0].shape
    graph.node("Identity", graph.operand(output, NCHW), output="output")
    graph.merge_biases()
    spatial = {name: name if scale == 1 else f"{scale}*{name}" for name in ("height", "width")}
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.nodes,
            model.arch,
            [_image_info("input", ["batch", channels, "height", "width"])],
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
