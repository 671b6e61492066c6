"""Which of the tensors in a file are the network, and the layouts in which programs name them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from weight_files import Strided, assert_same, random_model, state_dict, write, zip_file

from kdjax.models import Model
from kdjax.weights import WeightsError, load_model, load_weights
from kdjax.weights.unwrap import EMA, GENERATOR, NEUTRAL, OTHER, UNKNOWN, kind_of

State = dict[str, Any]


@pytest.fixture(scope="module")
def rrdbnet() -> Model:
    return random_model("rrdbnet", dict(num_in_ch=1, num_out_ch=1, num_feat=4, num_block=1, num_grow_ch=2))


@pytest.fixture(scope="module")
def net(rrdbnet: Model) -> State:
    return state_dict(rrdbnet)


@pytest.fixture(scope="module")
def other(net: State) -> State:
    """Another network of the same kind, such as one that is not averaged."""
    return {key: value + 1 for key, value in net.items()}


DISCRIMINATOR = {
    "conv0.weight": np.zeros((4, 3, 3, 3), np.float32),
    "conv0.bias": np.zeros(4, np.float32),
    "conv1.weight_orig": np.zeros((8, 4, 4, 4), np.float32),
    "conv1.weight_u": np.zeros(8, np.float32),
}
OPTIMIZER = {"state": {0: {"exp_avg": np.zeros(3, np.float32), "step": 7}}, "param_groups": [{"lr": 1e-4}]}


def under(name: str, state: State) -> State:
    return {f"{name}.{key}": value for key, value in state.items()}


# ---- files of bug reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hparams", "key", "layout"),
    [
        ("averaged_model", {}, "bare", "BasicSR"),
        ("lightning_two_networks", {}, "state_dict/net_g", "BasicSR"),
        ("edsr_authors_layout", {}, "bare", "EDSR-PyTorch"),
        ("edsr_res_scale_0.1", {"res_scale": 0.1}, "params", "BasicSR"),
        ("rrdbnet_x3", {"scale": 3}, "params", "BasicSR"),
    ],
)
def test_reported_files_give_torchs_output(name: str, hparams: State, key: str, layout: str) -> None:
    loaded = load_weights(GOLDEN / "cases" / f"{name}.pth", **hparams)
    vectors = np.load(GOLDEN / "cases" / f"{name}.npz")
    assert (loaded.key, loaded.layout) == (key, layout)
    np.testing.assert_allclose(loaded.model(vectors["x"])[0], vectors["y"], atol=1e-5)


# ---- several networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ("g d *g_ema g_optim d_optim", "g_ema"),
        ("*netG netD", "netG"),
        ("netG netD *netE", "netE"),
        ("G D *G_ema", "G_ema"),
        ("generator discriminator *generator_ema discriminator_ema", "generator_ema"),
        ("discriminator *generator", "generator"),
        ("model *model_ema optimizer", "model_ema"),
        ("state_dict *state_dict_ema", "state_dict_ema"),
        ("model *ema", "ema"),
        ("net *averaged_model", "averaged_model"),
        ("*state_dict net_d optimizer_states", "state_dict"),
        ("params *params_ema discriminator", "params_ema"),
        ("*restorer perceptual_loss", "restorer"),
    ],
)
def test_dicts_of_several_networks(names: str, key: str, rrdbnet: Model, net: State, other: State, tmp_path: Path):
    content: State = {"epoch": 3, "best_psnr": 31.5, "note": "x"}
    for name in names.split():
        is_wanted, name = name[0] == "*", name.removeprefix("*")
        if is_wanted:
            content[name] = net
        elif "optim" in name:
            content[name] = OPTIMIZER
        else:
            content[name] = DISCRIMINATOR if kind_of(name) == OTHER else other
    loaded = load_weights(write(tmp_path, zip_file(content)))
    assert loaded.key == key
    assert_same(rrdbnet.params, loaded.model.params)


@pytest.mark.parametrize(
    ("names", "key"),
    [
        ("*net_g net_d", "net_g"),
        ("*net_g_ema net_g net_d net_d_ema", "net_g_ema"),
        ("*ema_model online_model", "ema_model"),
        ("*model_ema model", "model_ema"),
        ("*model loss lpips", "model"),
        ("*restorer perceptual_loss.vgg", "restorer"),
        ("*generator discriminator", "generator"),
        ("*module_ema module", "module_ema"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "state_dict"])
def test_flat_dicts_of_several_networks(
    names: str, key: str, wrapper: str, rrdbnet: Model, net: State, other: State, tmp_path: Path
) -> None:
    state: State = {"initted": np.array([True]), "step": np.array([7]), "n_averaged": np.array(3)}
    for name in names.split():
        is_wanted, name = name[0] == "*", name.removeprefix("*")
        state |= under(name, net if is_wanted else DISCRIMINATOR if kind_of(name) == OTHER else other)
    content = {wrapper: state, "optimizer_states": [OPTIMIZER], "hyper_parameters": {"lr": 1}} if wrapper else state
    loaded = load_weights(write(tmp_path, zip_file(content)))
    assert loaded.key == f"{wrapper}/{key}".removeprefix("/")
    assert_same(rrdbnet.params, loaded.model.params)
    others = [name for name in names.split() if name[0] != "*" and kind_of(name) != OTHER and name != "module"]
    for name, at in itertools.product(others, ["", f"{wrapper}/"]):  # `key` chooses another
        chosen = load_weights(write(tmp_path, zip_file(content)), key=f"{at}{name}".removeprefix("/"))
        assert_same({"x": other["conv_hr.bias"]}, {"x": chosen.model.params["conv_hr"]["bias"]})
        assert chosen.key == f"{wrapper}/{name}".removeprefix("/")


def test_the_key_that_is_told_can_be_given(rrdbnet: Model, net: State, other: State, tmp_path: Path) -> None:
    for content, key in (
        ({"state_dict": under("model.generator", net) | under("model.discriminator", DISCRIMINATOR)},
         "state_dict/model.generator"),
        ({"a": {"params_ema": net, "params": other}}, "a/params_ema"),
        (under("lit.module.a.net_g", net) | under("lit.module.a.net_d", DISCRIMINATOR), "lit.a.net_g"),
        (under("module.net_g", net) | under("module.net_d", other), "net_g"),
    ):  # fmt: skip
        path = write(tmp_path, zip_file(content))
        assert load_weights(path).key == key
        loaded = load_weights(path, key=key)
        assert loaded.key == key
        assert_same(rrdbnet.params, loaded.model.params)


def test_what_cannot_be_decided_is_asked(net: State, other: State, tmp_path: Path) -> None:
    for names in (("student", "teacher"), ("netG_A", "netG_B"), ("ema_0", "ema_1")):
        nested = write(tmp_path, zip_file(dict(zip(names, (net, other), strict=True))), "nested.pth")
        flat = write(tmp_path, zip_file({"state_dict": under(names[0], net) | under(names[1], other)}), "flat.pth")
        with pytest.raises(WeightsError, match=rf"several sets of tensors: {names[0]}, {names[1]}; .*key=.*--key"):
            load_weights(nested)
        with pytest.raises(WeightsError, match=rf"tensors: state_dict/{names[0]}, state_dict/{names[1]}; .*key="):
            load_weights(flat)
        for name, state in zip(names, (net, other), strict=True):
            for path in (nested, flat):
                bias = load_model(path, key=name).params["conv_hr"]["bias"]
                np.testing.assert_array_equal(bias, state["conv_hr.bias"])


def test_a_discriminator_is_never_taken_for_the_network(net: State, tmp_path: Path) -> None:
    for content in (
        {"netD": net, "optimizer": OPTIMIZER},
        {"net_d": net, "net_d_ema": net},
        under("discriminator", net),
        {"state_dict": under("netD", net) | under("loss.vgg", net)},
    ):
        with pytest.raises(WeightsError, match=r"no image restoration network.*only: .*key="):
            load_weights(write(tmp_path, zip_file(content)))
    assert load_weights(write(tmp_path, zip_file({"netD": net})), key="netD").key == "netD"
    with pytest.raises(WeightsError, match="looks like a discriminator"):
        load_weights(write(tmp_path, zip_file({"netD": DISCRIMINATOR})), key="netD")


def test_a_key_that_is_not_there_lists_those_that_are(net: State, other: State, tmp_path: Path) -> None:
    path = write(tmp_path, zip_file({"state_dict": under("net_g", net) | under("net_d", other), "epoch": 1}))
    with pytest.raises(WeightsError, match=r"key='ema'; available: state_dict, state_dict/net_g, state_dict/net_d;"):
        load_weights(path, key="ema")
    with pytest.raises(WeightsError, match=r"key='net'; available: bare"):
        load_weights(write(tmp_path, zip_file(net)), key="net")


def test_an_average_that_is_no_network_is_passed_over(rrdbnet: Model, net: State, tmp_path: Path) -> None:
    # Latent diffusion's LitEma takes the dots out of the names; torch_ema's is a list.
    state = under("model", net) | under("model_ema", {key.replace(".", ""): value for key, value in net.items()})
    loaded = load_weights(write(tmp_path, zip_file(state)))
    assert loaded.key == "model"
    assert_same(rrdbnet.params, loaded.model.params)
    content = {"model": net, "ema": {"decay": 0.999, "shadow_params": list(net.values())}}
    assert load_weights(write(tmp_path, zip_file(content))).key == "model"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("params_ema", EMA), ("netE", EMA), ("swa_model", EMA), ("EMA", EMA), ("generatorEma", EMA),
        ("netG", GENERATOR), ("net_g", GENERATOR), ("G", GENERATOR), ("gen", GENERATOR),
        ("netD_ema", OTHER), ("d_ema", OTHER), ("g_optim", OTHER), ("lossFn", OTHER), ("loss_fn", OTHER),
        ("params", NEUTRAL), ("model", NEUTRAL), ("body", UNKNOWN), ("conv2d", UNKNOWN), ("encoder", UNKNOWN),
        ("downs", UNKNOWN), ("middle_blks", UNKNOWN), ("gamma", UNKNOWN),
    ],
)  # fmt: skip
def test_what_names_say(name: str, kind: int) -> None:
    assert kind_of(name) == kind


# ---- what stands around and between ----------------------------------------------------------------------------


def within(part: str) -> Callable[[str], str]:
    """Puts `part` behind the first name of a key."""
    return lambda key: key.replace(".", f".{part}.", 1)


@pytest.mark.parametrize(
    "rename",
    [
        within("module"),
        within("_orig_mod"),
        lambda key: f"_orig_mod.module.{key}",
        lambda key: within("module")(f"net_g._orig_mod.{key}") if key.startswith("body") else f"net_g.{key}",
        lambda key: f"module.{key}" if key.startswith("body") else key,
        lambda key: re.sub(r"rdb([123])", r"rdb\1._checkpoint_wrapped_module", key),
        lambda key: f"restorer.net.{key}",
        lambda key: f"module.model.student.{key}",
    ],
)
def test_wrapping_modules_anywhere(rename: Callable[[str], str], rrdbnet: Model, net: State, tmp_path: Path) -> None:
    state = {rename(key): value for key, value in net.items()}
    assert_same(rrdbnet.params, load_model(write(tmp_path, zip_file(state))).params)


def test_two_tensors_that_would_be_one_are_refused(net: State, tmp_path: Path) -> None:
    state = net | {"module.conv_hr.bias": net["conv_hr.bias"] + 1}
    with pytest.raises(WeightsError, match=r"'conv_hr\.bias' twice"):
        load_weights(write(tmp_path, zip_file(state)))


@pytest.mark.parametrize(
    "counters",
    [
        {"n_averaged": np.array(5)},
        {"epoch": 3, "step": np.array(3), "best_psnr": 31.5, "name": "x", "history": [1.0, 2.0], "none": None, 7: 8},
        {"best_psnr": np.array(31.5, np.float32), "iteration": np.array([9])},
        {"total_ops": np.zeros(1), "total_params": np.zeros(1)}
        | {f"body.0.rdb{k}.{name}": np.zeros(1) for k in (1, 2, 3) for name in ("total_ops", "total_params")},
        {"conv_hr.num_batches_tracked": np.array(5)},
        {"kernel_size": (3, 3), "config": {"num_feat": 4, "nested": {"a": [1]}}},
    ],
)
@pytest.mark.parametrize("wrapper", [None, "params"])
def test_counters_beside_the_tensors(
    counters: State, wrapper: str | None, rrdbnet: Model, net: State, tmp_path: Path
) -> None:
    state = counters | net
    path = write(tmp_path, zip_file({wrapper: state} if wrapper else state))
    assert_same(rrdbnet.params, load_model(path).params)


def test_schedules_with_a_counter(rrdbnet: Model, net: State, tmp_path: Path) -> None:
    """MultiStepLR keeps its milestones in a collections.Counter, which torch.load(weights_only=True) reads, too."""
    from weight_files import Opcodes, Writer

    counter = Opcodes(b"ccollections\nCounter\n" + Writer().code({30: 1, 60: 1}) + b"\x85R")
    content = {"net": net, "scheduler": {"milestones": counter, "gamma": 0.1}}
    assert_same(rrdbnet.params, load_model(write(tmp_path, zip_file(content))).params)


# ---- layouts ---------------------------------------------------------------------------------------------------

MEAN = np.array([0.4488, 0.4371, 0.4040], np.float32)


def authors_edsr(model: Model, img_range: float = 255.0) -> State:
    """A state dict as the program of EDSR's authors saves it."""

    def rename(key: str) -> str:
        key = re.sub(r"^body\.(\d+)\.conv1", r"body.\1.body.0", key)
        key = re.sub(r"^body\.(\d+)\.conv2", r"body.\1.body.2", key)
        key = re.sub(r"^upsample\.(\d+)", r"tail.0.\1", key)
        names = {
            "conv_first": "head.0",
            "conv_last": "tail.1",
            "conv_after_body": f"body.{model.hparams['num_block']}",
        }
        module, leaf = key.rsplit(".", 1)
        return f"{names.get(module, module)}.{leaf}"

    shift = np.eye(3, dtype=np.float32)[..., None, None]
    shifts = {"sub_mean.weight": shift, "sub_mean.bias": -img_range * MEAN}
    shifts |= {"add_mean.weight": shift, "add_mean.bias": img_range * MEAN}
    return {rename(key): value for key, value in state_dict(model).items()} | shifts


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
def test_edsr_as_its_authors_save_it(upscale: int, tmp_path: Path) -> None:
    model = random_model("edsr", dict(num_feat=4, num_block=2, upscale=upscale))
    path = write(tmp_path, zip_file(authors_edsr(model)))
    loaded = load_weights(path)
    assert (loaded.layout, loaded.model.hparams) == ("EDSR-PyTorch", model.hparams)
    assert_same(model.params, loaded.model.params)
    assert "res_scale=1 was assumed" in loaded.notes[0] and len(loaded.notes) == 1
    assert load_weights(path, res_scale=0.1).notes == ()


