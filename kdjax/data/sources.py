"""Finds the image files of a data set from folders, packs, single files and lists.

A data set is either clean (`gt` alone: noise or other degradations are added later) or paired (`gt` and `lq`, low
quality). Files are paired by BasicSR's rule: `filename_tmpl`, with the stem of gt in place of its `{}`, in the same
sub-folder. Unlike BasicSR, the suffix may differ where that is unambiguous, sub-folders are searched, and files without
a partner are errors, all listed in one message. Files and folders whose names start with a dot are ignored. A pack
(`kdjax.data.shards`) can replace any folder: it has the names of the folder it was made from.

A name from a list or template never leaves its folder. Links inside a folder are the owner's business and are followed
wherever they lead. No image is its own partner: gt and lq that are one file, under whatever names, are an error. Names
are the file system's bytes, even if they are not UTF-8.

Not handled: lmdb stores, and the content of the files, which is up to `kdjax.data.images`.
"""

from __future__ import annotations

import codecs
import logging
import os
import posixpath
import random
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Protocol

from kdjax.data.images import CONVERSIONS, IMAGE_SUFFIXES, ImageError, inspect_image
from kdjax.data.shards import PackError, identity, is_pack, name_fault, open_pack, split_path
from kdjax.files import printable
from kdjax.names import brief

_logger = logging.getLogger("kdjax")

_LISTED = 10  # names of each kind shown in a message
_LINE = 1000  # characters per line of a message
_NAME = 300  # and per name in it
_LONG_LINE = 10_000  # of a list: longer than two paths
_COMMAS = 100  # in a line of a list, at each of which a name may end
_VISITS = 1000  # of one folder through links; a few links to each other can spell any number of paths

# BasicSR's meta_info: "name.png (480,480,3)", in lmdb folders followed by the compression level.
_NAME_AND_SIZE = re.compile(r"(?P<name>.*\S)\s+\(\s*\d+(\s*,\s*\d+)*\s*\)(\s+\d+)?")


class DataError(ValueError):
    """Data that cannot be used; the message says what was given, what was wanted and what to do."""


@dataclass(frozen=True)
class ImagePair:
    """One image of a data set: its name in messages and results, and its files' paths."""

    name: str  # gt's path relative to its folder, with forward slashes
    gt: str
    lq: str | None  # None: a clean image


@dataclass(frozen=True)
class Found:
    """The images of a data set, and what is missing from it."""

    pairs: list[ImagePair]
    without_lq: list[str]  # paths of images that should have a partner in lq
    without_gt: list[str]  # and in gt
    not_found: list[str]  # unusable entries of a meta_info file: "line 3: no gt '9.png'"
    message: str | None  # for the user: everything that is wrong and what to do; None if nothing is
    left_out: list[str] = field(default_factory=list)  # paths of files in the folders that are not images


def find_pairs(
    *,
    gt: str | os.PathLike[str],
    lq: str | os.PathLike[str] | None = None,
    filename_tmpl: str = "{}",
    meta_info: str | None = None,
    recursive: bool = True,
    what: str = "training",
) -> list[ImagePair]:
    """Returns the images of a data set, in natural order of their names (2 before 10).

    `gt` and `lq` are two folders (or packs), or two files. `meta_info` is a text file that lists the images to use, one
    per line: either `name.png (height,width,channels)` as in BasicSR, or `gt name, lq name` as in Real-ESRGAN. Blank
    lines and lines that start with # are skipped, and the file's order is kept. Without `lq`, lq names are ignored.
    `what` names the data set in messages.

    Raises:
      DataError: a folder cannot be used, anything is missing, or gt and lq are the same.
    """
    found = survey(gt=gt, lq=lq, filename_tmpl=filename_tmpl, meta_info=meta_info, recursive=recursive, what=what)
    if found.message:
        raise DataError(found.message)
    _tell_left_out(found, what)
    return found.pairs


