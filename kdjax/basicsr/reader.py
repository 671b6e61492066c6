"""Reads a YAML as data, at a cost bounded by its size.

It reads YAML 1.1, like BasicSR, without features that a training file does not need and a hostile or damaged one can
exploit: tags other than those of plain values, deep nesting, and aliases that make a small file large. Where YAML 1.1
gives text a meaning its author hardly intended, it stays text (12:30:45, which would be 45045; 2024-05-01, a date) or
is rejected (0100, which would be 64; a key that is not text, such as yes). A key that occurs twice in a group is
rejected too; other readers keep the last.

Nodes are counted while the file is composed, before any value is built from them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kdjax.names import brief

MAX_BYTES = 256 << 10  # the largest in BasicSR has 8 kB
MAX_DEPTH = 32
MAX_NODES = 10_000  # keys, values and groups; every use of an alias counts again
MAX_CHARACTERS = 2 * MAX_BYTES  # in the nodes, counted the same way

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_NUMBERS, _MERGE = (f"{_TAG}int", f"{_TAG}float"), f"{_TAG}merge"
_OCTAL = re.compile(r"[-+]?0[0-7_]*[0-7]")
_LONGEST_NUMBER = 64  # characters


def read_yaml(content: bytes) -> Any:
    """Parses a YAML file into dicts, lists, strings, numbers, booleans and None.

    Raises:
      ValueError: the content is not YAML, or uses unsupported features; the message says where.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes, too many for a training YAML")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason} at byte {error.start:,}); save it as UTF-8") from None
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(_told(error)) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader in Python, with limits; libyaml's loader overflows its stack before it can be stopped."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = self._characters = 0
        self._sizes: dict[str, tuple[int, int]] = {}  # node and character counts of anchored values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _Refused(f"the alias *{brief(event.anchor)} refers to itself", event.start_mark)
            nodes, characters = self._sizes.get(event.anchor, (0, 0))  # PyYAML rejects unknown ones
            self._count(nodes, characters, event.start_mark)
            return super().compose_node(parent, index)
        if event.tag is not None and event.tag not in _PLAIN_TAGS:
            raise _Refused(f"the tag {brief(event.tag)} is not supported; write a plain value", event.start_mark)
        if self._depth == MAX_DEPTH:
            raise _Refused(f"it is nested more than {MAX_DEPTH} deep", event.start_mark)
        before = self._nodes, self._characters
        self._count(1, len(event.value) if isinstance(event, yaml.ScalarEvent) else 0, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._nodes - before[0], self._characters - before[1]
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag not in (self.DEFAULT_SCALAR_TAG, _MERGE):
                    raise _Refused(f"the key {brief(key.value)} is not text; quote it", key.start_mark)
                if key.value in lines:
                    problem = f"the key {brief(key.value)} appears twice in one group, first in line {lines[key.value]}"
                    raise _Refused(f"{problem}; keep one of them", key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: tuple[bool, bool]) -> str:
        tag = super().resolve(kind, value, implicit)
        is_sexagesimal = ":" in (value or "") and tag in _NUMBERS
        is_text = kind is yaml.ScalarNode and (tag not in _PLAIN_TAGS | {_MERGE} or is_sexagesimal)
        return self.DEFAULT_SCALAR_TAG if is_text else tag

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and isinstance(node, yaml.ScalarNode):
            if len(node.value) > _LONGEST_NUMBER or ":" in node.value:
                raise _Refused(f"{brief(node.value)} is not a number in YAML 1.1", node.start_mark)
            if _OCTAL.fullmatch(node.value):
                problem = f"{node.value} is octal in YAML 1.1 and means {int(node.value.replace('_', ''), 8)}"
                raise _Refused(f"{problem}; remove the leading 0, or quote it as text", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError):  # a plain tag before something else, as in `!!int text`
            raise _Refused(f"{brief(node.value)} is no {node.tag.removeprefix(_TAG)}", node.start_mark) from None

    def _count(self, nodes: int, characters: int, mark: yaml.Mark) -> None:
        self._nodes += nodes
        self._characters += characters
        if self._nodes > MAX_NODES or self._characters > MAX_CHARACTERS:
            raise _Refused(
                f"it has more than {MAX_NODES:,} keys and values, or {MAX_CHARACTERS:,} characters in them, counting"
                " those behind aliases",
                mark,
            )


class _Refused(yaml.MarkedYAMLError):
    """Something this reader does not support."""

    def __init__(self, problem: str, mark: yaml.Mark | None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def _told(error: yaml.YAMLError) -> str:
    """Returns the error as one line, without PyYAML's excerpt of the file."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    text = ", ".join(filter(None, (error.context, error.problem)))
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})"
