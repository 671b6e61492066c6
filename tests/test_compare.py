"""The comparison as a program: names and options of several models, files, and what is refused."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from PIL import Image

from kdjax import compare, data, models, validation
from kdjax.evaluate import evaluate
from kdjax.weights import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher.pth, student.pth, grey.pth, double.pth (which enlarges twice), and photographs in gt/."""
    folder = tmp_path_factory.mktemp("compare")
    networks = {
        "teacher": ("dncnn", dict(num_feat=4, depth=3)),
        "student": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=1, act_type="relu")),
        "grey": ("dncnn", dict(num_in_ch=1, num_feat=4, depth=2)),
        "double": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)),
    }
    random = np.random.default_rng(0)
    draw = lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32)  # noqa: E731  drawing fresh ones takes seconds
    for name, (arch, hparams) in networks.items():
        net = models.network(arch, hparams)
        save_model(models.Model(net, jax.tree.map(draw, net.abstract_params)), folder / f"{name}.pth")
    (folder / "gt").mkdir()
    for i in range(3):
        data.write_image(folder / "gt" / f"{i}.png", random.integers(0, 256, (16, 20, 3), dtype=np.uint8))
    return folder


def run_here(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    """The program inside this process: starting another takes seconds."""
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, flags)])
    caching = jax.config.jax_enable_compilation_cache
    try:
        compare.main()
    finally:
        jax.config.update("jax_enable_compilation_cache", caching)


@pytest.mark.once
def test_program(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder"
    flags = ["--teacher", folder / "teacher.pth", "--student", f"small={folder / 'student.pth'}", "--bf16"]
    flags += ["--size", "16", "8x24", "16x16", "--batch", "1", "2", "--repeats", "2", "--output", output]
    flags += ["--data", folder / "gt", "--sigma", "25", "--limit", "2"]
    result = programs.run("kdjax.compare", *flags)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in output.iterdir()} == {"compare.json", "compare.md", "compare.png"}
    text = (output / "compare.md").read_text()
    assert text in result.stdout and str(output) in result.stdout
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 120
    with Image.open(output / "compare.png") as picture:
        assert min(picture.size) > 400

    written = json.loads((output / "compare.json").read_text())
    assert [subject["name"] for subject in written["subjects"]] == ["teacher", "small"]
    assert [subject["is_teacher"] for subject in written["subjects"]] == [True, False]
    assert written["subjects"][0]["parameters"] == 3 * 4 * 9 + 4 + 4 * 4 * 9 + 4 + 4 * 3 * 9 + 3
    assert written["subjects"][1]["hparams"]["act_type"] == "relu"
    measured = [(r["height"], r["width"], r["batch"], r["dtype"], r["model"]) for r in written["costs"]]
    assert len(measured) == len(set(measured)) == 2 * 2 * 2 * 2
    assert measured[:3] == [
        (16, 16, 1, t, m) for t, m in zip(["float32"] * 2 + ["bfloat16"], ["teacher", "small", "teacher"], strict=True)
    ]
    for each in written["costs"]:
        timing = each["timing"]
        assert len(timing["seconds"]) == written["repeats"] == 2
        for spread in (timing["milliseconds"], timing["speed_up"]):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert each["memory"]["outputs"] == each["batch"] * each["height"] * each["width"] * 3 * 4
        assert each["macs"] % (each["height"] * each["width"]) == 0 and each["problem"] == ""
    assert "2 images, sigma 25" in written["images"]
    teacher, student = written["quality"]
    assert student["gap"] == pytest.approx(teacher["psnr"] - student["psnr"]) and teacher["gap"] == 0
    assert teacher["psnr_to_teacher"] is None and 0 < student["psnr_to_teacher"] < 60


def test_quality_is_that_of_evaluate(folder: Path) -> None:
    files = compare.load_files([str(folder / "teacher.pth"), str(folder / "student.pth")], [], [])
    networks = {name: file.model for name, file in files.items()}
    paths = data.find_pairs(gt=str(folder / "gt"))
    samples = [validation.make_sample(pair.name, data.read_image(pair.gt), None, 25.0) for pair in paths]
    rows = compare.measure_quality(networks, samples)
    for quality in rows:
        score = evaluate(networks[quality.model], samples)[0]
        assert (quality.psnr, quality.ssim) == (score.psnr, score.ssim)
    outputs = {
        name: dict(
            validation.restore(m.network.make_apply(), m.params, [s.lq for s in samples], [s.sigma for s in samples])
        )
        for name, m in networks.items()
    }
    like = np.mean([validation.score(outputs["student"][i], outputs["teacher"][i]).psnr for i in range(3)])
    assert rows[1].psnr_to_teacher == pytest.approx(like)