def test_the_mean_shifts_tell_the_range(tmp_path: Path) -> None:
    model = random_model("edsr", dict(num_feat=4, num_block=1, upscale=2))
    state = authors_edsr(model, img_range=1.0)
    assert load_model(write(tmp_path, zip_file(state))).hparams["img_range"] == 1.0
    with pytest.raises(WeightsError, match=r"img_range=255\.0, but the tensors say 1\.0"):
        load_weights(write(tmp_path, zip_file(state)), img_range=255)
    without = {key: value for key, value in state.items() if "mean" not in key}
    loaded = load_weights(write(tmp_path, zip_file(without)))
    assert loaded.model.hparams["img_range"] == 255.0 and any("img_range=255" in note for note in loaded.notes)
    for key, value in (
        ("sub_mean.bias", np.array([-0.5, -0.5, -0.5], np.float32)),
        ("add_mean.bias", 2 * MEAN),
        ("sub_mean.weight", 2 * np.eye(3, dtype=np.float32)[..., None, None]),
        ("add_mean.weight", np.zeros(3, np.float32)),
        ("sub_mean.bias", np.full(3, np.nan, np.float32)),
    ):
        with pytest.raises(WeightsError, match="does not shift colours by the mean of DIV2K"):
            load_weights(write(tmp_path, zip_file(state | {key: value})))


