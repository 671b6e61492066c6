"""Which image files belong to a data set, found from folders, packs, single files and lists.

A data set is either clean (`gt` alone: noise or other degradations are added later) or paired (`gt` and `lq`,
low quality). Files pair by BasicSR's rule: `filename_tmpl.format(stem of gt)` in the same sub-folder. Unlike
BasicSR, the suffix may differ where that leaves no doubt, sub-folders are searched, and every file that has
no partner is an error, told in one message. Files and folders whose names start with a dot are not seen.
Wherever a folder is wanted a pack (`kdjax.data.shards`) can be given: it has the names of the folder it was made from.

Left out: lmdb stores, and looking into the files, which `kdjax.data.images` does.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kdjax.data.images import IMAGE_SUFFIXES
from kdjax.data.shards import PackError, is_pack, open_pack

_LISTED = 10  # names that a message shows of each kind

# BasicSR's meta_info: "name.png (480,480,3)", in lmdb folders followed by the compression level.
_NAME_AND_SIZE = re.compile(r"(?P<name>.*\S)\s+\(\s*\d+(\s*,\s*\d+)*\s*\)(\s+\d+)?")


class DataError(ValueError):
    """Data that cannot be used; the message says what was given, what was wanted and what to do."""


@dataclass(frozen=True)
class ImagePair:
    """One image of a data set: its name in messages and results, and the paths of its files."""

    name: str  # the path of gt relative to its folder, with forward slashes
    gt: str
    lq: str | None  # None: a clean image


@dataclass(frozen=True)
class Found:
    """The images of a data set, and what is missing from it."""

    pairs: list[ImagePair]
    without_lq: list[str]  # paths of images that should have a partner in lq
    without_gt: list[str]  # and in gt
    not_found: list[str]  # entries of a meta_info file that do not exist: "line 3: no gt '9.png'"
    message: str | None  # all of that for the user, and what to do; None when nothing is missing


def find_pairs(
    *,
    gt: str,
    lq: str | None = None,
    filename_tmpl: str = "{}",
    meta_info: str | None = None,
    recursive: bool = True,
    what: str = "training",
) -> list[ImagePair]:
    """The images of a data set, in natural order of their names (2 before 10).

    `gt` and `lq` are two folders (or packs), or two files. `meta_info` is a text file that names the images to use, one
    in a line: either `name.png (height,width,channels)` as BasicSR writes it, or `gt name, lq name` as
    Real-ESRGAN does; blank lines and lines that start with # are skipped, and the order of the file is kept.
    Without `lq`, lq names are ignored. `what` names the data set in messages.

    Raises:
      DataError: a folder cannot be used, or anything is missing.
    """
    found = survey(gt=gt, lq=lq, filename_tmpl=filename_tmpl, meta_info=meta_info, recursive=recursive, what=what)
    if found.message:
        raise DataError(found.message)
    return found.pairs


def survey(
    *,
    gt: str,
    lq: str | None = None,
    filename_tmpl: str = "{}",
    meta_info: str | None = None,
    recursive: bool = True,
    what: str = "training",
) -> Found:
    """As `find_pairs`, but images without partner and entries that do not exist are part of what it returns.

    Raises:
      DataError: a folder cannot be used.
    """
    gt = _existing(gt, f"{what} images (gt)")
    lq = None if lq is None else _existing(lq, f"{what} images (lq)")
    _check_template(filename_tmpl)
    if os.path.isfile(gt):
        if meta_info is not None:
            raise DataError(f"{what} images: meta_info needs a folder as gt, and {gt!r} is a file")
        if lq is not None and not os.path.isfile(lq):
            raise DataError(f"{what} images: gt is the file {gt!r}, so lq must be a file too, and {lq!r} is a folder")
        return _all_found([ImagePair(os.path.basename(gt), gt, lq)])
    if lq is not None and os.path.isfile(lq):
        raise DataError(f"{what} images: gt is the folder {gt!r}, so lq must be a folder too, and {lq!r} is a file")
    gt_source = _open_source(gt, f"{what} images (gt)")
    lq_source = None if lq is None else _open_source(lq, f"{what} images (lq)")
    if meta_info is not None:
        return _listed_pairs(gt_source, lq_source, filename_tmpl, meta_info, what)
    gt_names = _list_images(gt_source, recursive, f"{what} images (gt)")
    if lq_source is None:
        return _all_found([ImagePair(name, gt_source.path(name), None) for name in gt_names])
    if os.path.samefile(gt, lq):
        raise DataError(
            f"{what} images: gt and lq are the same folder, {gt!r}; keep them in two folders, "
            "or list the pairs in a meta_info file"
        )
    lq_names = _list_images(lq_source, recursive, f"{what} images (lq)")
    return _matched_pairs(gt_source, lq_source, gt_names, lq_names, filename_tmpl, what)


def find_unlabelled(folder: str, *, degraded: bool) -> list[ImagePair]:
    """The images of a folder or pack (a str or Path) that have no clean partner, in natural order.

    `degraded` images are used as they are, and stand in for their own gt, which no loss may look at; others get the
    noise that is added to clean images.

    Raises:
      DataError: there is no such folder, or no image in it.
    """
    role = "unlabelled images"
    folder = _existing(folder, role)
    if not os.path.isdir(folder):
        raise DataError(f"{role}: {folder!r} is a file; give a folder")
    source = _open_source(folder, role)
    paths = [(name, source.path(name)) for name in _list_images(source, True, role)]
    return [ImagePair(name, path, path if degraded else None) for name, path in paths]


class _Source(Protocol):
    """Images with names: a folder of files, or a pack."""

    folder: str

    def names(self, recursive: bool) -> list[str]:
        """The names of all images, in no order; without `recursive`, of those in no sub-folder."""

    def has(self, name: str) -> bool: ...

    def path(self, name: str) -> str: ...


def _open_source(folder: str, role: str) -> _Source:
    try:
        return open_pack(folder) if is_pack(folder) else _Folder(folder)
    except PackError as error:
        raise DataError(f"{role}: {error}") from None


def _list_images(source: _Source, recursive: bool, role: str) -> list[str]:
    """The names of the images, in natural order; never an empty list."""
    try:
        names = source.names(recursive)
    except OSError as error:
        raise DataError(f"{role}: the folder {error.filename!r} cannot be read: {error.strerror}") from error
    if not names:
        depth = "and its sub-folders" if recursive else "(sub-folders were not searched)"
        seen = [files for parent, _, files in os.walk(source.folder) if recursive or parent == source.folder]
        others = sum(not name.startswith(".") for files in seen for name in files)
        raise DataError(
            f"{role}: no image in {source.folder!r} {depth}; looked for {', '.join(IMAGE_SUFFIXES)} and saw "
            f"{others} other file{'' if others == 1 else 's'}"
        )
    return sorted(names, key=_natural)


def _all_found(pairs: list[ImagePair]) -> Found:
    return Found(pairs, [], [], [], None)


def _existing(path: str, role: str) -> str:
    if not path:
        raise DataError(f"{role}: no path was given; give a folder or an image file")
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise DataError(f"{role}: {path!r} does not exist (looked for {os.path.abspath(path)})")
    return path


def _check_template(template: str) -> None:
    try:
        varies = template.format("a") != template.format("b")
    except (IndexError, KeyError, ValueError, AttributeError):
        varies = False
    if not varies:
        raise DataError(
            f"filename_tmpl is {template!r}; it must hold one {{}} where the name of gt without its suffix "
            "goes, such as '{}' or '{}x4'"
        )


class _Folder:
    """The images below a folder; names are paths relative to it, with forward slashes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def names(self, recursive: bool) -> list[str]:
        names: list[str] = []

        def fail(error: OSError) -> None:
            raise error

        for parent, folders, files in os.walk(self.folder, onerror=fail, followlinks=True):
            here = os.path.realpath(parent)

            def leads_back(name: str, here: str = here) -> bool:  # a link to a folder that holds this one
                target = os.path.realpath(os.path.join(here, name))
                return f"{here}{os.sep}".startswith(f"{target}{os.sep}")

            folders[:] = [name for name in folders if recursive and not name.startswith(".") and not leads_back(name)]
            for name in files:
                if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                    names.append(os.path.relpath(os.path.join(parent, name), self.folder).replace(os.sep, "/"))
        return names

    def has(self, name: str) -> bool:
        return os.path.isfile(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _natural(name: str) -> tuple[list[list[str | int]], str]:
    """A sort key that takes digits as numbers, folder by folder; 1 and 01 are told apart by the text."""
    # With one group, re.split alternates text, digits, text: the same position always holds the same type.
    parts = [re.split(r"([0-9]+)", part.lower()) for part in name.split("/")]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], name


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _partner_stem(gt_name: str, template: str) -> str:
    """The path of lq without its suffix: the template applies to the file name, the sub-folder stays."""
    folder, _, file_name = gt_name.rpartition("/")
    partner = template.format(_stem(file_name))
    return f"{folder}/{partner}" if folder else partner


