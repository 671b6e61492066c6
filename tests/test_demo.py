"""The page to try models: what it does to an image, and a server of it in a real browser (headless Chromium)."""

import base64
import io
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kdjax import demo, models
from kdjax.weights import save_model

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
FETCH = """
const done = arguments[arguments.length - 1];
fetch(arguments[0]).then(response => response.blob()).then(blob => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
});
"""


@pytest.fixture(scope="module")
def twice() -> models.Model:
    """A model that enlarges 2 times: its convolutions are zero, so that nearest enlargement is left."""
    model = models.init_model("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2), jax.random.key(0))
    return models.Model(model.arch, model.hparams, jax.tree.map(np.zeros_like, model.params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, twice: models.Model) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_model(twice, folder / "twice.pth")
    Image.fromarray(IMAGE).save(folder / "image.png")
    (folder / "broken.png").write_bytes((folder / "image.png").read_bytes()[:60])
    return folder


def test_restores_a_file_with_and_without_noise(twice: models.Model, folder: Path) -> None:
    given, made, seconds = demo.restore(twice, folder / "image.png", 0, tile=64, tile_pad=8)
    np.testing.assert_array_equal(made, IMAGE.repeat(2, 0).repeat(2, 1))
    assert given.shape == made.shape and seconds > 0
    _, noisy, _ = demo.restore(twice, folder / "image.png", 25, tile=64, tile_pad=8)
    noise = (noisy[::2, ::2].astype(float) - IMAGE)[(IMAGE > 80) & (IMAGE < 175)]  # where nothing is clipped
    assert 21 < noise.std() < 29 and abs(noise.mean()) < 3
    np.testing.assert_array_equal(noisy, demo.restore(twice, folder / "image.png", 25, tile=64, tile_pad=8)[1])


def test_an_image_too_large_for_the_page_is_refused(twice: models.Model, tmp_path: Path) -> None:
    Image.new("L", (3000, 2000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"6000x4000 pixels, more than the 20 million .* kdjax\.restore"):
        demo.restore(twice, tmp_path / "large.png", 0, tile=64, tile_pad=8)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "missing.pth"], 1, "error: missing.pth"),
        (["--model", "embedded", "--tile", "-1"], 1, "error: tile=-1 must be"),
        (["--model", "embedded", "--port", "70000"], 2, "--port 70000 must be from 0 to 65535"),
    ],
)
def test_bad_arguments(
    arguments: list[str], code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["kdjax.demo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        demo.main()
    said = str(exit_info.value.code) + capsys.readouterr().err
    assert message in said and (exit_info.value.code == 2) == (code == 2)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "kdjax.demo", "--model", "twice.pth", "embedded", "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            line = server.stdout.readline()
            match = re.match(r"http://127\.0\.0\.1:\d+/", line)
            assert match, line
            yield match[0]
        finally:
            server.terminate()


def dropped(browser: webdriver.Chrome, path: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))


def test_page_restores_what_is_dropped(browser: webdriver.Chrome, url: str, folder: Path) -> None:
    wait = WebDriverWait(browser, 60)
    browser.get(url)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    assert "enlarges 2 times" in browser.find_element(By.ID, "about").text
    dropped(browser, folder / "image.png")
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image img"))
    browser.find_element(By.ID, "restore").click()
    wait.until(lambda b: "ms for 56x40 pixels" in b.find_element(By.ID, "timing").text)
    images = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#result img"))
    shown = []
    for image in images:
        data = browser.execute_async_script(FETCH, image.get_attribute("src"))
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")))
    assert any(np.array_equal(pixels, IMAGE.repeat(2, 0).repeat(2, 1)) for pixels in shown), [x.shape for x in shown]
    # The page is served from here alone: nothing was fetched from another host.
    names = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and all(name.startswith((url, "data:", "blob:")) for name in names), names


def test_page_says_what_is_wrong_with_an_image(browser: webdriver.Chrome, url: str, folder: Path) -> None:
    wait = WebDriverWait(browser, 60)
    browser.get(url)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    browser.find_element(By.ID, "restore").send_keys(Keys.ENTER)
    wait.until(lambda b: "Drop an image first." in b.find_element(By.TAG_NAME, "body").text)


def test_other_pages_cannot_read_files_of_this_machine(url: str, folder: Path) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
        urllib.request.urlopen(f"{url}gradio_api/file={folder / 'twice.pth'}", timeout=30)
