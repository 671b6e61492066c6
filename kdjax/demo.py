"""Tries models in the browser, on this machine only:

    pip install "kdjax[demo]"
    python -m kdjax.demo --model student.pth teacher.pth

The page takes an image, optionally adds noise, and shows input and output with a slider between them, and the time it
took.

The server listens on localhost. It rejects requests under any other host name, requests from other sites' pages in the
same browser, and uploads that are not images. Nothing leaves the machine. Images and results are kept in a temporary
folder that only its user can read; they are deleted after an hour or when the program ends, and what a killed program
leaves behind is deleted by the next one. Exit codes: 0 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (the terminal
was closed).
"""

from __future__ import annotations

import argparse
import contextlib
import html
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from kdjax import assets, commandline, cost, models, sharding, validation
from kdjax.data import ImageError, read_image
from kdjax.data.images import opened
from kdjax.files import FolderInUse, locked
from kdjax.names import brief, named_paths, pick
from kdjax.tiles import restore_image
from kdjax.weights import Loaded, load_weights, weights_options

if TYPE_CHECKING:
    import gradio
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MOST_PIXELS = 20_000_000  # browsers can still display this
_MOST_BYTES = 200_000_000  # of a file: those pixels as uncompressed 16-bit RGBA are 160 MB
_MOST_NOISE = 75
_KEPT_SECONDS = 3600
_UPLOAD = "/gradio_api/upload"
_FOLDER = "kdjax-demo-"
_HOST = "127.0.0.1"
# What the browser may load for the page, and who may frame it: some versions of Gradio load a script from elsewhere.
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"