def survey(
    *,
    gt: str | os.PathLike[str],
    lq: str | os.PathLike[str] | None = None,
    filename_tmpl: str = "{}",
    meta_info: str | None = None,
    recursive: bool = True,
    what: str = "training",
) -> Found:
    """Like `find_pairs`, but returns what is missing or wrong with the images instead of raising.

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
        return _told_apart(_all_found([ImagePair(os.path.basename(gt), gt, lq)]), what)
    if lq is not None and os.path.isfile(lq):
        raise DataError(f"{what} images: gt is the folder {gt!r}, so lq must be a folder too, and {lq!r} is a file")
    if lq is not None and meta_info is None and os.path.samefile(gt, lq):
        raise DataError(
            f"{what} images: gt and lq are the same folder, {gt!r}; keep them in two folders, "
            "or list the pairs in a meta_info file"
        )
    gt_source = _open_source(gt, f"{what} images (gt)")
    lq_source = None if lq is None else _open_source(lq, f"{what} images (lq)")
    if meta_info is not None:
        return _told_apart(_listed_pairs(gt_source, lq_source, filename_tmpl, meta_info, what), what)
    gt_names, left_out = _list_images(gt_source, recursive, f"{what} images (gt)")
    if lq_source is None:
        return _all_found([ImagePair(name, gt_source.path(name), None) for name in gt_names], left_out)
    lq_names, others = _list_images(lq_source, recursive, f"{what} images (lq)")
    found = _matched_pairs(gt_source, lq_source, gt_names, lq_names, filename_tmpl, what)
    return replace(_told_apart(found, what), left_out=left_out + others)


def find_unlabelled(folder: str, *, degraded: bool) -> list[ImagePair]:
    """Returns the images of a folder or pack (a str or Path) without clean partners, in natural order.

    `degraded` images are used as they are, and stand in for their own gt, which no loss may look at. Others get the
    noise that is added to clean images.

    Raises:
      DataError: there is no such folder, or no image in it.
    """
    found = survey_unlabelled(folder)
    _tell_left_out(found, "unlabelled")
    return [replace(pair, lq=pair.gt) for pair in found.pairs] if degraded else found.pairs


def survey_unlabelled(folder: str) -> Found:
    """Returns the images of `find_unlabelled`, without partners, and the folder's other files; raises like it."""
    role = "unlabelled images"
    folder = _existing(folder, role)
    if not os.path.isdir(folder):
        raise DataError(f"{role}: {folder!r} is a file; give a folder")
    source = _open_source(folder, role)
    names, left_out = _list_images(source, True, role)
    return _all_found([ImagePair(name, source.path(name), None) for name in names], left_out)


class _Source(Protocol):
    """Named images: a folder of files, or a pack."""

    folder: str

    def names(self, recursive: bool) -> tuple[list[str], list[str]]:
        """Returns the names of all images and of all other files, unordered.

        Without `recursive`, only those not in a sub-folder.
        """

    def has(self, name: str) -> bool:
        """Whether there is such an image; never true for a name that leads out of the folder."""

    def path(self, name: str) -> str: ...


def _open_source(folder: str, role: str) -> _Source:
    try:
        return open_pack(folder) if is_pack(folder) else _Folder(folder)
    except PackError as error:
        raise DataError(f"{role}: {error}") from None


def _list_images(source: _Source, recursive: bool, role: str) -> tuple[list[str], list[str]]:
    """Returns the image names, in natural order and never empty, and the paths of all other files."""
    try:
        names, others = source.names(recursive)
    except OSError as error:
        raise DataError(f"{role}: the folder {error.filename!r} cannot be read: {error.strerror}") from error
    if not names:
        depth = "and its sub-folders" if recursive else "(sub-folders were not searched)"
        count = len(others)
        raise DataError(
            f"{role}: no image in {source.folder!r} {depth}; looked for {', '.join(IMAGE_SUFFIXES)} and saw "
            f"{count} other file{'' if count == 1 else 's'}"
        )
    return sorted(names, key=_natural), [source.path(name) for name in sorted(others, key=_natural)]


def _all_found(pairs: list[ImagePair], left_out: Sequence[str] = ()) -> Found:
    return Found(pairs, [], [], [], None, list(left_out))


