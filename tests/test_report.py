"""The page of an evaluation: what is in the file, and what it does in a real browser (headless Chromium)."""

import base64
import html.parser
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from kdjax.report.page import Restored, write_report

pytestmark = pytest.mark.once

NASTY = "</script><img src=x onerror=attacked=1>\"'&amp;<!--"
MINUS, TIMES = "\u2212", "\u00d7"
HEIGHT, WIDTH = 30, 40
RANDOM = np.random.RandomState(0)


def picture(channels: int = 3) -> np.ndarray:
    return RANDOM.randint(0, 256, (HEIGHT, WIDTH, channels), np.uint8)


def restored(
    name: str, scores: list[tuple[float, float, float]], degraded: str = "sigma 25", **arrays: Any
) -> Restored:
    """An image with PSNR, SSIM and LPIPS of the input and of the models; the input is black, the first model white."""
    gt = arrays.pop("gt", picture())
    models = {f"net {NASTY}": np.full_like(gt, 255), "25": picture(gt.shape[2])}
    return Restored(
        name=name,
        data=arrays.pop("data", "one"),
        degraded=degraded,
        lq=np.zeros_like(gt),
        gt=gt,
        outputs=models | arrays,
        scores={
            model: dict(zip(("psnr", "ssim", "lpips"), values, strict=True))
            for model, values in zip(["input", *models], scores, strict=True)
        },
    )


# In the order of PSNR of the first model: middle, best, worst, undefined.
SHARED = picture()
IMAGES = [
    restored("b", [(20.0, 0.4, 0.9), (30.0, 0.80, 0.20), (29.0, 0.7, 0.3)], gt=SHARED),
    restored("a10", [(20.0, 0.4, 0.9), (np.inf, 0.95, 0.10), (31.0, 0.7, 0.3)], degraded="sigma 50", gt=SHARED),
    restored(NASTY, [(14.0, 0.4, 0.9), (25.0, 0.90, 0.15), (26.0, 0.7, 0.3)], data=f"two {NASTY}"),
    restored("a9", [(20.0, 0.4, 0.9), (np.nan, 0.85, 0.30), (27.0, 0.7, 0.3)], gt=picture(channels=1)),
]
MODELS = list(IMAGES[0].outputs)
METRICS = ["psnr", "ssim", "lpips"]
TABLE = [
    {"model": model, "data": data, "degraded": degraded, "images": count} | dict(zip(METRICS, values, strict=True))
    for data, degraded, count, *rows in [
        ("one", "sigma 25", 1200, (20.0, 0.4, 0.9), (30.0, 0.8, 0.25), (29.0, 0.85, 0.2)),
        ("one", "sigma 50", 1, (20.0, 0.4, 0.9), (np.inf, np.nan, 0.1), (31.0, 0.7, 0.3)),
        (f"two {NASTY}", "sigma 25", 1, (14.0, 0.95, 0.9), (25.0, 0.9, 0.15), (26.0, 0.7, 0.15)),
    ]
    for model, values in zip(["input", *MODELS], rows, strict=True)
]
SETTINGS = {"model 25": "a.pth, sha256 " + 64 * "0", "2": f"second {NASTY}", "1": "third"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title=f"Evaluation {NASTY}", table=TABLE, images=IMAGES, settings=SETTINGS)
    return path


# ---- The file. ----


