"""What a config may say, and how it is told that it may not."""

import functools
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import config as config_lib
from kdjax import config_file
from kdjax.basicsr.keys import KEYS as KEYS_OF_BASICSR
from kdjax.config import Config, ConfigError, keys, parse
from kdjax.schedules import SCHEDULES, make_schedule

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str, variant: str = "") -> ConfigDict:
    """The ConfigDict of a file in `configs/`."""
    return config_file.load(f"{CONFIGS / name}.py:{variant}")


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
    "shrink": "output",
}
STUDIES = ("study_denoise", "study_few_labels", "study_lr", "study_noisy_only", "study_start")
RECIPES = ("denoise", "teacher", "realworld", "fast", "upscale", *METHODS)


@pytest.mark.parametrize("variant", ["", "quick", "debug"])
@pytest.mark.parametrize("name", RECIPES)
def test_shipped_configs_are_valid(name: str, variant: str) -> None:
    config = parse(load(name, variant).to_dict())
    assert isinstance(config, Config)
    json.dumps(config_lib.to_dict(config))


@pytest.mark.parametrize("name", RECIPES)
def test_unknown_variants_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no variant 'quik'"):
        load(name, "quik")


def test_cosine_ends_where_training_ends() -> None:
    config = load("denoise", "quick")
    config.train.steps = 123
    assert config.copy_and_resolve_references().train.lr.steps == 123


@pytest.mark.parametrize("name", RECIPES)
def test_files_return_every_key(name: str) -> None:
    given = load(name).to_dict()
    for path, _, default in keys(Config()):
        found = functools.reduce(lambda values, part: values[part], path.split("."), given)
        assert isinstance(found, type(default)) or path == "train.lr", path


def test_every_key_says_what_it_is() -> None:
    for path, field, _ in keys(Config()):
        assert 0 < len(field.metadata["about"]) < 100 and not field.metadata["about"].endswith("."), path


