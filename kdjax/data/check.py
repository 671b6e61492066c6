"""Checks every image of a data set before training:

    python -m kdjax.data.check --gt FOLDER [--lq FOLDER] [--unpaired FOLDER] [--unlabelled FOLDER] [--json FILE]

Every file is read once, in threads. A bad file is reported and does not stop the check. Folders may be packs. The exit
code is 1 if it finds any of these problems:

    damaged      cannot be read: training replaces it by another image
    tiny         smaller than the crop: training extends it by reflection
    duplicate    same pixels as an earlier image; clean images, lq and unlabelled ones are compared separately
    mismatched   gt is not `scale` times as large as its lq: training replaces it
    identical    gt and lq have the same pixels: if they are one file, training refuses to start
    missing      has no partner, or is listed in a meta_info file but does not exist: training refuses to start

It also reports what need not be a problem: unusual storage (grey among colour, alpha, palettes, 16 bits, CMYK;
`kdjax.data.images` describes the conversions), an lq paired with several gt, and files that kdjax cannot read as
images.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kdjax import assets, commandline
from kdjax.data.images import ImageError, inspect_image
from kdjax.data.pairs import Found, is_one_file, left_out_line, survey, survey_unlabelled
from kdjax.data.sources import shortened
from kdjax.files import write_json
from kdjax.progress import Pace

_AHEAD = 64  # files in flight in the threads; results are small, pixels are dropped
_PROBLEMS = ("damaged", "tiny", "duplicate", "mismatched", "identical", "missing")
_COMPARED = {"gt": "clean", "unpaired": "clean", "lq": "lq", "unlabelled": "unlabelled"}  # compared within a group


@dataclass(frozen=True)
class Facts:
    """What the check records about a readable image."""

    height: int
    width: int
    mode: str  # see `inspect_image`
    digest: bytes  # of its pixels and shape


@dataclass(frozen=True)
class Sizes:
    """Sizes of a folder's readable images, width x height in pixels; "" if there are none."""

    smallest: str  # by the shorter side
    median: str  # by area
    largest: str  # by area
    megapixels: float  # in total
    megabytes: float  # decoded: the size of a cache or pack of them


@dataclass
class Report:
    """The findings. The lists hold human-readable lines, each starting with an image's path."""

    images: dict[str, int] = field(default_factory=dict)  # by role: gt, lq, unpaired, unlabelled
    sizes: dict[str, Sizes] = field(default_factory=dict)
    modes: dict[str, dict[str, int]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    duplicate: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)  # paths, by kind of storage
    shared: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        """All problems, by kind."""
        return {kind: getattr(self, kind) for kind in _PROBLEMS}

    @property
    def clean(self) -> bool:
        return not any(self.problems.values())


