"""What a config may say, and how it is told that it may not."""

import importlib.util
import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from kdjax import config as config_lib
from kdjax.config import Config, ConfigError, parse

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str, variant: str = "") -> ConfigDict:
    """The ConfigDict of a file in `configs/`."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


# A config for each method of distillation, and the feature or loss term that makes it one.
METHODS = {
    "hint": "hint",
    "attention": "attention",
    "affinity": "affinity",
    "frequency": "wavelet",
    "soft_target": "soft_target",
    "contrastive": "contrastive",
    "label_consistency": "label_consistency",
    "ensemble": "output",
    "phases": "output",
    "perceptual": "perceptual",
    "slice": "output",
}


@pytest.mark.parametrize("variant", ["", "quick", "debug"])
@pytest.mark.parametrize("name", ["denoise", "teacher", "realworld", *METHODS])
def test_shipped_configs_are_valid(name: str, variant: str) -> None:
    if (name, variant) == ("teacher", "quick"):
        pytest.skip("there is none")
    config = parse(load(name, variant).to_dict())
    assert isinstance(config, Config)
    json.dumps(config_lib.to_dict(config))


@pytest.mark.parametrize("name", ["denoise", "teacher", "realworld", *METHODS])
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no variant 'quik'"):
        load(name, "quik")


def test_cosine_ends_where_training_ends() -> None:
    config = load("denoise", "quick")
    config.train.steps = 123
    assert config.copy_and_resolve_references().train.lr.steps == 123


def test_the_reference_config_names_every_key() -> None:
    """So that every key can be set on the command line, where only keys of the file are known."""
    given = load("denoise").to_dict()
    for section, fields in config_lib.to_dict(Config()).items():
        assert section in given
        if isinstance(fields, dict) and fields and section != "teacher":
            assert set(given[section]) == set(fields), section


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config key 'trian' does not exist; did you mean 'train'"),
        ({"train": {"stpes": 5}}, "config key 'train.stpes' does not exist; did you mean 'steps'"),
        ({"train": {"steps": "5"}}, "config.train.steps='5' is of type str; it must be of type int"),
        ({"train": {"steps": 0}}, "config.train.steps=0 must be at least 1"),
        ({"train": {"steps": True}}, "type bool"),
        ({"train": 5}, "config.train is 5; it must be a group of keys"),
        ({"train": {"lr": "fast"}}, "config.train.lr='fast'"),
        ({"train": {"ema_decay": 1.0}}, "config.train.ema_decay=1.0 must be from 0"),
        ({"train": {"betas": (0.9,)}}, "config.train.betas"),
        ({"train": {"weight_decay": float("nan")}}, "config.train.weight_decay=nan"),
        ({"val": {"sigma": 300}}, "config.val.sigma=300.0 must be from 0 to 255"),
        ({"student": {"dtype": "fp16"}}, "config.student.dtype='fp16' must be"),
        ({"data": {"crop": -1}}, "config.data.crop=-1 must be at least 1"),
        ({"seed": -1}, "config.seed=-1"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(values)


def test_whole_numbers_serve_as_floats_and_lists_as_tuples() -> None:
    config = parse({"train": {"weight_decay": 1, "betas": [0.9, 0.999], "lr": 1}})
    assert config.train.weight_decay == 1.0 and config.train.betas == (0.9, 0.999) and config.train.lr == 1.0


def test_changes_between_two_configs_are_told_by_key() -> None:
    before = json.loads(json.dumps(config_lib.to_dict(Config())))
    now = config_lib.to_dict(parse({"train": {"steps": 7}, "terms": {"task": {"weight": 1.0}}}))
    assert config_lib.changes(before, now) == [
        "terms.task: None -> {'weight': 1.0}",
        "train.steps: 250000 -> 7",
    ]


def test_every_config_is_tried() -> None:
    elsewhere = {"study_denoise", "study_few_labels", "basicsr"}  # see test_study.py and test_basicsr.py
    assert {path.stem for path in CONFIGS.glob("*.py")} == {"denoise", "teacher", "realworld", *METHODS} | elsewhere
