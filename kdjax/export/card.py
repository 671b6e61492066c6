"""The model card next to exported files: what the model is, its known origin, and the files.

Teacher, data, recipe and numbers are read from the folder of the run that trained the model, after checking that its
`student.pth` is that model. Without such a folder the card says "not known".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import assets, models
from kdjax import config as config_lib
from kdjax.export import Artefact, ExportError
from kdjax.files import read_json
from kdjax.markdown import code, front_matter, literal, table
from kdjax.names import brief
from kdjax.weights import Loaded, load_model

UNKNOWN = "not known"


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a finished run's folder.

    Attributes:
      config: the whole config, as this version of kdjax understands it.
      teacher: "files" and "identity", or None if no loss needed one.
      step: the last step.
      numbers: metrics of its last validation, by name.
    """

    config: config_lib.Config
    teacher: dict[str, Any] | None
    step: int
    numbers: dict[str, float | None]


def find_run(loaded: Loaded, given: Path | None) -> Run | None:
    """Finds the run that trained a model: the `given` folder, or else the one containing the model's file.

    Raises:
      ExportError: if the given folder is not a finished run, or its student is another model.
    """
    folder = given or Path(loaded.path).parent
    try:
        run = _read_run(folder, loaded.model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if given is None:
            return None
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ExportError(
            f"--run {folder}: is not the folder of a finished run that trained this model: {reason}"
        ) from error
    return run


def _read_run(folder: Path, model: models.Model) -> Run:
    student = load_model(folder / "student.pth", arch=model.arch)
    same = (student.arch, student.hparams) == (model.arch, model.hparams) and all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(jax.tree.leaves(model.params), jax.tree.leaves(student.params), strict=True)
    )
    if not same:
        raise ValueError("its student.pth is another model")
    config = config_lib.parse(read_json(folder / "config.json"))
    step = read_json(folder / "result.json")["step"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = {
        name.removeprefix("val/"): value
        for row in rows
        if row["step"] == step
        for name, value in row.items()
        if name.startswith("val/")
    }
    teacher = read_json(folder / "run.json")["teacher"]
    if teacher:
        teacher = {"files": [str(file) for file in teacher["files"]], "identity": str(teacher["identity"])}
    wrong = [name for name, value in numbers.items() if not isinstance(value, float | int | None)]
    if type(step) is not int or wrong:
        raise ValueError(
            f"these results are not numbers: {brief({'step': step} | {name: numbers[name] for name in wrong})}"
        )
    return Run(config, teacher, step, numbers)


def model_card(name: str, loaded: Loaded, artefacts: Sequence[Artefact], run: Run | None, *, license: str) -> str:
    """Returns the card as Markdown, with the front matter that model hubs read.

    Args:
      license: its identifier, such as "apache-2.0", or "unknown".
    """
    model = loaded.model
    channels, scale = model.network.channels, model.network.scale
    macs = model.network.count_macs(256, 256)
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    entry = "weights at its top level" if loaded.key == "bare" else f"weights under {code(loaded.key)}"
    size = "of the same size" if scale == 1 else f"{scale} times as high and wide"
    hparams = ", ".join(f"{name}={value!r}" for name, value in model.hparams.items())
    files = [[code(a.path.name), f"{a.num_bytes:,}", code(a.sha256), literal(describe_checks(a))] for a in artefacts]
    lines = [
        front_matter(
            {
                "license": license,
                "library_name": "kdjax",
                "pipeline_tag": "image-to-image",
                "tags": ["image-restoration", model.arch.rpartition(":")[2].lower()],
            }
        ),
        "",
        f"# {literal(name)}",
        "",
        f"An image restoration network: {colours} images in, images {size} out.",
        "",
        *_facts(
            {
                "architecture": code(f"{model.arch}({hparams})"),
                "parameters": f"{models.count_params(model.params):,}",
                "cost": f"{macs / 1e9:.2f} GMAC for an input of 256x256",
                "scale": str(scale),
                "channels": f"{channels} ({colours})",
                "input": "float32, about 0 to 1 (a noisy image may leave that range), any height and width",
                "output": "float32, not clipped: clip to 0 to 1 before rounding to 8 bit",
                "exported from": f"{code(Path(loaded.path).name)}, {entry}, sha256 {code(loaded.sha256)}",
            }
        ),
        "",
        "## Training",
        "",
        *_facts(_training(loaded, run)),
        "",
        "## Numbers",
        "",
        *_numbers(run),
        "",
        "## Files",
        "",
        table(["file", "bytes", "sha256", "checked"], files, align="llll"),
        "",
    ]
    if run:
        lines += [
            "## Config of the run",
            "",
            "```json",
            json.dumps(config_lib.to_dict(run.config), indent=2),
            "```",
            "",
        ]
    return "\n".join(lines)


def describe_checks(artefact: Artefact) -> str:
    """Describes in a few words how a file was verified."""
    if "largest_differences" in artefact.checks:
        sizes, differences = artefact.checks["sizes"], artefact.checks["largest_differences"]
        return f"differs from the model by at most {max(differences):.1e} on {len(sizes)} sizes"
    return next(iter(artefact.checks.values()))


def _facts(rows: dict[str, str]) -> list[str]:
    """Formats a table of names, which may be untrusted, and values that are Markdown."""
    return table(["", ""], [[literal(name), value] for name, value in rows.items()], align="ll").splitlines()


def _training(loaded: Loaded, run: Run | None) -> dict[str, str]:
    if run is None:
        known = "see `MODEL_CARD.md` in `kdjax/assets`" if loaded.path in map(str, assets.MODELS.values()) else UNKNOWN
        return dict.fromkeys(("teacher", "data", "recipe"), known)
    data, train = run.config.data, run.config.train
    teacher = "none"
    if run.teacher:
        files = ", ".join(code(Path(file).name) for file in run.teacher["files"])
        teacher = f"{files}, {literal(run.teacher['identity'])}"
    made = f"degraded by {_inline(run.config.degrade)}"
    source = f"{code(data.gt)}, " + (f"inputs from {code(data.lq)}" if data.lq else made)
    if data.unpaired:
        source += f", and {code(data.unpaired)}, {made}"
    return {
        "teacher": teacher,
        "data": source,
        "losses": "<br>".join(f"{literal(name)}: {_inline(options)}" for name, options in run.config.terms.items()),
        "recipe": (
            f"{run.step:,} steps of {data.batch_size} crops of {data.crop} pixels, {train.optimizer}, learning rate"
            f" {_inline(train.lr)}, EMA {train.ema_decay:g}, seed {run.config.seed}"
        ),
        "started from": code(run.config.student.weights) if run.config.student.weights else "random weights",
    }


def _numbers(run: Run | None) -> list[str]:
    if run is None or not run.numbers:
        return [f"{UNKNOWN.capitalize()}."]
    val = run.config.val
    degraded = f"noise of sigma {val.sigma:g}"
    if val.lq:
        degraded = f"inputs from {code(val.lq)}"
    elif val.degrade:
        degraded = f"degraded by {_inline(val.degrade)}"
    part = f", centre crops of {val.crop}" if val.crop else ""
    part += f", at most {val.limit} images" if val.limit else ""
    values = {name: "not defined" if value is None else f"{value:.4f}" for name, value in run.numbers.items()}
    return [
        f"The last validation of the run, at step {run.step:,}: {code(val.gt)}, {degraded}{part}. PSNR in dB.",
        "",
        *_facts(values),
    ]


def _inline(value: Any) -> str:
    return code(json.dumps(value))