class Elements(html.parser.HTMLParser):
    """Every element with its attributes and the text up to the next tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = []
        self.found.append((tag, dict(attrs), self._inside))

    def handle_endtag(self, tag: str) -> None:
        self._inside = []

    def handle_data(self, data: str) -> None:
        self._inside.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        return ["".join(text) for name, has, text in self.found if name == tag and attributes.items() <= has.items()]


def payload(elements: Elements) -> dict[str, Any]:
    return json.loads(elements.texts("script", id="payload")[0])


def decoded(elements: Elements) -> list[np.ndarray]:
    """The embedded pictures by number, as (h, w, c)."""
    pictures = []
    while texts := elements.texts("script", id=f"picture-{len(pictures)}"):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(texts[0], validate=True)), formats=["PNG"]))
        pictures.append(pixels.reshape(*pixels.shape[:2], -1))
    return pictures


def test_holds_every_picture_once_without_loss(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    pictures = decoded(elements)
    for entry, image in zip(payload(elements)["images"], IMAGES, strict=True):
        wanted = {"input": image.lq, **image.outputs, "clean (gt)": image.gt}
        assert list(entry["pictures"]) == list(wanted)
        for name, number in entry["pictures"].items():
            np.testing.assert_array_equal(pictures[number], wanted[name])
    # Four images of four pictures: black, white (both in colour and grey) and SHARED come up several times.
    assert len(pictures) == 16 - 2 - 2 - 1


def test_scores_and_settings_survive(page: Path) -> None:
    report = payload(Elements(page.read_text("utf-8")))
    for entry, image in zip(report["images"], IMAGES, strict=True):
        assert (entry["name"], entry["data"], entry["degraded"]) == (image.name, image.data, image.degraded)
        assert list(entry["scores"]) == list(image.scores)
        for model, values in image.scores.items():
            np.testing.assert_equal({name: float(entry["scores"][model][name]) for name in values}, values)
    for entry, row in zip(report["rows"], TABLE, strict=True):
        np.testing.assert_equal({name: type(value)(entry[name]) for name, value in row.items()}, row)
    assert report["settings"] == [list(item) for item in SETTINGS.items()]
    assert report["models"] == MODELS


def test_names_cannot_become_markup(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    assert not [tag for tag, _, _ in elements.found if tag == "img"]
    assert len(elements.texts("script")) == 1 + len(decoded(elements)) + 1
    assert elements.texts("title") == elements.texts("h1") == [f"Evaluation {NASTY}"]


def test_policy_allows_nothing_from_outside(page: Path) -> None:
    elements = Elements(page.read_text("utf-8"))
    (policy,) = [has["content"] for tag, has, _ in elements.found if has.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    addresses = [value for _, has, _ in elements.found for name, value in has.items() if name in ("src", "href")]
    assert addresses == ["data:,"]  # no icon


def test_a_name_that_is_no_unicode_and_no_images(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, title="\udcff", table=[{"model": "\udcff", "psnr": np.float32(1)}], images=[], settings={})
    report = payload(Elements(path.read_text("utf-8")))
    assert report["rows"] == [{"model": "\\xff", "psnr": 1.0}] and report["images"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gt": picture().astype(np.float32)}, r"image 'x' \(one, sigma 25\): gt is float32 of shape \(30, 40, 3\)"),
        ({"gt": picture()[..., 0]}, r"gt is uint8 of shape \(30, 40\); wanted uint8 of shape \(h, w, 1 or 3\)"),
        ({"lq": picture()[:15]}, r"lq is uint8 of shape \(15, 40, 3\); wanted uint8 of gt's shape \(30, 40, 3\)"),
        ({"outputs": {"net": picture(1)}}, r"output of 'net' is uint8 of shape \(30, 40, 1\)"),
        ({"outputs": {"net": picture() / 255}}, r"output of 'net' is float64"),
        ({"outputs": {"input": picture()}}, r"a model cannot be named 'input'"),
        ({}, "it has no score"),
        ({"scores": {"net": {"pnsr": 1.0}}}, r"unknown metric 'pnsr' \(known: psnr, "),
    ],
)
def test_wrong_arrays_are_named_and_nothing_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    parts = dict(name="x", data="one", degraded="sigma 25", lq=picture(), gt=picture(), outputs={}, scores={}) | change
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "report.html", title="", table=[], images=[Restored(**parts)], settings={})
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report(path, title="", table=[], images=IMAGES, settings={})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# ---- The page in a browser. ----


Open = Callable[..., webdriver.Chrome]


@pytest.fixture
def open_page(browser: webdriver.Chrome, page: Path) -> Iterator[Open]:
    """Opens the page at a size of the window and in a scheme; afterwards nothing may be in the console."""

    def open_at(
        width: int = 1280, height: int = 900, *, mobile: bool = False, scheme: str = "light"
    ) -> webdriver.Chrome:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})
        preference = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [preference]})
        browser.get(page.as_uri())
        return browser

    yield open_at
    assert browser.get_log("browser") == []


def by_id(browser: webdriver.Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def choose(browser: webdriver.Chrome, name: str, option: str) -> None:
    Select(by_id(browser, name)).select_by_visible_text(option)


def listed(browser: webdriver.Chrome) -> list[str]:
    return [element.text for element in browser.find_elements(By.CLASS_NAME, "card-name")]


def open_image(browser: webdriver.Chrome, name: str) -> None:
    """Clicks on the card of an image and waits until it is drawn."""
    browser.find_elements(By.CLASS_NAME, "card")[listed(browser).index(name)].click()
    WebDriverWait(browser, 10).until(
        lambda _: (by_id(browser, "left").get_attribute("aria-label") or "").endswith(name)
    )


def press(browser: webdriver.Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def canvas(browser: webdriver.Chrome, side: str) -> np.ndarray:
    """The RGBA pixels that are drawn on a side, (h, w, 4)."""
    script = """
      const canvas = document.getElementById(arguments[0]);
      const {width, height} = canvas;
      const copy = new OffscreenCanvas(width, height).getContext("2d");
      copy.drawImage(canvas, 0, 0);
      return [height, width, Array.from(copy.getImageData(0, 0, width, height).data)];
    """
    height, width, values = browser.execute_script(script, side)
    return np.uint8(values).reshape(height, width, 4)


def transform(browser: webdriver.Chrome, side: str) -> tuple[float, float, float]:
    """Zoom and place, from the style that the browser computed: (zoom, x, y)."""
    zoom, _, _, _, x, y = map(float, re.findall(r"-?[\d.]+", by_id(browser, side).value_of_css_property("transform")))
    return zoom, x, y


def share_of_left(browser: webdriver.Chrome) -> float:
    """How much of the image shows the left side, which is black while the right one is white: from a screenshot."""
    shot = np.asarray(Image.open(io.BytesIO(by_id(browser, "stage").screenshot_as_png)).convert("L"))
    zoom, x, y = transform(browser, "left")
    row = shot[int(y) + 3, max(int(x), 0) : int(x + WIDTH * zoom)]  # near the upper edge, where no knob is
    return float(np.mean(row < 20))


def hot(level: np.ndarray) -> np.ndarray:
    """The colour scale: black, red, yellow, white from 0 to 255."""
    return np.clip(np.stack([3 * level, 3 * level - 255, 3 * level - 510], -1), 0, 255)


def test_opens_and_asks_no_network(open_page: Open, page: Path) -> None:
    browser = open_page()
    open_image(browser, "b")
    press(browser, "e", "n")
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in requests
    assert all(url == page.as_uri() or url.startswith("data:") for url in requests)


def test_policy_holds(open_page: Open) -> None:
    browser = open_page()
    script = """
      const done = arguments[0];
      document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
      document.body.insertAdjacentHTML("beforeend", "<p onclick='attacked = 1'></p>");
      document.body.lastChild.click();
    """
    assert browser.execute_async_script(script) == "script-src-attr"
    assert browser.execute_script("return typeof attacked") == "undefined"
    browser.get_log("browser")  # which tells of it


def test_names_are_shown_as_text(open_page: Open) -> None:
    browser = open_page()
    assert NASTY in listed(browser) and by_id(browser, "summary").text.count(NASTY) >= 3
    open_image(browser, NASTY)
    assert by_id(browser, "viewer-name").text == NASTY
    assert f"net {NASTY}" in by_id(browser, "scores").text
    assert (
        browser.execute_script("return typeof attacked + document.querySelectorAll('[onerror]').length") == "undefined0"
    )


def test_worst_first_and_other_orders(open_page: Open) -> None:
    browser = open_page()
    assert listed(browser) == [NASTY, "b", "a10", "a9"]  # 25 dB, 30 dB, inf, nan
    choose(browser, "order", "Best first")
    assert listed(browser) == ["a10", "b", NASTY, "a9"]
    choose(browser, "order", "Smallest gain first")
    assert listed(browser) == ["b", NASTY, "a10", "a9"]
    choose(browser, "order", "By name")
    assert listed(browser) == [NASTY, "a9", "a10", "b"]
    choose(browser, "order", "Worst first")
    choose(browser, "metric", "SSIM")
    assert listed(browser) == ["b", "a9", NASTY, "a10"]
    choose(browser, "metric", "LPIPS")  # less is better
    assert listed(browser) == ["a9", "b", NASTY, "a10"]
    choose(browser, "metric", "PSNR (dB)")
    choose(browser, "model", MODELS[1])
    assert listed(browser) == [NASTY, "a9", "b", "a10"]


def test_filters_and_counts(open_page: Open) -> None:
    browser = open_page()
    assert by_id(browser, "count").text == "4 images, out of 1202 that were measured"
    choose(browser, "degraded", "sigma 50")
    assert listed(browser) == ["a10"]
    choose(browser, "degraded", "All")
    choose(browser, "data", "one")
    assert listed(browser) == ["b", "a10", "a9"]
    by_id(browser, "search").send_keys("A1")
    assert listed(browser) == ["a10"]
    assert by_id(browser, "count").text == "1 of 4 images, out of 1202 that were measured"


def test_cards_show_score_and_change(open_page: Open) -> None:
    browser = open_page()
    texts = [element.text for element in browser.find_elements(By.CLASS_NAME, "card-scores")]
    assert texts == ["25.00 dB +11.00 vs input", "30.00 dB +10.00 vs input", "∞ dB +∞ vs input",
                     "nan dB"]  # fmt: skip
    choose(browser, "metric", "LPIPS")
    assert browser.find_element(By.CLASS_NAME, "card-scores").text == f"0.3000 LPIPS {MINUS}0.6000 vs input"
    loaded = "return [...document.querySelectorAll('#images img')].every((img) => img.naturalWidth === 40)"
    WebDriverWait(browser, 10).until(lambda _: browser.execute_script(loaded))


def summary_column(browser: webdriver.Chrome, number: int) -> list[str]:
    return [
        cell.text.replace("\n", " ")
        for cell in browser.find_elements(By.CSS_SELECTOR, f"#summary tbody td:nth-child({number})")
    ]


def test_table_marks_the_best_and_sorts(open_page: Open) -> None:
    browser = open_page()
    assert summary_column(browser, 5)[3:6] == ["20.00", "∞ best", "31.00"]
    assert summary_column(browser, 6)[3:6] == ["0.4000", "nan", "0.7000 best"]
    assert summary_column(browser, 7)[6:] == ["0.9000", "0.1500 best", "0.1500 best"]
    assert summary_column(browser, 6)[6:] == ["0.9500", "0.9000 best", "0.7000"]  # the input is no rival
    assert summary_column(browser, 7)[:3] == ["0.9000", "0.2500", "0.2000 best"]
    assert summary_column(browser, 4)[0] == "1,200"
    heads = lambda: browser.find_elements(By.CSS_SELECTOR, "#summary th")  # noqa: E731
    assert [head.text.split()[0] for head in heads()][:5] == ["Model", "Set", "Degradation", "Images", "PSNR"]
    heads()[4].find_element(By.TAG_NAME, "button").click()
    ordered = [text.removesuffix(" best") for text in summary_column(browser, 5)]
    assert ordered == ["∞", "31.00", "30.00", "29.00", "26.00", "25.00", "20.00", "20.00", "14.00"]
    assert heads()[4].get_attribute("aria-sort") == "descending"
    press(browser, Keys.ENTER)  # the button keeps the focus
    assert summary_column(browser, 5)[0] == "14.00" and heads()[4].get_attribute("aria-sort") == "ascending"
    heads()[5].find_element(By.TAG_NAME, "button").click()
    assert summary_column(browser, 6)[-1] == "nan"
    heads()[6].find_element(By.TAG_NAME, "button").click()
    assert summary_column(browser, 7)[0] == "0.1000 best"  # less is better: the best is on top as well


def test_settings_keep_their_order(open_page: Open) -> None:
    browser = open_page()
    browser.find_element(By.CSS_SELECTOR, "main summary").click()
    assert [term.text for term in browser.find_elements(By.CSS_SELECTOR, "#settings dt")] == list(SETTINGS)
    assert [text.text for text in browser.find_elements(By.CSS_SELECTOR, "#settings dd")] == list(SETTINGS.values())


def test_canvases_hold_the_true_pixels(open_page: Open) -> None:
    browser = open_page()
    for image in (IMAGES[0], IMAGES[3]):  # colour, and grey
        open_image(browser, image.name)
        for name, wanted in {"input": image.lq, **image.outputs, "clean (gt)": image.gt}.items():
            choose(browser, "right-side", name)
            wait_for_label(browser, "right", f"{name}, {image.name}")
            np.testing.assert_array_equal(
                canvas(browser, "right")[..., :3], np.broadcast_to(wanted, (HEIGHT, WIDTH, 3))
            )
        press(browser, Keys.ESCAPE)
        assert not by_id(browser, "viewer").is_displayed()
        wait_for_focus(browser, image.name)  # back where it was opened


def wait_for_focus(browser: webdriver.Chrome, start: str) -> None:
    WebDriverWait(browser, 10).until(lambda _: browser.switch_to.active_element.text.startswith(start))


def wait_for_label(browser: webdriver.Chrome, side: str, label: str) -> None:
    WebDriverWait(browser, 10).until(lambda _: by_id(browser, side).get_attribute("aria-label") == label)


def test_border_moves_by_keys_and_by_dragging(open_page: Open) -> None:
    browser = open_page()
    open_image(browser, "b")
    divider = by_id(browser, "divider")
    assert browser.switch_to.active_element == divider
    assert share_of_left(browser) == pytest.approx(0.5, abs=0.02)
    press(browser, *[Keys.ARROW_LEFT] * 10)
    assert divider.get_attribute("aria-valuenow") == "40"
    assert share_of_left(browser) == pytest.approx(0.4, abs=0.02)
    press(browser, Keys.PAGE_UP, Keys.PAGE_UP, Keys.ARROW_RIGHT)
    assert share_of_left(browser) == pytest.approx(0.61, abs=0.02)
    press(browser, Keys.HOME)
    assert share_of_left(browser) == 0
    press(browser, Keys.END)
    assert share_of_left(browser) == pytest.approx(1, abs=0.02)
    width = WIDTH * transform(browser, "left")[0]
    # By its knob, and then by a press somewhere else in the picture.
    ActionChains(browser).move_to_element(divider).click_and_hold().move_by_offset(
        -int(0.75 * width), 0
    ).release().perform()
    assert share_of_left(browser) == pytest.approx(0.25, abs=0.02)
    ActionChains(browser).move_to_element_with_offset(by_id(browser, "stage"), int(0.2 * width), 30).click().perform()
    assert share_of_left(browser) == pytest.approx(0.7, abs=0.02)
    press(browser, "s")  # after a click into the picture the keys still work
    wait_for_label(browser, "left", f"{MODELS[0]}, b")
    assert share_of_left(browser) == pytest.approx(0.3, abs=0.02)


def test_zoom_and_place_are_the_same_on_both_sides(open_page: Open) -> None:
    browser = open_page(width=500, height=700)
    open_image(browser, "b")
    stage = by_id(browser, "stage")
    room = stage.size["width"]
    states = [transform(browser, "left")]

    def expect(zoom: float) -> None:
        states.append(transform(browser, "left"))
        assert transform(browser, "right") == states[-1] and states[-1][0] == pytest.approx(zoom)
        assert by_id(browser, "zoom").text == f"{zoom:g}{TIMES}"
        for side in ("left", "right"):
            assert by_id(browser, side).value_of_css_property("image-rendering") == "pixelated"

    expect(8)  # fits eight times: 320 of about 480 pixels
    by_id(browser, "zoom-in").click()
    expect(8)
    by_id(browser, "zoom-out").click()
    expect(6)
    press(browser, *"--------")
    expect(1)
    press(browser, "+", "=")
    expect(3)
    by_id(browser, "fit").click()
    expect(8)
    assert states[-1] == states[0] and states[0][1] == pytest.approx((room - 320) / 2, abs=1)
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(stage), 0, 400).perform()
    zoom, x, _ = transform(browser, "right")
    assert zoom == pytest.approx(8 / np.e, abs=0.01) and x == pytest.approx((room - 40 * zoom) / 2, abs=1)


def test_a_large_image_moves_in_the_stage(open_page: Open) -> None:
    browser = open_page(width=320, height=500)
    open_image(browser, "b")
    stage = by_id(browser, "stage")
    room = stage.size["width"]
    assert transform(browser, "left")[0] == 7 and room < 320  # the largest whole number that fits
    press(browser, "+")
    zoom, x, y = transform(browser, "left")
    assert zoom == 8 and x == pytest.approx((room - 320) / 2, abs=1)
    place = ActionChains(browser).move_to_element_with_offset(stage, 90, 60)
    place.click_and_hold().move_by_offset(-7, 0).release().perform()
    assert transform(browser, "left") == transform(browser, "right") == (8, x - 7, y)
    assert by_id(browser, "divider").get_attribute("aria-valuenow") == "50"  # the border stays
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).key_up(Keys.SHIFT).perform()
    assert transform(browser, "left") == (8, 0, y)  # as far as its edge
    press(browser, "0")
    assert transform(browser, "left")[0] == 7


def test_an_image_wider_than_the_stage_is_shrunk(open_page: Open, tmp_path: Path) -> None:
    browser = open_page(width=390, height=844, mobile=True)
    open_image(browser, "b")
    room = browser.execute_script("return document.getElementById('stage').clientWidth")
    width = next(width for width in range(room + 1, 2000) if room / width * width > room)  # by rounding
    gt = np.zeros((20, width, 3), np.uint8)
    image = Restored("b", "one", "x", gt, gt, outputs={}, scores={"input": {"psnr": np.inf}})
    path = tmp_path / "wide.html"
    write_report(path, title="", table=[], images=[image], settings={})
    browser.get(path.as_uri())
    open_image(browser, "b")
    zoom, x, _ = transform(browser, "left")
    assert (zoom, x) == (pytest.approx(room / width, rel=1e-5), 0)
    assert by_id(browser, "left").value_of_css_property("image-rendering") == "auto"
    ActionChains(browser).move_to_element_with_offset(by_id(browser, "stage"), room // 4, 30).click().perform()
    assert by_id(browser, "divider").get_attribute("aria-valuenow") == "75"  # it is whole: a press moves the border
    press(browser, "+")
    assert transform(browser, "left")[0] == 1
    press(browser, "-")
    assert transform(browser, "left")[0] == zoom


def test_error_map_is_the_amplified_difference(open_page: Open) -> None:
    browser = open_page()
    open_image(browser, "b")
    choose(browser, "right-side", MODELS[1])
    by_id(browser, "errors").click()
    wait_for_label(browser, "right", f"Error map of {MODELS[1]}, b")
    assert by_id(browser, "errors").get_attribute("aria-pressed") == "true"
    for factor in (5, 1):
        choose(browser, "factor", f"{TIMES} {factor}")
        WebDriverWait(browser, 10).until(lambda _, f=factor: f"{TIMES} {f}" in by_id(browser, "scale-caption").text)
        assert by_id(browser, "scale-end").text == {5: "≥ 51", 1: "255"}[factor]
        for side, output in (("left", IMAGES[0].lq), ("right", IMAGES[0].outputs[MODELS[1]])):
            error = np.abs(output.astype(float) - IMAGES[0].gt).mean(-1) * factor
            drawn = canvas(browser, side)
            np.testing.assert_allclose(drawn[..., :3], hot(error), atol=0.5 + 1e-6)
            assert np.all(drawn[..., 3] == 255)
    choose(browser, "right-side", "clean (gt)")
    wait_for_label(browser, "right", "Error map of clean (gt), b")
    assert not canvas(browser, "right")[..., :3].any()


def test_pixels_under_the_pointer(open_page: Open) -> None:
    browser = open_page()
    open_image(browser, "b")
    stage, (zoom, x, y) = by_id(browser, "stage"), transform(browser, "left")
    column, row = 7, 4
    offset = [x + (column + 0.5) * zoom - stage.size["width"] / 2, y + (row + 0.5) * zoom - stage.size["height"] / 2]
    ActionChains(browser).move_to_element_with_offset(stage, *map(int, offset)).perform()
    shown = [line.split() for line in by_id(browser, "pixel").text.splitlines()]
    clean = IMAGES[0].gt[row, column]
    error = f"{np.mean(clean):.1f}"  # of black
    assert shown[0] == ["Pixel", "x", f"{column},", "y", f"{row}"]
    assert shown[1] == ["input", "0", "0", "0", "error", error]
    assert shown[2] == [*MODELS[0].split(), "255", "255", "255", "error", f"{np.mean(255.0 - clean):.1f}"]
    assert shown[3] == ["clean", "(gt)", *map(str, clean)]


def test_next_and_previous_follow_the_list(open_page: Open) -> None:
    browser = open_page()
    open_image(browser, NASTY)
    seen = []
    for key in "nnnnpp":
        press(browser, key)
        seen.append(by_id(browser, "viewer-name").text)
    assert seen == ["b", "a10", "a9", NASTY, "a9", "a10"]
    wait_for_label(browser, "left", "input, a10")
    press(browser, Keys.ESCAPE)
    wait_for_focus(browser, "a10")
    choose(browser, "model", MODELS[1])
    open_image(browser, "b")
    right = Select(by_id(browser, "right-side"))
    assert [option.text for option in right.options] == ["input", *MODELS, "clean (gt)"]
    assert right.first_selected_option.text == MODELS[1]
    assert by_id(browser, "scores").text.splitlines()[1:3] == ["input 20.00 0.4000 0.9000", f"{MODELS[0]} 30.00"]


def test_fits_a_phone_and_works_by_touch(open_page: Open) -> None:
    browser = open_page(width=390, height=844, mobile=True)
    widths = "return [document.documentElement.scrollWidth, document.getElementById('viewer').scrollWidth]"
    assert browser.execute_script(widths)[0] == 390
    open_image(browser, "b")
    press(browser, "e")
    wait_for_label(browser, "left", "Error map of input, b")
    assert browser.execute_script(widths) == [390, 390]
    press(browser, "e")
    wait_for_label(browser, "left", "input, b")
    box = browser.execute_script("return document.getElementById('stage').getBoundingClientRect()")
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def touch(kind: str, *offsets: float) -> None:
        points = [{"x": middle[0] + dx, "y": middle[1] + 40, "id": i} for i, dx in enumerate(offsets)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 0)
    for offset in (20, 50, 80):
        touch("touchMove", offset)
    touch("touchEnd")
    assert share_of_left(browser) == pytest.approx(0.75, abs=0.02)
    touch("touchStart", -60)
    touch("touchStart", -60, 60)
    touch("touchMove", -15, 15)
    touch("touchEnd")
    assert transform(browser, "left") == transform(browser, "right")
    assert transform(browser, "left")[0] == pytest.approx(2, abs=0.1)  # eight times, and four times less


CONTRASTS = """
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] === undefined || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...arguments[0].querySelectorAll("*")]
    .filter((e) => e.checkVisibility({ visibilityProperty: true }))
    .filter((e) => e.tagName === "SELECT" || [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .map((e) => {
      const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
      return [e.textContent.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(open_page: Open, scheme: str) -> None:
    browser = open_page(scheme=scheme)
    ground = np.mean(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))
    assert ground > 200 if scheme == "light" else ground < 60
    browser.execute_script("document.querySelectorAll('details').forEach((details) => details.open = true)")
    contrasts = browser.execute_script(CONTRASTS, browser.find_element(By.TAG_NAME, "body"))
    open_image(browser, "b")
    press(browser, "e")
    wait_for_label(browser, "left", "Error map of input, b")
    contrasts += browser.execute_script(CONTRASTS, by_id(browser, "viewer"))
    assert len(contrasts) > 100
    assert [entry for entry in contrasts if entry[1] < 4.5] == []


def test_everything_that_takes_the_focus_has_a_name(open_page: Open) -> None:
    browser = open_page()
    nodes = []
    for name in (None, "b"):  # the page, and the viewer above it
        if name:
            open_image(browser, name)
        nodes += browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    focusable = [
        (node["role"]["value"], node["name"]["value"]) for node in nodes
        if any(has["name"] == "focusable" and has["value"]["value"] for has in node.get("properties", []))
    ]  # fmt: skip
    roles = {role for role, _ in focusable}
    assert {"button", "combobox", "slider", "searchbox"} <= roles
    assert [entry for entry in focusable if not entry[1] and entry[0] not in ("RootWebArea", "dialog")] == []
