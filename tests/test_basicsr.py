"""YAMLs of BasicSR, Real-ESRGAN and the guide, as configs and as what the training program is started with."""

import contextlib
import copy
import itertools
import json
import re
import runpy
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
import pytest
import yaml
from ml_collections import ConfigDict
from PIL import Image
from test_config import load
from test_perceptual import write_vgg

from kdjax import assets, config, models, train, validation
from kdjax.basicsr import Translation, format_account, translate
from kdjax.basicsr.keys import DEGRADATION, KEYS
from kdjax.basicsr.reader import read_yaml
from kdjax.config import ConfigError, parse
from kdjax.schedules import make_schedule
from kdjax.training import preparation
from kdjax.training.monitor import Monitor
from kdjax.weights import save_model

ROOT = Path(__file__).parent.parent
FILES = Path(__file__).parent / "basicsr"
NAMES = ("guide", "msrresnet_x4", "edsr_x4", "realesrnet_x4plus")
# Where any name is allowed: nothing is read there.
FREE = ("dist_params.", "val.metrics.", "datasets.val_2.")


def read(name: str) -> dict[str, Any]:
    """A YAML as a reader gives it; the guide's with an architecture in place of the placeholder."""
    options = yaml.safe_load((FILES / f"{name}.yml").read_text(encoding="utf-8"))
    if name == "guide":
        options["network_g"]["type"] = "EDSR"  # which takes the four keys that stand below it
    return options


