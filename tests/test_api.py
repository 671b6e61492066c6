"""What a user of the package meets first: its public names, their examples, the time an import takes, the notebook."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import kdjax

NOTEBOOK = Path(__file__).parent.parent / "docs" / "restore.ipynb"


@pytest.mark.parametrize("name", kdjax.__all__)
def test_the_example_of_every_public_name_is_true(name: str) -> None:
    function = getattr(kdjax, name)
    module = importlib.import_module(function.__module__)
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=dict(vars(module)))
    assert example.examples
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted and not result.failed, "".join(report)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'restore_images'; it has .*restore_image"):
        _ = kdjax.restore_images


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, time; started = time.perf_counter(); import kdjax; seconds = time.perf_counter() - started;"
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules); print(seconds)"
    )
    run = [sys.executable, "-c", code]
    seconds = [float(subprocess.run(run, capture_output=True, check=True, timeout=60).stdout) for _ in range(3)]
    assert min(seconds) < 0.3, seconds


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
