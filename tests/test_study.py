"""A study as a program and as an account: columns, seeds, sums."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from PIL import Image
from test_config import STUDIES, load

from kdjax import config as config_lib
from kdjax import distill, study, train
from kdjax.config import ConfigError
from kdjax.report import ladder
from kdjax.training import columns, loop, preparation
from kdjax.training.monitor import Monitor
from kdjax.weights import load_model

ROOT = Path(__file__).parent.parent
CONFIG = """
from kdjax import config_file

def get_config():
    study = config_file.load({configs!r} + ":debug")
    for name in list(study.columns):
        if name not in {columns!r}:
            del study.columns[name]
    study.seeds = {seeds!r}
    return study
"""


def start(folder: Path, columns: tuple[str, ...], seeds: tuple[int, ...], code: int = 0) -> str:
    """Runs the debug study with some of its columns."""
    path = folder / "study.py"
    path.write_text(CONFIG.format(configs=str(ROOT / "configs" / "study_denoise.py"), columns=columns, seeds=seeds))
    result = programs.run("kdjax.study", "--config", path, "--workdir", folder / "study")
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    start(folder, ("scratch", "hint", "scratch_equal_compute", "output"), (0,))
    return folder


@pytest.mark.once
def test_account(finished: Path) -> None:
    report = json.loads((finished / "study" / "results.json").read_text())
    rows = {row["column"]: row for row in report["rows"]}
    assert set(rows) == {"scratch", "hint", "output", "scratch_equal_compute"}
    assert rows["scratch"]["gain"] == 0 and rows["scratch"]["steps"] == 4
    # The same multiply-accumulates as the column with a teacher, to a step.
    equal, output = rows["scratch_equal_compute"], rows["output"]
    assert equal["gigamacs"] == pytest.approx(output["gigamacs"], rel=0.5 / equal["steps"] + 0.01)
    assert rows["hint"]["gigamacs"] > output["gigamacs"] > 2 * rows["scratch"]["gigamacs"]
    table = (finished / "study" / "results.md").read_text()
    assert all(f"| {name} |" in table for name in rows) and "29.589 dB" in table
    with Image.open(finished / "study" / "results.png") as picture:
        assert picture.size[0] > 1000 and np.asarray(picture.convert("L")).std() > 10
    student = load_model(finished / "study" / "seed0" / "hint" / "student.pth")
    assert student.arch == "dncnn"
    assert not list((finished / "study" / "seed0").glob("checkpoints*"))


@pytest.mark.once
def test_finished_runs_are_not_run_again_and_seeds_can_be_added(finished: Path) -> None:
    kept = finished / "study" / "seed0" / "output" / "student.pth"
    before = kept.stat().st_mtime_ns
    output = start(finished, ("scratch", "output"), (0, 1))
    assert "seed 1: output, scratch" in output and "seed 0: " not in output and "4 of 4 runs" in output
    assert kept.stat().st_mtime_ns == before
    report = json.loads((finished / "study" / "results.json").read_text())
    assert [row["seeds"] for row in report["rows"]] == [[0, 1], [0, 1]]


def small_study() -> study.Study:
    values = load("study_denoise", "debug").copy_and_resolve_references().to_dict()
    values |= {"columns": {name: values["columns"][name] for name in ("scratch", "hint")}, "seeds": (3,)}
    values["base"]["teacher"]["weights"] = str(programs.RANDOM_TEACHER)
    return study.parse(values)


class StopAfter:
    """As StopSignals, which a signal reached while `count` steps were done."""

    name = "SIGTERM"

    def __init__(self, count: int) -> None:
        self.left = count

    @property
    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "damaged_images")} for row in rows]


@pytest.mark.once
@pytest.mark.usefixtures("one_device")
def test_columns_trained_together_are_what_the_training_program_makes_and_survive_a_stop(tmp_path: Path) -> None:
    """One joint step gives each column the numbers of a run of its own; an interrupted study gives the same."""
    configs = {column: config for (column, _), config in small_study().runs.items()}
    study.train_together(configs, tmp_path / "broken", 1, StopAfter(3))
    assert not (tmp_path / "broken" / "hint" / "result.json").exists()
    study.train_together(configs, tmp_path / "broken", 1, StopAfter(100))
    for column, config in configs.items():
        setup = preparation.prepare(config)
        train.train(setup, Monitor(config.val, setup.student, setup.teacher), tmp_path / column)
        alone = [row for row in rows_of(tmp_path / column) if "loss/total" in row]
        together = [row for row in rows_of(tmp_path / "broken" / column) if "loss/total" in row]
        assert [row["step"] for row in together] == [2, 4]
        for ours, theirs in zip(together, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        models = [
            load_model(folder / "student.pth").params for folder in (tmp_path / "broken" / column, tmp_path / column)
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *models)


@pytest.mark.once
@pytest.mark.usefixtures("one_device")
def test_nothing_is_trained_again_when_measuring_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {column: config for (column, _), config in small_study().runs.items()}
    with monkeypatch.context() as patched:
        results = iter([{"psnr": 30.0}])  # of the first column; the second raises StopIteration
        patched.setattr(study, "measure", lambda *_: next(results))
        with pytest.raises(StopIteration):
            study.train_together(configs, tmp_path, 1, StopAfter(100))
    waiting = {c: config for c, config in configs.items() if not study.is_finished(config, tmp_path / c)}
    assert waiting == configs

    def retrained(*_: object) -> None:
        raise AssertionError("a column is trained again")

    monkeypatch.setattr(distill, "joint_step", retrained)
    study.train_together(waiting, tmp_path, 1, StopAfter(100))
    assert all(study.is_finished(config, tmp_path / column) for column, config in configs.items())
    assert not list(tmp_path.glob("checkpoints*"))


@pytest.mark.once
@pytest.mark.usefixtures("one_device")
def test_a_column_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(recipes: dict, states: loop.States, *_: object) -> tuple[loop.States, dict]:
        metrics = {c: {"finite": jax.numpy.array(c != "hint"), "loss/total": jax.numpy.array(1.0)} for c in recipes}
        return {c: dataclasses.replace(state, step=state.step + 1) for c, state in states.items()}, metrics

    monkeypatch.setattr(distill, "joint_step", diverge)
    configs = {column: config for (column, _), config in small_study().runs.items()}
    for steps in (100, 1):  # also where a signal comes before the numbers are looked at
        with pytest.raises(loop.NonFiniteLoss, match="column 'hint', seed 3: step 1: the loss or its gradient"):
            study.train_together(configs, tmp_path / str(steps), 1, StopAfter(steps))


def test_equal_compute_takes_the_steps_of_the_other_column_into_account(monkeypatch: pytest.MonkeyPatch) -> None:
    values = load("study_denoise", "debug").copy_and_resolve_references().to_dict()
    values |= {"columns": {"scratch": {}, "long": {"train": {"steps": 12}}, "equal": {"compute_of": "long"}}}
    counted = []
    monkeypatch.setattr(columns, "step_macs", lambda setup, *_: counted.append(setup) or 1_000)
    runs = study.ready(study.parse(values)).runs
    assert {(c, seed): config.train.steps for (c, seed), config in runs.items() if c == "equal"} == {
        ("equal", 0): 12,
        ("equal", 1): 12,
    }
    assert len(counted) == 2  # not again for every seed
    study.ready(study.parse(values), ["long", "scratch"])
    assert len(counted) == 2  # not for columns that are not trained
    with pytest.raises(ValueError, match="unknown column 'lang'; did you mean 'long'"):
        study.ready(study.parse(values), ["lang"])


def test_columns_of_other_images_are_trained_apart() -> None:
    values = load("study_denoise", "debug").copy_and_resolve_references().to_dict()
    hparams = {"grey": {"num_in_ch": 1}, "small": {"num_feat": 4}}
    values |= {"columns": {"scratch": {}} | {name: {"student": {"hparams": h}} for name, h in hparams.items()}}
    configs = {column: config for (column, seed), config in study.parse(values).runs.items() if not seed}
    assert [list(group) for group in study.groups(configs)] == [["scratch", "small"], ["grey"]]


def test_the_learning_rate_of_the_study_follows_its_steps() -> None:
    for variant, steps in (("", 1_500), ("quick", 300)):
        config = load("study_denoise", variant)
        assert (config.base.train.steps, config.base.train.lr.steps) == (steps, steps)
        config.base.train.steps = 10_000  # as --config.base.train.steps does
        assert config.base.train.lr.steps == 10_000


def test_a_run_with_another_config_is_refused(tmp_path: Path) -> None:
    config = next(iter(small_study().runs.values()))
    (tmp_path / "scratch").mkdir()
    values = config_lib.to_dict(config)
    for change, refused in (({"log": {"every": 7}}, False), ({"seed": 9}, True)):
        (tmp_path / "scratch" / "config.json").write_text(json.dumps(values | change))
        if refused:
            with pytest.raises(ConfigError, match=r"a different config .seed: 9 -> 3.; give a new --workdir"):
                study.is_finished(config, tmp_path / "scratch")
        else:
            assert not study.is_finished(config, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(column={}), "study key 'column' does not exist; did you mean 'columns'"),
        (dict(columns={}), "needs columns and seeds"),
        (dict(columns={"a": {"trane": {}}}), "column 'a'.*did you mean 'train'"),
        (dict(columns={"scratch": {}, "b": {"compute_of": "scrath"}}), "did you mean 'scratch'"),
        (
            dict(columns={"a": {"compute_of": "b"}, "b": {"compute_of": "c"}, "c": {}}),
            "'b', which itself has a compute_of",
        ),
        (dict(base=None), "study key 'base' is None; it must be a training config"),
        (dict(curve_images=0), "'curve_images' is 0; it must be a whole number, at least 1"),
    ],
)
def test_bad_studies_are_refused(change: dict, message: str) -> None:
    values = load("study_denoise", "debug").copy_and_resolve_references().to_dict()
    with pytest.raises(ConfigError, match=message):
        study.parse(values | change)


@pytest.mark.parametrize("variant", ["", "quick", "debug"])
@pytest.mark.parametrize("name", STUDIES)
def test_shipped_studies_are_valid(name: str, variant: str) -> None:
    values = load(name, variant).copy_and_resolve_references().to_dict()
    for column in values["columns"].values():
        column.pop("compute_of", None)  # which costs a look at both networks
    study.parse(values)


def test_a_student_of_another_architecture_has_its_own_sizes() -> None:
    """In that column the base's sizes, which have other names, are gone; in others, a column changes some of them."""
    values = load("study_start", "debug").copy_and_resolve_references().to_dict()
    changes = {"scratch": {}, "wide": {"student": {"hparams": {"num_feat": 8}}}}
    changes["rival"] = {"student": {"arch": "unet", "hparams": {"num_feat": 4}}}
    runs = study.parse(values | {"columns": changes}).runs
    sizes = {column: runs[column, 0].student.hparams for column in changes}
    assert sizes["rival"] == {"num_feat": 4} and sizes["wide"] == {**sizes["scratch"], "num_feat": 8}


