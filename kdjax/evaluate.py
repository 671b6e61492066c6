"""Measures a model on a folder of images:

    python -m kdjax.evaluate --model FILE --data DIR --sigma 25 [--json F]

Clean images get the benchmark's noise (`kdjax.validation`: seed 0 per image, not clipped); with --lq the degraded
partners are read from another folder. PSNR and SSIM are BasicSR's, on RGB after rounding to 8 bit, no border left out;
the result is the mean over the images.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path

from kdjax import assets, data, models, validation
from kdjax.logbook import finite, write_json
from kdjax.validation import Score
from kdjax.weights import load_weights, parse_hparams


def evaluate(
    model: models.Model, samples: list[validation.Sample], *, show_progress: bool = False
) -> tuple[Score, dict[str, Score]]:
    """The mean score of a model, and that of every image by name, in the order of `samples`."""
    apply = models.make_apply(model.arch, model.hparams)
    scores: dict[int, Score] = {}
    shown = time.monotonic()
    for position, output in validation.restore(apply, model.params, [sample.lq for sample in samples]):
        scores[position] = validation.score(output, samples[position].gt)
        if show_progress and time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"{len(scores)} of {len(samples)} images", file=sys.stderr, flush=True)
    by_name = {sample.name: scores[position] for position, sample in enumerate(samples)}
    return validation.mean_score(list(by_name.values())), by_name


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m kdjax.evaluate", description="PSNR and SSIM of a model on a folder of images."
    )
    parser.add_argument("--model", required=True, help='.pth or .safetensors file, or "embedded"')
    parser.add_argument("--data", required=True, help='folder of clean images, or "embedded"')
    parser.add_argument("--sigma", type=float, help="standard deviation of the noise to add, 0..255 scale")
    parser.add_argument("--lq", help="folder of the degraded images, in place of --sigma")
    parser.add_argument("--filename-tmpl", default="{}", help='lq file stem from the gt stem, e.g. "{}_noisy"')
    parser.add_argument("--limit", type=int, default=0, help="images at most, spread over the folder; 0 takes all")
    parser.add_argument("--key", default="auto", help="which state dict of the file, e.g. params; default: the best")
    parser.add_argument("--hparam", action="append", default=[], metavar="NAME=VALUE", help="what the file cannot tell")
    parser.add_argument("--json", type=Path, help="also write the results, by image, to this file")
    options = parser.parse_args()
    if (options.sigma is None) == (options.lq is None):
        parser.error("give either --sigma or --lq")
    if options.sigma is not None and not 0 <= options.sigma <= 255:
        parser.error(f"--sigma {options.sigma:g} must be from 0 to 255")
    logging.getLogger("jax").setLevel(logging.WARNING)
    try:
        loaded = load_weights(
            assets.locate(options.model, assets.TEACHER), **({"key": options.key} | parse_hparams(options.hparam))
        )
        model = loaded.model
        if options.lq is None and models.scale_of(model) != 1:
            raise ValueError(f"{loaded.path} enlarges {models.scale_of(model)} times; give its small images with --lq")
        pairs = data.find_pairs(
            gt=assets.locate(options.data, assets.VAL_PHOTOGRAPHS),
            lq=options.lq,
            filename_tmpl=options.filename_tmpl,
            what="evaluation",
        )
        images = data.load_images(
            pairs, channels=models.num_channels(model), scale=models.scale_of(model), limit=options.limit
        )
    except (ValueError, OSError) as error:  # what the user gave; a traceback would hide the message
        sys.exit(f"error: {error}")
    samples = [validation.make_sample(image.name, image.gt, image.lq, options.sigma or 0.0) for image in images]
    print(f"{loaded.path}: {model.arch}, {models.count_params(model.params):,} parameters, {loaded.layout} layout,")
    print(f"  weights under {loaded.key!r}, sha256 {loaded.sha256}")
    started = time.monotonic()
    mean, by_name = evaluate(model, samples, show_progress=True)
    degraded = f"sigma {options.sigma:g}" if options.lq is None else options.lq
    result = {
        "model": loaded.path,
        "sha256": loaded.sha256,
        "data": options.data,
        "degraded": degraded,
        "images": len(samples),
        **dataclasses.asdict(mean),
    }
    print(f"{options.data}, {len(samples)} images, {degraded}, {time.monotonic() - started:.0f} s")
    print(f"  PSNR {mean.psnr:.2f} dB   SSIM {mean.ssim:.4f}")
    if models.scale_of(model) == 1:
        before = validation.input_score(samples)
        result["input"] = dataclasses.asdict(before)
        print(f"  input {before.psnr:.2f} dB        {before.ssim:.4f}")
    if options.json:
        result["by_image"] = {name: dataclasses.asdict(score) for name, score in by_name.items()}
        write_json(options.json, finite(result))


if __name__ == "__main__":
    main()