def test_what_a_key_decides_is_kept_apart() -> None:
    config = parse({"data": {"crop": 32}, "val": {"sigma": 5.0}})
    assert config_lib.deciding(config.data, config_lib.SAMPLES)["crop"] == 32
    assert "batch_size" not in config_lib.deciding(config.data, config_lib.SAMPLES)
    assert config_lib.deciding(config.val, config_lib.BASELINE)["sigma"] == 5.0
    assert not {"every", "save_images"} & config_lib.deciding(config.val, config_lib.BASELINE).keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "config key 'trian' does not exist; did you mean 'train'"),
        ({"train": {"stpes": 5}}, "config key 'train.stpes' does not exist; did you mean 'steps'"),
        ({"train": {"steps": "5"}}, "config.train.steps='5' is of type str; it must be of type int"),
        ({"train": {"steps": 0}}, "config.train.steps=0 must be from 1 to 2,147,483,647"),
        ({"train": {"steps": True}}, "type bool"),
        ({"train": 5}, "config.train is 5; it must be a group of keys"),
        ({"train": {"lr": "fast"}}, "config.train.lr='fast'"),
        ({"train": {"ema_decay": 1.0}}, "config.train.ema_decay=1.0 must be from 0"),
        ({"train": {"betas": (0.9,)}}, "config.train.betas"),
        ({"train": {"weight_decay": float("nan")}}, "config.train.weight_decay=nan"),
        ({"val": {"sigma": 300}}, "config.val.sigma=300.0 must be from 0 to 255"),
        ({"student": {"dtype": "fp16"}}, "config.student.dtype='fp16' must be"),
        ({"data": {"crop": -1}}, "config.data.crop=-1 must be from 1"),
        ({"seed": 2**64 - 1}, "config.seed=18446744073709551615 must be from 0 to 4,294,967,295"),
        ({"seed": -1}, "config.seed=-1 must be from 0 to 4,294,967,295"),
        ({"train": {"lr": -1e-4}}, "config.train.lr=-0.0001 must never be negative"),
        ({"train": {"lr": {"name": "linear", "value": 1.0, "steps": 5, "final": -1.0}}}, "config.train.lr.* negative"),
        (
            {"train": {"lr": {"name": "cosine", "value": 1.0, "steps": 1e5}}},
            "config.train.lr: .*steps=100000.0 must be a",
        ),
        ({"train": {"betas": (0.9, 1 - 1e-12)}}, "config.train.betas"),  # 1 in float32
        ({"terms": {"task": 5}}, "config.terms.task is 5; it must be a group"),
        ({"terms": {"task": {"weight": object()}}}, "config.terms.task.weight=<object .* must be made of numbers"),
        ({"student": {"hparams": {1: 2}}}, "config.student.hparams has the key 1; keys must be strings"),
        ({"student": {"arch": ""}}, "config.student.arch is empty.*--config.student.arch=my_package"),
        ({"teacher": {"hparams": {"arch": ""}}}, "config.teacher.hparams.arch is empty"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(values)


def nested(path: str, value: object) -> dict:
    *groups, name = path.split(".")
    values = {name: value}
    for group in reversed(groups):
        values = {group: values}
    return values


KEYS = [(path, default) for path, _, default in keys(Config())]
# What has no place of its own in the dataclasses.
INSIDE = {
    "train.lr": ("value", "steps", "final", "gamma", "milestones", "values", "boundaries", "warmup"),
    **dict.fromkeys(("student.hparams", "teacher.hparams", "terms", "degrade", "val.degrade"), ("x",)),
}
LARGEST = float(np.finfo(np.float32).max)
NUMBERS = [
    0, -1, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, -1e-9, 5e-324,
    LARGEST, 2 * LARGEST, 1e308, math.inf, -math.inf, math.nan, True,
]  # fmt: skip


def is_harmless(value: object, most: int) -> bool:
    """Whether all numbers in it are finite in 32 bits."""
    if isinstance(value, dict):
        return all(is_harmless(each, most) for each in value.values())
    if isinstance(value, tuple | list):
        return all(is_harmless(each, most) for each in value)
    return not isinstance(value, int | float) or (abs(value) <= (most if isinstance(value, int) else LARGEST))


def parsed(path: str, value: object) -> object:
    """The value as the config has it; None where it is refused, in a short message with the key."""
    try:
        config = parse(nested(path, value))
    except ConfigError as error:
        assert f"config.{path}" in str(error) and len(str(error)) < 400, error
        return None
    return functools.reduce(getattr, path.split("."), config)


@pytest.mark.parametrize(("path", "default"), KEYS)
def test_any_number_is_harmless_or_refused_by_name(path: str, default: object) -> None:
    most = 2**32 - 1 if path == "seed" else 2**31 - 1
    for number in NUMBERS:
        values = [number, (number,), [number, number]]
        values += [{name: each} for name in INSIDE.get(path, ()) for each in (number, [number])]
        if path == "train.lr":
            values += [{"name": kind, "value": 1.0, name: number} for kind in SCHEDULES for name in INSIDE[path]]
        for value in values if isinstance(default, dict | tuple) or path == "train.lr" else [number]:
            if path == "terms" and isinstance(value, dict):
                value = {"task": value}
            if (found := parsed(path, value)) is None:
                continue
            assert is_harmless(found, most), (path, value)
            json.dumps(found, allow_nan=False)
            if path == "train.lr":
                assert np.isfinite(make_schedule(found)(2**31 - 1))


def test_seeds_give_keys_of_their_own() -> None:
    seeds = [0, 1, 2**31, 2**32 - 1]
    drawn = {tuple(jax.random.key_data(jax.random.key(parse({"seed": seed}).seed)).tolist()) for seed in seeds}
    assert len(drawn) == len(seeds)


@pytest.mark.parametrize(("path", "default"), [(path, default) for path, default in KEYS if isinstance(default, str)])
def test_any_text_is_harmless_or_refused_by_name(path: str, default: str) -> None:
    for text in (
        "a\0b",
        "\0",
        "a\nb",
        "\x1b[2J",
        "caf\udce9",
        "\ud800",
        "\u202e",
        "x" * 10**7,
        "../x",
        "/x",
        "\u00e4" * 300,
    ):
        for value in (text, {"x": text}, [text]):
            if (found := parsed(path, value)) is None:
                continue
            assert "\0" not in found and len(os.fsencode(found)) <= 4096
            json.dumps(found).encode()


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "/x",
        "x\ny",
        "x\ty",
        "x\x1b",
        "\u202ex",
        "caf\udce9",
        "x" * 201,
        "\u00e4" * 101,
    ],
)
def test_a_name_is_that_of_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"config.name=.* must be the name of one folder.*--workdir"):
        parse({"name": name})


@pytest.mark.parametrize(
    "name", ["x", "x" * 200, "001_MSRResNet_x4", "lr=1e-4, ema", "\u00e4 \u00f6", "..x", "\u8d85\u89e3\u50cf"]
)
def test_ordinary_names_are_taken(name: str) -> None:
    assert parse({"name": name}).name == name


def test_deep_groups_and_other_objects_are_refused() -> None:
    deep: dict = {}
    for _ in range(5_000):
        deep = {"a": deep}
    for path in ("student.hparams", "terms", "train.lr"):
        with pytest.raises(ConfigError, match=f"config.{path}.*groups within groups"):
            parse(nested(path, deep))
    with pytest.raises(ConfigError, match=r"config.name=.* of type dict|groups within groups"):
        parse({"name": deep})


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
    elsewhere = {"basicsr", *STUDIES}  # see test_basicsr.py and test_study.py
    assert {path.stem for path in CONFIGS.glob("*.py")} == {*RECIPES} | elsewhere


def reference() -> list[str]:
    """The rows of the table in docs/configuration.md: every key, its default, the YAML keys of BasicSR that set it."""
    counterparts: dict[str, list[str]] = {}
    for name, key in KEYS_OF_BASICSR.items():
        for path in key.becomes.split(", "):
            counterparts.setdefault(path, []).append(name.removeprefix("datasets.train."))
    rows = []
    for path, field, default in keys(Config()):
        yaml = [f"`{name}`" for name in counterparts.get(path, ())]
        rows.append(
            f"| `{path}` | `{default!r}` | {field.metadata['about']} | {', '.join(yaml)} |".replace("|  |", "| |")
        )
    return rows


def test_the_documentation_has_the_table_of_the_code() -> None:
    text = (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("| `")] == reference(), "\n".join(reference())