def check(
    found: Mapping[str, Found],
    *,
    crop: int,
    scale: int = 1,
    threads: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Report:
    """Reads all images of a data set and reports on them.

    Args:
      found: the `survey` of each source by role: "gt" (with its lq), "unpaired", "unlabelled".
      crop: side of the training crop, in gt pixels.
      scale: size of gt relative to lq.
      threads: decoding threads; by default one per core, at most eight.
      tell: called with a line of progress every few seconds.
    """
    report = Report()
    pairs = [(pair.gt, pair.lq) for pair in found["gt"].pairs if pair.lq is not None]
    paths: dict[str, list[str]] = {}
    for role, source in found.items():
        # A meta_info file may list an image twice; it is still one file.
        paths[role] = _unique([*(pair.gt for pair in source.pairs), *source.without_lq])
    if pairs or found["gt"].without_gt:
        paths["lq"] = _unique([*(lq for _, lq in pairs), *found["gt"].without_gt])
    report.missing = [
        *(f"{path}: no partner in lq" for path in found["gt"].without_lq),
        *(f"{path}: no partner in gt" for path in found["gt"].without_gt),
        *(f"meta_info, {entry}" for source in found.values() for entry in source.not_found),
    ]
    known: dict[str, Facts] = {}
    wanted = _unique([path for group in paths.values() for path in group])
    pace = Pace(len(wanted))
    with contextlib.closing(_read_all(wanted, threads or min(8, os.cpu_count() or 1))) as read:
        for done, (path, facts) in enumerate(read, 1):
            if isinstance(facts, Facts):
                known[path] = facts
            else:
                report.damaged.append(facts)
            if tell and pace.is_due(5):
                tell(f"{done} of {len(wanted)} images")

    first: dict[tuple[str, bytes], str] = {}
    for role, group in paths.items():
        readable = {path: known[path] for path in group if path in known}
        report.images[role] = len(group)
        report.sizes[role] = _sizes(list(readable.values()))
        report.modes[role] = dict(Counter(facts.mode for facts in readable.values()).most_common())
        side = crop if role in ("gt", "unpaired") else crop // scale
        for path, facts in readable.items():
            if min(facts.height, facts.width) < side:
                report.tiny.append(f"{path}: {facts.width}x{facts.height}, smaller than the crop of {side}")
            before = first.setdefault((_COMPARED[role], facts.digest), path)
            if before != path:
                report.duplicate.append(f"{path}: the same pixels as {before}")
    for gt, lq in pairs:
        if gt in known and lq in known:
            large, small = known[gt], known[lq]
            if (large.height, large.width) != (scale * small.height, scale * small.width):
                report.mismatched.append(
                    f"{gt}: {large.width}x{large.height}, and lq {lq} {small.width}x{small.height}: with scale {scale}"
                    f" gt should be {scale * small.width}x{scale * small.height}"
                )
        if gt in known and lq in known and known[gt].digest == known[lq].digest:
            what = "is the same file" if is_one_file(gt, lq) else "has the same pixels"
            report.identical.append(f"{gt}: its lq {lq} {what}")
    report.notes = _notes(known)
    partners: dict[str, list[str]] = defaultdict(list)
    for gt, lq in dict.fromkeys(pairs):
        partners[lq].append(gt)
    report.shared = [
        f"{lq}: is the lq of {len(gts)} gt images, such as {gts[0]} and {gts[1]}"
        for lq, gts in partners.items()
        if gts[1:]
    ]
    report.left_out = _unique([path for source in found.values() for path in source.left_out])
    return report


def _read_all(paths: Sequence[str], threads: int) -> Generator[tuple[str, Facts | str]]:
    """Yields every path in order, with its facts or the reason it cannot be read."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), _AHEAD):
            some = paths[start : start + _AHEAD]
            yield from zip(some, pool.map(_facts, some), strict=True)


def _facts(path: str) -> Facts | str:
    try:
        pixels, mode = inspect_image(path)
    except ImageError as error:
        return str(error)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return Facts(pixels.shape[0], pixels.shape[1], mode, digest.digest())


def _unique(paths: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(paths))


def _sizes(images: Sequence[Facts]) -> Sizes:
    if not images:
        return Sizes("", "", "", 0.0, 0.0)
    by_area = sorted(images, key=lambda facts: facts.height * facts.width)
    smallest = min(images, key=lambda facts: min(facts.height, facts.width))
    shown = [f"{facts.width}x{facts.height}" for facts in (smallest, by_area[len(by_area) // 2], by_area[-1])]
    pixels = sum(facts.height * facts.width for facts in images)
    return Sizes(*shown, megapixels=round(pixels / 1e6, 2), megabytes=round(pixels * 3 / 2**20, 1))


def _notes(known: Mapping[str, Facts]) -> dict[str, list[str]]:
    """Returns the images stored differently from most, by kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for path, facts in known.items():
        for kind in _kinds(facts.mode):
            kinds[kind].append(path)
    if len(kinds["grey"]) == len(known):  # a grey data set
        del kinds["grey"]
    return {kind: paths for kind, paths in kinds.items() if paths}


def _kinds(mode: str) -> Iterator[str]:
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        yield "grey"
    if mode.endswith(("A", "a")):
        yield "alpha"
    if "16" in mode or mode == "I":
        yield "16 bit"
    if mode.startswith("P"):
        yield "palette"
    if mode == "CMYK":
        yield "CMYK"


def lines(report: Report) -> list[str]:
    """Formats the report as lines of text."""
    text = []
    for role, count in report.images.items():
        sizes = report.sizes[role]
        text.append(f"{role}: {count} images, {sizes.megapixels:,} megapixels, {sizes.megabytes:,} MB decoded")
        if sizes.median:
            text.append(f"  smallest {sizes.smallest}, median {sizes.median}, largest {sizes.largest}")
            text.append("  stored as " + ", ".join(f"{mode} ({n})" for mode, n in report.modes[role].items()))
    for kind, paths in report.notes.items():
        text += [f"note: {len(paths)} stored as {kind}", *shortened(paths)]
    if report.shared:
        text += [f"note: {len(report.shared)} lq with several gt", *shortened(report.shared)]
    if report.left_out:
        text.append(f"note: {left_out_line(report.left_out)}")
    for kind, found in report.problems.items():
        if found:
            text += [f"{kind}: {len(found)}", *shortened(found)]
    count = sum(map(len, report.problems.values()))
    text.append("clean" if report.clean else f"{count} problem{'' if count == 1 else 's'}")
    return text


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.data.check", __doc__)
    parser.add_argument("--gt", required=True, help='folder or pack of clean images, or "embedded"')
    parser.add_argument("--lq", help="folder or pack of their degraded partners")
    parser.add_argument("--filename-tmpl", default="{}", help='lq file stem from the gt stem, e.g. "{}_noisy"')
    parser.add_argument("--meta-info", help="list of the files to use, one a line")
    parser.add_argument("--unpaired", help="folder of clean images beside the pairs")
    parser.add_argument("--unpaired-meta-info", help="list of those to use")
    parser.add_argument("--unlabelled", help="folder of degraded images without a clean partner")
    parser.add_argument("--scale", type=int, default=1, help="how many times larger gt is than lq (default: 1)")
    parser.add_argument("--crop", type=int, default=128, help="side of the training crop, gt pixels (default: 128)")
    parser.add_argument("--json", type=Path, help="also write every finding to this file")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.scale < 1 or options.crop < 0:
        parser.error("--scale must be 1 or more, and --crop 0 or more")
    started = time.monotonic()
    try:
        found = {
            "gt": survey(
                gt=assets.locate(options.gt, assets.TRAIN_PHOTOGRAPHS),
                lq=options.lq,
                filename_tmpl=options.filename_tmpl,
                meta_info=options.meta_info,
            )
        }
        if options.unpaired:
            found["unpaired"] = survey(gt=options.unpaired, meta_info=options.unpaired_meta_info, what="unpaired")
        if options.unlabelled:
            found["unlabelled"] = survey_unlabelled(options.unlabelled)
        report = check(
            found,
            crop=options.crop,
            scale=options.scale,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print("\n".join([*lines(report), f"{time.monotonic() - started:.0f} s"]), flush=True)
        if options.json:
            write_json(options.json, {"clean": report.clean} | asdict(report))
    except (ValueError, OSError) as error:  # errors in the user's input; a traceback would hide the message
        commandline.fail(str(error))
    sys.exit(0 if report.clean else 1)


if __name__ == "__main__":
    commandline.run(main)
