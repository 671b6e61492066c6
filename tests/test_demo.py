"""The page to try models: what it does to an image, and a server of it in a real browser (headless Chromium)."""

import base64
import contextlib
import functools
import http.client
import http.server
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from kdjax import demo, models
from kdjax.data import read_image
from kdjax.weights import save_model

pytestmark = pytest.mark.once

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
FETCH = """
const done = arguments[arguments.length - 1];
fetch(arguments[0]).then(response => response.blob()).then(blob => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
});
"""
UPLOAD = """
const [url, done] = arguments;
const form = new FormData();
form.append("files", new Blob([Uint8Array.from(atob("PNG"), c => c.charCodeAt(0))]), "image.png");
fetch(url + "gradio_api/upload", {method: "POST", body: form}).then(response => done(response.status), done);
"""
BOUNDARY = b"--boundary"


def png(width: int, height: int) -> bytes:
    """A black image of one bit, whose file is small whatever its size."""
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\1\0\0\0\0"
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )


NO_IMAGES = {
    "text.png": b"not an image",
    "empty.jpg": b"",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "photo.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "program.exe": b"MZ" + bytes(99),
    "claims.png": png(30_000, 30_000),
}


@pytest.fixture(scope="module")
def twice() -> models.Model:
    """A model that upscales 2x: its convolutions are zero, so that nearest enlargement is left."""
    model = models.network("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2)).init(jax.random.key(0))
    return models.Model(model.network, jax.tree.map(np.zeros_like, model.params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, twice: models.Model) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    save_model(twice, folder / "twice.pth")
    Image.fromarray(IMAGE).save(folder / "image.png")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:-300])
    for name, content in NO_IMAGES.items():
        (folder / name).write_bytes(content)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(IMAGE).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(IMAGE).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(IMAGE[..., 0].astype(np.uint16) * 256 + 129).save(folder / "deep.png")
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


class Server(NamedTuple):
    """The program, started by a user who has set a proxy.

    Attributes:
      temporary: its folder for temporary files.
      calls: one entry for every connection to the proxy, which answers nothing.
    """

    url: str
    temporary: Path
    process: subprocess.Popen
    calls: list[object]

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].strip("/"))

    def stored(self) -> list[str]:
        return sorted(str(path) for path in self.temporary.rglob("*") if path.is_file())

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        status, text = response.status, response.read().decode()
        connection.close()
        return status, text

    def upload(self, name: str, content: bytes, **headers: str) -> tuple[int, str]:
        return self.request("POST", "/gradio_api/upload", form(name, content), **FORM | headers)

    def restore(self, file: object, model: object = "twice", sigma: object = 0, wait: bool = True) -> str:
        """The events of a restoration; begins it only where it is not to `wait`."""
        body = json.dumps({"data": [model, file, sigma, 1, 0]}).encode()
        _, answer = self.request("POST", "/gradio_api/call/restore", body, Content_Type="application/json")
        return self.request("GET", f"/gradio_api/call/restore/{json.loads(answer)['event_id']}")[1] if wait else ""


FORM = {"Content_Type": f"multipart/form-data; boundary={BOUNDARY[2:].decode()}"}


def form(name: str, content: bytes) -> bytes:
    head = f'Content-Disposition: form-data; name="files"; filename="{name}"'.encode()
    return b"\r\n".join([BOUNDARY, head, b"", content, BOUNDARY + b"--", b""])


def gradio_file(path: object) -> dict[str, object]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