def _matched_pairs(
    gt: _Source, lq: _Source, gt_names: Sequence[str], lq_names: Sequence[str], template: str, what: str
) -> Found:
    free: dict[str, list[str]] = defaultdict(list)  # by path without suffix: lq files that have no gt yet
    for name in lq_names:
        free[_stem(name)].append(name)
    partner: dict[str, str] = {}
    rest: dict[str, list[str]] = defaultdict(list)
    for name in gt_names:
        wanted = _partner_stem(name, template)
        exact = wanted + os.path.splitext(name)[1]
        if exact in free.get(wanted, ()):
            partner[name] = exact
            free[wanted].remove(exact)
        else:
            rest[wanted].append(name)
    for wanted, names in rest.items():
        if len(names) == 1 and len(free.get(wanted, ())) == 1:
            partner[names[0]] = free[wanted].pop()
    pairs = [ImagePair(name, gt.path(name), lq.path(partner[name])) for name in gt_names if name in partner]
    without_lq = [name for name in gt_names if name not in partner]
    without_gt = [name for name in lq_names if name in free[_stem(name)]]
    if not without_lq and not without_gt:
        return _all_found(pairs)
    folders = f"gt {gt.folder!r} and lq {lq.folder!r}"
    lines = [f"{what} images: {folders} do not form pairs (filename_tmpl {template!r})"]
    if without_lq:
        example = without_lq[0]
        wanted = _partner_stem(example, template)
        looked_for = wanted + os.path.splitext(example)[1]
        lines += [f"{len(without_lq)} of {len(gt_names)} in gt have no lq:", *shortened(without_lq)]
        lines += [f"for {example!r} the lq would be {looked_for!r}, or the same with another suffix"]
        if len(found := free.get(wanted, [])) > 1:
            lines[-1] += f", but there are {len(found)}: {', '.join(found)}"
    if without_gt:
        lines += [f"{len(without_gt)} of {len(lq_names)} in lq have no gt:", *shortened(without_gt)]
    lines += ["rename or remove these files, set filename_tmpl, or list the pairs in a meta_info file"]
    return Found(pairs, [*map(gt.path, without_lq)], [*map(lq.path, without_gt)], [], "\n".join(lines))