def test_mmediting_and_kair_name_things_otherwise(tmp_path: Path) -> None:
    edsr = random_model("edsr", dict(num_feat=4, num_block=2, upscale=4, img_range=1.0))
    state = {re.sub(r"^upsample\.(\d)", lambda m: f"upsample.{int(m[1]) // 2}.upsample_conv", key): value
             for key, value in state_dict(edsr).items()}  # fmt: skip
    content = {"meta": {}, "state_dict": under("generator", state) | under("discriminator", DISCRIMINATOR)}
    loaded = load_weights(write(tmp_path, zip_file(content)), res_scale=1)
    assert (loaded.layout, loaded.key, loaded.notes) == ("MMEditing", "state_dict/generator", ())
    assert loaded.model.hparams == edsr.hparams
    assert_same(edsr.params, loaded.model.params)

    msrresnet = random_model("msrresnet", dict(num_feat=4, num_block=2, upscale=4))
    for layout, rules in {
        "MMEditing": ((r"^body", "trunk_net"), (r"^upconv(\d)", r"upsample\1.upsample_conv")),
        "KAIR": ((r"^body", "recon_trunk"), (r"^conv_hr", "HRconv")),
    }.items():
        state = state_dict(msrresnet)
        for pattern, name in rules:
            state = {re.sub(pattern, name, key): value for key, value in state.items()}
        loaded = load_weights(write(tmp_path, zip_file(state)))
        assert (loaded.layout, loaded.model.hparams) == (layout, msrresnet.hparams)
        assert_same(msrresnet.params, loaded.model.params)


