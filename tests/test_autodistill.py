"""One command from a teacher to an exported student: what it finds out, what it writes, and what it refuses."""

import itertools
import json
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import programs
import pytest

from kdjax import assets, autodistill, data, shrink
from kdjax.config import parse
from kdjax.config_file import load
from kdjax.models import Model, network
from kdjax.training import task
from kdjax.weights import load_model, save_model

pytestmark = pytest.mark.once


def photographs(side: int) -> list[np.ndarray]:
    folder = Path(assets.locate("embedded", assets.TRAIN_PHOTOGRAPHS))
    images = [data.read_image(path) for path in sorted(folder.iterdir()) if path.suffix == ".png"][:6]
    return [image[:side, :side] for image in images]


@pytest.fixture(scope="module")
def teacher() -> Model:
    return load_model(programs.SMALL_TEACHER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher: Model) -> Path:
    """teacher.pth, random.pth (which does not denoise), and some photographs in photos/."""
    folder = tmp_path_factory.mktemp("distill")
    save_model(teacher, folder / "teacher.pth")
    save_model(network("dncnn", dict(num_feat=4, depth=3)).init(jax.random.key(0)), folder / "random.pth")
    (folder / "photos").mkdir()
    for i, image in enumerate(photographs(160)):
        data.write_image(folder / "photos" / f"{i}.png", image)
    return folder


def test_the_noise_is_found(teacher: Model) -> None:
    found = task.find_task(teacher, photographs(96))
    low, high = found.degrade["sigma"]
    assert found.degrade["name"] == "awgn_blind" and low <= 25 <= high and 25.0 in found.sigmas


def test_a_range_ends_where_the_quality_no_longer_falls_as_it_should() -> None:
    blind = {5.0: 38, 10.0: 35.5, 15.0: 34, 25.0: 31.5, 35.0: 30, 50.0: 28.3, 75.0: 22}
    assert task._range_around(50.0, blind) == (5.0, 50.0)
    for_25 = {5.0: 32, 10.0: 31.9, 15.0: 31.8, 25.0: 31.2, 35.0: 26, 50.0: 20, 75.0: 15}
    assert task._range_around(25.0, for_25) == (25.0, 25.0)