def _existing(path: str | os.PathLike[str], role: str) -> str:
    """Returns the path of an existing file or folder as text, with ~ expanded."""
    path = os.fspath(path)
    if not path:
        raise DataError(f"{role}: no path was given; give a folder or an image file")
    try:
        path = os.path.expanduser(path)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        looked_for = brief(os.path.abspath(path), _LINE)
        raise DataError(f"{role}: {brief(path, _NAME)} does not exist (looked for {looked_for})") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or another character not allowed in paths
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{role}: {brief(path, _NAME)} cannot be used: {reason}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{role}: {path!r} is neither a file nor a folder")
    return path


def _check_template(template: str) -> None:
    rest = template.replace("{}", "", 1)
    if "{}" not in template or "{" in rest or "}" in rest:
        raise DataError(
            f"filename_tmpl is {brief(template)}; it must hold one {{}} where the name of gt without its suffix "
            "goes, and no other braces, such as '{}' or '{}x4'"
        )
    if any(separator in template for separator in ("/", "\0", os.sep, os.altsep or os.sep)):
        raise DataError(
            f"filename_tmpl is {brief(template)}; it is for file names: an lq is in the same sub-folder as its gt. Give"
            " the other folder as lq, or list the pairs in a meta_info file"
        )


class _Folder:
    """The images below a folder; names are relative paths with forward slashes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def names(self, recursive: bool) -> tuple[list[str], list[str]]:
        images: list[str] = []
        others: list[str] = []
        visits: Counter[tuple[int, int]] = Counter()
        waiting: list[tuple[str, tuple]] = [("", ())]  # sub-folders, each with its parents, innermost first
        while waiting:
            inside, above = waiting.pop()
            state = os.stat(self.path(inside))
            here = state.st_dev, state.st_ino
            if any(here == other for other in _chain(above)):  # a link to one of its parents
                continue
            visits[here] += 1
            if visits[here] > _VISITS:
                raise OSError(0, f"links lead to it on more than {_VISITS:,} ways", self.path(inside))
            with os.scandir(self.path(inside)) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if _is_folder(entry):
                        if recursive:
                            waiting.append((f"{inside}{entry.name}/", (here, above)))
                    else:
                        (images if entry.name.lower().endswith(IMAGE_SUFFIXES) else others).append(inside + entry.name)
        return images, others

    def has(self, name: str) -> bool:
        return name_fault(name) is None and os.path.isfile(self.path(name))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _chain(above: tuple) -> Iterator[tuple[int, int]]:
    while above:
        folder, above = above
        yield folder


def _natural(name: str) -> tuple[list[list[str | int]], str]:
    """Returns a sort key that compares digits as numbers, folder by folder; the text distinguishes 1 from 01."""
    # With one group, re.split alternates text, digits, text, so the same position always has the same type.
    parts = [re.split(r"([0-9]+)", part.lower()) for part in name.split("/")]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], name


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _partner_stem(gt_name: str, template: str) -> str:
    """Returns lq's path without its suffix: the template applies to the file name, the sub-folder stays."""
    folder, slash, file_name = gt_name.rpartition("/")
    return folder + slash + template.replace("{}", _stem(file_name))


def _matched_pairs(
    gt: _Source, lq: _Source, gt_names: Sequence[str], lq_names: Sequence[str], template: str, what: str
) -> Found:
    free: dict[str, dict[str, None]] = defaultdict(dict)  # by path without suffix: lq files not yet paired
    for name in lq_names:
        free[_stem(name)][name] = None
    partner: dict[str, str] = {}
    rest: dict[str, list[str]] = defaultdict(list)
    for name in gt_names:
        wanted = _partner_stem(name, template)
        exact = wanted + os.path.splitext(name)[1]
        if exact in free.get(wanted, ()):
            partner[name] = exact
            del free[wanted][exact]
        else:
            rest[wanted].append(name)
    for wanted, names in rest.items():
        if len(names) == 1 and len(free.get(wanted, ())) == 1:
            partner[names[0]], _ = free[wanted].popitem()
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
        lines += [
            f"for {brief(example, _NAME)} the lq would be {brief(looked_for, _NAME)}, or the same with another suffix"
        ]
        if len(found := free.get(wanted, {})) > 1:
            lines[-1] += f", but there are {len(found)}: {one_line(', '.join(islice(found, _LISTED)))}"
    if without_gt:
        lines += [f"{len(without_gt)} of {len(lq_names)} in lq have no gt:", *shortened(without_gt)]
    lines += ["rename or remove these files, set filename_tmpl, or list the pairs in a meta_info file"]
    return Found(pairs, [*map(gt.path, without_lq)], [*map(lq.path, without_gt)], [], "\n".join(lines))