@contextlib.contextmanager
def started(folder: Path, temporary: Path, **variables: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """The program in a user's environment, and the URL that it says."""
    command = [sys.executable, "-m", "kdjax.demo", "--model", "twice.pth", "embedded", "--port", "0"]
    environment = {"HOME": str(folder), "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TMPDIR": str(temporary)}
    environment |= variables
    # Tests that run as a job in the background of a shell ignore SIGINT, and what they start would as well.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with server as process:
        try:
            line = process.stdout.readline()
            match = re.match(r"http://127\.0\.0\.1:\d+/", line)
            assert match, line
            yield process, match[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    temporary, calls = tmp_path_factory.mktemp("temporary"), []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def listen() -> None:
            while True:
                try:
                    connection, _ = proxy.accept()
                except OSError:  # closed
                    return
                calls.append(connection.getpeername())
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        with started(folder, temporary, http_proxy=address, HTTPS_PROXY=address) as (process, url):
            yield Server(url, temporary, process, calls)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 128 + signal.SIGTERM
        assert not list(temporary.iterdir())
        assert not calls  # nothing was fetched from anywhere


@pytest.fixture
def url(server: Server) -> str:
    return server.url


def dropped(browser: webdriver.Chrome, path: Path) -> None:
    browser.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))


def test_page_restores_what_is_dropped(browser: webdriver.Chrome, url: str, folder: Path) -> None:
    wait = WebDriverWait(browser, 60)
    browser.get(url)
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    assert "upscales 2x" in browser.find_element(By.ID, "about").text
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


def test_page_says_what_is_wrong_with_an_image(browser: webdriver.Chrome, server: Server, folder: Path) -> None:
    wait = WebDriverWait(browser, 60)
    browser.get(server.url.replace("127.0.0.1", "localhost"))
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    browser.find_element(By.ID, "restore").send_keys(Keys.ENTER)
    wait.until(lambda b: "Drop an image first." in b.find_element(By.TAG_NAME, "body").text)
    dropped(browser, folder / "text.png")
    wait.until(lambda b: "text.png: not a readable image (PNG, JPEG" in b.find_element(By.TAG_NAME, "body").text)
    dropped(browser, folder / "cut.png")
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#image img"))
    browser.find_element(By.ID, "restore").click()
    wait.until(lambda b: "cut.png: image file is truncated" in b.find_element(By.TAG_NAME, "body").text)
    assert str(server.temporary) not in browser.find_element(By.TAG_NAME, "body").text


def test_pages_of_other_sites_are_refused_by_a_real_browser(
    browser: webdriver.Chrome, server: Server, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "index.html").write_text(f"<a href='{server.url}'>link</a>")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=tmp_path)
    script = UPLOAD.replace("PNG", base64.b64encode((folder / "image.png").read_bytes()).decode())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        before = server.stored()
        # Gradio lets every page of this machine read its answers, so that the status can be seen.
        browser.get(f"http://localhost:{other.server_port}/")
        assert browser.execute_async_script(script, server.url) == 403
        assert server.stored() == before
        browser.find_element(By.TAG_NAME, "a").click()
        WebDriverWait(browser, 60).until(lambda b: b.title == "kdjax")
        assert browser.execute_async_script(script, server.url) == 200
        # And the page itself reaches no other server.
        ask = "fetch(arguments[0]).then(() => arguments[1]('answered'), () => arguments[1]('refused'))"
        assert browser.execute_async_script(ask, server.url) == "answered"
        assert browser.execute_async_script(ask, f"http://127.0.0.1:{other.server_port}/secret") == "refused"
        other.shutdown()
    assert not any("/secret" in path for path in asked)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1.evil.example", "localhost.:{}", ""])
def test_other_names_are_not_answered(host: str, server: Server) -> None:
    before, host = server.stored(), host.format(server.port)
    assert server.request("GET", "/", Host=host)[0] == 400
    assert server.upload("image.png", png(8, 8), Host=host)[0] == 400
    assert server.stored() == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Dest": "document"},
    ],
)
def test_what_browsers_send_for_other_sites_is_refused(headers: dict[str, str], server: Server) -> None:
    before = server.stored()
    assert server.upload("image.png", png(8, 8), **headers)[0] == 403
    assert server.request("POST", "/gradio_api/queue/join", b"{}", **headers)[0] == 403
    assert server.request("GET", "/config", **headers)[0] == 403
    assert server.request("GET", "/", **headers)[0] == (200 if "Sec_Fetch_Dest" in headers else 403)  # a link
    assert server.stored() == before


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_not_kept(name: str, server: Server) -> None:
    before = server.stored()
    status, said = server.upload(name, NO_IMAGES[name])
    assert status == 415 and re.match(
        f"{name}: (not a readable image|the file is empty|HEIC cannot|.*30000x30000 pix)", said
    )
    assert server.stored() == before


