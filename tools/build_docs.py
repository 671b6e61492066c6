"""Builds the documentation as a site, build/site: README.md is its index, docs/ are its pages.

    pip install -e ".[docs]"
    python tools/build_docs.py

A link to a page, a heading or a file that is not there is an error, and so is a docstring of the reference that names a
parameter its function does not have.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "docs"
FROM_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def lay_out() -> None:
    """Puts pages, and whatever they link to in the repository, into one folder, and adapts the links."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for source, page in FROM_THE_ROOT.items():
        shutil.copy(ROOT / source, PAGES / page)
    for page in list(PAGES.glob("*.md")):
        source = ROOT if page.name in FROM_THE_ROOT.values() else ROOT / "docs"
        text = page.read_text(encoding="utf-8")
        page.write_text(LINK.sub(lambda link, source=source: _placed(source, link[1]), text), encoding="utf-8")


def _placed(source: Path, link: str) -> str:
    """The link as it is in the site, for one in a page of the folder `source`."""
    target = Path(os.path.normpath(source / link))
    if not target.is_file() or not target.is_relative_to(ROOT):
        return link  # the build says that it is broken
    if target.is_relative_to(ROOT / "docs"):
        return str(target.relative_to(ROOT / "docs"))
    inside = target.relative_to(ROOT)
    page = FROM_THE_ROOT.get(str(inside))
    if page is None and not (PAGES / inside).exists():
        (PAGES / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, PAGES / inside)
    return page or str(inside)


def main() -> None:
    lay_out()
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="")
    if result.returncode or "griffe:" in result.stdout:
        sys.exit(result.returncode or "error: the docstrings above do not fit their functions")


if __name__ == "__main__":
    main()
