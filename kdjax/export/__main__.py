"""Exports a model to other formats, and verifies every file:

    python -m kdjax.export --model FILE --output DIR [--format pth safetensors stablehlo onnx]

Next to the files go NAME.md, the model card, and NAME.export.json, a report of what was written and verified. If the
output is a file instead of DIR, only that file is written. Exits with 1 if a file could not be written or was wrong.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import kdjax
from kdjax import assets, commandline, models
from kdjax.export import FORMATS, Artefact, ExportError, export_model
from kdjax.export.card import describe_checks, find_run, model_card
from kdjax.files import write_json, write_text
from kdjax.weights import Loaded, load_weights, weights_options

FORMAT_NAMES = [suffix.removeprefix(".") for suffix in FORMATS]


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.export", __doc__)
    parser.add_argument("--model", required=True, help=assets.MODEL_HELP)
    parser.add_argument(
        "--output", required=True, type=Path, help="a folder, or one file with the suffix of its format"
    )
    parser.add_argument("--format", nargs="+", choices=FORMAT_NAMES, help="what to write to the folder; default: all")
    parser.add_argument(
        "--run", type=Path, help="folder of the run that trained the model; default: where the model is"
    )
    parser.add_argument("--license", default="unknown", help="license for the card, such as apache-2.0")
    parser.add_weights_options()
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    is_file = options.output.suffix in FORMATS and not options.output.is_dir()
    if is_file and options.format:
        parser.error(f"--output {options.output} is a file, and its suffix is the format; leave out --format")
    if not re.fullmatch(r"[\w.+-]+", options.license):
        parser.error(f"--license {options.license!r} must be an identifier, such as apache-2.0")
    try:
        folder = options.output.parent if is_file else options.output
        loaded = load_weights(options.model, **weights_options(options))
        run = find_run(loaded, options.run)
        folder.mkdir(parents=True, exist_ok=True)
        name = options.output.stem if is_file else Path(loaded.path).stem
        suffixes = [options.output.suffix] if is_file else [f".{format}" for format in options.format or FORMAT_NAMES]
        print(f"{loaded.path}: {loaded.model.arch}, {models.count_params(loaded.model.params):,} parameters")
        artefacts, failed = export_all(loaded, [folder / f"{name}{suffix}" for suffix in dict.fromkeys(suffixes)])
        write_text(folder / f"{name}.md", model_card(name, loaded, artefacts, run, license=options.license))
        write_json(folder / f"{name}.export.json", report(loaded, artefacts, failed))
    except (ValueError, OSError) as error:  # caused by the user's input; a traceback would hide the message
        commandline.fail(str(error))
    print(f"{folder / name}.md, {folder / name}.export.json")
    if failed:
        commandline.fail("\nerror: ".join(failed.values()))


def export_all(loaded: Loaded, paths: list[Path]) -> tuple[list[Artefact], dict[str, str]]:
    """Exports to all paths; returns the files that were written, and error messages by file name for the rest."""
    artefacts, failed = [], {}
    for path in paths:
        try:
            if path.exists() and path.samefile(loaded.path):
                artefact = _the_model_itself(path)
            else:
                artefact = export_model(loaded.model, path, about={"source_sha256": loaded.sha256})
        except ExportError as error:
            failed[path.name] = str(error)
        else:
            artefacts.append(artefact)
            print(f"{path}: {artefact.num_bytes:,} bytes, {describe_checks(artefact)}", flush=True)
    return artefacts, failed


def report(loaded: Loaded, artefacts: list[Artefact], failed: dict[str, str]) -> dict[str, object]:
    """Returns what was exported, as JSON."""
    model = loaded.model
    return {
        "model": {
            "file": Path(loaded.path).name,
            "sha256": loaded.sha256,
            "key": loaded.key,
            "arch": model.arch,
            "hparams": model.hparams,
            "parameters": models.count_params(model.params),
            "scale": model.network.scale,
            "channels": model.network.channels,
        },
        "kdjax": kdjax.__version__,
        "files": [
            {
                "file": artefact.path.name,
                "bytes": artefact.num_bytes,
                "sha256": artefact.sha256,
                "checks": artefact.checks,
                "versions": artefact.versions,
            }
            for artefact in artefacts
        ],
        "failed": failed,
    }


def _the_model_itself(path: Path) -> Artefact:
    """The exported file itself: never overwritten, since it may hold more than the weights taken from it."""
    content = path.read_bytes()
    checks = {"source": "the file that was exported, left as it is"}
    return Artefact(path, hashlib.sha256(content).hexdigest(), len(content), checks, {})


if __name__ == "__main__":
    commandline.run(main)