def restore(
    model: models.Model,
    path: str | os.PathLike[str],
    sigma: float,
    *,
    level: float | None = None,
    strength: float = 1.0,
    tile: int,
    tile_pad: int,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Restores an image file; returns the model's input and output, uint8 of equal size, and the seconds it took.

    Args:
      sigma: of the noise to add first, on the scale of 0 to 255.
      level, strength: the `sigma` and the `strength` of `kdjax.tiles.restore_image`.

    Raises:
      ImageError: if the file is not an image, or has too many pixels for a page.
    """
    scale = model.network.scale
    check_image(path, scale)
    image = read_image(path)
    height, width = (size * scale for size in image.shape[:2])
    noisy = validation.add_noise(image, sigma)
    started = time.perf_counter()
    restored = restore_image(model, noisy, tile=tile, tile_pad=tile_pad, sigma=level, strength=strength)
    seconds = time.perf_counter() - started
    given, made = (np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) for x in (noisy, restored))
    return np.asarray(Image.fromarray(given).resize((width, height), Image.Resampling.BICUBIC)), made, seconds


def check_image(path: str | os.PathLike[str], scale: int = 1) -> None:
    """Checks the header of a file.

    Raises:
      ImageError: if the file is not an image, or has too many pixels for a page after enlarging it `scale` times.
    """

    def check(image: Image.Image) -> None:
        width, height = (side * scale for side in image.size)
        if height * width > _MOST_PIXELS:
            raise ImageError(
                f"the result would be {width}x{height} pixels, more than the {_MOST_PIXELS / 1e6:g} million that this"
                " page shows; use python -m kdjax.restore"
            )

    with opened(path, check):
        pass


def build_page(loaded: dict[str, Loaded], folder: Path, *, tile: int, tile_pad: int) -> gradio.Blocks:
    """Builds the page for models by name; Gradio keeps uploads in `folder`, and reads nothing else."""
    import gradio as gr

    def run(
        name: str, image: dict[str, Any] | None, sigma: float, strength: float = 1.0, level: float = 0.0
    ) -> tuple[tuple[np.ndarray, np.ndarray], str]:
        if not image or not image.get("path"):
            raise _error("Drop an image first.")
        path = image["path"]
        if not Path(path).resolve().is_relative_to(folder.resolve()) or not os.path.exists(path):
            raise _error("The image is gone: images dropped on the page are deleted after an hour. Drop it again.")
        try:
            for what, value, most in (
                ("noise", sigma, _MOST_NOISE), ("strength", strength, 1), ("noise level", level, _MOST_NOISE)
            ):  # fmt: skip
                if not isinstance(value, int | float) or not 0 <= value <= most:
                    raise ValueError(f"the {what} is {brief(value)}; it must be a number from 0 to {most}")
            model = pick(loaded, str(name), "model").model
            how = {"level": level or None, "strength": strength}
            with cost.telling_out_of_memory():
                given, made, seconds = restore(model, path, sigma, **how, tile=tile, tile_pad=tile_pad)
        except cost.OutOfMemory as error:
            raise _error(f"out of memory: {error}; start the page with a smaller --tile") from error
        except ValueError as error:  # including ImageError: a fault of the upload, not of the program
            raise _error(_without_folder(error, path)) from error
        height, width = made.shape[:2]
        megapixels = height * width / model.network.scale**2 / 1e6
        return (given, made), (
            f"**{seconds * 1000:.0f} ms** for {width}x{height} pixels, {megapixels / seconds:.2f} megapixels of input a"
            " second. The first image of a size below the tile also compiles the model."
        )

    with gr.Blocks(title="kdjax", analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS)) as page:
        gr.Markdown(
            "# kdjax\nDrop an image; the slider shows the input on its left and the restored image on its right."
        )
        with gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown(list(loaded), value=next(iter(loaded)), label="Model", elem_id="model")
                about = gr.Markdown(_about(next(iter(loaded.values()))), elem_id="about")
                image = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", elem_id="image")
                sigma = gr.Slider(0, _MOST_NOISE, 0, step=1, label="Noise to add first, sigma of 255", elem_id="sigma")
                strength = gr.Slider(
                    0, 1, 1, step=0.05, label="Strength, for models that do not enlarge", elem_id="strength"
                )
                level = gr.Slider(
                    0, _MOST_NOISE, 0, step=1, label="Noise level to tell the model, if it takes one; 0 estimates it",
                    elem_id="level",
                )  # fmt: skip
                button = gr.Button("Restore", variant="primary", elem_id="restore")
                gr.Examples([str(photo) for photo in _photographs()], image, label="Bundled photographs")
            with gr.Column(scale=2):
                slider = gr.ImageSlider(
                    label="Input | restored", type="numpy", format="png", interactive=False, elem_id="result"
                )
                timing = gr.Markdown(elem_id="timing")
        name.change(lambda chosen: _about(loaded[chosen]), name, about, api_visibility="private")
        # Gradio's preprocessing would convert anything but 8-bit RGB, and report only "Error" for files it cannot open.
        button.click(run, [name, image, sigma, strength, level], [slider, timing], api_name="restore", preprocess=False)
    return page


def _error(message: str) -> Exception:
    """Returns the exception that Gradio shows on the page verbatim."""
    import gradio as gr

    return gr.Error(html.escape(message, quote=False), print_exception=False)


def _without_folder(error: Exception, path: str) -> str:
    return str(error).replace(path, Path(path).name)


def _about(loaded: Loaded) -> str:
    model = loaded.model
    scale = model.network.scale
    enlarges = f", upscales {scale}x" if scale > 1 else ""
    is_told = ", is told the noise level" if model.network.takes_sigma else ""
    return f"{model.arch}, {models.count_params(model.params):,} parameters{enlarges}{is_told}"


def _photographs() -> list[Path]:
    folder = Path(assets.locate("embedded", assets.VAL_PHOTOGRAPHS))
    return sorted(path for path in folder.iterdir() if path.suffix == ".png")[:4]


class _Guard:
    """Protects Gradio, which accepts any file from anyone and keeps partial uploads.

    Rejects what a browser sends on behalf of another site's page (403), unless it follows a link to this one; more than
    `_MOST_BYTES` (413); and uploads that are not images (415). An upload is passed on only once it is complete.
    Responses tell the browser to load nothing from elsewhere.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(message)

        await self._answer(scope, receive, send_with_policy)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        if _is_foreign(request):
            return await PlainTextResponse("this page does not answer other sites", 403)(scope, receive, send)
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return await self._app(scope, receive, send)
        try:
            chunks = await _read_body(request)
        except ClientDisconnect:
            return None
        if chunks is None:
            message = f"more than {_MOST_BYTES / 1e6:.0f} MB"
            return await PlainTextResponse(message, 413)(scope, receive, send)
        chunks.reverse()

        async def replay() -> Message:
            if not chunks:
                return await receive()
            return {"type": "http.request", "body": chunks.pop(), "more_body": bool(chunks)}

        if scope["path"] != _UPLOAD:
            return await self._app(scope, replay, send)
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, replay, keep)
        if answer[0]["status"] == 200:
            stored = json.loads(b"".join(message.get("body", b"") for message in answer))
            if problem := await run_in_threadpool(_remove_what_is_no_image, stored):
                return await PlainTextResponse(problem, 415)(scope, receive, send)
        for message in answer:
            await send(message)
        return None