def _listed_pairs(gt: _Source, lq: _Source | None, template: str, meta_info: str, what: str) -> Found:
    pairs: list[ImagePair] = []
    faults: list[str] = []
    for number, line in enumerate(_read_list(meta_info, what), 1):
        if not line.strip():
            continue
        gt_name, lq_name = _parse_line(line, gt)
        if not gt.has(gt_name):
            if not line.lstrip().startswith("#"):  # a comment, unless it is the name of a file
                faults.append(f"line {number}: {_no_such('gt', gt_name)}")
            continue
        lq_path = None
        if lq is not None:
            lq_name = _partner_in(lq, gt_name, template) if lq_name is None else _plain(lq_name)
            if not lq.has(lq_name):
                faults.append(f"line {number}: {_no_such('lq', lq_name)}")
                continue
            lq_path = lq.path(lq_name)
        pairs.append(ImagePair(gt_name, gt.path(gt_name), lq_path))
    if faults:
        places = f"gt {gt.folder!r}" if lq is None else f"gt {gt.folder!r} and lq {lq.folder!r}"
        lines = [
            f"{what} images: {len(faults)} of {len(faults) + len(pairs)} entries in meta_info {meta_info!r} "
            f"cannot be used; names are relative to {places}, and stay inside",
            *shortened(faults),
        ]
        return Found(pairs, [], [], faults, "\n".join(lines))
    if not pairs:
        raise DataError(f"{what} images: meta_info {meta_info!r} names no image; give one name in a line")
    return _all_found(pairs)


def _read_list(path: str, what: str) -> list[str]:
    """Reads the lines of a text file, decoding bytes as in file names."""
    path = _existing(path, f"{what} images (meta_info)")
    if not os.path.isfile(path):
        raise DataError(
            f"{what} images: meta_info {path!r} is a folder; give a text file that names one image in a line"
        )
    try:
        with open(path, "rb") as file:
            content = file.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{what} images: meta_info {path!r} cannot be read: {error.strerror}") from error
    if b"\0" in content:
        raise DataError(
            f"{what} images: meta_info {path!r} is not a text file in UTF-8: it has bytes that are zero, as UTF-16 and"
            " binary files have"
        )
    try:
        return [os.fsdecode(line) for line in content.splitlines()]
    except UnicodeDecodeError as error:  # on Windows, whose file names are Unicode
        raise DataError(f"{what} images: meta_info {path!r} is not a text file in UTF-8: {error}") from error


def _parse_line(line: str, gt: _Source) -> tuple[str, str | None]:
    """Returns the gt name and, in Real-ESRGAN's form, the lq name; looks up names with spaces or commas in `gt`."""

    def parse(line: str) -> tuple[str, str | None]:
        if (match := _NAME_AND_SIZE.fullmatch(line)) is not None:
            return match["name"], None
        first_split = None
        for comma in islice(re.finditer(",", line), _COMMAS):
            split = line[: comma.start()].rstrip(), line[comma.end() :].lstrip()
            if gt.has(split[0]):
                return split
            first_split = first_split or split
        if first_split:
            return first_split
        first = line.split()[0]  # BasicSR takes the first word and ignores the rest
        return (first, None) if gt.has(first) else (line, None)

    if len(line) > _LONG_LINE:
        return line, None
    for name in dict.fromkeys((line, line.strip())):
        if gt.has(name):
            return _plain(name), None
    gt_name, lq_name = parse(line.strip())
    return _plain(gt_name), lq_name


def _plain(name: str) -> str:
    """Normalises a name: a/./b and a//b become a/b."""
    return name if name_fault(name) else posixpath.normpath(name.replace(os.sep, "/"))


