"""The denoisers in the package: each has its name everywhere, a line in the card, and does what it is for."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kdjax
from kdjax import assets, restore, validation
from kdjax.data import read_image

CARD = Path(assets.__file__).parent / "MODEL_CARD.md"


@pytest.mark.parametrize("name", assets.MODELS)
def test_a_shipped_model_is_the_one_of_its_card(name: str) -> None:
    path = Path(assets.model(name))
    assert f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`" in CARD.read_text()
    assert f"# {path.name}" in CARD.read_text() and f"`{path.name}`" in (CARD.parent / "LICENSES.md").read_text()


def test_the_fast_model_is_small_and_the_best() -> None:
    assert Path(assets.model("fast")).stat().st_size < 2_000_000
    clean = read_image(assets.VAL_PHOTOGRAPHS / "astronaut.png")[100:292, 150:342]
    sample = validation.make_sample("astronaut", clean, None, 25.0)
    psnr = {}
    for name in assets.MODELS:
        output = kdjax.restore_image(name, sample.lq)
        psnr[name] = validation.score(np.uint8(np.round(np.clip(output, 0, 1) * 255)), clean).psnr
    assert max(psnr, key=psnr.__getitem__) == assets.BEST
    assert psnr["fast"] > validation.input_score([sample]).psnr + 8


def test_an_image_alone_is_restored_by_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noisy = np.random.default_rng(0).normal(128, 25, (24, 32, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save("photo.png")
    restore.main(["photo.png"])
    np.testing.assert_array_equal(read_image(tmp_path / "restored" / "photo.png"), kdjax.restore_image("fast", noisy))