def changed(options: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values, by their paths with __ for dots; an Ellipsis removes the key."""
    options = copy.deepcopy(dict(options))
    for path, value in values.items():
        *groups, name = path.split("__")
        group = options
        for part in groups:
            group = group.setdefault(part, {})
        if value is ...:
            del group[name]
        else:
            group[name] = value
    return options


def leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all keys that are no groups."""
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def refusal(options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        translate(options)
    return str(caught.value)


def check_account(options: Mapping[str, Any], translation: Translation) -> None:
    """Every key has one row, its own or that of its group, in the order of the file, and what it became exists."""
    rows = [row.key for row in translation.account]
    found = []
    for path in leaves(options):
        covering = [key for key in rows if path == key or path.startswith(f"{key}.")]
        assert len(covering) == 1, (path, covering)
        found += [key for key in covering if key not in found]
    assert found == rows
    for row in translation.account:
        assert row.becomes != "-" or row.note, row
        if row.becomes != "-" and row.value is not None:
            group = translation.config
            for part in row.becomes.split(", ")[0].split("."):
                if part in ("value", "milestones", "gamma") and (isinstance(group, float) or part not in group):
                    break  # parts of a schedule that became a number, or one of another kind
                group = group[part]


# ---- whole files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_accounted_for_once_and_the_config_is_valid(name: str) -> None:
    options = read(name)
    before = copy.deepcopy(options)
    translation = translate(options)
    assert options == before
    check_account(options, translation)
    parsed = parse(translation.config)
    assert set(translation.config) == set(config.to_dict(parsed))
    for section, values in config.to_dict(parsed).items():
        if isinstance(values, dict) and section not in ("terms", "degrade"):  # so that the command line can set all
            assert set(translation.config[section]) == set(values)
    json.dumps(translation.config)
    lines = format_account(translation.account).splitlines()
    assert len(lines) == 1 + len(translation.account) and all(map(str.startswith, lines[1:], leaves_of(translation)))


def leaves_of(translation: Translation) -> list[str]:
    return [row.key for row in translation.account]


def test_the_guide() -> None:
    translated = translate(read("guide")).config
    assert translated["name"] == "Distillation_Denoising_Student"
    assert translated["student"]["arch"] == "edsr"
    hparams = translated["student"]["hparams"]
    assert (hparams["num_feat"], hparams["num_block"], hparams["upscale"]) == (32, 8, 1)  # from `scale`
    teacher = translated["teacher"]
    assert teacher["weights"] == "experiments/pretrained_models/teacher_model.pth" and teacher["key"] == "auto"
    assert teacher["hparams"]["num_block"] == 23 and teacher["hparams"]["scale"] == 1
    terms = translated["terms"]
    assert terms["task"] == {"criterion": "charbonnier", "weight": 1.0, "eps": 1e-12}
    assert terms["output"] == {"criterion": "mse", "weight": 2.0}
    assert terms["perceptual"]["weight"] == 1.0 and terms["perceptual"]["vgg"].endswith("vgg19-dcbb9e9d.pth")
    assert terms["style"]["weight"] == 0 and terms["style"]["layer_weights"]["conv5_4"] == 1.0
    data = translated["data"]
    assert (data["gt"], data["lq"]) == ("datasets/your_paired_gt", "datasets/your_paired_lq")
    assert (data["unpaired"], data["unpaired_part"]) == ("datasets/your_unpaired_gt", 0.5)
    assert data["meta_info"] == "datasets/meta_info_paired.txt"
    assert data["unpaired_meta_info"] == "datasets/meta_info_unpaired.txt"
    assert (data["crop"], data["canvas"], data["batch_size"], data["workers"]) == (400, 400, 4, 4)
    assert data["hflip"] and data["rot"] and not data["gt_usm"]
    degrade = translated["degrade"]
    assert degrade["name"] == "realesrgan" and degrade["blur_sigma"] == (0.2, 3.0) and degrade["sinc_prob"] == 0.1
    assert degrade["kernel_list"][-1] == "plateau_aniso" and degrade["blur_kernel_size"] == 21
    assert degrade["final_sinc_prob"] == 0.8  # which the guide lacks: Real-ESRGAN's
    assert translated["val"]["gt"] == "datasets/val/gt" and translated["val"]["lq"] == "datasets/val/lq"
    assert translated["val"]["every"] == translated["checkpoint"]["every"] == 5_000
    assert translated["val"]["save_images"] == 4
    assert translated["train"]["steps"] == 250_000 and translated["train"]["ema_decay"] == 0.999
    assert translated["train"]["lr"] == {
        "name": "multistep",
        "value": 2e-4,
        "milestones": (50_000, 100_000, 150_000, 200_000),
        "gamma": 0.5,
        "warmup": 0,
    }
    assert translated["log"]["every"] == 100 and translated["log"]["tensorboard"] and translated["log"]["wandb"] == ""


@pytest.mark.parametrize("variant", ["", "quick", "debug"])
def test_the_guide_as_a_config(variant: str) -> None:
    """configs/realworld.py says what the guide's YAML says, but for what its comments explain."""
    ours, guide = load("realworld", variant).copy_and_resolve_references().to_dict(), translate(read("guide")).config
    parse(ours)
    for section, values in guide.items():
        if section not in ("terms", "teacher", "student") and isinstance(values, dict):
            assert set(ours[section]) == set(values), section
    assert ours["degrade"] == guide["degrade"]
    assert ours["val"]["degrade"] == ours["degrade"] and ours["val"]["crop"]  # whole images compile it for every size
    if variant == "":
        assert ours["train"] == guide["train"] | {"ema_warmup": True} and ours["checkpoint"] == guide["checkpoint"]
        assert ours["terms"]["task"] == guide["terms"]["task"]
        assert ours["terms"]["perceptual"]["layer_weights"] == guide["terms"]["perceptual"]["layer_weights"]
        same = ("canvas", "hflip", "rot", "workers", "unpaired_part", "gt_usm")
        assert {name: ours["data"][name] for name in same} == {name: guide["data"][name] for name in same}


def test_pairs_with_a_cosine() -> None:
    translated = translate(read("msrresnet_x4")).config
    assert translated["student"]["arch"] == "msrresnet" and translated["student"]["hparams"]["upscale"] == 4
    data = translated["data"]
    assert (data["batch_size"], data["workers"], data["filename_tmpl"]) == (32, 6, "{}x4")  # of two GPUs
    assert data["meta_info"] == "data/train/meta_info.txt" and not data["rot"] and data["hflip"]
    assert data["canvas"] == 0 and translated["degrade"] == {}
    assert translated["val"]["gt"] == "data/first/gt" and translated["val"]["save_images"] == 0
    assert translated["train"]["lr"] == {
        "name": "cosine",
        "value": 2e-4,  # which YAML 1.1 reads as text
        "steps": 1_000_000,
        "final": 1e-7,
        "warmup": 500,
    }
    assert translated["log"]["wandb"] == "mine"


def test_defaults_are_those_of_basicsr() -> None:
    translated = translate(read("edsr_x4")).config
    assert translated["train"]["ema_decay"] == 0  # no EMA without the key
    assert translated["train"]["betas"] == (0.9, 0.999) and translated["train"]["weight_decay"] == 0.01  # torch's AdamW
    assert translated["data"]["batch_size"] == 16  # on a CPU
    assert translated["seed"] == 0 and translated["terms"]["task"] == {"criterion": "l1", "weight": 1.0}
    assert translated["student"]["weights"] == "edsr_x4.pth"
    val = translated["val"]  # there is none: a look at some of the training images
    assert (val["gt"], val["lq"], val["limit"]) == ("data/train/gt", "data/train/x4", 8)


def test_clean_images_that_are_degraded() -> None:
    translated = translate(read("realesrnet_x4plus")).config
    data = translated["data"]
    assert (data["gt"], data["lq"], data["meta_info"]) == ("data/clean", "", "data/meta_info.txt")
    assert (data["crop"], data["canvas"], data["gt_usm"]) == (256, 400, True)
    assert (data["batch_size"], data["workers"]) == (12, 5) and data["per_device"]  # num_gpu: auto
    assert set(translated["degrade"]) == {"name", *DEGRADATION}
    assert translated["degrade"]["blur_sigma2"] == (0.2, 1.5) and translated["degrade"]["jpeg_range2"] == (30.0, 95.0)
    assert translated["student"]["hparams"]["scale"] == 4


def test_without_small_images_validation_degrades_as_training_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a fault at scale 4 nor plain noise at scale 1, and one size of image to compile for."""
    for name, size in (("a.png", (40, 32)), ("b.png", (24, 32))):
        Image.new("RGB", size).save(tmp_path / name)
    options = changed(
        read("realesrnet_x4plus"),
        datasets__train__dataroot_gt=str(tmp_path),
        datasets__train__meta_info=...,
        network_g={"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 1},
    )
    for val in ({}, {"datasets__val__dataroot_gt": str(tmp_path)}):
        translated = translate(changed(options, **val)).config
        config_dict = ConfigDict(translated)
        config_dict.degrade.noise_range = (1.0, 5.0)  # as the command line sets it
        assert config_dict.val.degrade.noise_range == (1.0, 5.0)
    parsed = parse(translate(options).config)
    assert (parsed.val.degrade, parsed.val.crop) == (parsed.degrade, 400)
    made = []

    def degrade(names: list, gts: list, spec: dict, scale: int) -> list[validation.Sample]:  # compiling takes long
        made.extend(gt.shape for gt in gts)
        assert spec == parsed.degrade and scale == 4
        return []

    monkeypatch.setattr(validation, "degraded_samples", degrade)
    with caplog.at_level("INFO", "kdjax"):
        monkeypatch.setattr(train.log, "propagate", True)
        Monitor(parsed.val, models.Model(models.network("srvggnetcompact", parsed.student.hparams), {}), None)
    assert made == [(400, 400, 3)] * 2
    assert "degrading 2 validation images of 1 sizes" in caplog.text
    # Small images that are there are used, and without a degradation they are needed.
    assert (
        translate(changed(options, datasets__val={"dataroot_gt": "g", "dataroot_lq": "l"})).config["val"]["degrade"]
        == {}
    )
    message = refusal(changed(read("msrresnet_x4"), datasets__val_1__dataroot_lq=...))
    assert "datasets.val.dataroot_lq: missing, and needed" in message


def test_the_canvas_is_a_multiple_of_the_scale() -> None:
    for scale, canvas in ((1, 400), (3, 402), (4, 400)):
        options = changed(read("realesrnet_x4plus"), scale=scale, network_g={"type": "SRVGGNetCompact"})
        assert translate(options).config["data"]["canvas"] == canvas


def test_multistep_restarts_as_basicsr_has_them() -> None:
    rate = make_schedule(translate(read("edsr_x4")).config["train"]["lr"])
    current = 1e-4
    for count in range(400):  # MultiStepRestartLR, written out
        if count in (0, 250):
            current = 1e-4 * {0: 1, 250: 0.5}[count]
        elif count in (200, 300):
            current *= 0.5 ** {200: 1, 300: 2}[count]
        np.testing.assert_allclose(rate(count), current, rtol=1e-6)


# ---- any key gone, misspelt or damaged -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_removed_key_has_a_default_or_is_missed_by_name(name: str) -> None:
    options = read(name)
    missed = set()
    for path in leaves(options):
        without = changed(options, **{path.replace(".", "__"): ...})
        try:
            translation = translate(without)
        except ConfigError as error:
            assert path.rpartition(".")[2] in str(error) or path.split(".")[0] in str(error), (path, str(error))
            missed.add(path)
        else:
            check_account(without, translation)
    assert {"network_g.type", "datasets.train.type", "train.optim_g.lr", "train.total_iter"} <= missed
    assert "datasets.train.gt_size" in missed or "gt_size" in options
    assert not missed & {"name", "manual_seed", "num_gpu", "train.ema_decay", "train.warmup_iter", "logger.print_freq"}


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_key_is_refused_with_the_nearest_name(name: str) -> None:
    options = read(name)
    for path in leaves(options):
        if path.startswith(FREE) or ".layer_weights." in path:
            continue
        *groups, key = path.split(".")
        wrong = key[:-1] + "q" + key[-1:]
        message = refusal(changed(options, **{"__".join([*groups, key]): ..., "__".join([*groups, wrong]): 1}))
        if path in ("network_g.type", "network_teacher.type"):  # whose keys then cannot be known
            assert f"{path}: missing" in message
            continue
        assert ".".join([*groups, wrong]) in message, path
        hints = [f"did you mean {name!r}" for name in (path.replace("val_1", "val"), key)]
        assert any(hint in message for hint in hints) or key == "rgb_mean", message


@pytest.mark.once
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "value", [None, "", "nonsense", True, -1, 0, 1e400, [], [[]], {}, {"a": 1}, float("nan")], ids=repr
)
def test_a_damaged_value_is_taken_or_refused_never_a_crash(name: str, value: Any) -> None:
    options = read(name)
    for path in leaves(options):
        damaged = changed(options, **{path.replace(".", "__"): value})
        with contextlib.suppress(ConfigError):
            translate(damaged)
    for group in ("datasets", "train", "network_g", "path", "val", "logger"):
        with contextlib.suppress(ConfigError):
            translate(changed(options, **{group: value}))


def test_null_means_not_set() -> None:
    guide = read("guide")
    translated = translate(changed(guide, val=None, logger=None, train__perceptual_opt=None, train__scheduler=None))
    assert {row.key for row in translated.account} >= {"val", "logger", "train.perceptual_opt", "train.scheduler"}
    assert translated.config["train"]["lr"] == {"name": "constant", "value": 2e-4, "warmup": 0}
    assert set(translated.config["terms"]) == {"task", "output"}


# ---- single keys -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"datasets__train__unpaired_prob": 0.25}, {"data.unpaired_part": 0.25}),
        ({"datasets__train__gt_size": 512}, {"data.crop": 512, "data.canvas": 512}),
        ({"datasets__val__dataroot_lq": ...}, {"val.degrade.name": "realesrgan", "val.crop": 0}),
        ({"high_order_degradation": False},
         {"data.unpaired": "", "data.gt": "datasets/your_paired_gt", "data.canvas": 0}),
        (
            {"datasets__train__dataroot_gt_paired": ..., "datasets__train__dataroot_lq_paired": ...,
             "datasets__train__meta_info_paired": ...},
            {"data.gt": "datasets/your_unpaired_gt", "data.lq": "", "data.unpaired": "",
             "data.meta_info": "datasets/meta_info_unpaired.txt"},
        ),
        (
            {"datasets__train__dataroot_gt_paired": ..., "datasets__train__dataroot_lq_paired": ...,
             "datasets__train__dataroot_paired": "P"},
            {"data.gt": "P", "data.lq": "P"},
        ),
        (
            {"datasets__train__dataroot_gt_paired": ..., "datasets__train__dataroot_lq_paired": ...,
             "datasets__train__meta_info_paired": ..., "datasets__train__dataroot_paired": "P"},
            {"data.gt": "P/GT", "data.lq": "P/LQ"},
        ),
        ({"noise_range": [1, 30]}, {"degrade.noise_range": (1.0, 30.0)}),  # at both places, and the same
        ({"train__optim_g__lr": "2e-4", "val__val_freq": "5e3"}, {"train.lr.value": 2e-4, "val.every": 5_000}),
        ({"train__optim_g__type": "AdamW"}, {"train.optimizer": "adamw", "train.weight_decay": 0.0}),
        ({"train__warmup_iter": 100}, {"train.lr.warmup": 100}),
        ({"train__pixel_opt": {"type": "SmoothL1Loss", "beta": 0.1}},
         {"terms.task": {"criterion": "smooth_l1", "beta": 0.1, "weight": 1.0}}),
        ({"train__pixel_opt": {"type": "MSELoss", "loss_weight": 2}},
         {"terms.task": {"criterion": "mse", "weight": 2.0}}),
        ({"train__perceptual_opt__vgg_file": "vgg.pth"},
         {"terms.perceptual.vgg": "vgg.pth", "terms.style.vgg": "vgg.pth"}),
        ({"train__perceptual_opt__style_weight": 3}, {"terms.style.weight": 3.0, "terms.perceptual.weight": 1.0}),
        ({"train__distillation_opt": {"type": "FeatureDistillation", "feature_layers": ["layer1"]}},
         {"terms.output": {"criterion": "mse", "weight": 1.0}}),
        ({"train__distillation_opt__criterion": "smooth_l1"}, {"terms.output.criterion": "smooth_l1"}),
        (
            {"train__distillation_opt__loss_weight": 5.0,
             "train__distillation_scheduler": {"milestones": [50_000, 100_000], "gamma": 0.5}},
            {"terms.output.weight": {"name": "multistep", "value": 5.0, "milestones": (50_000, 100_000), "gamma": 0.5}},
        ),
        ({"path__param_key_teacher": "params_ema"}, {"teacher.key": "params_ema"}),
        ({"network_g": {"type": "NAFNet", "width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}},
         {"student.arch": "nafnet", "student.hparams.enc_blk_nums": (1, 1)}),
        ({"network_g": {"type": "DnCNN", "num_in_ch": 3, "depth": 7}}, {"student.hparams.depth": 7}),
        ({"network_g": {"type": "SRVGGNetCompact", "num_conv": 4, "act_type": "relu"}},
         {"student.hparams.upscale": 1, "student.hparams.act_type": "relu"}),
        ({"network_g__res_scale": "1e-1"}, {"student.hparams.res_scale": 0.1}),
        ({"network_d": None, "train__gan_opt": None}, {}),
        ({"path__resume_state": None, "path__experiments_root": "x"}, {}),
    ],
)  # fmt: skip
def test_what_becomes_of_keys(values: dict, expected: dict) -> None:
    options = changed(read("guide"), **values)
    translation = translate(options)
    check_account(options, translation)
    parse(translation.config)
    for path, value in expected.items():
        found = translation.config
        for part in path.split("."):
            found = found[part]
        assert found == value, path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "RealESRGANModel"}, "model_type: 'RealESRGANModel': .*GAN training is not supported"),
        ({"network_d": {"type": "UNetDiscriminatorSN"}, "train__gan_opt": {"type": "GANLoss", "loss_weight": 0.1}},
         "GAN training is not supported; remove network_d"),
        ({"l1_gt_usm": True}, "l1_gt_usm: True: .*gt_usm"),
        ({"gt_usm": True, "high_order_degradation": False}, "gt_usm: true, but pairs are used unchanged"),
        ({"network_g__upscale": 2}, "network_g.upscale: 2, but scale is 1; they must be equal"),
        ({"network_g": {"type": "DnCNN"}, "scale": 4}, "scale: 4: dncnn does not upscale"),
        ({"network_g__num_blocks": 3}, "network_g.num_blocks: .*did you mean 'num_block'"),
        ({"network_g__num_feat": "many"}, "network_g.num_feat: .*'many' is a str, wanted int"),
        ({"network_g__rgb_mean": [0.5, 0.5, 0.5]}, "network_g.rgb_mean: .*DIV2K"),
        ({"network_g__type": "RRDBnet2"}, "network_g.type: .*did you mean 'RRDBNet'"),
        ({"network_g": {"type": "my_net:Net"}, "scale": 4}, "network_g.scale: 1, but scale is 4; use the name"),
        ({"network_teacher": {"type": "my_net:Net", "key": "params"}}, "network_teacher.key: no network takes"),
        ({"name": "../../x"}, "name: '../../x': .* the name of one folder"),
        ({"network_teacher__type": "Restormer"}, "network_teacher.type: 'Restormer': there is no such architecture"),
        ({"network_teacher__num_blk": 3}, "network_teacher.num_blk: .*did you mean 'num_block'"),
        ({"datasets__train__type": "FFHQDataset"}, "datasets.train.type: .*unknown data set 'FFHQDataset'.*Paired"),
        ({"datasets__train__io_backend__type": "lmdb"}, "datasets.train.io_backend.type: 'lmdb': .*unpack the lmdb"),
        ({"datasets__train__use_shuffle": False}, "use_shuffle: False: the order is always shuffled"),
        ({"datasets__train__mean": [0.5, 0.5, 0.5]}, "datasets.train.mean"),
        ({"datasets__train__color": "y"}, "datasets.train.color"),
        ({"datasets__train__dataroot_lq_paired": ...}, "dataroot_lq_paired: pairs need"),
        ({"datasets__train__type": "PairedImageDataset"}, "dataroot_gt_unpaired: only RealESRGANHybridDataset"),
        ({"datasets__train__type": "RealESRGANDataset"}, "dataroot_lq: RealESRGANDataset does not read it"),
        ({"datasets__train__dataroot_gt": "other"}, "dataroot_gt.*keep one of them"),
        ({"datasets__train__noise_range": [30, 1]}, "the degradation: noise_range"),
        ({"noise_range": [1, 20]}, "noise_range: .*keep one of them"),
        ({"datasets__train__gt_size": "big"}, "datasets.train.gt_size: 'big': wanted a number"),
        ({"datasets__train__gt_size": 1.5}, "datasets.train.gt_size: 1.5: wanted a whole number"),
        ({"datasets__val__type": "SingleImageDataset"}, "datasets.val.type: .*without clean images"),
        ({"datasets__vall": {"name": "x"}}, "datasets.vall: there is no such key"),
        ({"path__resume_state": "x.state"}, "path.resume_state: 'x.state': a .state file of PyTorch"),
        ({"path__pretrain_network_g": "x.pth", "path__strict_load_g": False}, "path.strict_load_g: false"),
        ({"path__strict_load_teacher": False}, "path.strict_load_teacher: false"),
        ({"path__pretrain_network_g": "x.pth", "path__param_key_g": "params"}, "path.param_key_g: 'params'"),
        ({"train__optim_g__type": "SGD"}, "unknown optimizer 'SGD'.*known: Adam, AdamW"),
        ({"train__optim_g__eps": 1e-6}, "train.optim_g.eps"),
        ({"train__scheduler__type": "StepLR"}, "unknown scheduler 'StepLR'; did you mean 'MultiStepLR'"),
        ({"train__scheduler__milestones": ...}, "train.scheduler: .*milestones"),
        ({"train__scheduler": {"type": "CosineAnnealingRestartLR", "periods": [5, 5], "restart_weights": [1, 1]}},
         r"periods: \[5, 5\]: .*write one, such as `periods: \[10\]`"),
        ({"train__scheduler__restarts": [0, 5]}, "train.scheduler.restarts: 2 restarts and 1 restart_weights"),
        ({"train__pixel_opt__reduction": "sum"}, "train.pixel_opt.reduction: 'sum': losses are means"),
        ({"train__pixel_opt__type": "WeightedTVLoss"}, "unknown pixel loss 'WeightedTVLoss'"),
        ({"train__pixel_opt": ..., "train__perceptual_opt": ..., "train__distillation_opt": ...},
         "no loss has a weight"),
        ({"train__perceptual_opt__vgg_type": "vgg16"}, "vgg_file: missing; name torchvision's file of vgg16"),
        ({"train__perceptual_opt__layer_weights": ...}, "layer_weights: missing"),
        ({"train__distillation_opt__type": "HintDistillation"}, "distillation_opt.type: .*docs/distillation.md"),
        ({"train__distillation_opt__criterion": "kl"}, "unknown criterion 'kl'"),
        ({"train__distillation_opt": ..., "train__distillation_scheduler": {"milestones": [1], "gamma": 0.5}},
         "there is no distillation_opt"),
        ({"train__distillation_scheduler": {"gamma": 0.5}}, "train.distillation_scheduler: .*milestones"),
        ({"train": ...}, "no group `train`, so it is for testing"),
        ({"train__ema_decay": 1.5}, "config.train.ema_decay=1.5"),
        ({"train": 5}, "train: it must be a group of keys"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(values: dict, message: str) -> None:
    assert re.search(message, refusal(changed(read("guide"), **values)))


def test_the_placeholder_is_refused_with_what_to_write() -> None:
    message = refusal(yaml.safe_load((FILES / "guide.yml").read_text()))
    assert message.count("\n") == 1 and "network_g.type: 'YourLightweightArchitecture'" in message
    assert "EDSR takes num_in_ch" in message and "my_package.my_net:MyNet" in message


def test_all_that_is_wrong_is_told_at_once() -> None:
    options = changed(
        read("guide"),
        model_type="ESRGANModel",
        datasets__train__gt_sise=3,
        datasets__train__gt_size="x",
        network_g__upscale=4,
        train__optim_g__type="SGD",
        train__gan_opt={"type": "GANLoss"},
        path__resume_state="x.state",
        path__strict_load_teacher=False,
    )
    lines = refusal(options).splitlines()
    starts = [line.split(":")[0].strip() for line in lines[1:]]
    assert len(starts) == 8 and set(starts) == {
        "model_type",
        "datasets.train.gt_sise",
        "datasets.train.gt_size",
        "network_g.upscale",
        "train.optim_g.type",
        "train.gan_opt",
        "path.resume_state",
        "path.strict_load_teacher",
    }


# ---- a file is data --------------------------------------------------------------------------------------------

LEVELS = list(itertools.pairwise("abcdefghij"))
HOSTILE = {
    "deep flow": "[" * 60_000,
    "deep block": "\n".join(" " * i + "a:" for i in range(700)),
    "deep sequence": "- " * 20_000,
    "laughs": "a: &a [x]\n" + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in LEVELS),
    "merged laughs": "a: &a {k: 1}\n" + "".join(f"{c}: &{c} {{<<: [{','.join(['*' + p] * 9)}]}}\n" for p, c in LEVELS),
    "long laughs": f"a: &a {'x' * 100_000}\nb: [{','.join(['*a'] * 9_000)}]",
    "itself": "a: &a [*a]",
    "undefined": "a: *b",
    "python": "a: !!python/object/apply:os.system [x]",
    "renamed tag": "%TAG !a! tag:yaml.org,2002:python/\n--- !a!object/apply:os.system [x]",
    "own tag": "a: !x 1",
    "no int": "a: !!int abc",
    "no digits": "a: !!int ''",
    "no bool": "a: !!bool abc",
    "no float": f"a: !!float {'1:1' * 60_000}",
    "timestamp": "a: !!timestamp abc",
    "int of a group": "!!int {a: 1}",
    "long number": f"a: {'9' * 100_000}",
    "long hex": f"a: 0x{'f' * 100_000}",
    "octal": "a: 0100",
    "twice": "a: 1\nb: 2\na: 3\n",
    "twice in a line": "{a: 1, a: 2}",
    "twice, quoted": "a: 1\n'a': 2",
    "truth as a key": "yes: 1",
    "a list as a key": "? [a]\n: 1",
    "documents": "a: 1\n---\nb: 2",
    "tab": "a:\n\tb: 1",
    "control": "a: \x1b[2J",
    "nul": "a: b\x00",
    "utf-16": "a: 1".encode("utf-16"),
    "latin-1": "a: caf\u00e9 x".encode("latin-1"),
    "large": "a: " + "x" * 300_000,
    "many": "".join(f"k{i}: 1\n" for i in range(6_000)),
    "anchors": f"[{','.join(f'&a{i} x' for i in range(10_001))}]",
    "unclosed": "{a: [1, 2",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_file_is_refused_in_one_line_at_a_bounded_cost(content: str | bytes) -> None:
    content = content if isinstance(content, bytes) else content.encode()
    watched = len(content) < 50_000  # it takes much longer so, and others can hardly take more than their size
    if watched:
        tracemalloc.start()
    with pytest.raises(ValueError) as caught:
        read_yaml(content)
    if watched:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20e6
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_values_are_those_of_yaml_1_1_but_for_what_nobody_means() -> None:
    for text, value in {
        "12:30:45": "12:30:45", "2024-05-01": "2024-05-01", "1:30.5": "1:30.5", "=": "=", "yes": True, "'no'": "no",
        "~": None, "1_000": 1000, "0x1F": 31, "1e-4": "1e-4", "1.0e-4": 1e-4, "!!float 1e-4": 1e-4, "0": 0, ".5": 0.5,
    }.items():  # fmt: skip
        assert read_yaml(f"a: {text}".encode()) == {"a": value}
    merged = b"\xef\xbb\xbfa: &a {k: 1, j: 2}\nb: {<<: *a, k: 3}\nc: {<<: *a}\nd: *a"
    assert read_yaml(merged) == {
        "a": {"k": 1, "j": 2},
        "b": {"k": 3, "j": 2},
        "c": {"k": 1, "j": 2},
        "d": {"k": 1, "j": 2},
    }
    for name in NAMES:
        content = (FILES / f"{name}.yml").read_bytes()
        assert read_yaml(content) == yaml.safe_load(content)


def test_a_large_file_is_accounted_for_at_a_bounded_cost() -> None:
    """Unknown and doubtful keys cost a search for the nearest each; values are shown in few characters."""
    guide = read("guide")
    unknown = {f"unknown_key_{i}": 1 for i in range(5_000)}
    for options in (guide | unknown, changed(guide, network_g=guide["network_g"] | unknown)):
        message = refusal(options)
        assert message.count("\n") <= 60 and len(message) < 60_000
    shared: list = ["x" * 1000]
    for _ in range(100):
        shared = [shared] * 4
    free = changed(guide, dist_params={"x" * 5_000: shared, "\x1b": 10**5_000, "n": "a\nb"})
    table = format_account(translate(free).account)
    assert len(table) < 60_000 and "\x1b" not in table and max(map(len, table.splitlines())) < 400
    for path in leaves(guide):
        with contextlib.suppress(ConfigError):
            translate(changed(guide, **{path.replace(".", "__"): 10**5_000}))


OWN = """
import pathlib
from flax import nnx

pathlib.Path("imported").touch()


class Net(nnx.Module):
    def __init__(self, num_in_ch: int = 3, width: int = 2, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(num_in_ch, 3, (1, 1), rngs=rngs)

    def __call__(self, image):
        return self.conv(image), {}
"""


def test_a_network_of_ones_own_is_imported_only_when_the_command_line_names_it(
    one_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "own_yaml_net.py").write_text(OWN)
    make_pairs(tmp_path / "train")
    options = small(
        network_g={"type": "own_yaml_net:Net", "width": 4},
        network_teacher={"type": "own_yaml_net:Net", "width": 4},
        datasets__train__dataroot_gt_unpaired=...,
        datasets__train__meta_info_unpaired=...,
        datasets__val__dataroot_gt="train/gt",
        datasets__val__dataroot_lq="train/lq",
        train__perceptual_opt=...,
    )
    (tmp_path / "train.yml").write_text(yaml.safe_dump(options, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    values = runpy.run_path(str(ROOT / "configs" / "basicsr.py"))["get_config"]("train.yml")
    assert re.search(r"network_g.type +own_yaml_net:Net .*only with --config.student.arch", capsys.readouterr().out)
    with pytest.raises(ConfigError, match=r"config.student.arch is empty.*--config.student.arch="):
        parse(values.to_dict())
    values.student.arch = "own_yaml_net:Net"
    with pytest.raises(ConfigError, match=r"config.teacher.hparams.arch is empty.*--config.teacher.hparams.arch="):
        parse(values.to_dict())
    assert not Path("imported").exists() and "own_yaml_net" not in sys.modules

    teacher = models.network("own_yaml_net:Net", {"width": 4}).init(jax.random.key(0))
    save_model(teacher, "teacher.pth")
    values.teacher.weights, values.teacher.hparams.arch = "teacher.pth", "own_yaml_net:Net"
    setup = preparation.prepare(parse(values.to_dict()))
    assert setup.student.hparams == {"num_in_ch": 3, "width": 4} == setup.teacher.model.hparams
    assert Path("imported").exists()


# ---- as a program ----------------------------------------------------------------------------------------------


def start(folder: Path, yml: str, *flags: str) -> subprocess.CompletedProcess:
    """The training program with a YAML of `folder`, whose paths are relative to it."""
    return programs.run("kdjax.train", "--config", f"{ROOT / 'configs' / 'basicsr.py'}:{yml}", *flags, cwd=folder)


def make_pairs(folder: Path) -> None:
    """Folders gt and lq with two small images each."""
    random = np.random.RandomState(0)
    for part in ("gt", "lq"):
        (folder / part).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.fromarray(random.randint(0, 256, (32, 40, 3), np.uint8)).save(folder / part / name)


def small(**values: Any) -> dict[str, Any]:
    """The guide's YAML with its structure kept, and small networks, folders and numbers."""
    sizes = {
        "datasets__train__dataroot_gt_paired": "train/gt",
        "datasets__train__dataroot_lq_paired": "train/lq",
        "datasets__train__gt_size": 16,
        "datasets__train__batch_size_per_gpu": 2,
        "datasets__train__num_worker_per_gpu": 0,
        "datasets__train__meta_info_paired": ...,
        "datasets__val__dataroot_gt": "val/gt",
        "datasets__val__dataroot_lq": "val/lq",
        "network_g__num_feat": 8,
        "network_g__num_block": 1,
        "network_teacher__num_block": 2,
        "path__pretrain_network_teacher": str(assets.TEACHER),
        "train__total_iter": 2,
        "train__perceptual_opt__layer_weights": {"conv1_2": 0.1},
        "logger__print_freq": 1,
        "logger__use_tb_logger": False,
    }
    return changed(read("guide"), **(sizes | values))


@pytest.mark.once
def test_the_guide_runs_as_a_program(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_pairs(tmp_path / part)
    # BasicSR's place for the VGG.
    (tmp_path / "experiments/pretrained_models").mkdir(parents=True)
    write_vgg(tmp_path / "experiments/pretrained_models/vgg19-dcbb9e9d.pth", "vgg19", "conv1_2")
    options = small(datasets__train__dataroot_gt_unpaired=..., datasets__train__meta_info_unpaired=...)
    (tmp_path / "train.yml").write_text(yaml.safe_dump(options, sort_keys=False))
    result = start(tmp_path, "train.yml", "--config.name=mine", "--config.log.diagnose=False")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("train.total_iter ") == 1  # the table, once
    folder = tmp_path / "runs/mine"
    assert {path.name for path in folder.iterdir()} >= {"student.pth", "student.safetensors", "metrics.jsonl", "val"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    values = {name for row in rows for name in row}
    assert {"loss/task", "loss/output", "loss/perceptual", "val/teacher_psnr"} <= values and "loss/style" not in values
    written = json.loads((folder / "config.json").read_text())
    assert written["student"]["arch"] == "edsr" and written["data"]["crop"] == 16


def test_pairs_and_clean_images_are_trained_on_together(tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_pairs(tmp_path / part)
    options = small(
        datasets__train__dataroot_gt_unpaired=str(assets.TRAIN_PHOTOGRAPHS),
        datasets__train__dataroot_gt_paired=str(tmp_path / "train/gt"),
        datasets__train__dataroot_lq_paired=str(tmp_path / "train/lq"),
        datasets__train__batch_size_per_gpu=4,
        datasets__train__meta_info_unpaired=...,
        train__perceptual_opt__perceptual_weight=0,
    )
    setup = preparation.prepare(parse(translate(options).config))
    assert len(setup.unpaired) == 6 and len(setup.pairs) == 2 and setup.recipe.degrade is not None
    with preparation.open_batches(setup, start_step=0) as batches:
        batch = next(batches)
    assert batch["gt"].shape == (4, 400, 400, 3) and sorted(batch["is_paired"]) == [False, False, True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "train.yml: .*No such file"),
        ("", "the file holds None; wanted a training YAML"),
        ("- a\n- b\n", r"the file holds \['a', 'b'\]; wanted a training YAML"),
        ("name: [1, 2\n", "train.yml: while parsing"),
        ("train: !!python/object/apply:os.system ['touch executed']\n", "the tag .*os.system' is not supported"),
        ("a: &a {b: *a}\ntrain: *a\n", "error: train.yml: the alias .* refers to itself"),
        ("\x00\x01", "error: train.yml: "),
        ("name: x\ntrain: {}\n", "network_g.type, .*train.total_iter: missing"),
    ],
    ids=["missing", "empty", "list", "broken", "python tag", "recursive", "binary", "hollow"],
)
def test_bad_files_end_with_one_message(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "train.yml").write_text(content)
    config_file = runpy.run_path(str(ROOT / "configs" / "basicsr.py"))
    with contextlib.chdir(tmp_path), pytest.raises(SystemExit) as caught:
        config_file["get_config"]("train.yml")
    assert re.search(message, str(caught.value)), caught.value
    assert not (tmp_path / "executed").exists()


@pytest.mark.once
def test_messages_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "guide.yml").write_text((FILES / "guide.yml").read_text())
    result = start(tmp_path, "guide.yml")
    assert result.returncode == 1 and "Traceback" not in result.stderr and result.stdout == ""
    assert result.stderr.startswith("error: guide.yml: it cannot be run as written:\n  network_g.type: ")
    (tmp_path / "pairs.yml").write_text((FILES / "msrresnet_x4.yml").read_text())
    result = start(tmp_path, "pairs.yml", "--config.log.wandb=", "--config.val.degrade.nam=1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (tmp_path / "own_yaml_net.py").write_text(OWN)
    (tmp_path / "own.yml").write_text(yaml.safe_dump(small(network_g__type="own_yaml_net:Net")))
    result = start(tmp_path, "own.yml")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: config.student.arch is empty") and not (tmp_path / "imported").exists()
    with pytest.raises(SystemExit, match="name the YAML behind a colon"):
        runpy.run_path(str(ROOT / "configs" / "basicsr.py"))["get_config"]()


# ---- the documentation -----------------------------------------------------------------------------------------


def reference() -> list[str]:
    """The rows of the table in docs/migrating.md, from the table that the program uses."""
    rows = []
    for path, key in KEYS.items():
        name = path.removeprefix("datasets.train.")
        if name not in DEGRADATION:
            becomes = key.becomes if key.becomes == "-" else f"`{key.becomes}`"
            rows.append(f"| `{path}` | {becomes} | {key.note} |")
    names = ", ".join(f"`{name}`" for name in DEGRADATION)
    rows.append(f"| {names}: at the root or in `datasets.train` | `degrade.*` | {KEYS['noise_range'].note} |")
    return [row.replace(" |  |", " | |") for row in rows]


def test_the_documentation_has_the_table_of_the_code() -> None:
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ") and line in set(reference())]
    assert table == reference(), "\n".join(reference())