def _no_such(role: str, name: str) -> str:
    fault = name_fault(name)
    return f"{role} {brief(name, _NAME)} {fault}" if fault else f"no {role} {brief(name, _NAME)}"


def _partner_in(lq: _Source, gt_name: str, template: str) -> str:
    """Returns the lq name for a listed gt: the same suffix, else the one other image suffix that exists."""
    stem = _partner_stem(gt_name, template)
    exact = stem + os.path.splitext(gt_name)[1]
    if lq.has(exact):
        return exact
    found = [stem + suffix for suffix in IMAGE_SUFFIXES if lq.has(stem + suffix)]
    return found[0] if len(found) == 1 else exact


def _told_apart(found: Found, what: str) -> Found:
    """Returns the same, with a message if gt and lq are one thing under two names."""
    pairs = [pair for pair in found.pairs if pair.lq is not None]
    same = [pair for pair in pairs if is_one_file(pair.gt, pair.lq)]
    if same:
        lines = [
            f"{what} images: gt and lq are the same file in {len(same)} of {len(pairs)} pairs:",
            *shortened([pair.gt if pair.gt == pair.lq else f"{pair.gt} is also {pair.lq}" for pair in same]),
            "an lq is the degraded image: give the folder that has them as lq, or name them in the meta_info file",
        ]
    elif not found.message and _is_packed(pairs) and _has_the_same_pixels(pairs):
        lines = [
            f"{what} images: gt and lq have the same pixels in all of {len(pairs)} pairs, {pairs[0].gt!r} and"
            f" {pairs[0].lq!r} for example: were they packed from one folder? Give a pack of the degraded images as lq"
        ]
    else:
        return found
    return replace(found, message="\n".join(filter(None, [found.message, *lines])))


def is_one_file(gt: str, lq: str | None) -> bool:
    """Whether two paths lead to one image: through links, another spelling, or the same record of a pack."""
    return lq is not None and (gt == lq or ((one := identity(gt)) is not None and one == identity(lq)))


def _is_packed(pairs: Sequence[ImagePair]) -> bool:
    """Whether some are in a pack, where two copies of an image are not one file."""
    return bool(pairs) and any(path and split_path(path) for path in (pairs[0].gt, pairs[0].lq))


def _has_the_same_pixels(pairs: Sequence[ImagePair]) -> bool:
    """Whether gt and lq have the same pixels in every readable pair."""

    def is_alike(pair: ImagePair) -> bool | None:
        assert pair.lq is not None
        try:
            gt, lq = inspect_image(pair.gt)[0], inspect_image(pair.lq)[0]
        except ImageError:
            return None
        return gt.shape == lq.shape and bool((gt == lq).all())

    # In random order: some degraded images may be clean on purpose, and they may come first.
    known = (alike for pair in random.Random(0).sample(pairs, len(pairs)) if (alike := is_alike(pair)) is not None)
    return next(known, False) and all(known)


def _tell_left_out(found: Found, what: str) -> None:
    if found.left_out:
        _logger.info("%s images: %s", what, left_out_line(found.left_out))


def left_out_line(paths: Sequence[str]) -> str:
    """Returns one line, for the user, on the files of a folder that were skipped."""
    count = len(paths)
    pictures_first = sorted(paths, key=lambda path: os.path.splitext(path)[1].lower() not in CONVERSIONS)
    shown = ", ".join(map(one_line, pictures_first[:3])) + (f" and {count - 3} more" if count > 3 else "")
    return f"{count} other file{' is not an image' if count == 1 else 's are not images'} that kdjax reads: {shown}"


def shortened(items: Sequence[str]) -> list[str]:
    """Returns the first items, one per line, and the number of the others."""
    rest = len(items) - _LISTED
    return [f"  {one_line(item)}" for item in items[:_LISTED]] + ([f"  ... and {rest} more"] if rest > 0 else [])


def one_line(text: str) -> str:
    """Returns the text as one line of a message, whatever characters its file names contain."""
    text = printable(text[:_LINE] + ("..." if len(text) > _LINE else ""))
    return text.replace("\n", "\\n").replace("\t", "\\t")
