"""Tries models in the browser, on this machine only:

    pip install "kdjax[demo]"
    python -m kdjax.demo --model student.pth teacher.pth

The page takes an image, adds noise to it if asked to, and shows input and output with a slider between them, and how
long that took. It listens on localhost; nothing is sent anywhere else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kdjax import assets, models
from kdjax.data import read_image
from kdjax.names import named_paths
from kdjax.tiles import restore_image
from kdjax.weights import Loaded, load_weights, parse_hparams

if TYPE_CHECKING:
    import gradio

_MOST_PIXELS = 20_000_000  # what a browser still shows


def add_noise(image: np.ndarray, sigma: float) -> np.ndarray:
    """A uint8 image as float32 in about [0, 1], with Gaussian noise of `sigma` (0..255 scale), always the same."""
    noise = np.random.default_rng(0).standard_normal(image.shape, np.float32)
    return np.float32(image) / 255 + np.float32(sigma / 255) * noise


def restore(
    model: models.Model, path: str | os.PathLike[str], sigma: float, *, tile: int, tile_pad: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """What the model was given and what it made of an image file, uint8 of one size, and the seconds that it took.

    Raises:
      ImageError: the file is not an image.
      ValueError: it has too many pixels for a page.
    """
    image = read_image(path)
    scale = models.scale_of(model)
    height, width = (size * scale for size in image.shape[:2])
    if height * width > _MOST_PIXELS:
        raise ValueError(
            f"the result would be {width}x{height} pixels, more than the {_MOST_PIXELS / 1e6:g} million that this page"
            " shows; use python -m kdjax.restore"
        )
    noisy = add_noise(image, sigma)
    started = time.perf_counter()
    restored = restore_image(model, noisy, tile=tile, tile_pad=tile_pad)
    seconds = time.perf_counter() - started
    given, made = (np.round(np.clip(x, 0, 1) * 255).astype(np.uint8) for x in (noisy, restored))
    return np.asarray(Image.fromarray(given).resize((width, height), Image.Resampling.BICUBIC)), made, seconds


def build_page(loaded: dict[str, Loaded], *, tile: int, tile_pad: int) -> gradio.Blocks:
    """The page for models by name."""
    import gradio as gr

    def run(name: str, path: str | None, sigma: float) -> tuple[tuple[np.ndarray, np.ndarray], str]:
        if path is None:
            raise gr.Error("Drop an image first.")
        try:
            given, made, seconds = restore(loaded[name].model, path, sigma, tile=tile, tile_pad=tile_pad)
        except ValueError as error:  # also an ImageError: what was dropped, not the program
            raise gr.Error(str(error).replace(str(path), Path(path).name)) from error
        height, width = made.shape[:2]
        megapixels = height * width / models.scale_of(loaded[name].model) ** 2 / 1e6
        return (given, made), (
            f"**{seconds * 1000:.0f} ms** for {width}x{height} pixels, {megapixels / seconds:.2f} megapixels of input a"
            " second. The first image of a size below the tile also compiles the model."
        )

    with gr.Blocks(title="kdjax", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(
            "# kdjax\nDrop an image; the slider shows the input on its left and the restored image on its right."
        )
        with gr.Row():
            with gr.Column(scale=1):
                name = gr.Dropdown(list(loaded), value=next(iter(loaded)), label="Model", elem_id="model")
                about = gr.Markdown(_about(next(iter(loaded.values()))), elem_id="about")
                path = gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", elem_id="image")
                sigma = gr.Slider(0, 75, 0, step=1, label="Noise to add first, sigma of 255", elem_id="sigma")
                button = gr.Button("Restore", variant="primary", elem_id="restore")
                gr.Examples([str(photo) for photo in _photographs()], path, label="Photographs of the package")
            with gr.Column(scale=2):
                slider = gr.ImageSlider(
                    label="Input | restored", type="numpy", format="png", interactive=False, elem_id="result"
                )
                timing = gr.Markdown(elem_id="timing")
        name.change(lambda chosen: _about(loaded[chosen]), name, about, api_visibility="private")
        button.click(run, [name, path, sigma], [slider, timing], api_name="restore")
    return page


def _about(loaded: Loaded) -> str:
    model = loaded.model
    scale = models.scale_of(model)
    enlarges = f", enlarges {scale} times" if scale > 1 else ""
    return f"{model.arch}, {models.count_params(model.params):,} parameters{enlarges}"


def _photographs() -> list[Path]:
    folder = Path(assets.locate("embedded", assets.VAL_PHOTOGRAPHS))
    return sorted(path for path in folder.iterdir() if path.suffix == ".png")[:4]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kdjax.demo", description="A local page to try models on images.")
    parser.add_argument("--model", nargs="+", required=True, metavar="[NAME=]FILE", help='weights, or "embedded"')
    parser.add_argument("--port", type=int, default=7860, help="port on localhost; 0 takes a free one (default: 7860)")
    parser.add_argument("--tile", type=int, default=256, help="side of a tile; 0 runs images whole (default: 256)")
    parser.add_argument("--tile-pad", type=int, default=16, help="context around a tile (default: 16)")
    parser.add_argument("--key", default="auto", help="which state dict of the files, e.g. params; default: the best")
    parser.add_argument("--hparam", action="append", default=[], metavar="NAME=VALUE", help="what a file cannot tell")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    options = parser.parse_args()
    if not 0 <= options.port <= 65535:
        parser.error(f"--port {options.port} must be from 0 to 65535")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: it would look for news
    try:
        import gradio as gr
    except ImportError:
        sys.exit('error: the page needs Gradio; install it with pip install "kdjax[demo]"')
    try:
        hparams = parse_hparams(options.hparam)
        paths = named_paths(options.model, "--model")
        loaded = {
            name: load_weights(assets.locate(path, assets.TEACHER), key=options.key, **hparams)
            for name, path in paths.items()
        }
        first = next(iter(loaded.values())).model
        restore_image(first, np.zeros((8, 8), np.float32), tile=options.tile, tile_pad=options.tile_pad)
    except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
        sys.exit(f"error: {error}")
    page = build_page(loaded, tile=options.tile, tile_pad=options.tile_pad)
    fonts = ["system-ui", "sans-serif"]  # Gradio's own would be fetched
    try:
        _, url, _ = page.launch(
            server_name="127.0.0.1",
            server_port=options.port or _free_port(),
            inbrowser=options.open,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
            footer_links=[],
        )
    except OSError as error:
        sys.exit(
            f"error: port {options.port} cannot be used ({error}); choose another with --port, or 0 for a free one"
        )
    print(f"{url}  (Ctrl-C ends)", flush=True)
    page.block_thread()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
