"""Finds the images of a data set, and their partners, in folders, packs, single files and lists.

A data set is either clean (`gt` alone: noise or other degradations are added later) or paired (`gt` and `lq`, low
quality). Files are paired by BasicSR's rule: `filename_tmpl`, with the stem of gt in place of its `{}`, in the same
sub-folder. Unlike BasicSR, the suffix may differ where that is unambiguous, sub-folders are searched, and files without
a partner are errors, all listed in one message.

A name from a list or template never leaves its folder. No image is its own partner: gt and lq that are one file, under
whatever names, are an error.

Not handled: lmdb stores, and the content of the files, which is up to `kdjax.data.images`.
"""

from __future__ import annotations

import codecs
import logging
import os
import posixpath
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from kdjax.data.images import CONVERSIONS, IMAGE_SUFFIXES, ImageError, inspect_image
from kdjax.data.shards import identity, name_fault, split_path
from kdjax.data.sources import NAME, DataError, Source, existing, list_images, one_line, open_source, shortened
from kdjax.names import brief

_logger = logging.getLogger("kdjax")

_LISTED = 10  # candidates for a partner shown in a message
_LONG_LINE = 10_000  # of a list: longer than two paths
_COMMAS = 100  # in a line of a list, at each of which a name may end

# BasicSR's meta_info: "name.png (480,480,3)", in lmdb folders followed by the compression level.
_NAME_AND_SIZE = re.compile(r"(?P<name>.*\S)\s+\(\s*\d+(\s*,\s*\d+)*\s*\)(\s+\d+)?")


@dataclass(frozen=True)
class ImagePair:
    """One image of a data set: its name in messages and results, and its files' paths."""

    name: str  # gt's path relative to its folder, with forward slashes
    gt: str
    lq: str | None  # None: a clean image
    answer: str | None = None  # the image that a teacher has made of lq


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
    gt = existing(gt, f"{what} images (gt)")
    lq = None if lq is None else existing(lq, f"{what} images (lq)")
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
    gt_source = open_source(gt, f"{what} images (gt)")
    lq_source = None if lq is None else open_source(lq, f"{what} images (lq)")
    if meta_info is not None:
        return _told_apart(_listed_pairs(gt_source, lq_source, filename_tmpl, meta_info, what), what)
    gt_names, left_out = list_images(gt_source, recursive, f"{what} images (gt)")
    if lq_source is None:
        return _all_found([ImagePair(name, gt_source.path(name), None) for name in gt_names], left_out)
    lq_names, others = list_images(lq_source, recursive, f"{what} images (lq)")
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


def with_answers(pairs: Sequence[ImagePair], answers: str, lq: str) -> list[ImagePair]:
    """Returns the pairs with the images that a teacher has made of their lq files, found in a folder by name.

    Args:
      answers: folder or pack of the teacher's images, named as those in `lq` are, but for the suffix.
      lq: folder or pack of the degraded images of all pairs; those of others may be there.

    Raises:
      DataError: a folder cannot be used, an answer is missing, or it is the lq itself.
    """
    role = "teacher's images (teacher.outputs)"
    source, degraded = open_source(existing(answers, role), role), open_source(existing(lq, "degraded images"), "lq")
    stems: dict[str, list[str]] = defaultdict(list)
    for name in list_images(source, True, role)[0]:
        stems[_stem(name)].append(name)
    path_of = {degraded.path(name): name for name in list_images(degraded, True, "degraded images")[0]}
    found, missing = [], []
    for pair in pairs:
        assert pair.lq is not None  # the caller has degraded images
        name = path_of.get(pair.lq, "")
        named = stems.get(_stem(name), [])
        if name in named or len(named) == 1:
            found.append(replace(pair, answer=source.path(name if name in named else named[0])))
        else:
            missing.append(pair.lq)
    if missing:
        lines = [
            f"{role}: {len(missing)} of {len(pairs)} degraded images have none of their name in {source.folder!r}:"
        ]
        raise DataError(
            "\n".join([*lines, *shortened(missing), "restore these too, or leave them out of the training"])
        )
    if same := [pair for pair in found if is_one_file(pair.answer or "", pair.lq)]:
        raise DataError(
            f"{role}: {same[0].answer!r} is the degraded image itself; give the folder of the restored ones"
        )
    return found


