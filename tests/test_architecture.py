"""The house has floors: a module of kdjax imports from lower floors only, and Flax and torch stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import kdjax

PACKAGE = Path(kdjax.__file__).parent
FLOORS = [
    {
        "names",
        "files",
        "commandline",
        "markdown",
        "config",
        "progress",
        "signals",
        "assets",
        "batch",
        "ops",
        "schedules",
        "sharding",
        "streams",
        "memory",
        "compiled",
        "macs",
        "noise_level",
        "config_file",
    },  # the ground
    {"models"},  # networks
    {"data", "weights", "degradations"},  # the world outside; what damages images
    {"losses", "media", "basicsr"},  # distances; pictures as users have them; a BasicSR YAML as a config
    {"terms", "metrics", "cost"},  # the losses of a config; scores; what a model costs
    {"distill", "tiles"},  # the step; a trained model over images of any size
    {"validation", "teacher"},  # measuring; the teacher of a run, and what it said, kept
    {"training", "report"},  # what a run works with; what was measured, written down
    {
        "train",
        "study",
        "evaluate",
        "restore",
        "export",
        "demo",
        "convert",
        "show",
        "compare",
        "cache",
        "shrink",
    },  # programs
    {"autodistill"},  # which uses others
]
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# Modules that others of their floor may use: how names are looked up and files written, what a config and a schedule
# may be, what a batch holds, what every program starts with.
FOUNDATION = {"names", "files", "config", "signals", "schedules", "compiled", "config_file", "batch"}


def imported_modules(path: Path) -> set[str]:
    """The absolute names that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_floor() -> None:
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert modules == set(FLOOR_OF)


def test_modules_import_from_lower_floors_only() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = module_of(path)
        for name in imported_modules(path):
            parts = name.split(".")
            if (
                parts[0] != "kdjax"
                or len(parts) < 2
                or parts[1] in {here, *FOUNDATION}
                or here in ("__init__", "__main__")
            ):
                continue
            if FLOOR_OF[parts[1]] >= FLOOR_OF[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []


def test_flax_modules_stay_inside_models_and_torch_outside_the_package() -> None:
    for path in PACKAGE.rglob("*.py"):
        names = imported_modules(path)
        uses_torch = any(name.split(".")[0] == "torch" for name in names)
        assert not uses_torch or path.name == "spandrel_worker.py", path  # a process of its own
        if module_of(path) != "models":
            assert not any(name.startswith(("flax.nnx", "flax.linen")) for name in names), path


def test_files_are_written_in_one_place() -> None:
    """Renaming is how a file gets its name at last; checkpoints are Orbax's, and only put aside here."""
    for path in PACKAGE.rglob("*.py"):
        if path.name not in ("files.py", "checkpoint.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"os\.(replace|rename)\(|path\.rename\(|shutil\.move", text), path


def test_import_is_lazy() -> None:
    code = "import kdjax, sys; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; kdjax.psnr"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