def _is_foreign(request: Request) -> bool:
    """Returns whether a browser sends this for another site's page; other programs send neither header."""
    site, origin = (request.headers.get(name) for name in ("sec-fetch-site", "origin"))
    is_own = site in (None, "same-origin", "none") and (
        origin is None or urlsplit(origin).netloc == request.headers.get("host")
    )
    is_whole_page = request.headers.get("sec-fetch-dest") == "document"  # not in a frame
    is_link = request.method == "GET" and request.url.path == "/" and is_whole_page
    return not is_own and not is_link


async def _read_body(request: Request) -> list[bytes] | None:
    """Reads the chunks of a request's body, at least one; None if it is too long.

    Raises:
      ClientDisconnect: if the upload was cut off.
    """
    most = _MOST_BYTES + 2**16  # allows for the form around the file
    if int(request.headers.get("content-length", 0)) > most:
        return None
    chunks, size = [b""], 0
    async for chunk in request.stream():
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            return None
    return chunks


def _remove_what_is_no_image(paths: list[str]) -> str:
    """Deletes all files of an upload if any is not an image; returns the problem, or ''."""
    try:
        for path in paths:
            check_image(path)
    except ImageError as error:
        for other in map(Path, paths):
            other.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                other.parent.rmdir()
        return _without_folder(error, path)
    return ""


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """Yields a folder that only this user can read; on exit deletes it. Also deletes those left by killed programs."""
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
    try:
        with locked(folder):
            for other in folder.parent.glob(f"{_FOLDER}*"):
                with contextlib.suppress(FolderInUse, OSError):
                    is_own = other.lstat().st_uid == folder.lstat().st_uid  # in /tmp, anyone can take a name
                    if is_own and any(other.iterdir()):  # an empty one is just being created
                        with locked(other):
                            shutil.rmtree(other)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.demo", __doc__)
    parser.add_argument(
        "--model", nargs="+", default=[assets.BEST], metavar="[NAME=]FILE",
        help=f"{assets.MODEL_HELP}; default: {assets.BEST}",
    )  # fmt: skip
    parser.add_argument("--port", type=int, default=7860, help="port on localhost; 0 picks a free one (default: 7860)")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile; 0 takes images whole (default: 256)")
    parser.add_argument("--tile-pad", type=int, default=16, help="context around a tile (default: 16)")
    parser.add_weights_options("the files")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port} must be from 0 to 65535")
    if importlib.util.find_spec("gradio") is None:
        commandline.fail('the page needs Gradio; install it with pip install "kdjax[demo]"')
    sharding.use_all_cores()
    try:
        _usable_port(options.port)  # fail before the long start-up
        chosen = weights_options(options)
        paths = named_paths(options.model, "--model")
        loaded = {name: load_weights(path, **chosen) for name, path in paths.items()}
        first = next(iter(loaded.values())).model
        restore_image(first, np.zeros((8, 8), np.float32), tile=options.tile, tile_pad=options.tile_pad)
        code = _serve(options, loaded)
    except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
        commandline.fail(str(error))
    # Not sys.exit: a thread may be restoring an image, cannot be stopped, and would abort at interpreter shutdown.
    os._exit(code)


def _serve(options: argparse.Namespace, loaded: dict[str, Loaded]) -> int:
    """Serves the page until a signal arrives; returns the exit code."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        with _private_folder() as folder:
            _set_environment(folder)
            page = build_page(loaded, folder, tile=options.tile, tile_pad=options.tile_pad)
            url = _launch(page, _usable_port(options.port), options.open)
            print(f"{url}  (Ctrl-C ends)", flush=True)
            while True:
                time.sleep(_KEPT_SECONDS)
    except KeyboardInterrupt:
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


def _launch(page: gradio.Blocks, port: int, open_it: bool) -> str:
    """Serves the page from its own thread; returns its URL."""
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    _, url, _ = page.launch(
        server_name=_HOST,
        server_port=port,
        inbrowser=open_it,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        max_file_size=_MOST_BYTES,
        app_kwargs={
            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[_HOST, "localhost"]), Middleware(_Guard)]
        },
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # others would be fetched
        footer_links=[],
    )
    return url


def _set_environment(folder: Path) -> None:
    """Sets the environment variables that Gradio reads on import, and removes those meant for other apps."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")  # otherwise ./.gradio, which it serves
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{direct},{_HOST}"  # it calls its own server


def _usable_port(port: int) -> int:
    """Returns the port, or a free one for 0.

    Raises:
      OSError: if it cannot be used.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: reuse a port just freed
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise OSError(
                f"port {port} cannot be used: {error.strerror}; choose another with --port, or 0 for a free one"
            ) from None
        return probe.getsockname()[1]


if __name__ == "__main__":
    commandline.run(main)