def dncnn_pytorch(rng: np.random.Generator, *, first_bias: bool) -> State:
    """Two convolutions with BatchNorm between a first and a last one, without biases: SaoYan's DnCNN-PyTorch."""
    state = {}
    for index, (inputs, outputs) in {0: (2, 5), 2: (5, 5), 5: (5, 5), 8: (5, 2)}.items():
        state[f"dncnn.{index}.weight"] = rng.normal(size=(outputs, inputs, 3, 3)).astype(np.float32)
    if first_bias:
        state["dncnn.0.bias"] = rng.normal(size=5).astype(np.float32)
    for index in (3, 6):
        for name in ("weight", "bias", "running_mean"):
            state[f"dncnn.{index}.{name}"] = rng.normal(size=5).astype(np.float32)
        state[f"dncnn.{index}.running_var"] = rng.uniform(1e-5, 1e-3, size=5).astype(np.float32)
        state[f"dncnn.{index}.num_batches_tracked"] = np.array(7)
    return state


@pytest.mark.parametrize(("first_bias", "eps"), [(False, 1e-5), (True, 1e-4)])
def test_dncnn_in_the_layouts_of_its_pytorch_versions(first_bias: bool, eps: float, tmp_path: Path) -> None:
    state = dncnn_pytorch(np.random.default_rng(0), first_bias=first_bias)
    loaded = load_weights(write(tmp_path, zip_file(under("module", state))))
    assert loaded.layout == "DnCNN-PyTorch with BatchNorm"
    x = image = np.random.default_rng(1).uniform(size=(1, 6, 7, 2))
    for index in (0, 2, 5, 8):  # the definition, in numpy
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
        )
        x = np.einsum("bhwiyx,oiyx->bhwo", windows, state[f"dncnn.{index}.weight"].astype(np.float64))
        x = x + state.get(f"dncnn.{index}.bias", 0)
        if index in (2, 5):
            gamma, beta, mean, variance = (
                state[f"dncnn.{index + 1}.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
            )
            x = (x - mean) / np.sqrt(variance.astype(np.float64) + eps) * gamma + beta
        if index != 8:
            x = np.maximum(x, 0)
    expected = image - x
    np.testing.assert_allclose(loaded.model(image)[0], expected, atol=2e-6 * np.abs(expected).max())


def test_dncnn_without_batch_norm_under_another_name(tmp_path: Path) -> None:
    model = random_model("dncnn", dict(num_in_ch=1, num_feat=4, depth=3))
    state = {key.replace("model.", "dncnn."): value for key, value in state_dict(model).items()}
    loaded = load_weights(write(tmp_path, zip_file(state)))
    assert loaded.layout == "DnCNN-PyTorch"
    assert_same(model.params, loaded.model.params)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("MDSR", ["head.0.weight", "pre_process.0.0.body.0.weight", "body.0.body.0.weight", "tail.0.weight"]),
        (
            "RCAN with an un-shuffled",
            ["head.1.weight", "body.0.body.0.body.0.weight", "body.0.body.0.body.3.conv_du.0.weight"],
        ),
        ("SRResNet", ["model.0.weight", "model.1.sub.0.res.0.weight", "model.1.sub.0.res.2.weight"]),
        ("weight normalisation", ["head.0.weight_g", "head.0.weight_v", "body.0.body.0.weight_g"]),
    ],
)
def test_relatives_that_are_not_supported_are_named(name: str, keys: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, zip_file({key: np.zeros((2, 2, 3, 3), np.float32) for key in keys}))
    with pytest.raises(WeightsError, match=rf"looks like .*{name}.*not supported"):
        load_weights(path)


