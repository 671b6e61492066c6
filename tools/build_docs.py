"""Builds the documentation site in build/site, with README.md as its index and docs/ as its pages.

    pip install -e ".[docs]"
    python tools/build_docs.py

Links to missing pages, headings or files are errors, and so are docstrings in the API reference that name parameters
their function does not have.
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
# Either code, which has no links, or the file that a link points to.
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(?<=\]\()(?![a-z]+:|#)([^)#\s]+)", re.MULTILINE | re.DOTALL)


def lay_out() -> None:
    """Copies the pages, and whatever they link to in the repository, into one folder, and adapts the links."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    for name, page in FROM_THE_ROOT.items():
        shutil.copy(ROOT / name, PAGES / page)
    for path in [ROOT / name for name in FROM_THE_ROOT] + sorted((ROOT / "docs").glob("*.md")):
        adapted = LINK.sub(
            lambda link, path=path: _placed(path, link[1]) if link[1] else link[0], path.read_text("utf-8")
        )
        (PAGES / FROM_THE_ROOT.get(path.name, path.name)).write_text(adapted, "utf-8")


def _placed(page: Path, link: str) -> str:
    """Translates a link on this page to the site.

    Raises:
      SystemExit: if it points to no file of the repository.
    """
    target = Path(os.path.normpath(page.parent / link))
    if not target.is_file() or not target.is_relative_to(ROOT):
        sys.exit(f"error: {page.relative_to(ROOT)} links to {link}, which is no file of the repository")
    if target.is_relative_to(ROOT / "docs"):
        return str(target.relative_to(ROOT / "docs"))
    inside = str(target.relative_to(ROOT))
    if inside not in FROM_THE_ROOT:
        (PAGES / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(target, PAGES / inside)
    return FROM_THE_ROOT.get(inside, inside)


def main() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").split()
    if missing := [page.name for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in navigation]:
        sys.exit(f"error: mkdocs.yml has no {', '.join(missing)} in its nav; add it there")
    lay_out()
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    result = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="")
    if result.returncode or "griffe:" in result.stdout:
        sys.exit(result.returncode or "error: the docstrings above do not fit their functions")


if __name__ == "__main__":
    main()