def test_long_and_broken_uploads_are_not_kept(server: Server) -> None:
    before = server.stored()
    head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: multipart/form-data; boundary=" + BOUNDARY[2:] + b"\r\n"
    start = form("image.png", png(8, 8))[:-20]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"Content-Length: 300000000\r\n\r\n" + start)
        assert b" 413 " in connection.recv(100)
    chunk = f"{2**20:x}\r\n".encode() + bytes(2**20) + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(start), start))
        for _ in range(200):
            connection.sendall(chunk)
        connection.settimeout(5)
        assert b" 413 " in connection.recv(100)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head + b"Content-Length: 1000\r\n\r\n" + start)
        time.sleep(0.3)
        assert server.stored() == before
    time.sleep(0.3)
    assert server.stored() == before


@pytest.mark.parametrize("name", ["image.png", "turned.jpg", "cmyk.jpg", "deep.png"])
def test_an_image_reaches_the_model_as_the_reader_gives_it(name: str, server: Server, folder: Path) -> None:
    status, stored = server.upload(name, (folder / name).read_bytes())
    assert status == 200, stored
    answer = server.restore(gradio_file(json.loads(stored)[0]))
    event, data = answer.strip().split("\n\n")[-1].split("\n")
    assert event == "event: complete", answer
    (_, made), _ = json.loads(data.removeprefix("data: "))
    np.testing.assert_array_equal(
        np.asarray(Image.open(made["path"])), read_image(folder / name).repeat(2, 0).repeat(2, 1)
    )


def test_files_of_this_machine_cannot_be_read(server: Server, folder: Path) -> None:
    assert server.request("GET", f"/gradio_api/file={folder / 'twice.pth'}")[0] in (403, 404)
    for file in (gradio_file(folder / "image.png"), {"path": str(folder / "image.png")}, {"path": "../image.png"}):
        assert "event: error" in server.restore(file)


@pytest.mark.parametrize(
    ("model", "sigma", "message"),
    [
        ("other", 0, "unknown model"),
        (["twice"], 0, "unknown model"),
        ("twice", None, "0 to 75"),
        ("twice", -1, "0 to 75"),
    ],
)
def test_requests_of_programs_are_checked(model: object, sigma: object, message: str, server: Server) -> None:
    file = gradio_file(json.loads(server.upload("image.png", png(8, 8))[1])[0])
    assert message in server.restore(file, model, sigma)


def test_the_port_of_another_program(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kdjax.demo", "--model", "embedded", "--port", str(server.port)])
    with pytest.raises(SystemExit, match=rf"port {server.port} cannot be used: .* choose another with --port"):
        demo.main()


def test_ctrl_c_leaves_nothing_and_a_start_removes_what_a_killed_page_left(server: Server, folder: Path) -> None:
    (lives,) = server.temporary.iterdir()
    assert lives.stat().st_mode & 0o777 == 0o700
    left = server.temporary / "kdjax-demo-killed"
    (left / "upload").mkdir(parents=True)
    (left / "upload" / "image.png").write_bytes(png(8, 8))
    with started(folder, server.temporary) as (process, url):
        assert len(list(server.temporary.iterdir())) == 2 and not left.exists()
        begun = Server(url, server.temporary, process, [])
        begun.restore(gradio_file(json.loads(begun.upload("image.png", png(600, 600))[1])[0]), "embedded", wait=False)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert list(server.temporary.iterdir()) == [lives]
