"""What a user of the package meets first: its public names, their examples, the time an import takes, a loop
of their own, the notebook."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import kdjax

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "restore.ipynb"


def test_every_public_name_is_listed_and_there() -> None:
    assert dir(kdjax) == sorted([*kdjax.__all__, "__version__"])
    code = "import kdjax; print(*(getattr(kdjax, name).__name__.split('.')[-1] for name in kdjax.__all__))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.split() == kdjax.__all__


def test_the_version_has_one_source() -> None:
    """The one in `kdjax/__init__.py`, which the build reads; an editable install may be of another day."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "kdjax/__init__.py"
    assert re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", kdjax.__version__)


WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "kdjax").rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_are_true(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", kdjax._HOME)
def test_every_public_function_has_an_example(name: str) -> None:
    function = getattr(kdjax, name)
    assert ">>>" in function.__doc__ and function.__module__ in WITH_EXAMPLES


@pytest.mark.once
def test_the_loop_of_the_docs_learns(tmp_path: Path) -> None:
    """`examples/own_loop.py`, as it is: at most 40 lines of code, and the loss falls."""
    path = ROOT / "examples" / "own_loop.py"
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    assert len([line for line in source.replace(docstring, "").splitlines() if line.strip(' "')]) <= 40
    run = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    losses = [[float(number) for number in re.findall(r"0\.[0-9]+", line)] for line in run.stdout.splitlines()]
    (total, edges), (last_total, last_edges) = losses[0], losses[-1]
    assert last_total < 0.85 * total and last_edges < 0.85 * edges, run.stdout
    assert kdjax.load_model(tmp_path / "student.pth").hparams["num_feat"] == 16


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'restore_images'; it has .*restore_image"):
        _ = kdjax.restore_images


def test_importing_loads_nothing_large() -> None:
    code = "import sys, kdjax; assert not {'jax', 'numpy', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.once
def test_the_notebook_runs_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # without the start-up files of whoever runs this
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, printed = (cell.outputs for cell in cells)
    assert "image/png" in shown[-1].data
    before, after = (float(word) for word in printed[-1].text.split() if word[0].isdigit())
    assert before < 21 and after > 27