def _listed_pairs(gt: _Source, lq: _Source | None, template: str, meta_info: str, what: str) -> Found:
    meta_info = os.path.expanduser(meta_info)
    try:
        with open(meta_info, encoding="utf-8-sig") as file:
            lines = file.readlines()
    except OSError as error:
        raise DataError(f"{what} images: meta_info {meta_info!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} images: meta_info {meta_info!r} is not a text file in UTF-8: {error}") from error
    pairs: list[ImagePair] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        gt_name, lq_name = _parse_line(line, gt)
        if not gt.has(gt_name):
            faults.append(f"line {number}: no gt {gt_name!r}")
            continue
        lq_path = None
        if lq is not None:
            if lq_name is None:
                lq_name = _partner_in(lq, gt_name, template)
            if not lq.has(lq_name):
                faults.append(f"line {number}: no lq {lq_name!r}")
                continue
            lq_path = lq.path(lq_name)
        pairs.append(ImagePair(gt_name, gt.path(gt_name), lq_path))
    if faults:
        places = f"gt {gt.folder!r}" if lq is None else f"gt {gt.folder!r} and lq {lq.folder!r}"
        lines = [
            f"{what} images: {len(faults)} of {len(faults) + len(pairs)} entries in meta_info {meta_info!r} "
            f"do not exist; names are relative to {places}",
            *shortened(faults),
        ]
        return Found(pairs, [], [], faults, "\n".join(lines))
    if not pairs:
        raise DataError(f"{what} images: meta_info {meta_info!r} names no image; give one name in a line")
    return _all_found(pairs)


def _parse_line(line: str, gt: _Source) -> tuple[str, str | None]:
    """The gt name and, in Real-ESRGAN's form, the lq name; a name with spaces or commas is found by looking."""

    if gt.has(line):
        return line, None
    if (match := _NAME_AND_SIZE.fullmatch(line)) is not None:
        return match["name"], None
    splits = [(line[: comma.start()].rstrip(), line[comma.end() :].lstrip()) for comma in re.finditer(",", line)]
    for left, right in splits:
        if gt.has(left):
            return left, right
    if splits:
        return splits[0]
    first = line.split()[0]  # BasicSR takes the first word, whatever follows
    return (first, None) if gt.has(first) else (line, None)


def _partner_in(lq: _Source, gt_name: str, template: str) -> str:
    """The lq name of a listed gt: the same suffix, else the one other image suffix that exists."""
    stem = _partner_stem(gt_name, template)
    exact = stem + os.path.splitext(gt_name)[1]
    if lq.has(exact):
        return exact
    found = [stem + suffix for suffix in IMAGE_SUFFIXES if lq.has(stem + suffix)]
    return found[0] if len(found) == 1 else exact


def shortened(items: Sequence[str]) -> list[str]:
    """The first of the items, a line each, and how many more there are."""
    rest = len(items) - _LISTED
    return [f"  {item}" for item in items[:_LISTED]] + ([f"  ... and {rest} more"] if rest > 0 else [])