def survey_unlabelled(folder: str) -> Found:
    """Returns the images of `find_unlabelled`, without partners, and the folder's other files; raises like it."""
    role = "unlabelled images"
    folder = existing(folder, role)
    if not os.path.isdir(folder):
        raise DataError(f"{role}: {folder!r} is a file; give a folder")
    source = open_source(folder, role)
    names, left_out = list_images(source, True, role)
    return _all_found([ImagePair(name, source.path(name), None) for name in names], left_out)


def _all_found(pairs: list[ImagePair], left_out: Sequence[str] = ()) -> Found:
    return Found(pairs, [], [], [], None, list(left_out))


def _check_template(template: str) -> None:
    rest = template.replace("{}", "", 1)
    if "{}" not in template or "{" in rest or "}" in rest:
        raise DataError(
            f"filename_tmpl is {brief(template)}; it must hold one {{}} for the name of gt without its suffix, "
            "and no other braces, such as '{}' or '{}x4'"
        )
    if any(separator in template for separator in ("/", "\0", os.sep, os.altsep or os.sep)):
        raise DataError(
            f"filename_tmpl is {brief(template)}; it is for file names: an lq is in the same sub-folder as its gt. Give"
            " the other folder as lq, or list the pairs in a meta_info file"
        )


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _partner_stem(gt_name: str, template: str) -> str:
    """Returns lq's path without its suffix: the template applies to the file name, the sub-folder stays."""
    folder, slash, file_name = gt_name.rpartition("/")
    return folder + slash + template.replace("{}", _stem(file_name))


def _matched_pairs(
    gt: Source, lq: Source, gt_names: Sequence[str], lq_names: Sequence[str], template: str, what: str
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
        lines += [f"for {brief(example, NAME)} the lq would be {brief(looked_for, NAME)}, or with another suffix"]
        if len(found := free.get(wanted, {})) > 1:
            lines[-1] += f", but there are {len(found)}: {one_line(', '.join(islice(found, _LISTED)))}"
    if without_gt:
        lines += [f"{len(without_gt)} of {len(lq_names)} in lq have no gt:", *shortened(without_gt)]
    lines += ["rename or remove these files, set filename_tmpl, or list the pairs in a meta_info file"]
    return Found(pairs, [*map(gt.path, without_lq)], [*map(lq.path, without_gt)], [], "\n".join(lines))


def _listed_pairs(gt: Source, lq: Source | None, template: str, meta_info: str, what: str) -> Found:
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
        raise DataError(f"{what} images: meta_info {meta_info!r} names no image; write one name per line")
    return _all_found(pairs)


def _read_list(path: str, what: str) -> list[str]:
    """Reads the lines of a text file, decoding bytes as in file names."""
    path = existing(path, f"{what} images (meta_info)")
    if not os.path.isfile(path):
        raise DataError(f"{what} images: meta_info {path!r} is a folder; give a text file with one name per line")
    try:
        with open(path, "rb") as file:
            content = file.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{what} images: meta_info {path!r} cannot be read: {error.strerror}") from error
    if b"\0" in content:
        raise DataError(
            f"{what} images: meta_info {path!r} is not a text file in UTF-8: it has zero bytes, as UTF-16 and binary"
            " files do"
        )
    try:
        return [os.fsdecode(line) for line in content.splitlines()]
    except UnicodeDecodeError as error:  # on Windows, whose file names are Unicode
        raise DataError(f"{what} images: meta_info {path!r} is not a text file in UTF-8: {error}") from error


def _parse_line(line: str, gt: Source) -> tuple[str, str | None]:
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
    return f"{role} {brief(name, NAME)} {fault}" if fault else f"no {role} {brief(name, NAME)}"


def _partner_in(lq: Source, gt_name: str, template: str) -> str:
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
