"""The contact sheet as a program, and that it shows what the run trains on."""

from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from PIL import Image
from test_config import load

from kdjax import config as config_lib
from kdjax import show
from kdjax.degradations import realesrgan
from kdjax.training import preparation


def start(*arguments: str, code: int = 0) -> str:
    result = programs.run("kdjax.show", *arguments)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_writes_a_sheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    output = start("--config", "configs/denoise.py:debug", f"--output={path}", "--count=5", "--config.data.crop=64")
    assert "5 samples" in output and str(path) in output
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape[0] >= 5 * 64 and pixels.shape[1] > 2 * 64
    # gt and lq of the first row: the same picture, with noise of sigma 25.
    gt, lq = pixels[:64, :64].astype(float), pixels[:64, 70:134].astype(float)
    assert 15 < np.std(gt - lq) < 30 and np.corrcoef(gt.ravel(), lq.ravel())[0, 1] > 0.5


@pytest.mark.once
def test_bad_requests_are_refused(tmp_path: Path) -> None:
    arguments = ("--config", "configs/denoise.py:debug")
    assert "must end in one of" in start(*arguments, f"--output={tmp_path}/sheet.txt", code=2)
    assert "does not exist" in start(*arguments, "--config.data.gt=nowhere", code=1)


def test_pairs_from_files_are_shown_as_such(tmp_path: Path) -> None:
    for name, level in (("gt", 200), ("lq", 50)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (40, 40), (level + i, level, level)).save(tmp_path / name / f"{i}.png")
    values = load("denoise", "debug")
    values.data.update(gt=str(tmp_path / "gt"), lq=str(tmp_path / "lq"), crop=32)
    setup = preparation.prepare(config_lib.parse(values.copy_and_resolve_references().to_dict()))
    sheet = show.draw_sheet(setup, count=2)
    assert sheet[0, 0, 1] == 200 and sheet[0, 32 + 6, 1] == 50


@pytest.mark.once
def test_only_what_had_an_effect_is_told() -> None:
    choices, _ = realesrgan.draw(jax.random.key(0), realesrgan.Settings())
    choices = jax.device_get(choices)
    told = {}
    for used in (False, True):
        second = choices.second._replace(blurs=np.bool_(used), is_gaussian=np.bool_(used), mode=np.int32(2))
        changed = choices._replace(second=second, has_sinc=np.bool_(used), jpeg_first=np.bool_(used))
        told[used] = show._told(changed)
    assert len(told[False][1]) == 1 and len(told[True][1]) == 3  # kernels
    assert any(line.startswith("2: Poisson") for line in told[False][0])
    assert any(line.startswith("2: Gaussian") for line in told[True][0])
    assert any("bicubic" in line for line in told[True][0])
    assert told[False][0][-1].startswith("2: JPEG") and told[True][0][-1] == "sinc yes"
    row = show._row(np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40, 1), np.uint8), *told[True])
    assert row.shape[1] > 80 + 3 * 84 and row.shape[2] == 3