def result(column: str, seed: int, psnr: float, **more: object) -> dict:
    about = {"ssim": 0.9, "psnr_student_teacher": 35.0, "steps": 10, "macs_per_step": 2e9, "curve": [[5, psnr - 1]]}
    return {"column": column, "seed": seed, "psnr": psnr} | about | more


def test_gap_closed_and_spread_are_paired_by_seed() -> None:
    results = [result("scratch", 0, 30.0), result("scratch", 1, 30.4), result("scratch", 2, 30.2)]
    results += [result("output", 0, 30.1), result("output", 1, 30.5), result("output", 2, 30.3)]
    results += [result("hint", 1, 30.2, macs_per_step=6e9)]
    scratch, output, hint = ladder.summarise(results, teacher_psnr=31.2)
    assert output.gain == pytest.approx(0.1) and output.gain_spread == pytest.approx(0, abs=1e-9)
    assert output.psnr_spread == pytest.approx(0.2) and output.gap_closed == pytest.approx(0.1)
    assert hint.seeds == (1,) and hint.gain == pytest.approx(-0.2) and hint.gap_closed == pytest.approx(-0.25)
    assert scratch.gigamacs == 20 and hint.gigamacs == 60
    text = ladder.markdown([scratch, output, hint], teacher_psnr=31.2, input_psnr=20.5)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["scratch", "output", "hint"]
    assert "+0.100 ± 0.000 | 10.0 %" in lines[3] and "| 3.00 |" in lines[4] and "hint (1)" in text


def test_a_study_without_scratch_still_reports() -> None:
    (row,) = ladder.summarise([result("output", 0, 30.0)], teacher_psnr=31.0)
    assert row.gain is None and row.gap_closed is None
    text = ladder.markdown([row], teacher_psnr=31.0, input_psnr=20.0)
    assert "| output | 30.000" in text and "Highest: output." in text


def test_some_columns_can_be_trained_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = []
    monkeypatch.setattr(study, "train_together", lambda group, *_: trained.append(list(group)))
    assert study.run(small_study(), tmp_path, ["hint"]) == "no run has finished yet"
    assert trained == [["hint"]]


def test_a_study_replaces_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("error: a teacher is needed\n")  # of a start that failed; it is continued
    study.check_folder(tmp_path)
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"holds results\.json, which kdjax would overwrite"):
        study.check_folder(tmp_path)
    folder = tmp_path / "seed3" / "hint"
    folder.mkdir(parents=True)
    (folder / "student.pth").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds student\.pth, which kdjax would overwrite"):
        study.is_finished(small_study().runs["hint", 3], folder)