def test_options_are_for_all_models_or_for_one(folder: Path) -> None:
    paths = [f"a={folder / 'student.pth'}", f"b={folder / 'student.pth'}"]
    files = compare.load_files(paths, ["params"], ["b:act_type=relu"])
    assert {name: file.key for name, file in files.items()} == {"a": "params", "b": "params"}
    plain = compare.load_files([f"a={folder / 'student.pth'}"], ["a:params"], [])
    assert plain["a"].sha256 == files["b"].sha256


def test_default_names_are_those_of_the_files_and_of_their_folders(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "student.pth").write_bytes((folder / "grey.pth").read_bytes())
    paths = [tmp_path / "one" / "student.pth", tmp_path / "two" / "student.pth", folder / "grey.pth", "embedded"]
    assert list(compare.load_files(list(map(str, paths)), [], [])) == ["one_student", "two_student", "grey", "embedded"]


def test_a_path_with_an_equals_sign_is_a_path(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lr=1.pth").write_bytes((folder / "grey.pth").read_bytes())
    assert list(compare.load_files([str(tmp_path / "lr=1.pth")], [], [])) == ["lr=1"]


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["--student", "teacher.pth"], "is also the name of teacher.pth", 1),
        (["--student", "a=student.pth", "a=grey.pth"], "grey.pth: 'a' is also the name of student.pth", 1),
        (["--student", "missing.pth"], "missing.pth: does not exist", 1),
        (["--student", "=student.pth"], "=student.pth: does not exist", 1),
        (["--student", "student.pth", "--hparam", "studnet:act_type=relu"], "did you mean 'student'", 1),
        (["--student", "student.pth", "--hparam", "student:act_type"], "wanted NAME=VALUE", 1),
        (["--student", "student.pth", "--key", "student:params_ema"], "params_ema", 1),
        (["--student", "grey.pth", "--data", "gt", "--sigma", "5"], "teacher: 3, grey: 1", 1),
        (["--student", "double.pth", "--data", "gt", "--sigma", "5"], "teacher: 1, double: 2", 1),
        (["--student", "student.pth", "--data", "nowhere", "--sigma", "5"], "nowhere", 1),
        (["--student", "student.pth", "--output", "teacher.pth"], "teacher.pth", 1),
        (["--student", "student.pth", "--data", "gt"], "either --sigma or --lq", 2),
        (["--student", "student.pth", "--sigma", "5"], "--sigma and --lq need --data", 2),
        (["--student", "student.pth", "--data", "gt", "--sigma", "-5"], "from 0 to 255", 2),
        (["--student", "student.pth", "--limit", "-1"], "--limit -1 must be 0 or more", 2),
        (["--student", "student.pth", "--size", "64x"], "'64x' is not a size", 2),
        (["--student", "student.pth", "--batch", "0"], "'0' is not a whole number", 2),
        ([], "--student", 2),
    ],
)
def test_bad_input_is_one_message(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    message: str,
    code: int,
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, "--teacher", "teacher.pth", *flags)
    said = capsys.readouterr().err if code == 2 else stop.value.code
    assert message in said and (stop.value.code == 2 if code == 2 else said.startswith("error: "))


def test_without_matplotlib_the_other_files_are_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And models of other tasks are compared by their costs."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    flags = ["--teacher", folder / "teacher.pth", "--student", folder / "grey.pth", folder / "double.pth"]
    run_here(monkeypatch, *flags, "--size", 8, "--repeats", 1, "--output", tmp_path)
    assert "pip install 'kdjax[plot]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md"}
    written = json.loads((tmp_path / "compare.json").read_text())
    assert [subject["scale"] for subject in written["subjects"]] == [1, 1, 2]
    assert written["quality"] == [] and len(written["costs"]) == 3


def test_models_that_enlarge_need_small_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models_of_scale_2 = ["--teacher", folder / "double.pth", "--student", f"b={folder / 'double.pth'}"]
    with pytest.raises(SystemExit, match="upscale 2x; give the small images with --lq"):
        run_here(monkeypatch, *models_of_scale_2, "--data", folder / "gt", "--sigma", 5)