def test_a_teacher_that_upscales_gets_real_esrgans_degradation() -> None:
    double = network("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)).init(jax.random.key(0))
    assert task.find_task(double, []).degrade == {"name": "realesrgan"}


def test_validation_images_are_not_trained_on(folder: Path, tmp_path: Path) -> None:
    paths, held_out = autodistill.split(str(folder / "photos"), tmp_path)
    assert sorted(paths + held_out) == sorted(map(str, (folder / "photos").iterdir())) and len(held_out) == 1
    assert [Path(path).name for path in paths] == (tmp_path / "train.txt").read_text().split()


def test_damaged_images_are_left_out(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    output.mkdir()
    for i, image in enumerate(photographs(64)):
        data.write_image(images / f"{i}.png", image)
    _, (validated,) = autodistill.split(str(images), output)
    damaged = Path(validated), images / "4.png"
    for path in damaged:
        path.write_bytes(path.read_bytes()[:200])
    paths, held_out = autodistill.split(str(images), output)
    assert len(held_out) == 1 and held_out[0] not in {*paths, *map(str, damaged)}
    crops = list(itertools.islice(autodistill._crops(paths, 3), 9))
    assert all(crop.shape == (64, 64, 3) for crop in crops)
    said = capfd.readouterr().out
    assert [said.count(f"left out: {path}: ") for path in damaged] == [1, 1] and "smaller" not in said
    with pytest.raises(data.DataError, match="none of 1 images can be read"):
        next(autodistill._crops([str(images / "4.png")], 3))


def test_the_command_goes_to_the_end_and_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shrink, "ways", lambda teacher: [("num_feat",)])
    whole = load_model(folder / "teacher.pth").network.count_macs(64, 64)
    monkeypatch.setattr(shrink.Clock, "part", lambda clock, model: model.network.count_macs(64, 64) / whole)
    monkeypatch.setattr(autodistill, "samples_to_cache", lambda seconds, with_teacher, without: 16)
    output = tmp_path / "with space"
    flags = [str(folder / "teacher.pth"), "--data", str(folder / "photos"), "--output", str(output)]
    flags += ["--hours", "0.0001", "--speedup", "2", "--crops", "2"]
    (output / ".timing-1").mkdir(parents=True)  # as a plan that was killed leaves it
    (output / "train.txt").write_text("0.png")
    start, calls = autodistill._start, []

    def killed(program: str, *arguments: object, **how: object) -> subprocess.CompletedProcess:
        calls.append(program)
        if len(calls) == 1:
            return start(program, *arguments, **how)
        if len(calls) == 4:
            return subprocess.CompletedProcess([], -signal.SIGTERM)
        return programs.run(program, *arguments)

    monkeypatch.setattr(autodistill, "_start", killed)
    with pytest.raises(SystemExit) as caught:
        autodistill.main(flags)
    timed, answers, training = ["kdjax.train"] * 2, ["kdjax.cache"], ["kdjax.train"]
    assert caught.value.code == 143 and calls == timed + answers + training
    before = (output / "config.py").read_text()
    calls.clear()
    monkeypatch.setattr(
        autodistill, "_start", lambda program, *arguments: calls.append(program) or programs.run(program, *arguments)
    )
    autodistill.main(flags)
    assert calls == ["kdjax.train", "kdjax.evaluate", "kdjax.export"]
    assert (output / "config.py").read_text() == before and "is there; continuing" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"belongs to another command: kdjax distill .*teacher.pth"):
        autodistill.main([str(folder / "random.pth"), *flags[1:]])
    config = parse(load(str(output / "config.py")).to_dict())
    assert config.train.steps == 50 and config.teacher.weights == str(folder / "teacher.pth")
    assert config.teacher.cache == str(output / "answers")
    assert config.data.meta_info == str(output / "train.txt") and config.student.weights == str(output / "start.pth")
    student = load_model(output / "run" / "student.pth")
    assert 0 < student.hparams["num_feat"] < 8
    results = json.loads((output / "results" / "results.json").read_text())
    assert "student" in json.dumps(results) and (output / "results" / "report.html").exists()
    assert load_model(output / "exported" / "student.pth").network == student.network
    assert {path.name for path in output.iterdir()} - {"__pycache__", ".timing-1"} == {
        "config.py", "plan.json", "train.txt", "val", "start.pth", "answers", "run", "results", "exported",
    }  # fmt: skip


def test_a_teacher_whose_answers_are_worth_less_than_their_steps_stays_out_of_the_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """There is no time to write enough of them down, and in every step they would cost two thirds of it."""
    monkeypatch.setattr(shrink, "shrink", lambda teacher, *_, **__: (teacher, []))
    monkeypatch.setattr(autodistill, "_seconds_per_step", lambda values, output: 0.1 * len(values["terms"]) ** 1.5)
    flags = [str(folder / "teacher.pth"), "--data", str(folder / "photos"), "--hours", "0.01", "--crops", "1"]
    autodistill.plan(autodistill.make_parser().parse_args(flags), tmp_path)
    config = parse(load(str(tmp_path / "config.py")).to_dict())
    assert set(config.terms) == {"task"} and config.teacher.cache == "" and config.train.steps == 360
    assert "the teacher takes no part in the training" in capfd.readouterr().out


