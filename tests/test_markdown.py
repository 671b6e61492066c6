"""Markdown with hostile names in it, in every file that is written, as a parser reads it."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_tradeoff import MACHINE, row

from kdjax import config as config_lib
from kdjax import evaluate, models, study
from kdjax.export import Artefact, card
from kdjax.files import printable
from kdjax.markdown import code, front_matter, literal, table
from kdjax.report import ladder, tradeoff
from kdjax.report.page import Restored, write_report
from kdjax.report.tradeoff import Comparison, Quality, Subject
from kdjax.weights import Loaded

HOSTILE = [
    "a|b",
    "\\|",
    "a\\|b`c``d",
    "`",
    "``",
    "` x `",
    " ",
    "x ",
    "line\nbreak\r\n\n---\ntitle: y\n---",
    "---",
    "# x",
    "1. x",
    "- x",
    "> x",
    "<script>alert(1)</script>",
    "<!--",
    "&lt;",
    "[x](javascript:alert(1))",
    "![x](http://example.com/x.png)",
    "https://example.com",
    "www.example.com",
    "*x*",
    "_x_",
    "~~x~~",
    "$x$",
    ":smile:",
    "\x1b[2J\x07\x00",
    "\u202egpj.exe",
    "caf\udce9",
    "\t",
    "```\n# x",
    "@user #1",
]
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")


def tokens(text: str) -> list[Token]:
    return [child for token in PARSER.parse(text) for child in (token, *(token.children or ()))]


def shown(text: str) -> str:
    """A hostile text as a page has to show it."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def cells(text: str) -> Iterator[list[str]]:
    """The rows of all tables, as they are shown."""
    line: list[str] = []
    parsed = PARSER.parse(text)
    for before, token in itertools.pairwise(parsed):
        if token.type == "tr_open":
            line = []
        elif before.type in ("th_open", "td_open"):
            line.append("".join(child.content for child in token.children))
        elif token.type == "tr_close":
            yield line


def check(text: str, *, tables: int, front: int = 0) -> None:
    """Nothing in it steers a terminal, is HTML or a link, and it has so many tables and rules."""
    text.encode()
    assert printable(text) == text
    if front:
        assert text.startswith("---\n")
        head, text = text[4:].split("\n---\n", 1)
        assert set(yaml.safe_load(head)) == {"license", "library_name", "pipeline_tag", "tags"}
    kinds = [token.type for token in tokens(text)]
    assert not {"link_open", "image", "hr", "em_open", "blockquote_open"} & set(kinds)
    assert not [t for t in tokens(text) if t.type.startswith("html_") and t.content != "<br>"]
    assert kinds.count("table_open") == tables


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_nothing_else(text: str) -> None:
    for made in (literal(text), code(text)):
        (paragraph,) = (t for t in PARSER.parse(f"x {made} y") if t.type == "inline")
        assert "".join(child.content for child in paragraph.children) == f"x {shown(text)} y"
        assert {child.type for child in paragraph.children} == {"text", "code_inline"}
        for pad in (False, True):
            page = table(["name", "n"], [[made, "1"], ["plain", made]], align="lr", pad=pad)
            assert list(cells(page)) == [["name", "n"], [shown(text), "1"], ["plain", shown(text)]]
        (heading,) = (t for t in PARSER.parse(f"# {made}") if t.type == "inline")
        assert "".join(child.content for child in heading.children) == shown(text)
        (item,) = (t for t in PARSER.parse(f"- {made}: {made}") if t.type == "inline")
        assert "".join(child.content for child in item.children) == f"{shown(text)}: {shown(text)}"


@pytest.mark.parametrize(
    "text",
    [
        "cbsd68",
        "sigma 25",
        "student_student",
        "dncnn(num_feat=16, act_type='relu')",
        "/a/b/x.v2.pth, sha256 0f",
        "",
        "ü",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert literal(text) == text


@pytest.mark.parametrize("text", [*HOSTILE, "no", "apache-2.0", "1.0", "null", "a: b", "[x"])
def test_front_matter_holds_texts(text: str) -> None:
    written = front_matter({"license": text, "tags": ["x", text]})
    assert written.count("\n") == 3 and written.startswith("---\n") and written.endswith("\n---")
    assert yaml.safe_load(written[4:-4]) == {"license": printable(text), "tags": ["x", printable(text)]}


# ---- what is written -------------------------------------------------------------------------------------------

ALL = "".join(HOSTILE)


def test_a_study(tmp_path: Path) -> None:
    names = ["scratch", *HOSTILE]
    result = dict(seed=0, psnr=30.0, ssim=0.9, psnr_student_teacher=30.0, steps=1, macs_per_step=1, curve=[[1, 30.0]])
    result |= dict(teacher_psnr=31.0, input_psnr=20.0, student=ALL, teacher=ALL, images=1)
    rows = ladder.summarise([result | {"column": name} for name in names], 31.0)
    text = ladder.markdown(rows, teacher_psnr=31.0, input_psnr=20.0)
    check(text, tables=1)
    assert sorted(line[0] for line in list(cells(text))[1:]) == sorted(map(shown, names))
    assert {len(line) for line in cells(text)} == {8}
    ladder.plot(rows[:3], [result | {"column": name} for name in names[:3]], tmp_path / "x.png", teacher_psnr=31.0)

    folder = tmp_path / "seed0" / "scratch"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result | {"column": "$\\frac$", "ssim": float("inf")}))
    study.write_results(study.Study("---", (0,), 1, {("scratch", 0): config_lib.Config()}, {}), tmp_path)
    check((tmp_path / "results.md").read_text("utf-8"), tables=1)
    strict = lambda name: pytest.fail(name)  # noqa: E731
    json.loads((tmp_path / "results.json").read_text("utf-8"), parse_constant=strict)


