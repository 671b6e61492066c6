"""Markdown output that shows file names, folders, tensor names and config values literally.

Targets CommonMark with GitHub's tables. Text that Markdown, HTML or a terminal would interpret becomes a code span.
Control characters and line breaks become visible escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from kdjax.files import printable

# Text without meaning to Markdown inside a line, and that cannot start a list, a heading or a link.
_HARMLESS = re.compile(r"[\w/.(][\w ./,;:=()'\"%+±-]*")
_MEANS_MORE = re.compile(r"://|www\.|:[\w+-]+:|\d+[.)] |(?<!\w)_|_(?!\w)|\s$", re.ASCII)
_PLAIN_YAML = re.compile(r"[A-Za-z][\w.+-]*", re.ASCII)
_YAML_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def literal(value: object) -> str:
    """Returns the value as inline text: unchanged where Markdown would leave it alone, otherwise as a code span."""
    text = str(value)
    is_harmless = not text or (_HARMLESS.fullmatch(text) and not _MEANS_MORE.search(text) and printable(text) == text)
    return text if is_harmless else code(text)


def code(value: object) -> str:
    """Returns the value as a code span."""
    text = printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    # Markdown strips one space from each side, unless the span is all spaces.
    pad = " " if not text or (text.strip(" ") and (text[0] in "` " or text[-1] in "` ")) else ""
    text = f"{pad}{text}{pad}" if text else pad
    return f"{'`' * (longest + 1)}{text}{'`' * (longest + 1)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, align: str, pad: bool = False) -> str:
    """Returns a table; the cells are Markdown already.

    Args:
      align: "l" or "r" per column. Numbers are right-aligned.
      pad: pad cells with spaces, so that the table also lines up as plain text.
    """
    rules = ["---" if side == "l" else "---:" for side in align]
    lines = [header, rules, *rows]
    columns = [[cell.replace("|", "\\|") for cell in column] for column in zip(*lines, strict=True)]
    if pad:
        for number, (column, rule) in enumerate(zip(columns, rules, strict=True)):
            width = max(map(len, column))
            column[1] = rule.rjust(width, "-")
            columns[number] = [cell.ljust(width) if rule == "---" else cell.rjust(width) for cell in column]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))


def front_matter(values: Mapping[str, str | Sequence[str]]) -> str:
    """Returns YAML front matter of strings and lists of strings."""
    return "\n".join(["---", *(f"{name}: {_yaml(value)}" for name, value in values.items()), "---"])


def _yaml(value: str | Sequence[str]) -> str:
    if not isinstance(value, str):
        return f"[{', '.join(map(_yaml, value))}]"
    text = printable(value)
    return text if _PLAIN_YAML.fullmatch(text) and text.lower() not in _YAML_WORDS else json.dumps(text)
