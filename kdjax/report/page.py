"""An evaluation as one HTML page: a table of means, the images sorted worst first, and a viewer.

The page is a single file that works from disk and makes no network requests; its content security policy (CSP) forbids
them. Images are PNG, so the page shows, and measures errors on, exactly the pixels that were scored. An image shared by
several entries, such as the clean image of two noise levels, is stored once. A page is a third larger than its PNG
files.

`page.html` is the frame and `page.css` the style; `page.js` builds the table and the list, `viewer.js` the viewer.
Names and titles come from users: they are escaped here, and the scripts insert them as text only.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import numbers
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from kdjax.files import printable, whole_file
from kdjax.metrics.named import METRICS

INPUT = "input"
CLEAN = "clean (gt)"
_TITLES = {"model": "Model", "data": "Set", "degraded": "Degradation", "images": "Images"}


@dataclasses.dataclass(frozen=True)
class Restored:
    """One image as restored by several models; every array is uint8 with gt's shape, (h, w, 1) or (h, w, 3).

    Attributes:
      name: of the image.
      data: the set it belongs to.
      degraded: how it was degraded: "sigma 25" or the folder of the degraded images.
      lq: the degraded image, enlarged to gt's size if the models enlarge.
      gt: the clean image.
      outputs: the restored image, by model.
      scores: by model, or "input" for lq itself: the value of every metric, by its name in METRICS.
    """

    name: str
    data: str
    degraded: str
    lq: np.ndarray
    gt: np.ndarray
    outputs: dict[str, np.ndarray]
    scores: dict[str, dict[str, float]]


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    table: Sequence[Mapping[str, Any]],
    images: Sequence[Restored],
    settings: Mapping[str, str],
) -> None:
    """Writes the page, completely or not at all.

    Args:
      path: the .html file.
      title: its heading.
      table: rows in display order, {"model", "data", "degraded", "images", metric: value, ...}. The best value of a
        metric is marked among the models with equal "data" and "degraded"; the input does not compete.
      images: what the viewer shows, in any order: all or some of the measured images; nan and inf are valid scores.
      settings: shown as they are: files, checksums, date, ...

    Raises:
      ValueError: if an array has another dtype or shape, an image lacks a score, a metric is not in METRICS, or a model
        has one of the names reserved by the page.
      OSError: if the file cannot be written.
    """
    for restored in images:
        _check(restored)
    script, style = _read("page.js") + _read("viewer.js"), _read("page.css")
    page = string.Template(_read("page.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        title=html.escape(printable(title)),
        style=style,
        payload=_json(_shown(_payload(table, images, settings))),
        script=script,
    )
    before, after = page.split("<!-- pictures -->")
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(before)
        for number, picture in enumerate(_distinct(images)):
            file.write(f'<script type="text/plain" id="picture-{number}">{_base64_png(picture)}</script>\n')
        file.write(after)


def _check(restored: Restored) -> None:
    where = f"image {restored.name!r} ({restored.data}, {restored.degraded})"
    if reserved := {INPUT, CLEAN} & set(restored.outputs):
        raise ValueError(f"{where}: a model cannot be named {reserved.pop()!r}, which is another column; rename it")
    gt = restored.gt
    if gt.dtype != np.uint8 or gt.ndim != 3 or gt.shape[2] not in (1, 3) or 0 in gt.shape:
        raise ValueError(f"{where}: gt is {gt.dtype} of shape {gt.shape}; wanted uint8 of shape (h, w, 1 or 3)")
    outputs = {f"output of {name!r}": output for name, output in restored.outputs.items()}
    for what, picture in {"lq": restored.lq, **outputs}.items():
        if picture.dtype != np.uint8 or picture.shape != gt.shape:
            raise ValueError(
                f"{where}: {what} is {picture.dtype} of shape {picture.shape}; wanted uint8 of gt's shape {gt.shape}"
            )
    if not any(restored.scores.values()):
        raise ValueError(f"{where}: it has no score, and the list is sorted by score")
    if unknown := [metric for metric in _union(restored.scores.values()) if metric not in METRICS]:
        raise ValueError(f"{where}: a score has the unknown metric {unknown[0]!r} (known: {', '.join(METRICS)})")


def _pictures(restored: Restored) -> dict[str, np.ndarray]:
    """Returns the pictures of an image, by the name the page shows."""
    return {INPUT: restored.lq, **restored.outputs, CLEAN: restored.gt}


def _payload(
    table: Sequence[Mapping[str, Any]], images: Sequence[Restored], settings: Mapping[str, str]
) -> dict[str, Any]:
    """Returns everything but the pixels."""
    number_of: dict[str, int] = {}  # number of a picture by digest, in the order of `_distinct`
    return {
        "columns": [_column(name) for name in _union(table)],
        "rows": [{name: _plain(value) for name, value in row.items()} for row in table],
        "metrics": [_column(name) for name in _union(values for one in images for values in one.scores.values())],
        # Lists where order matters: JavaScript moves keys such as "25" to the front of an object.
        "settings": [[name, str(value)] for name, value in settings.items()],
        "models": [name for name in _union(m for one in images for m in (one.outputs, one.scores)) if name != INPUT],
        "images": [
            {
                "name": restored.name,
                "data": restored.data,
                "degraded": restored.degraded,
                "height": restored.gt.shape[0],
                "width": restored.gt.shape[1],
                "pictures": {
                    name: number_of.setdefault(_digest(picture), len(number_of))
                    for name, picture in _pictures(restored).items()
                },
                "scores": {
                    model: {name: _plain(value) for name, value in values.items()}
                    for model, values in restored.scores.items()
                },
            }
            for restored in images
        ],
    }


def _distinct(images: Sequence[Restored]) -> Iterator[np.ndarray]:
    """Yields every distinct picture once, in the order of its number."""
    seen = set()
    for restored in images:
        for picture in _pictures(restored).values():
            if (digest := _digest(picture)) not in seen:
                seen.add(digest)
                yield picture


def _digest(picture: np.ndarray) -> str:
    return hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the keys of all mappings, each once, in order of first appearance."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _column(name: str) -> dict[str, Any]:
    """How to display a column: numbers have a number of decimals, text None; only metrics have a better direction."""
    if name not in METRICS:
        title, digits = _TITLES.get(name, name), 0 if name == "images" else None
        return {"name": name, "title": title, "unit": "", "digits": digits, "higherIsBetter": None}
    metric = METRICS[name]
    title = f"{metric.title} ({metric.unit})" if metric.unit else metric.title
    return {
        "name": name,
        "title": title,
        "unit": metric.unit,
        "digits": metric.digits,
        "higherIsBetter": metric.higher_is_better,
    }


def _plain(value: Any) -> str | int | float:
    """Converts a value to JSON; non-finite numbers become the word that JavaScript's `Number` parses."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if not isinstance(value, numbers.Real):
        return str(value)
    if math.isnan(value):
        return "NaN"
    return float(value) if math.isfinite(value) else f"{'-' if value < 0 else ''}Infinity"


def _shown(value: Any) -> Any:
    """Replaces control and bidirectional formatting characters in all texts of the payload with visible escapes."""
    if isinstance(value, dict):
        return {printable(name): _shown(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    return printable(value) if isinstance(value, str) else value


def _json(value: Any) -> str:
    """Serialises to JSON that is safe inside a script element, which only a "<" could end or change."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _base64_png(picture: np.ndarray) -> str:
    """Encodes an image, grey or RGB, as a base64 PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else np.ascontiguousarray(picture)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _read(name: str) -> str:
    return resources.files("kdjax.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Returns the CSP source expression that allows exactly this script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
