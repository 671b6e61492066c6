"""The evaluation program, and the protocol behind its numbers."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from kdjax import data, metrics, models, validation
from kdjax.evaluate import evaluate
from kdjax.weights import save_model

ROOT = Path(__file__).parent.parent


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kdjax.evaluate", *flags], cwd=ROOT, text=True, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module")
def model() -> models.Model:
    return models.init_model("dncnn", dict(num_feat=4, depth=3), jax.random.key(0))


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


def test_program_prints_and_writes_the_same_numbers(
    tmp_path: Path, model: models.Model, images: list[np.ndarray]
) -> None:
    (tmp_path / "gt").mkdir()
    for i, image in enumerate(images):
        data.write_image(tmp_path / "gt" / f"{i}.png", image)
    save_model(model, tmp_path / "model.pth")
    flags = ("--model", str(tmp_path / "model.pth"), "--data", str(tmp_path / "gt"), "--sigma", "15")
    result = run(*flags, "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"PSNR {written['psnr']:.2f} dB   SSIM {written['ssim']:.4f}" in result.stdout
    assert written["images"] == 4 and set(written["by_image"]) == {f"{i}.png" for i in range(4)}
    assert written["input"]["psnr"] == pytest.approx(24.7, abs=0.5)


def test_pairs_are_read_from_two_folders(tmp_path: Path, images: list[np.ndarray]) -> None:
    for folder in ("gt", "lq"):
        (tmp_path / folder).mkdir()
        data.write_image(tmp_path / folder / "a.png", images[0])
    result = run("--model", "embedded", "--data", str(tmp_path / "gt"), "--lq", str(tmp_path / "lq"))
    assert result.returncode == 0, result.stderr
    assert "input inf dB" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "missing.pth", "--data", "embedded", "--sigma", "25"), "missing.pth"),
        (("--model", "README.md", "--data", "embedded", "--sigma", "25"), "README.md"),
        (("--model", "embedded", "--data", "nowhere", "--sigma", "25"), "nowhere"),
        (("--model", "embedded", "--data", "embedded"), "give either --sigma or --lq"),
        (("--model", "embedded", "--data", "embedded", "--sigma", "-1"), "from 0 to 255"),
        (("--model", "embedded", "--data", "embedded", "--sigma", "25", "--hparam", "x"), "NAME=VALUE"),
    ],
)
def test_bad_input_is_one_message(flags: tuple[str, ...], message: str) -> None:
    result = run(*flags)
    assert result.returncode != 0
    assert message in result.stderr and "Traceback" not in result.stderr