# ---- messages --------------------------------------------------------------------------------------------------


def test_messages_are_safe_to_print(net: State, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x00\u202egnp.\x9b31m"
    tensor = Strided(np.zeros(4, np.float32), 0, (4,), (1,))
    for content in (
        net | {evil: tensor, f"{evil}.{evil}": tensor},
        {evil: net, f"{evil}2": net},
        {f"state.{evil}.weight": tensor, f"{evil}.weight": tensor},
        {"kdjax": {"arch": f"{evil}:Net", "hparams": {}}, "params": net},
        {"kdjax": {"arch": "rrdbnet", "hparams": {evil: 3}}, "params": net},
        {"kdjax": {"arch": "rrdbnet", "hparams": {"scale": evil}}, "params": net},
        {"netD": {evil: net}, f"net_d{evil}": net},
        [evil],
    ):
        with pytest.raises(WeightsError) as caught:
            load_weights(write(tmp_path, zip_file(content)))
        assert not set(str(caught.value)) & set("\x1b\x07\x00\u202e\x9b")
        assert len(str(caught.value)) < 3000


def test_names_of_files_are_safe_to_print(net: State, tmp_path: Path) -> None:
    for name in ("a\x1b[2J\u202e.pth", "b\udcff\udce9.pth", "Bücher 写真.pth"):
        try:
            path = write(tmp_path, b"nothing", name)
        except OSError:  # a file system that refuses such names
            path = tmp_path / name
        with pytest.raises(WeightsError) as caught:
            load_weights(path)
        str(caught.value).encode()
        assert not set(str(caught.value)) & set("\x1b\u202e")
        with pytest.raises(WeightsError) as caught:
            load_weights(tmp_path / f"{name}.missing.pth")
        str(caught.value).encode()
    assert "Bücher 写真" in str(caught.value)