def test_degraded_images_alone_are_enough(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The student learns the teacher's answers, from a start that is near to them, and is compared with them."""
    monkeypatch.setattr(shrink, "ways", lambda teacher: [("num_feat",)])
    monkeypatch.setattr(shrink.Clock, "part", lambda clock, model: model.hparams["num_feat"] / 8)
    monkeypatch.setattr(autodistill, "_LEAST_ANSWERED", 24)
    monkeypatch.setattr(autodistill, "_seconds_per_step", lambda values, output: 1.0)
    monkeypatch.setattr(autodistill, "_start", lambda program, *arguments: programs.run(program, *arguments))
    output, images = tmp_path / "out", tmp_path / "noisy"
    images.mkdir()
    random = np.random.default_rng(0)
    for i, clean in enumerate(photographs(160)):
        noisy = np.clip(clean + random.normal(0, 25, clean.shape), 0, 255).astype(np.uint8)
        data.write_image(images / f"{i}.png", noisy[: 40 if i == 1 else 160])  # one is too small
    flags = ["--lq", str(images), "--output", str(output), "--hours", "0.001", "--speedup", "2"]
    autodistill.main([str(folder / "teacher.pth"), *flags])
    assert "learns what the teacher makes of 24 crops of 128x128 pixels" in (said := capfd.readouterr().out)
    assert "left out: 1 images that are smaller than 128x128" in said
    config = parse(load(str(output / "config.py")).to_dict())
    assert set(config.terms) == {"task"} and config.data.gt == str(output / "answered" / "train" / "gt")
    answers = [data.read_image(path) for path in sorted((output / "answered" / "train" / "gt").iterdir())]
    crops = [data.read_image(path) for path in sorted((output / "answered" / "train" / "lq").iterdir())]
    assert len(crops) == 24 and len({crop.tobytes() for crop in crops}) == 24
    teacher = load_model(folder / "teacher.pth")
    one = crops[5][None] / np.float32(255)
    np.testing.assert_array_equal(shrink.restored(teacher, shrink.Images.of_lq(one, one))[0], answers[5])
    rows = {row["model"]: row for row in json.loads((output / "results" / "results.json").read_text())["results"]}
    assert set(rows) == {"input", "student"} and rows["student"]["psnr"] > rows["input"]["psnr"] + 3


@pytest.mark.parametrize(
    ("teacher_file", "flags", "message", "code"),
    [
        ("random.pth", (), "does not make noisy images better, at any level of Gaussian noise", 1),
        ("nowhere.pth", (), "nowhere.pth: does not exist", 1),
        ("teacher.pth", ("--data", "nowhere"), "--data: 'nowhere' does not exist", 1),
        ("teacher.pth", ("--speedup", "1"), "--speedup 1 must be more than 1", 2),
        ("teacher.pth", ("--hours", "0"), "--hours 0 must be more than 0", 2),
        ("teacher.pth", ("--crops", "-1"), "--crops -1 must be 0 or more", 2),
    ],
)
def test_bad_input_is_one_message(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    teacher_file: str,
    flags: tuple[str, ...],
    message: str,
    code: int,
) -> None:
    arguments = [
        str(folder / teacher_file),
        "--data",
        str(folder / "photos"),
        "--output",
        str(tmp_path / "out"),
        *flags,
    ]
    with pytest.raises(SystemExit) as caught:
        autodistill.main(arguments)
    said = capsys.readouterr().err if code == 2 else str(caught.value)
    assert message in said


def test_no_name_of_a_file_becomes_code(tmp_path: Path) -> None:
    name = 'a"""\nimport os; os.mkdir("made")\n#\r\u2028.pth'
    text = autodistill.config_text(f"kdjax distill {name}", {"name": "x", "teacher.weights": name})
    (tmp_path / "config.py").write_text(text, encoding="utf-8")
    assert load(str(tmp_path / "config.py")).teacher.weights == name
    assert not Path("made").exists() and text.splitlines()[1].startswith("# Train with it")


def test_the_teacher_answers_beforehand_where_that_allows_for_more_steps() -> None:
    hour = 3600.0
    assert autodistill.samples_to_cache(hour, 0.15, 0.05) == 8 * 3600
    assert autodistill.samples_to_cache(hour, 0.055, 0.05) == 0  # the teacher costs next to nothing
    assert autodistill.samples_to_cache(hour / 60, 0.15, 0.05) == 0  # too few samples
    assert autodistill.samples_to_cache(100 * hour, 0.15, 0.05) == autodistill._MOST_CACHED
    assert autodistill.samples_to_cache(hour, 0.05, 0.051) == 0  # measured, so it may come out like this


def test_foreign_files_are_left_alone(folder: Path, tmp_path: Path) -> None:
    for names in (["mine.txt"], ["mine.txt", "train.txt"], ["val"]):  # a data set may have the last two
        output = tmp_path / "".join(names)
        output.mkdir()
        for name in names:
            (output / name).write_text("mine")
        with pytest.raises(SystemExit, match="holds other files"):
            autodistill.main([str(folder / "teacher.pth"), "--data", str(folder / "photos"), "--output", str(output)])
        assert {path.name: path.read_text() for path in output.iterdir()} == dict.fromkeys(names, "mine")
