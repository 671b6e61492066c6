"""What the tensors of a file do not tell: asked for, settled by what was published, and how it is said."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN
from weight_files import random_model, state_dict, write, zip_file

from kdjax.models import MODELS, network
from kdjax.weights import WeightsError, load_model, load_weights, parse_hparams, save_model
from kdjax.weights.convert import torch_shapes

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(num_feat=4, num_block=1)


def bare(folder: Path, arch: str, hparams: dict[str, Any]) -> Path:
    """A file of another program: nothing but tensors."""
    return write(folder, zip_file({"params": state_dict(random_model(arch, hparams))}))


# ---- asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "hparams", "name", "values"),
    [
        ("rrdbnet", dict(num_grow_ch=2, num_upsample=1, scale=3, **SMALL), "scale", (2, 3)),
        ("rrdbnet", dict(num_grow_ch=2, num_upsample=1, scale=1, **SMALL), "scale", (1, 2, 3)),
        ("edsr", dict(upscale=2, **SMALL), "res_scale", (0.1, 1)),
        ("edsr", dict(upscale=1, num_block=16), "res_scale", (0.1, 1)),
        ("edsr", dict(upscale=2, num_feat=65, num_block=16), "res_scale", (0.5, 1)),
        ("srvggnetcompact", dict(num_feat=4, num_conv=1, act_type="relu"), "act_type", ("relu", "leakyrelu")),
    ],
)
def test_what_no_tensor_tells_is_asked_for(arch: str, hparams: dict, name: str, values: tuple, tmp_path: Path) -> None:
    path = bare(tmp_path, arch, hparams)
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    for way in (f"load_model(..., {name}=", f"--hparam {name}=", f"config.teacher.hparams.{name} = "):
        assert way in str(caught.value)
    for value in values:
        assert load_model(path, **{name: value}).hparams[name] == value
    save_model(load_model(path, **{name: values[-1]}), tmp_path / "own.safetensors")  # says it itself
    loaded = load_weights(tmp_path / "own.safetensors")
    assert loaded.model.hparams[name] == values[-1] and loaded.notes == ()


@pytest.mark.once
def test_the_message_is_a_command_that_works() -> None:
    command = [sys.executable, ROOT / "tools" / "convert_torch_weights.py", "--info"]
    command += [GOLDEN / "cases" / "edsr_res_scale_0.1.pth", "--hparam", "res_scale=1e-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "res_scale=0.1" in done.stdout and "img_range=255" in done.stderr, done.stderr


def test_what_the_file_says_is_not_contradicted(tmp_path: Path) -> None:
    save_model(random_model("edsr", dict(upscale=2, res_scale=0.1, **SMALL)), tmp_path / "x.pth")
    assert load_model(tmp_path / "x.pth", res_scale=0.1).hparams["res_scale"] == 0.1
    with pytest.raises(WeightsError, match=r"res_scale=1\.0, but the file says 0\.1"):
        load_weights(tmp_path / "x.pth", res_scale=1)


def test_older_files_of_kdjax_state_fewer_hyper_parameters(tmp_path: Path) -> None:
    model = random_model("edsr", dict(upscale=2, **SMALL))
    about = {"arch": "edsr", "hparams": {"num_feat": 4, "upscale": 2}}
    loaded = load_weights(write(tmp_path, zip_file({"params": state_dict(model), "kdjax": about})))
    assert (loaded.model.hparams, loaded.notes) == (model.hparams, ())


# ---- settled by what was published -----------------------------------------------------------------------------


@pytest.mark.parametrize(("num_feat", "num_block", "res_scale"), [(64, 16, 1.0), (256, 32, 0.1)])
def test_published_sizes_of_edsr(num_feat: int, num_block: int, res_scale: float, tmp_path: Path, caplog: Any) -> None:
    net = network("edsr", dict(num_feat=num_feat, num_block=num_block, upscale=3))
    zeros = {key: np.zeros(shape, np.float16) for key, shape in torch_shapes(net).items()}
    loaded = load_weights(write(tmp_path, zip_file({"params": zeros})))
    assert loaded.model.hparams["res_scale"] == res_scale
    assert f"as in the published EDSR of {num_feat} features and {num_block} blocks" in loaded.notes[0]
    assert "img_range=255" in loaded.notes[1]
    assert all(note in caplog.text for note in loaded.notes)  # wherever the file is loaded from


@pytest.mark.parametrize(
    ("arch", "hparams", "note"),
    [
        ("rrdbnet", dict(num_grow_ch=2, scale=4, **SMALL), None),
        (
            "rrdbnet",
            dict(num_grow_ch=2, scale=2, **SMALL),
            r"12 input channels.*pixel-unshuffled by 2.*scale=2.*num_in_ch=12",
        ),
        ("rrdbnet", dict(num_grow_ch=2, scale=1, **SMALL), r"48 input channels.*pixel-unshuffled by 4.*scale=1"),
        ("srvggnetcompact", dict(num_feat=4, num_conv=1), None),
        ("srvggnetcompact", dict(num_feat=4, num_conv=1, unshuffle=2), r"12 input channels.*unshuffle=2"),
        ("dncnn", dict(depth=17), None),
        ("dncnn", dict(num_feat=4, depth=3), r"ReLU was assumed"),
        ("drunet", dict(num_feat=(2, 3, 4, 5), num_block=1), r"taken for a noise level map"),
        ("drunet", dict(num_feat=(2, 3, 4, 5), num_block=2, noise_map=False), None),
        ("msrresnet", SMALL, None),
        ("nafnet", dict(width=4, enc_blk_nums=(1,), dec_blk_nums=(1,)), None),
        ("unet", dict(num_feat=4, num_level=1), None),
        ("unet", dict(num_feat=4, num_level=1, unshuffle=2), r"12 input channels.*unshuffle=2"),
    ],
)
def test_what_is_taken_is_noted(arch: str, hparams: dict, note: str | None, tmp_path: Path) -> None:
    loaded = load_weights(bare(tmp_path, arch, hparams))
    assert loaded.model.hparams == network(arch, hparams).hparams
    if note is None:
        assert loaded.notes == ()
    else:
        (found,) = loaded.notes
        assert re.search(note, found)


# ---- RRDBNet by 3 ----------------------------------------------------------------------------------------------


def test_rrdbnet_enlarges_by_3() -> None:
    model = random_model("rrdbnet", dict(num_grow_ch=2, num_upsample=1, scale=3, **SMALL))
    x = np.random.default_rng(0).uniform(size=(1, 5, 7, 3)).astype(np.float32)
    output, features = model.network.make_apply()(model.params, x)
    assert output.shape == (1, 15, 21, 3) and features["body.0"].shape == (1, 5, 7, 4) and model.network.scale == 3
    with pytest.raises(ValueError, match="scale 3 with num_upsample=1"):
        random_model("rrdbnet", dict(scale=3))


# ---- as command lines give them --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("-1", -1), ("+2", 2), ("0.1", 0.1), ("-0.5", -0.5), ("1e-1", 0.1), ("1E2", 100.0), (".5", 0.5),
        ("2.", 2.0), ("true", True), ("False", False), ("relu", "relu"), ("1.2.3", "1.2.3"), ("nan", "nan"),
        ("1_000", "1_000"), ("1,1,1,28", (1, 1, 1, 28)), ("[1,1,1,28]", (1, 1, 1, 28)), ("(1, 2)", (1, 2)),
        ("[2]", (2,)), ("2,", (2,)), ("[]", ()), ("0.5,true,x", (0.5, True, "x")), ("a=b", "a=b"), ("-", "-"),
    ],
)  # fmt: skip
def test_values_of_a_command_line(text: str, value: Any) -> None:
    (found,) = parse_hparams([f"name={text}"]).values()
    assert found == value and type(found) is type(value)


def test_pairs_that_are_none() -> None:
    for pair in ("name", "=3", "name=", ""):
        with pytest.raises(WeightsError, match="wanted NAME=VALUE"):
            parse_hparams([pair])


def test_values_fit_the_types_of_the_architecture(tmp_path: Path) -> None:
    assert network("edsr", parse_hparams(["res_scale=1"])).hparams["res_scale"] == 1.0
    levels = parse_hparams(["enc_blk_nums=2", "dec_blk_nums=[3]"])
    assert network("nafnet", levels).hparams["enc_blk_nums"] == (2,)
    for name, value in (("res_scale", "x"), ("res_scale", True), ("res_scale", float("inf")), ("num_feat", 0.5)):
        with pytest.raises(ValueError, match=name):
            network("edsr", {name: value})


# ---- sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "hparams"),
    [
        ("rrdbnet", dict(num_block=2, num_upsample=3, scale=8)),
        ("rrdbnet", dict(num_block=2, plus=True, ranks=(0, 2, 3) * 5)),
        ("srvggnetcompact", dict(num_conv=3)),
        ("srvggnetcompact", dict(num_conv=3, act_type="relu")),
        ("dncnn", dict(depth=5)),
        ("drunet", dict(num_feat=(2, 3, 4, 5), num_block=3)),
        ("edsr", dict(num_block=2, upscale=4)),
        ("edsr", dict(num_block=3, upscale=3)),
        ("msrresnet", dict(num_block=2, upscale=1)),
        ("nafnet", dict(enc_blk_nums=(1, 2), dec_blk_nums=(0, 1), middle_blk_num=2)),
        ("span", dict(feature_channels=4)),
        ("realplksr", dict(dim=4, n_blocks=3)),
        ("mosr", dict(dim=4, n_block=3)),
        ("mosr", dict(dim=4, n_block=2, upsampler="gps", upscale=2)),
        ("rcan", dict(num_feat=4, num_group=2, num_block=3, squeeze_factor=2, upscale=3)),
        ("realplksr", dict(dim=4, n_blocks=2, use_ea=False, layer_norm=True)),
        ("unet", dict(num_level=2, num_conv=3)),
        ("unet", dict(num_level=2, num_conv=3, num_conv_up=1, unshuffle=2)),
    ],
)
def test_numbers_of_tensors(arch: str, hparams: dict) -> None:
    net = network(arch, hparams)
    assert MODELS[arch].files.num_tensors(net.hparams) == len(torch_shapes(net))