def test_a_comparison(tmp_path: Path) -> None:
    subjects = [Subject(n, False, n, 64 * "f", n, n, {}, 1, 1, 3) for n in HOSTILE]
    costs = [row(n, 1.0, side=64) for n in HOSTILE]
    costs[0] = dataclasses.replace(costs[0], timing=None, problem=ALL)
    quality = [Quality(n, 31.0, 0.9, 0.0, 30.0) for n in HOSTILE]
    comparison = Comparison(MACHINE, subjects, 20, costs, f"{ALL}, 68 images", quality, None)
    text = tradeoff.markdown(comparison)
    check(text, tables=3)
    found = list(cells(text))
    assert len(found) == 3 * (1 + len(HOSTILE)) and {len(line) for line in found} == {6, 8, 5}
    assert [line[0].strip() for line in found[1 : 1 + len(HOSTILE)]] == [shown(n).strip() for n in HOSTILE]
    few = dataclasses.replace(comparison, subjects=subjects[:2], costs=costs[1:3], quality=[], images=ALL)
    few = dataclasses.replace(few, subjects=[dataclasses.replace(s, name="$\\frac$\x1b") for s in subjects[:1]])
    few = dataclasses.replace(few, costs=[dataclasses.replace(costs[1], model="$\\frac$\x1b")])
    tradeoff.plot(few, tmp_path / "x.png")


def test_an_evaluation(tmp_path: Path) -> None:
    rows = [{"data": n, "degraded": n, "images": 1, "model": n, "psnr": 30.0} for n in HOSTILE]
    text = evaluate.markdown(rows, ["psnr"], dict.fromkeys(HOSTILE, ALL))
    check(text, tables=1)
    found = list(cells(text))
    assert {len(line) for line in found} == {5} and [line[3] for line in found[1:]] == list(map(shown, HOSTILE))
    assert sum(token.type == "list_item_open" for token in tokens(text)) == len(HOSTILE)

    image = np.zeros((4, 4, 3), np.uint8)
    scores = {n: {"psnr": 1.0} for n in HOSTILE}
    one = Restored(ALL, ALL, ALL, image, image, dict.fromkeys(HOSTILE, image), scores)
    write_report(tmp_path / "x.html", title=ALL, table=rows, images=[one], settings=dict.fromkeys(HOSTILE, ALL))
    page = (tmp_path / "x.html").read_text("utf-8")
    assert printable(page) == page and page.count("<script>") == 1 and page.count("</script>") == 3


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    net = models.network("srvggnetcompact", dict(num_feat=1, num_conv=1, upscale=1))
    model = models.Model(net, net.abstract_params)
    return Loaded(model, ALL.replace("\0", ""), 64 * "f", "BasicSR", ALL)


def test_a_model_card(loaded: Loaded) -> None:
    name = ALL.replace("\0", "")
    files = [Artefact(Path(n.replace("\0", "")), "0" * 64, 1, {"source": n}, {}) for n in HOSTILE]
    config = config_lib.parse(
        {
            "student": {"weights": name},
            "terms": {n.replace("\0", ""): {"criterion": name, "weight": 1.0} for n in HOSTILE},
            "degrade": {"name": name},
            "data": {"gt": name, "lq": name, "unpaired": name, "meta_info": name},
            "val": {"gt": name, "lq": name},
        }
    )
    for val in (config.val, dataclasses.replace(config.val, lq="", degrade={"name": name})):
        run = card.Run(
            dataclasses.replace(config, val=val),
            {"files": [name] * 2, "identity": name},
            1,
            dict.fromkeys(HOSTILE, 1.0),
        )
        text = card.model_card(name, loaded, files, run, license=name)
        check(text, tables=4, front=1)
        assert {len(line) for line in cells(text.split("\n---\n", 1)[1])} == {2, 4}
    check(card.model_card("x", loaded, [], None, license="no"), tables=3, front=1)
