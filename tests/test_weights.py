"""kdjax.weights: what real files give, every layout, both file formats both ways, and files that mean harm.

`weight_files` writes the files; `-m torch` compares with torch where it is installed.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import GOLDEN
from flax import traverse_util
from weight_files import (
    BFLOAT16,
    FORMATS,
    STORAGES,
    Parameter,
    Strided,
    Writer,
    assert_same,
    legacy_file,
    random_model,
    state_dict,
    write,
    zip_file,
    zip_records,
)

from kdjax.models import Model, count_params, network
from kdjax.weights import WeightsError, load_model, load_weights, save_model
from kdjax.weights.convert import to_state_dict, torch_shapes
from kdjax.weights.pickle_reader import ALLOWED

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("rrdbnet", "srvggnetcompact", "dncnn", "edsr", "msrresnet")
GOLDEN_FILES = sorted(path for arch in ARCHS for path in (GOLDEN / "archs").glob(f"{arch}*.pth"))


# ---- small things to store -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dncnn() -> Model:
    return random_model("dncnn", {"num_in_ch": 1, "num_feat": 4, "depth": 3})


@pytest.fixture(scope="module")
def rrdbnet() -> Model:
    hparams = {"num_in_ch": 1, "num_out_ch": 1, "num_feat": 4, "num_block": 2, "num_grow_ch": 2}
    return random_model("rrdbnet", hparams)


def golden_act(path: Path) -> dict[str, Any]:
    """What the tensors of a golden file do not tell."""
    if path.stem.startswith("edsr"):
        return {"res_scale": 0.1}
    names = [name for name in path.stem.split("_") if name in ("relu", "leakyrelu")]
    return {"act_type": names[0]} if names else {}


# ---- reference files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_golden_file_gives_the_reference_output(path: Path) -> None:
    loaded = load_weights(path, **golden_act(path))
    model, vectors = loaded.model, np.load(path.with_suffix(".npz"))
    assert model.arch == path.stem.split("_")[0]
    assert len(loaded.sha256) == 64 and loaded.path == str(path)
    output, features = jax.jit(model.network.make_apply())(model.params, vectors["x"])
    np.testing.assert_allclose(output, vectors["y"], atol=1e-5)
    for name in vectors.files:
        if name.startswith("feat:"):
            np.testing.assert_allclose(features[name.removeprefix("feat:")], vectors[name], atol=1e-5)
    ratio = vectors["y"].shape[1] // vectors["x"].shape[1]
    assert model.hparams.get("scale", model.hparams.get("upscale", 1)) == ratio


def test_span_is_folded_from_what_was_trained(tmp_path: Path) -> None:
    """`eval_conv` of a file is what the last validation used; the parts are newer."""
    model = load_model(GOLDEN / "archs" / "span_x2.pth")
    state = to_state_dict(model)
    assert state["block_3.c2_r.conv.1.weight"].shape == (12, 12, 3, 3)
    stale = {key: value * 0 if ".eval_conv." in key else value for key, value in state.items()}
    assert_same(load_model(write(tmp_path, zip_file(stale))).params, model.params)
    for key, value in (("conv_1.sk.weight", np.zeros((6, 4, 1, 1), np.float32)), ("conv_2.conv.2.bias", None)):
        wrong = {name: each for name, each in (state | {key: value}).items() if each is not None}
        with pytest.raises(WeightsError, match=r"do not fit span .*unexpected: .*\.sk\."):
            load_model(write(tmp_path, zip_file(wrong)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_export_and_import_change_no_bit(path: Path, suffix: str, tmp_path: Path) -> None:
    model = load_model(path, **golden_act(path))
    saved = tmp_path / f"saved{suffix}"
    save_model(model, saved)
    again = load_weights(saved)  # says its own act_type
    assert (again.model.arch, again.model.hparams) == (model.arch, model.hparams)
    assert_same(model.params, again.model.params)
    save_model(again.model, tmp_path / f"again{suffix}")
    assert saved.read_bytes() == (tmp_path / f"again{suffix}").read_bytes()


def test_a_file_without_prelu_weights_asks_for_its_activation(tmp_path: Path) -> None:
    hparams = {"num_feat": 3, "num_conv": 2, "upscale": 2, "act_type": "leakyrelu"}
    model = random_model("srvggnetcompact", hparams)
    path = write(tmp_path, zip_file({"params": OrderedDict(state_dict(model))}))
    with pytest.raises(WeightsError, match=r"act_type='relu' or act_type='leakyrelu'"):
        load_weights(path)
    for act_type in ("relu", "leakyrelu"):
        assert load_model(path, act_type=act_type).hparams == model.hparams | {"act_type": act_type}
    with pytest.raises(WeightsError, match="choose one of"):
        load_weights(path, act_type="gelu")


@pytest.mark.parametrize("num_in_ch", [1, 3, 4])
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_rrdbnet_hyperparameters(num_in_ch: int, scale: int, tmp_path: Path) -> None:
    hparams = {"num_in_ch": num_in_ch, "num_out_ch": num_in_ch, "scale": scale, "num_feat": 2, "num_block": 1}
    model = random_model("rrdbnet", hparams | {"num_grow_ch": 3})
    assert load_model(write(tmp_path, zip_file(state_dict(model)))).hparams == model.hparams


def test_channels_that_only_look_unshuffled(tmp_path: Path) -> None:
    hparams = {"num_in_ch": 12, "num_out_ch": 3, "scale": 4, "num_feat": 2, "num_block": 1, "num_grow_ch": 2}
    model = random_model("rrdbnet", hparams)
    path = write(tmp_path, zip_file(state_dict(model)))
    assert load_model(path).hparams["scale"] == 2
    assert load_model(path, scale=4).hparams == load_model(path, num_in_ch=12).hparams == model.hparams
    save_model(model, tmp_path / "own.pth")
    assert load_model(tmp_path / "own.pth").hparams == model.hparams


# ---- layouts ---------------------------------------------------------------------------------------------------


def bsrgan_key(key: str) -> str:
    key = key.replace("body.", "RRDB_trunk.", 1) if key.startswith("body.") else key
    for ours, theirs in (("rdb", "RDB"), ("conv_body", "trunk_conv"), ("conv_up", "upconv"), ("conv_hr", "HRconv")):
        key = key.replace(ours, theirs)
    return key


def old_esrgan_key(key: str, num_block: int, num_upsample: int) -> str:
    module, leaf = key.rsplit(".", 1)
    if module.startswith("body."):
        _, block, dense, conv = module.split(".")
        return f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{leaf}"
    last = 3 * num_upsample
    names = {"conv_first": "0", "conv_body": f"1.sub.{num_block}", "conv_hr": last + 2, "conv_last": last + 4}
    names |= {f"conv_up{k}": 3 * k for k in range(1, num_upsample + 1)}
    return f"model.{names[module]}.{leaf}"


@pytest.mark.parametrize("num_upsample", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", ["BasicSR", "BSRGAN", "old ESRGAN"])
def test_every_rrdbnet_layout(layout: str, num_upsample: int, tmp_path: Path) -> None:
    hparams = {"num_feat": 3, "num_block": 2, "num_grow_ch": 2, "num_upsample": num_upsample}
    model = random_model("rrdbnet", hparams | {"scale": 2**num_upsample})
    rename = {"BasicSR": str, "BSRGAN": bsrgan_key, "old ESRGAN": lambda key: old_esrgan_key(key, 2, num_upsample)}
    state = {rename[layout](key): value for key, value in state_dict(model).items()}
    path = write(tmp_path, zip_file(state))
    told = {"scale": 2} if num_upsample == 1 else {}  # or 3
    loaded = load_weights(path, **told)
    assert (loaded.layout, loaded.key, loaded.model.hparams) == (layout, "bare", model.hparams)
    assert_same(model.params, loaded.model.params)


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"to_img.offset.weight": (32, 12, 1, 1), "to_img.init_pos": (1, 32, 1, 1)}, "RealPLKSR with DySample"),
        ({"feats.1.channe_mixer.0.weight": (8, 4, 3, 3)}, "PLKSR, the one that is not RealPLKSR"),
    ],
)
def test_relatives_with_dysample_are_refused_by_name(extra: dict, name: str, tmp_path: Path) -> None:
    state = state_dict(random_model("realplksr", dict(dim=4, n_blocks=1, upscale=2)))
    state |= {key: np.zeros(shape, np.float32) for key, shape in extra.items()}
    with pytest.raises(WeightsError, match=f"it looks like {name}, which is not supported"):
        load_model(write(tmp_path, zip_file(state)))


def test_esrgan_plus_is_told_by_its_1x1_convolutions(rrdbnet: Model, tmp_path: Path) -> None:
    state = {old_esrgan_key(key, 2, 2): value for key, value in state_dict(rrdbnet).items()}
    idle = {
        f"model.1.sub.{i}.RDB{j}.conv1x1.weight": np.zeros((2, 4, 1, 1), np.float32) for i in (0, 1) for j in (1, 2, 3)
    }
    model = load_model(write(tmp_path, zip_file(state | idle)))
    assert model.hparams["plus"] and list(to_state_dict(model)) != list(state_dict(rrdbnet))
    assert {*to_state_dict(model)} == {*state, *idle}  # written in the layout that other programs know
    state["model.1.sub.0.RDB1.conv1x1.weight"] = idle["model.1.sub.0.RDB1.conv1x1.weight"]
    with pytest.raises(WeightsError, match=r"do not fit rrdbnet .*5 missing: body.0.rdb2.conv1x1.weight"):
        load_model(write(tmp_path, zip_file(state)))


def dncnn_with_batch_norm(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """conv 0, ReLU, conv 2, BatchNorm 3, ReLU, conv 5, BatchNorm 6, ReLU, conv 8."""
    state = {}
    for index, (inputs, outputs) in {0: (2, 5), 2: (5, 5), 5: (5, 5), 8: (5, 2)}.items():
        state[f"model.{index}.weight"] = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
        state[f"model.{index}.bias"] = rng.normal(size=outputs).astype(np.float32)
    for index in (3, 6):
        for name in ("weight", "bias", "running_mean"):
            state[f"model.{index}.{name}"] = rng.normal(size=5).astype(np.float32)
        state[f"model.{index}.running_var"] = rng.uniform(1e-5, 2, size=5).astype(np.float32)
        state[f"model.{index}.num_batches_tracked"] = np.array(7)
    return state


def test_batch_norm_is_folded_into_the_convolutions(tmp_path: Path) -> None:
    state = dncnn_with_batch_norm(np.random.default_rng(0))
    loaded = load_weights(write(tmp_path, zip_file(OrderedDict(state))))
    assert loaded.layout == "KAIR with BatchNorm"
    assert loaded.model.hparams == network("dncnn", {"num_in_ch": 2, "num_feat": 5, "depth": 4}).hparams
    image = np.random.default_rng(1).uniform(size=(1, 9, 8, 2)).astype(np.float32)
    x = image.astype(np.float64)
    for index in (0, 2, 5, 8):  # the definition, in numpy
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        weight = state[f"model.{index}.weight"].astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        x = np.einsum("bhwiyx,oiyx->bhwo", windows, weight) + state[f"model.{index}.bias"]
        if index in (2, 5):
            norm = {
                name: state[f"model.{index + 1}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
            }
            x = (x - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-4) * norm["weight"] + norm["bias"]
        if index != 8:
            x = np.maximum(x, 0)
    expected = image - x
    np.testing.assert_allclose(loaded.model(image)[0], expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("drop", ["model.3.running_var", "model.2.bias", "model.5.weight", "model.6.running_mean"])
def test_incomplete_batch_norm_is_refused(drop: str, tmp_path: Path) -> None:
    state = dncnn_with_batch_norm(np.random.default_rng(0))
    del state[drop]
    with pytest.raises(WeightsError, match="BatchNorm"):
        load_weights(write(tmp_path, zip_file(state)))


def test_ircnn_is_not_taken_for_dncnn(tmp_path: Path) -> None:
    model = random_model("dncnn", {"num_in_ch": 1, "num_feat": 64, "depth": 7})
    path = write(tmp_path, zip_file(state_dict(model)))
    with pytest.raises(WeightsError, match=r"IRCNN.*arch='dncnn'"):
        load_weights(path)
    assert load_model(path, arch="DnCNN").hparams == model.hparams
    save_model(model, tmp_path / "own.pth")
    assert load_model(tmp_path / "own.pth").hparams == model.hparams


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("SwinIR", ["conv_first.weight", "layers.0.residual_group.blocks.0.norm1.weight", "conv_after_body.weight"]),
        ("Restormer", ["patch_embed.proj.weight", "encoder_level1.0.norm1.body.weight"]),
        ("SCUNet", ["m_head.0.weight", "m_tail.0.weight"]),
        ("discriminator", ["conv0.weight", "conv1.weight_orig", "conv9.weight"]),
    ],
)
def test_known_but_unsupported_networks_are_named(name: str, keys: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, zip_file({f"module.{key}": np.zeros((2, 2, 3, 3), np.float32) for key in keys}))
    with pytest.raises(WeightsError, match=rf"looks like .*{name}.*supported: rrdbnet, srvggnetcompact, dncnn"):
        load_weights(path)


def test_unknown_keys_are_shown(tmp_path: Path) -> None:
    state = {f"strange.{i}.weight": np.zeros(2, np.float32) for i in range(30)}
    with pytest.raises(WeightsError, match=r"strange\.0\.weight.*30 in all.*supported: rrdbnet"):
        load_weights(write(tmp_path, zip_file(state)))
    with pytest.raises(ValueError, match="unknown architecture"):
        load_weights(write(tmp_path, zip_file(state)), arch="vdsr")


def test_one_error_lists_every_fault(rrdbnet: Model, tmp_path: Path) -> None:
    state = state_dict(rrdbnet)
    del state["body.0.rdb2.conv3.weight"], state["conv_hr.bias"]
    state["extra.weight"] = np.zeros(1, np.float32)
    state["conv_body.weight"] = np.zeros((4, 4, 1, 1), np.float32)
    state["conv_up1.bias"] = np.zeros(4, np.int64)
    with pytest.raises(WeightsError) as caught:
        load_weights(write(tmp_path, zip_file(state)))
    message = str(caught.value)
    assert "file.pth" in message and "rrdbnet" in message and "\n" not in message
    assert "2 missing: body.0.rdb2.conv3.weight, conv_hr.bias" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 wrong shape: conv_body.weight is (4, 4, 1, 1), wanted (4, 4, 3, 3)" in message
    assert "1 not floating point: conv_up1.bias is int64" in message


def test_one_fault_alone_is_enough(dncnn: Model, tmp_path: Path) -> None:
    state = state_dict(dncnn)
    faults = {
        "1 missing: model.2.bias$": {key: value for key, value in state.items() if key != "model.2.bias"},
        "1 unexpected: model.1.bias$": state | {"model.1.bias": state["model.0.bias"]},
        r"1 wrong shape: model.2.bias is \(4, 1\), wanted \(4,\)$": state
        | {"model.2.bias": np.zeros((4, 1), np.float32)},
        "1 not floating point: model.2.bias is int8$": state | {"model.2.bias": np.zeros(4, np.int8)},
    }
    for message, faulty in faults.items():
        with pytest.raises(WeightsError, match=message):
            load_weights(write(tmp_path, zip_file(faulty)))


def test_long_lists_of_faults_are_cut(rrdbnet: Model, tmp_path: Path) -> None:
    state = state_dict(rrdbnet) | {f"extra.{i}": np.zeros(1, np.float32) for i in range(500)}
    with pytest.raises(WeightsError, match=r"500 unexpected: .*extra\.19, \.\.\. \(500 in all\)") as caught:
        load_weights(write(tmp_path, zip_file(state)))
    assert "extra.20" not in str(caught.value)


def test_a_stray_number_does_not_ask_for_a_giant_network(rrdbnet: Model, tmp_path: Path) -> None:
    state = state_dict(rrdbnet) | {"body.99999.rdb1.conv1.weight": np.zeros((2, 4, 3, 3), np.float32)}
    with pytest.raises(WeightsError, match=r"unexpected: .*body\.99999\.rdb1"):
        load_weights(write(tmp_path, zip_file(state)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(dncnn: Model, value: float, tmp_path: Path) -> None:
    state = state_dict(dncnn)
    state["model.2.bias"] = np.array([0, value, 0, 0], np.float32)
    with pytest.raises(WeightsError, match=r"NaN or infinite.*model\.2\.bias"):
        load_weights(write(tmp_path, zip_file(state)))


def test_float64_beyond_float32_is_refused(dncnn: Model, tmp_path: Path) -> None:
    state = state_dict(dncnn) | {"model.2.bias": np.array([0, 1e300, 0, 0])}
    with pytest.raises(WeightsError, match=r"model\.2\.bias"):
        load_weights(write(tmp_path, zip_file(state)))


# ---- where the weights are -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["params_ema", "params", "model_state_dict", "state_dict", "params-ema", "net"])
def test_known_wrappers(dncnn: Model, wrapper: str, tmp_path: Path) -> None:
    value = {"epoch": 3, "note": "x", "best": 1.5, wrapper: state_dict(dncnn), "flags": [True, None, ("a", 2**70)]}
    assert load_weights(write(tmp_path, zip_file(value))).key == wrapper


def test_the_moving_average_comes_first_and_the_choice_is_told(dncnn: Model, tmp_path: Path) -> None:
    zeros = {key: np.zeros_like(value) for key, value in state_dict(dncnn).items()}
    path = write(
        tmp_path, zip_file({"params": zeros, "params_ema": state_dict(dncnn), "optimizer": {"state": {0: zeros}}})
    )
    loaded = load_weights(path)
    assert loaded.key == "params_ema"
    assert_same(dncnn.params, loaded.model.params)
    assert not load_model(path, key="params").params["model"]["0"]["kernel"].any()
    with pytest.raises(WeightsError, match=r"key='ema'; available: params, params_ema"):
        load_weights(path, key="ema")
    with pytest.raises(WeightsError, match="no tensors at the top level"):
        load_weights(path, key="bare")


def test_other_wrappings(dncnn: Model, tmp_path: Path) -> None:
    state = state_dict(dncnn)
    assert load_weights(write(tmp_path, zip_file(state)), key="bare").key == "bare"
    assert load_weights(write(tmp_path, zip_file({"anything": state}))).key == "anything"
    assert load_weights(write(tmp_path, zip_file({"iter": 4, "anything": state, "rest": {}}))).key == "anything"
    assert load_weights(write(tmp_path, zip_file({"state_dict": {"params": state}}))).key == "state_dict/params"
    with pytest.raises(WeightsError, match=r"several sets of tensors: a, b.*key="):
        load_weights(write(tmp_path, zip_file({"a": state, "b": state})))
    for value in ([state], 3, "text", None, np.zeros(3, np.float32), {}, {"params": {}}, {"params": {"a": 1}}):
        with pytest.raises(WeightsError, match=r"wanted a dict|no tensors"):
            load_weights(write(tmp_path, zip_file(value)))


@pytest.mark.parametrize("prefix", ["module.", "netG.", "_orig_mod.", "module._orig_mod.", "net_g.module."])
def test_prefixes_before_every_key(dncnn: Model, prefix: str, tmp_path: Path) -> None:
    state = {prefix + key: value for key, value in state_dict(dncnn).items()}
    assert_same(dncnn.params, load_model(write(tmp_path, zip_file(state))).params)
    state["strange.model.0.bias"] = state.pop(prefix + "model.0.bias")
    with pytest.raises(WeightsError, match=r"unexpected|missing"):
        load_weights(write(tmp_path, zip_file(state)))


def test_a_prefix_of_an_enclosing_model(rrdbnet: Model, tmp_path: Path) -> None:
    state = {f"model.{key}": value for key, value in state_dict(rrdbnet).items()}
    assert_same(rrdbnet.params, load_model(write(tmp_path, zip_file({"state_dict": state}))).params)


def test_hyperparameters_that_contradict_the_tensors(dncnn: Model, tmp_path: Path) -> None:
    path = write(tmp_path, zip_file(state_dict(dncnn)))
    with pytest.raises(WeightsError, match="depth=9, but the tensors say 3"):
        load_weights(path, depth=9)
    with pytest.raises(WeightsError, match="no hyper-parameter 'scale'"):
        load_weights(path, scale=2)
    with pytest.raises(WeightsError, match=r"fit no supported architecture rrdbnet|do not fit rrdbnet"):
        load_weights(path, arch="rrdbnet")
    save_model(dncnn, path)
    with pytest.raises(WeightsError, match="the file says dncnn, not rrdbnet"):
        load_weights(path, arch="RRDBNet")


@pytest.mark.parametrize(
    "about",
    [
        {},
        [1],
        "rrdbnet",
        {"arch": "nonsense", "hparams": {}},
        {"arch": "dncnn", "hparams": {"depth": 10**9}},
        {"arch": "dncnn", "hparams": {"unheard": 1}},
        {"arch": "dncnn", "hparams": {"depth": "3"}},
        {"arch": "dncnn", "hparams": {1: 3}},
        {"arch": "rrdbnet", "hparams": {"num_upsample": 10**9, "scale": 10**12}},
    ],
)
def test_a_false_statement_of_a_file_about_itself(dncnn: Model, about: Any, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsError):
        load_weights(write(tmp_path, zip_file({"params": state_dict(dncnn), "kdjax": about})))
    if 1 not in (about.get("hparams", {}) if isinstance(about, dict) else {}):
        content = safetensors.numpy.save(state_dict(dncnn), metadata={"kdjax": json.dumps(about)})
        with pytest.raises(WeightsError):
            load_weights(write(tmp_path, content))
    assert time.monotonic() - start < 20


# ---- what torch files can contain ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16])
def test_precisions_become_float32(dncnn: Model, form: str, dtype: Any, tmp_path: Path) -> None:
    state = {key: value.astype(dtype) for key, value in state_dict(dncnn).items()}
    model = load_model(write(tmp_path, FORMATS[form](OrderedDict(state))))
    want = {key: value.astype(np.float32) for key, value in state.items()}
    assert_same(want, state_dict(model))


@pytest.mark.parametrize("form", FORMATS)
def test_views_parameters_and_other_values(dncnn: Model, form: str, tmp_path: Path) -> None:
    state: dict[str, Any] = OrderedDict(state_dict(dncnn))
    flat = np.concatenate(
        [np.full(5, np.nan, np.float32), *(state[key].reshape(-1) for key in ("model.0.weight", "model.0.bias"))]
    )
    state["model.0.weight"] = Strided(flat, 5, (4, 1, 3, 3), (9, 9, 3, 1))  # one storage for two tensors
    state["model.0.bias"] = Strided(flat, 5 + 36, (4,), (1,))
    kernel = state["model.2.weight"]
    state["model.2.weight"] = Strided(  # saved as kernel.permute(2, 3, 1, 0) was, and permuted back
        np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)).reshape(-1), 0, (4, 4, 3, 3), (1, 4, 48, 16)
    )
    state["model.2.bias"] = Parameter(state["model.2.bias"])
    every_type = {str(dtype): np.arange(2).astype(dtype) for dtype in STORAGES}
    content = {
        "params": state,
        "other": [every_type, np.array(3.0, np.float32), np.zeros((0, 3), np.float32), -1, 2.5, None],
    }
    assert_same(dncnn.params, load_model(write(tmp_path, FORMATS[form](content))).params)


def test_a_repeated_scalar_is_expanded(dncnn: Model, tmp_path: Path) -> None:
    state: dict[str, Any] = state_dict(dncnn)
    state["model.0.bias"] = Strided(np.array([0.25], np.float32), 0, (4,), (0,))
    bias = load_model(write(tmp_path, zip_file(state))).params["model"]["0"]["bias"]
    np.testing.assert_array_equal(bias, np.full(4, 0.25, np.float32))


def test_legacy_view_of_a_storage(dncnn: Model, tmp_path: Path) -> None:
    state: dict[str, Any] = state_dict(dncnn)
    base = np.concatenate([[np.float32(9)] * 3, state["model.0.bias"], [np.float32(9)]]).astype(np.float32)
    state["model.0.bias"] = Strided(base, 0, (4,), (1,), view=(3, 4))
    assert_same(dncnn.params, load_model(write(tmp_path, legacy_file(state))).params)
    state["model.0.bias"] = Strided(base, 1, (4,), (1,), view=(3, 4))  # leaves its view, though not the storage
    with pytest.raises(WeightsError, match="reaches scalar 5 of a storage of 4"):
        load_weights(write(tmp_path, legacy_file(state)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16])
def test_big_endian_file(dncnn: Model, dtype: Any, tmp_path: Path) -> None:
    state = {key: value.astype(dtype) for key, value in state_dict(dncnn).items()}
    model = load_model(write(tmp_path, zip_file(state, byteorder="big")))
    assert_same({key: value.astype(np.float32) for key, value in state.items()}, state_dict(model))


def test_files_of_torch_1_6_have_no_byteorder(dncnn: Model, tmp_path: Path) -> None:
    assert_same(dncnn.params, load_model(write(tmp_path, zip_file(state_dict(dncnn), byteorder=None))).params)


def test_python_2_pickles(dncnn: Model, tmp_path: Path) -> None:
    # OrderedDict([[key, value], ...]) with byte strings for keys.
    writer = Writer()
    pairs = b"".join(
        b"](U" + bytes([len(key)]) + key.encode() + writer.code(value) + b"e"
        for key, value in state_dict(dncnn).items()
    )
    program = b"\x80\x02ccollections\nOrderedDict\n](" + pairs + b"e\x85R."
    path = write(tmp_path, zip_records(program, writer.storages, byteorder="little"))
    assert_same(dncnn.params, load_model(path).params)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ""])
def test_the_content_decides_not_the_suffix(dncnn: Model, suffix: str, tmp_path: Path) -> None:
    for content in (
        zip_file(state_dict(dncnn)),
        legacy_file(state_dict(dncnn)),
        safetensors.numpy.save(state_dict(dncnn)),
    ):
        assert_same(dncnn.params, load_model(write(tmp_path, content, f"file{suffix}")).params)


# ---- safetensors -----------------------------------------------------------------------------------------------


def test_safetensors_of_other_tools(rrdbnet: Model, tmp_path: Path) -> None:
    state = state_dict(rrdbnet)
    loaded = load_weights(write(tmp_path, safetensors.numpy.save(state, metadata={"format": "pt"}), "x.safetensors"))
    assert (loaded.key, loaded.layout) == ("bare", "BasicSR")
    assert_same(rrdbnet.params, loaded.model.params)
    half = {key: value.astype(np.float16) for key, value in state.items()}
    want = {key: value.astype(np.float32) for key, value in half.items()}
    assert_same(want, state_dict(load_model(write(tmp_path, safetensors.numpy.save(half)))))


def test_safetensors_bfloat16(dncnn: Model, tmp_path: Path) -> None:
    header, data = {}, b""
    for key, value in state_dict(dncnn).items():
        raw = value.astype(BFLOAT16).tobytes()
        header[key] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    model = load_model(write(tmp_path, struct.pack("<Q", len(text)) + text + data))
    want = {key: value.astype(BFLOAT16).astype(np.float32) for key, value in state_dict(dncnn).items()}
    assert_same(want, state_dict(model))


def test_saved_safetensors_have_torch_names_and_layouts(dncnn: Model, tmp_path: Path) -> None:
    save_model(dncnn, tmp_path / "x.safetensors")
    assert_same(state_dict(dncnn), safetensors.numpy.load_file(tmp_path / "x.safetensors"))


# ---- files that mean harm --------------------------------------------------------------------------------------


class Reduce:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def touching(marker: Path, name: str) -> bytes:
    """Opcodes that run `touch marker` through the global `name` ("module\\nname\\n")."""
    return (
        b"\x80\x02c"
        + name.encode()
        + b"(X"
        + struct.pack("<I", len(str(marker)) + 6)
        + f"touch {marker}".encode()
        + b"tR."
    )


def laugh(i: int) -> bytes:
    """A list that holds the list before it ten times."""
    return b"](" + bytes([ord("h"), i]) * 10 + b"eq" + bytes([i + 1])


COPY = b"ccollections\nOrderedDict\nh\x01R0"

HOSTILE = {
    "eval": pickle.dumps(Reduce(eval, "1+1"), 2),
    "getattr chain": b"\x80\x04cbuiltins\ngetattr\n(ctorch._utils\n_rebuild_tensor_v2\n" + text("__globals__") + b"tR.",
    "a dotted name": b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.",
    "a module with a blank": b"\x80\x04" + text("torch._utils os") + text("system") + b"\x93.",
    "a name with a blank": b"\x80\x04" + text("torch._utils") + text("_rebuild_tensor_v2 os.system") + b"\x93.",
    "all in the name": b"\x80\x04" + text("") + text("torch._utils _rebuild_tensor_v2") + b"\x93.",
    "a global line with blanks": b"ctorch._utils os\nsystem\n.",
    "numpy by prefix": b"cnumpy.testing._private.utils\nrunstring\n(X\x01\x00\x00\x001}tR.",
    "numpy scalar": pickle.dumps(np.float64(1.0), 2),
    "torch by prefix": b"ctorch.hub\nload\n)R.",
    "load from bytes": b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
    "a storage that is none": b"ctorch\nEvilStorage\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "INST": b"(S'1'\nicollections\nOrderedDict\n.",
    "OBJ": b"(ccollections\nOrderedDict\no.",
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "BUILD on a name": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    "BUILD on a list": b"\x80\x02]}b.",
    "a class as value": pickle.dumps(Path("x"), 2),
    "text persistent id": b"Px\n.",
    "a persistent id of junk": b"\x80\x02NQ.",
    "a whole module": b"\x80\x02(X\x06\x00\x00\x00moduleNNNtQ.",
    "call of a storage type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "call of a string": b"\x80\x02X\x01\x00\x00\x00a)R.",
    "call without a tuple": b"\x80\x02ccollections\nOrderedDict\n]R.",
    "OrderedDict of pairs that are none": b"\x80\x02ccollections\nOrderedDict\n](K\x01e\x85R.",
    "a set": b"\x80\x04\x8f.",
    "an empty stack": b"\x80\x02.",
    "an unknown memo": b"\x80\x02h\x07.",
    "no mark": b"\x80\x02t.",
    "an unknown opcode": b"\x80\x02\xff.",
    "no stop": b"\x80\x02}",
    "a huge string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "deep nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a dict that holds itself": b"\x80\x02}q\x00X\x06\x00\x00\x00paramsh\x00s.",
    "odd dict items": b"\x80\x02}(K\x01u.",
    "millions of steps": b"\x80\x02" + b"N0" * 600_000 + b"N.",
    "copies of copies": b"\x80\x02](" + b"](NNe" * 50_000 + b"e\x85q\x010" + COPY * 2_000 + b"N.",
    "billion laughs": b"\x80\x02]q\x00" + b"".join(map(laugh, range(50))) + b".",
    "huge decimal": b"L" + b"9" * 100_000 + b"L\n.",
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_end_in_one_kind_of_error(name: str, tmp_path: Path) -> None:
    start = time.monotonic()
    legacy_head = b"".join(b"\x80\x02" + Writer().code(value) + b"." for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    program = HOSTILE[name]
    for content in (zip_records(program, {}, byteorder="little"), legacy_head + program, program):
        with pytest.raises(WeightsError, match=r"file\.pth"):
            load_weights(write(tmp_path, content))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("name", ["os\nsystem\n", "posix\nsystem\n", "subprocess\ngetoutput\n", "builtins\nexec\n"])
def test_nothing_is_executed(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    program = touching(marker, name)
    for content in (zip_records(program, {}, byteorder="little"), program):
        with pytest.raises(WeightsError, match=r"not on the list.*nothing was executed.*torch\.save"):
            load_weights(write(tmp_path, content))
    assert not marker.exists()
    pickle.loads(program) if name.startswith("posix") else None  # the program is a live one
    assert marker.exists() == name.startswith("posix")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "EvilStorage"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils os", "system"),
        ("torch._utils", "_rebuild_tensor_v2 os.system"),
        ("collections", "OrderedDict.fromkeys"),
        ("numpy", "frombuffer"),
        ("numpy.core.multiarray", "scalar"),
        ("builtins", "getattr"),
        ("__builtin__", "eval"),
        ("", "torch._utils _rebuild_tensor_v2"),
    ],
)
def test_names_are_matched_exactly(module: str, name: str, tmp_path: Path) -> None:
    for program in (
        b"c" + module.encode() + b"\n" + name.encode() + b"\n.",
        b"\x80\x04" + text(module) + text(name) + b"\x93.",
    ):
        with pytest.raises(WeightsError, match="not on the list"):
            load_weights(write(tmp_path, zip_records(program, {}, byteorder="little")))


def test_the_list_of_names_is_exact() -> None:
    storages = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()  # noqa: SIM905
    others = {("collections", "OrderedDict"), ("collections", "Counter"), ("torch", "Size")}
    others |= {("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "parameter")}
    assert set(ALLOWED) == others | {("torch", f"{name}Storage") for name in storages}


BASE = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        Strided(BASE, 0, (13,), (1,)),
        Strided(BASE, 1, (12,), (1,)),
        Strided(BASE, -1, (4,), (1,)),
        Strided(BASE, 0, (4,), (-1,)),
        Strided(BASE, 0, (-4,), (1,)),
        Strided(BASE, 0, (2, 2), (1,)),
        Strided(BASE, 0, (2,), (12,)),
        Strided(BASE, 2**63, (1,), (1,)),
        Strided(BASE, 0, (2**62, 2**62), (0, 0)),
        Strided(BASE, 0, (2**40,), (0,)),
        Strided(BASE, 0, (2**600,) * 32, (0,) * 32),
        Strided(BASE, 0, (1,) * 33, (1,) * 33),
        Strided(BASE, 0, (True,), (1,)),
        Strided(BASE, 0.0, (1,), (1,)),
        Strided(BASE, 0, ("1",), (1,)),
        Strided(BASE, 0, [4], (1,)),
        Strided(BASE, None, (4,), (1,)),
        Strided(BASE, 0, (4,), (1,), numel=4),
        Strided(BASE, 0, (13,), (1,), numel=13),
        Strided(BASE, 0, (4,), (1,), numel=-1),
        Strided(BASE, 0, (4,), (1,), numel=2**62),
    ],
    ids=str,
)
def test_tensors_outside_their_storage(tensor: Strided, tmp_path: Path) -> None:
    for form in FORMATS.values():
        with pytest.raises(WeightsError, match=r"file\.pth"):
            load_weights(write(tmp_path, form({"params": {"model.0.weight": tensor}})))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Strided(BASE[:4], 1, (4,), (1,)), "reaches scalar 5 of a storage of 4"),
        (Strided(BASE[:4], 0, (4,), (2,)), "reaches scalar 7 of a storage of 4"),
        (Strided(BASE[:4], 5, (4,), (0,)), "reaches scalar 6 of a storage of 4"),
        (Strided(BASE[:4], -1, (4,), (1,)), "no negative number"),
        (Strided(BASE[:4], 3, (4,), (-1,)), "no negative number"),
        (Strided(BASE[:4], 0, (4,), (1,), numel=5), r"x float32|5 were declared|truncated"),
    ],
    ids=str,
)
def test_no_byte_outside_a_storage_is_read(
    dncnn: Model, form: str, tensor: Strided, message: str, tmp_path: Path
) -> None:
    """In a file that is right otherwise, so that only the bounds can refuse it."""
    state: dict[str, Any] = state_dict(dncnn) | {"model.2.bias": tensor}
    with pytest.raises(WeightsError, match=message):
        load_weights(write(tmp_path, FORMATS[form](state)))


def test_legacy_storages_are_as_long_as_declared(dncnn: Model, tmp_path: Path) -> None:
    state: dict[str, Any] = state_dict(dncnn)
    content = legacy_file(state)
    last = list(state.values())[-1]
    size = last.size
    assert content.endswith(struct.pack("<q", size) + last.tobytes())
    with pytest.raises(WeightsError, match=f"has {size + 1} scalars, {size} were declared"):
        load_weights(write(tmp_path, content[: -8 - last.nbytes] + struct.pack("<q", size + 1) + last.tobytes()))
    with pytest.raises(WeightsError, match="truncated"):
        load_weights(write(tmp_path, content[:-1]))
    state["model.2.bias"] = Strided(BASE[:6], 0, (4,), (1,), view=(3, 4))
    with pytest.raises(WeightsError, match="reaches beyond its storage of 6"):
        load_weights(write(tmp_path, legacy_file(state)))


@pytest.mark.once
def test_only_scalars_are_dict_keys(tmp_path: Path) -> None:
    # Hashing a tuple recurses in C, and crashes the process when it is nested deeply enough.
    for depth in (1, 400_000):
        program = b"\x80\x02})" + b"\x85" * depth + b"Ns."
        with pytest.raises(WeightsError, match="a tuple as dict key"):
            load_weights(write(tmp_path, zip_records(program, {}, byteorder="little")))


def test_many_views_of_one_storage_cannot_fill_the_memory(tmp_path: Path) -> None:
    base = np.zeros(1000, np.float32)
    state = {f"model.{i}.weight": Strided(base, 0, (1000, 1000), (0, 1)) for i in range(1000)}
    with pytest.raises(WeightsError, match=r"unfold to 4,000,000,000 bytes, far more than the .* of the file"):
        load_weights(write(tmp_path, zip_file(state)))


def test_zip_bombs(dncnn: Model, tmp_path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(50_000_000))
    assert len(file.getvalue()) < 100_000
    with pytest.raises(WeightsError, match="compressed"):
        load_weights(write(tmp_path, file.getvalue()))
    # A record that says it is stored and is larger than the file.
    content = bytearray(zip_file(state_dict(dncnn)))
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    with pytest.raises(WeightsError, match="declare"):
        load_weights(write(tmp_path, bytes(content)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_file({}, constants__pkl=b"") + b"", "TorchScript|no tensors"),
        (zip_file({}, **{"constants.pkl": b""}), "TorchScript"),
        (zip_file({}, code____torch__=b""), "TorchScript"),
        (zip_file({}, deeper__data=b"") + b"", "no tensors"),
        (zip_file({}, **{"sub__data.pkl": b""}), "2 records data.pkl"),
        (zip_file({}, byteorder="middle"), "byteorder"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "tar file"),
        (b"hello, this is text", "starts with"),
        (b"PK\x03\x04", "damaged"),
        (b"\x80", "damaged"),
        (pickle.dumps({"a": 1}, 2), "not one that torch.save wrote"),
        (pickle.dumps([1, 2]), "not one that torch.save wrote"),
        (b"\xff" * 64, "starts with"),
        (struct.pack("<Q", 2) + b"{}", "no tensors"),
        (struct.pack("<Q", 4) + b"{xx}", "damaged .safetensors"),
        (struct.pack("<Q", 10**6) + b"{}", "starts with"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        load_weights(write(tmp_path, content))


def test_missing_records(dncnn: Model, tmp_path: Path) -> None:
    writer = Writer()
    program = b"\x80\x02" + writer.code(state_dict(dncnn)) + b"."
    del writer.storages["2"]
    with pytest.raises(WeightsError, match=r"data/2.*missing"):
        load_weights(write(tmp_path, zip_records(program, writer.storages, byteorder="little")))


def test_two_records_of_one_name(dncnn: Model, tmp_path: Path) -> None:
    file = io.BytesIO(zip_file(state_dict(dncnn)))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("any name/data/0", b"")
    with pytest.raises(WeightsError, match="two records"):
        load_weights(write(tmp_path, file.getvalue()))


@pytest.mark.parametrize("form", ["zip", "legacy", "pth", "safetensors"])
def test_damaged_files_only_ever_raise_weights_errors(dncnn: Model, form: str, tmp_path: Path) -> None:
    if form in FORMATS:
        content = FORMATS[form]({"params": OrderedDict(state_dict(dncnn)), "epoch": 3})
    else:
        save_model(dncnn, tmp_path / f"x.{form}")
        content = (tmp_path / f"x.{form}").read_bytes()
    rng = random.Random(0)
    cuts = {0, 1, 2, 4, 8, 9, 16, len(content) - 1, *(rng.randrange(len(content)) for _ in range(120))}
    damaged = [content[:cut] for cut in cuts]
    for _ in range(250):
        copy = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        damaged.append(bytes(copy))
    # Where the structure is: the pickle and the directory, not the weights.
    structure = [i for i in range(len(content)) if i < 1500 or i > len(content) - 1200]
    for _ in range(250):
        copy = bytearray(content)
        copy[rng.choice(structure)] ^= 1 << rng.randrange(8)
        damaged.append(bytes(copy))
    outcomes = {"read": 0, "refused": 0}
    start = time.monotonic()
    for copy in damaged:
        try:
            load_weights(write(tmp_path, copy))
            outcomes["read"] += 1
        except WeightsError as error:
            assert "file.pth" in str(error) and len(str(error)) < 5000
            outcomes["refused"] += 1
    assert outcomes["refused"] > len(cuts) - 10 and time.monotonic() - start < 60


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        load_weights(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match="is a folder"):
        load_weights(tmp_path)
    with pytest.raises(WeightsError, match="0 bytes"):
        load_weights(write(tmp_path, b""))
    with pytest.raises(WeightsError, match=r"nul|null|does not exist"):
        load_weights("a\0b.pth")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.pth")
        with pytest.raises(WeightsError, match="not a regular file"):
            load_weights(tmp_path / "pipe.pth")


def test_a_file_without_read_permission(dncnn: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, zip_file(state_dict(dncnn)))

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so chmod would not do
    with pytest.raises(WeightsError, match=r"file\.pth: cannot be read.*Permission denied"):
        load_weights(path)


# ---- saving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(
    dncnn: Model, suffix: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, b"old", f"x{suffix}")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(WeightsError, match="No space left"):
        save_model(dncnn, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_models_that_are_not_saved(dncnn: Model, tmp_path: Path) -> None:
    def changed(value: Any) -> Model:
        flat = traverse_util.flatten_dict(dncnn.params, sep=".")
        return Model(dncnn.network, traverse_util.unflatten_dict(flat | {"model.0.bias": value}, sep="."))

    with pytest.raises(ValueError, match=r"\.onnx; use \.pth or \.safetensors"):
        save_model(dncnn, tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match=r"NaN.*model\.0\.bias"):
        save_model(changed(np.full(4, np.nan, np.float32)), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"model\.0\.bias is \(5,\), wanted \(4,\)"):
        save_model(changed(np.zeros(5, np.float32)), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        save_model(dncnn, tmp_path / "no" / "x.pth")
    assert os.listdir(tmp_path) == []


def test_saving_needs_no_particular_order_or_kind_of_arrays(rrdbnet: Model, tmp_path: Path) -> None:
    flat = traverse_util.flatten_dict(rrdbnet.params, sep=".")
    backwards = dict(sorted(((key, np.asarray(value)) for key, value in flat.items()), reverse=True))
    other = Model(rrdbnet.network, traverse_util.unflatten_dict(backwards, sep="."))
    for suffix in (".pth", ".safetensors"):
        save_model(rrdbnet, tmp_path / f"a{suffix}")
        save_model(other, tmp_path / f"b{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_saved_tensors_are_aligned_and_in_network_order(tmp_path: Path) -> None:
    hparams = {"num_feat": 1, "num_block": 11, "num_grow_ch": 1}
    model = random_model("rrdbnet", hparams)
    save_model(model, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        for info in archive.infolist():
            name_length, extra_length = struct.unpack_from("<HH", content, info.header_offset + 26)
            assert (info.header_offset + 30 + name_length + extra_length) % 64 == 0, info.filename
        program = archive.read("archive/data.pkl")
    names = [
        "conv_first.weight",
        "conv_first.bias",
        "body.0.rdb1.conv1.weight",
        "body.9.",
        "body.10.",
        "conv_body.",
        "conv_up1.",
    ]
    positions = [program.index(name.encode()) for name in [*names, "conv_up2.", "conv_hr.", "conv_last.", "kdjax"]]
    assert positions == sorted(positions)


# ---- the tool --------------------------------------------------------------------------------------------------


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "convert_torch_weights.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.once
def test_tool(tmp_path: Path) -> None:
    model = random_model("srvggnetcompact", {"num_feat": 2, "num_conv": 1, "act_type": "relu"})
    path = write(tmp_path, zip_file({"params": state_dict(model)}))
    done = run_tool(path, tmp_path / "out.safetensors", "--key", "params", "--hparam", "act_type=relu")
    assert done.returncode == 0, done.stderr
    assert load_model(tmp_path / "out.safetensors").hparams == model.hparams
    done = run_tool("--info", tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    for fact in ("srvggnetcompact", "act_type=relu", "BasicSR", "bare", f"{count_params(model.params):,}"):
        assert fact in done.stdout
    done = run_tool(path, tmp_path / "out.pth")
    assert done.returncode == 1 and "act_type='relu'" in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and not (tmp_path / "out.pth").exists()


# ---- torch -----------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_torch_reads_what_we_write(rrdbnet: Model, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_model(rrdbnet, tmp_path / "x.pth")
    for options in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        content = torch.load(tmp_path / "x.pth", **options)
        assert content["kdjax"] == {"arch": rrdbnet.arch, "hparams": rrdbnet.hparams}
        assert_same(state_dict(rrdbnet), {key: value.numpy() for key, value in content["params"].items()})


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_we_read_what_torch_writes(dncnn: Model, zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pth"

    def saved(value: Any) -> dict[str, np.ndarray]:
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        return state_dict(load_model(path))

    arrays = state_dict(dncnn)
    state = OrderedDict((key, torch.from_numpy(value.copy())) for key, value in arrays.items())
    assert_same(arrays, saved(state))
    assert_same(
        arrays, saved({"epoch": 3, "params": state, "lr": 1e-4, "betas": (0.9, 0.99), "scalar": torch.tensor(2)})
    )
    assert_same(arrays, saved({key: torch.nn.Parameter(value) for key, value in state.items()}))
    assert_same(arrays, saved({f"module.{key}": value for key, value in state.items()}))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        converted = {key: value.to(dtype) for key, value in state.items()}
        assert_same({key: value.float().numpy() for key, value in converted.items()}, saved(converted))
    channels_last = {k: v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    assert_same(arrays, saved(channels_last))
    flat = torch.cat([value.reshape(-1) for value in state.values()])
    parts = torch.split(flat, [math.prod(value.shape) for value in arrays.values()])
    shared = {key: part.view(arrays[key].shape) for key, part in zip(arrays, parts, strict=True)}
    assert_same(arrays, saved(shared))
    network = torch.nn.Module()
    network.model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 1, 3, padding=1),
    )  # fmt: skip
    network.load_state_dict(state)
    assert_same(arrays, saved(torch.nn.DataParallel(network).state_dict()))
    torch.save(network, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"not on the list|whole pickled model"):
        load_weights(path)


@pytest.mark.torch
def test_batch_norm_folding_against_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    conv, norm, relu = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU
    layers = [conv(3, 6, 3, padding=1), relu()]
    for _ in range(3):
        layers += [conv(6, 6, 3, padding=1), norm(6, eps=1e-4), relu()]
    network = torch.nn.Sequential(*layers, conv(6, 3, 3, padding=1))
    image = torch.rand(2, 3, 16, 15)
    network(image)  # moves the running statistics away from 0 and 1
    network.eval()
    torch.save({f"model.{key}": value for key, value in network.state_dict().items()}, tmp_path / "x.pth")
    with torch.no_grad():
        expected = (image - network(image)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(
        load_model(tmp_path / "x.pth")(image.permute(0, 2, 3, 1).numpy())[0], expected, atol=1e-5
    )


# ---- architectures without reference files ---------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("arch", "hparams"),
    [
        ("nafnet", dict(width=4, middle_blk_num=2, enc_blk_nums=(1, 2), dec_blk_nums=(2, 1))),
        ("unet", dict(num_feat=4, num_level=2, num_conv=2)),
        ("unet", dict(num_feat=4, num_level=1, num_conv=2, num_conv_up=1, unshuffle=2)),
        ("edsr", dict(num_feat=4, num_block=2, upscale=3, res_scale=0.1)),
        ("edsr", dict(num_feat=4, num_block=1, upscale=1, unshuffle=2)),
        ("msrresnet", dict(num_feat=4, num_block=1, upscale=1)),
        ("dncnn", dict(num_feat=4, depth=3, unshuffle=4)),
        ("dncnn", dict(num_feat=4, depth=3, num_in_ch=1, unshuffle=2)),
        ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2, unshuffle=2)),
    ],
)
def test_export_and_import_is_the_identity(arch: str, hparams: dict, suffix: str, tmp_path: Path) -> None:
    model = random_model(arch, hparams)
    save_model(model, tmp_path / f"model{suffix}")
    loaded = load_model(tmp_path / f"model{suffix}")
    assert (loaded.arch, loaded.hparams) == (model.arch, model.hparams)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


@pytest.mark.parametrize(
    ("arch", "hparams"),
    [
        ("nafnet", dict(width=4, middle_blk_num=2, enc_blk_nums=(1, 2, 1), dec_blk_nums=(2, 1, 1))),
        ("edsr", dict(num_block=16, upscale=4)),
        ("msrresnet", dict(num_feat=4, num_block=2, upscale=3)),
        ("msrresnet", dict(num_feat=4, num_block=2, upscale=1)),
        ("dncnn", dict(num_feat=4, depth=3, unshuffle=2)),
        ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=1, unshuffle=2)),
    ],
)
def test_published_keys_tell_the_architecture(arch: str, hparams: dict, tmp_path: Path) -> None:
    """Bare state dicts, as their authors save them: nothing but names and shapes says what they are."""
    model = random_model(arch, hparams)
    loaded = load_weights(write(tmp_path, zip_file({"params": to_state_dict(model)})))
    assert (loaded.model.arch, loaded.model.hparams) == (model.arch, model.hparams)
    jax.tree.map(np.testing.assert_array_equal, loaded.model.params, model.params)


def test_names_and_shapes_of_nafnet_are_the_published_ones() -> None:
    """Some of the keys of NAFNet-SIDD-width32.pth and their shapes."""
    hparams = dict(width=32, enc_blk_nums=(2, 2, 4, 8), middle_blk_num=12, dec_blk_nums=(2, 2, 2, 2))
    shapes = torch_shapes(network("nafnet", hparams))
    assert list(shapes)[:2] == ["intro.weight", "intro.bias"]
    expected = {
        "intro.weight": (32, 3, 3, 3),
        "encoders.0.0.beta": (1, 32, 1, 1),
        "encoders.0.1.conv2.weight": (64, 1, 3, 3),
        "encoders.3.7.sca.1.weight": (256, 256, 1, 1),
        "encoders.0.0.norm1.weight": (32,),
        "middle_blks.11.conv4.weight": (1024, 512, 1, 1),
        "ups.0.0.weight": (1024, 512, 1, 1),
        "downs.3.weight": (512, 256, 2, 2),
        "decoders.3.1.gamma": (1, 32, 1, 1),
        "ending.bias": (3,),
    }
    assert {key: shapes[key] for key in expected} == expected
    assert not any("ups" in key and "bias" in key for key in shapes)
