"""The evaluation program, and the protocol behind its numbers."""

import json
import math
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from test_metrics import lpips_state, write_lpips

from kdjax import data, metrics, models, validation
from kdjax.evaluate import Gallery, evaluate, main, make_restore, markdown
from kdjax.metrics import niqe
from kdjax.metrics.named import METRICS
from kdjax.weights import save_model

ROOT = Path(__file__).parent.parent


def run(*flags: str) -> subprocess.CompletedProcess:
    return programs.run("kdjax.evaluate", *flags)


def write_folder(folder: Path, images: list[np.ndarray]) -> str:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        data.write_image(folder / f"{i}.png", image)
    return str(folder)


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.network("dncnn", dict(num_feat=4, depth=3)).init(jax.random.key(0))


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in [(20, 31, 3), (31, 20, 3), (20, 31, 3), (12, 12, 3)]]


def test_noise_is_the_benchmarks() -> None:
    gt = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    noisy = validation.add_noise(gt, 25.0)
    np.random.seed(0)
    expected = gt / 255 + np.random.normal(0, 25 / 255, gt.shape)
    np.testing.assert_allclose(noisy, expected, atol=1e-7)
    assert noisy.dtype == np.float32 and noisy.min() < 0  # not clipped


def test_scores_are_those_of_one_image_at_a_time(model: models.Model, images: list[np.ndarray]) -> None:
    """Whatever the sizes, and however the images are spread over the devices."""
    samples = [validation.make_sample(str(i), gt, None, 25.0) for i, gt in enumerate(images)]
    mean, by_name = evaluate(model, samples)
    for i, gt in enumerate(images):
        output = np.asarray(model(samples[i].lq[None])[0][0])
        output = np.round(np.clip(output, 0, 1) * 255).astype(np.uint8)
        assert by_name[str(i)].psnr == pytest.approx(metrics.psnr(output, gt), abs=1e-3)
        assert by_name[str(i)].ssim == pytest.approx(metrics.ssim(output, gt), abs=1e-4)
    assert mean.psnr == pytest.approx(np.mean([score.psnr for score in by_name.values()]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tiles_give_the_whole_image(model: models.Model, dtype: jnp.dtype) -> None:
    """Three convolutions see 3 pixels around each: with 4 around a tile there is nothing but rounding."""
    rng = np.random.default_rng(1)
    images = [rng.random((41, 30, 3), dtype=np.float32), rng.random((20, 47, 3), dtype=np.float32)]
    whole = dict(make_restore(model, dtype=dtype)(images, [0.0] * len(images)))
    tiled = dict(make_restore(model, tile=16, tile_pad=4, dtype=dtype)(images, [0.0] * len(images)))
    for i, image in enumerate(images):
        assert whole[i].shape == tiled[i].shape == image.shape and whole[i].dtype == tiled[i].dtype == np.uint8
        assert np.abs(np.int16(whole[i]) - tiled[i]).max() <= (1 if dtype == jnp.float32 else 3)


def test_x8_is_the_mean_over_flips_and_turns(model: models.Model) -> None:
    image = np.random.default_rng(2).random((12, 17, 3), dtype=np.float32)
    outputs = []
    for turns in range(4):
        for flip in (1, -1):
            view = np.rot90(image, turns)[:, ::flip]
            outputs.append(np.rot90(np.asarray(model(view[None].copy())[0][0])[:, ::flip], -turns))
    expected = np.round(np.clip(np.mean(outputs, axis=0), 0, 1) * 255)
    for engine in ({}, {"tile": 64}):
        [(_, output)] = make_restore(model, x8=True, **engine)([image], [0.0])
        assert np.abs(output - expected).max() <= 1


def test_one_model_one_set_one_level(tmp_path: Path, model: models.Model, images: list[np.ndarray]) -> None:
    folder = write_folder(tmp_path / "gt", images)
    save_model(model, tmp_path / "model.pth")
    flags = ("--model", str(tmp_path / "model.pth"), "--data", folder, "--sigma", "15")
    result = run(*flags, "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    before, after = json.loads((tmp_path / "out.json").read_text())["results"]
    assert f"PSNR {after['psnr']:.2f} dB   SSIM {after['ssim']:.4f}" in result.stdout
    assert (before["model"], after["model"], after["degraded"]) == ("input", "model", "sigma 15")
    assert after["images"] == 4 and set(after["by_image"]) == {f"{i}.png" for i in range(4)}
    assert before["psnr"] == pytest.approx(24.7, abs=0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gt", "model.pth", "out.json"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, model: models.Model, images: list[np.ndarray]) -> Path:
    """Two models on a clean set at two levels and on pairs, with everything that can be measured and written."""
    place = tmp_path_factory.mktemp("evaluation")
    textured = np.random.default_rng(3).integers(0, 256, (96, 192, 3), dtype=np.uint8)
    write_folder(place / "clean", [*images[:2], textured])
    write_folder(place / "pairs" / "gt", images[:1])
    write_folder(place / "pairs" / "noisy", images[:1])
    other = models.network("dncnn", dict(num_feat=4, depth=2)).init(jax.random.key(1))
    for name, one in (("student", model), ("teacher", other)):
        (place / name).mkdir()
        save_model(one, place / name / "student.pth")
    pristine = niqe.Pristine(np.zeros(36), np.eye(36))
    np.savez(place / "niqe.npz", mu_pris_param=pristine.mean[None], cov_pris_param=pristine.covariance)
    lpips = write_lpips(place / "lpips.pth", lpips_state("alex"))
    main(
        f"--model {place}/student/student.pth {place}/teacher/student.pth --data clean={place}/clean --sigma 15 50 15"
        f" --pairs camera {place}/pairs/gt {place}/pairs/noisy --metrics {' '.join(METRICS)} --niqe {place}/niqe.npz"
        f" --lpips {lpips} --output {place}/out/deep --save-images --report-images 4".split()
    )
    return place / "out" / "deep"


def test_every_model_set_and_level_has_a_row(results: Path, model: models.Model) -> None:
    content = json.loads((results / "results.json").read_text())
    conditions = [("clean", "sigma 15", 3), ("clean", "sigma 50", 3), ("camera", "pairs", 1)]
    names = ["input", "student_student", "teacher_student"]  # two files of one name are told apart by their folders
    rows = content["results"]
    assert [(row["model"], row["data"], row["degraded"], row["images"]) for row in rows] == [
        (name, *condition) for condition in conditions for name in names
    ]
    samples = [
        validation.make_sample(path.name, data.read_image(path), None, 50.0)
        for path in sorted((results.parent.parent / "clean").iterdir())
    ]
    mean, by_name = evaluate(model, samples)
    row = rows[4]
    assert (row["psnr"], row["ssim"]) == pytest.approx((mean.psnr, mean.ssim))
    assert {name: one["psnr"] for name, one in row["by_image"].items()} == pytest.approx(
        {name: score.psnr for name, score in by_name.items()}
    )
    # Of three images one is large enough for NIQE, and one for LPIPS; equal images have no finite PSNR.
    assert row["by_image"]["0.png"]["niqe"] is None and row["niqe"] == row["by_image"]["2.png"]["niqe"] > 0
    assert row["by_image"]["1.png"]["lpips"] is None and row["lpips"] == row["by_image"]["2.png"]["lpips"] > 0
    assert rows[6]["psnr"] is None and rows[6]["ssim"] == 1.0
    assert content["models"]["student_student"]["parameters"] == models.count_params(model.params)
    assert content["settings"]["lpips"].startswith("alex, ")


def test_the_table_is_markdown_and_the_report_one_page(results: Path) -> None:
    text = (results / "results.md").read_text()
    lines = text.splitlines()
    assert lines[0] == ("| data | degraded | images | model | PSNR (dB) | SSIM | PSNR-Y (dB) | SSIM-Y | NIQE | LPIPS |")
    assert len({line.count("|") for line in lines[:11]}) == 1 and "- noise: Gaussian, seed 0" in text
    rows = json.loads((results / "results.json").read_text())["results"]
    assert f"| clean | sigma 50 | 3 | input | {rows[3]['psnr']:.2f} |" in text
    page = (results / "report.html").read_text()
    assert page.count('id="picture-') > 4
    assert re.search(r'"name": "\d.png", "data": "clean", "degraded": "sigma 15", "height"', page)
    assert '"scores": {"input": {"psnr": ' in page


def test_restored_images_are_saved(results: Path, model: models.Model) -> None:
    saved = sorted(str(path.relative_to(results / "images")) for path in results.rglob("images/**/*.png"))
    assert len(saved) == 2 * (2 * 3 + 1) and "clean/sigma_15/teacher_student/2.png" in saved
    gt = data.read_image(results.parent.parent / "clean" / "0.png")
    [(_, expected)] = make_restore(model)([validation.add_noise(gt, 15.0)], [15.0])
    np.testing.assert_array_equal(
        data.read_image(results / "images" / "clean" / "sigma_15" / "student_student" / "0.png"), expected
    )


def test_the_old_form_of_one_pair_of_folders(
    tmp_path: Path, images: list[np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    gt = write_folder(tmp_path / "gt", images[:1])
    lq = tmp_path / "lq"
    lq.mkdir()
    data.write_image(lq / "0_noisy.bmp", images[0])
    main(["--model", "embedded", "--data", gt, "--lq", str(lq), "--filename-tmpl", "{}_noisy", "--bf16"])
    assert "gt, pairs, 1 image\n  PSNR inf dB   SSIM 1.0000   input" in capsys.readouterr().out


def test_niqe_can_be_fitted_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--model", "embedded", "--data", "embedded", "--sigma", "25", "--limit", "1", "--metrics", "niqe"]
    main([*flags, "--niqe", "embedded", "--tile", "256", "--json", str(tmp_path / "out.json")])
    content = json.loads((tmp_path / "out.json").read_text())
    before, after = content["results"]
    assert 0 < after["niqe"] < before["niqe"]
    assert content["settings"]["niqe"] == "fitted to the photographs in embedded"
    assert content["settings"]["restored"] == "tiles of 256 pixels, 16 around them, float32"
    capsys.readouterr()


def test_the_gallery_keeps_what_the_first_model_did_worst() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    for metric, kept in (("psnr", [1, 3]), ("niqe", [0, 2])):
        gallery = Gallery(2, metric)
        for position, value in enumerate([30.0, 20.0, math.inf, 25.0, math.nan]):
            gallery.add("first", position, image, {metric: value})
        for position in range(5):
            gallery.add("second", position, image + 1, {metric: 0.0})
        assert sorted(gallery.outputs) == kept
        assert all(set(outputs) == {"first", "second"} for outputs in gallery.outputs.values())
    nothing = Gallery(0, "psnr")
    nothing.add("first", 0, image, {"psnr": 1.0})
    assert not nothing.outputs


def test_the_best_model_is_bold_where_there_are_several() -> None:
    row = {"data": "a|b", "degraded": "sigma 5", "images": 1}
    values = [("input", 40.0, 1.0), ("x", 30.0, 5.0), ("y", 31.0, 5.5), ("z", 20.0, math.nan)]
    rows = [row | {"model": name, "psnr": psnr, "niqe": niqe_} for name, psnr, niqe_ in values]
    lines = markdown(rows, ["psnr", "niqe"], {"noise": "none"}).splitlines()
    assert [line.split(" | ", 3)[3] for line in lines[2:6]] == [
        "input | 40.00 | 1.000 |", "x | 30.00 | **5.000** |", "y | **31.00** | 5.500 |", "z | 20.00 | - |"
    ]  # fmt: skip
    assert lines[2].startswith("| `a\\|b` |") and lines[-1] == "- noise: none"
    assert "**" not in markdown(rows[:2], ["psnr", "niqe"], {})


MODEL, CLEAN = ("--model", "embedded"), ("--data", "embedded")
NOISY = (*MODEL, *CLEAN, "--sigma", "25")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--model", "missing.pth", *CLEAN, "--sigma", "25"), 1, "missing.pth"),
        (("--model", "README.md", *CLEAN, "--sigma", "25"), 1, "README.md"),
        ((*MODEL, "--data", "nowhere", "--sigma", "25"), 1, "nowhere"),
        ((*MODEL, "--pairs", "p", "nowhere", "kdjax/assets"), 1, "nowhere"),
        ((*MODEL, "--pairs", "a/b", "x", "y"), 1, "--pairs a/b: wanted NAME GT LQ"),
        ((*NOISY, "--pairs", "embedded", "a", "b"), 1, "two sets of images are called 'embedded'"),
        (("--model", "a=embedded", "a=embedded", *NOISY[2:]), 1, "'a' is also the name of embedded"),
        (("--model", "input=embedded", *NOISY[2:]), 1, "'input' already means something else"),
        ((*NOISY, "--hparam", "x"), 1, "NAME=VALUE"),
        ((*NOISY, "--metrics", "niqe", "--niqe", "nowhere"), 1, "nowhere"),
        ((*NOISY, "--metrics", "niqe", "--niqe", "nowhere.npz"), 1, "nowhere.npz"),
        ((*NOISY, "--metrics", "niqe", "--niqe", "kdjax/assets/photographs/val/camera.png"), 1, "camera.png: 3 sharp"),
        ((*NOISY, "--metrics", "lpips", "--lpips", "README.md"), 1, "README.md"),
        ((*NOISY, "--output", "README.md/out"), 1, "README.md"),
        ((*MODEL, *CLEAN), 2, "give either --sigma or --lq"),
        ((*NOISY, "--lq", "x"), 2, "give either --sigma or --lq"),
        (MODEL, 2, "no images given"),
        ((*MODEL, "--pairs", "p", "a", "b", "--sigma", "5"), 2, "--sigma and --lq need --data"),
        ((*MODEL, "--data", "a", "b", "--lq", "c"), 2, "--lq goes with one --data, and 2 are given"),
        ((*MODEL, *CLEAN, "--sigma", "-1"), 2, "from 0 to 255"),
        ((*NOISY, "--metrics", "lpips"), 2, "the metric lpips needs a file: --lpips"),
        ((*NOISY, "--metrics", "vif"), 2, "invalid choice: 'vif'"),
        ((*NOISY, "--tile", "-1"), 2, "--tile -1 must be 0 or more"),
        ((*NOISY, "--save-images"), 2, "--save-images needs --output"),
    ],
)
def test_bad_input_is_one_message(
    flags: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(flags)
    text = str(stop.value.code) if code == 1 else capsys.readouterr().err
    assert (stop.value.code == 2 or text.startswith("error: ")) and message in text


def test_models_of_different_kinds_are_not_compared(
    tmp_path: Path, images: list[np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    grey = models.network("dncnn", dict(num_in_ch=1, num_feat=4, depth=2)).init(jax.random.key(0))
    large = models.network("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)).init(jax.random.key(0))
    save_model(grey, tmp_path / "grey.pth")
    save_model(large, tmp_path / "large.pth")
    for flags, message in [
        (("embedded", f"{tmp_path}/grey.pth"), "embedded: 3 channels, scale 1; grey: 1 channels, scale 1"),
        ((f"{tmp_path}/large.pth",), "upscales 2x; give its small images"),
        ((f"{tmp_path}/grey.pth", "--metrics", "psnr_y"), "psnr_y needs RGB"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["--model", *flags, *NOISY[2:]])
    folder = write_folder(tmp_path / "gt", images)
    main(["--model", f"{tmp_path}/grey.pth", "--data", folder, "--sigma", "25", "--limit", "1"])
    assert "gt, sigma 25, 1 image\n  PSNR 20." in capsys.readouterr().out


def test_a_file_that_holds_no_pristine_model_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "small.npz", mu_pris_param=np.zeros(3), cov_pris_param=np.zeros((3, 3)))
    (tmp_path / "text.npz").write_text("text")
    for name in ("other", "small", "text"):
        with pytest.raises(SystemExit, match=f"{name}.npz"):
            main([*NOISY, "--metrics", "niqe", "--niqe", f"{tmp_path}/{name}.npz"])


def test_the_program_has_no_traceback_for_bad_input() -> None:
    result = run("--model", "missing.pth", "--data", "embedded", "--sigma", "25")
    assert result.returncode == 1
    assert result.stderr.startswith("error: missing.pth") and "Traceback" not in result.stderr
