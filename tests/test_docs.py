"""Every command line of README.md and docs/ runs, as written, in the environment of a user.

Each page is tried from top to bottom in a folder that holds what its text says is there: a clone's configs, tools and
benchmarks, photographs, a teacher, a student. Long commands are cut short by flags that are appended to them. A shell
runs README.md, and what needs one; other programs are forked (see programs.py). In the source of a page a comment
before a block says what else holds for it:

    <!-- not run: REASON -->      only parsed: REASON, or: needs torch (which `pytest -m torch` runs)
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
import yaml
from PIL import Image
from test_metrics import lpips_state, write_lpips

import kdjax
from kdjax import assets
from kdjax.data import read_image, write_image
from kdjax.models import network
from kdjax.weights import save_model

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "kdjax" / "assets" / "MODEL_CARD.md",
]
LANGUAGES = {"sh", "text", "python", "yaml", "javascript"}
MARKS = re.compile(r"<!-- (not run|only parsed): (\S.*) -->|<!-- (needs torch) -->")

# What makes a command short, by its program; of a flag that is given twice, the last one counts.
_RUN = {
    "train.steps": 2, "data.crop": 16, "data.batch_size": 4, "val.limit": 1, "val.crop": 32, "val.every": 2,
    "checkpoint.every": 2, "log.every": 1, "log.diagnose": False, "data.workers": 0,
}  # fmt: skip
# By config. As in `:debug`, so that most pages find in the cache of compiled programs what another one has compiled.
_SMALL = " --config.teacher.weights=teacher.pth --config.student.hparams.num_feat="
SMALL = {
    **dict.fromkeys(("denoise", "realworld", "frequency"), f"{_SMALL}8 --config.student.hparams.num_conv=2"),
    "shrink": f"{_SMALL}8 --config.student.hparams.num_grow_ch=4",  # the teacher's: only its depth is shrunk
}
SHORT = {
    "kdjax.train": " ".join(f"--config.{key}={value}" for key, value in _RUN.items()),
    "kdjax.study": "--columns scratch output --config.seeds='(0,)' "
    + " ".join(f"--config.base.{key}={value}" for key, value in _RUN.items()),
    "kdjax.cache": "--samples 8 --config.data.crop=16 --config.data.batch_size=4 --config.data.workers=0",
    "kdjax.show": "--count 2 --config.data.crop=16 --config.data.canvas=32 --config.data.batch_size=2"
    " --config.data.workers=0",
    "kdjax.compare": "--size 32 --batch 1 --repeats 1 --limit 1",
    "kdjax.demo": "--port 0",
    "kdjax.shrink": "--crops 2",
    "benchmarks/data.py": "--limit 4 --crop 16 --batch-size 2 --repeats 1",
    "benchmarks/memory.py": "--crop 16 --batch-size 4 --accumulate 1 --steps 1 --students 'SRVGGNetCompact 32x8'",
    "benchmarks/update_shares.py": "--steps 1 --config.data.crop=16 --config.data.batch_size=4 --config.data.workers=0",
    "benchmarks/step.py": "--crop 16 --batch-size 2 --repeats 1 --parts cached inference",
    "benchmarks/startup.py": "--repeats 1",
    "benchmarks/degradations.py": "--canvas 32 --crop 16 --batch-size 2 --repeats 1 --step-repeats 0",
}


# What the lines of README.md are about.
IMAGES = "import numpy as np; image = np.zeros((9, 8, 3), np.uint8); batch = np.zeros((1, 9, 8, 3), np.float32)\n"


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    mark: str  # "", "not run", "only parsed" or "needs torch"


def blocks_of(page: Path) -> list[Block]:
    lines, blocks, start = page.read_text(encoding="utf-8").splitlines(), [], None
    for number, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            if start is None:
                start = number
                continue
            match = MARKS.fullmatch(lines[start - 1])
            mark = (match[1] or match[3]) if match else ""
            blocks.append(Block(start + 1, lines[start].strip("` "), "\n".join(lines[start + 1 : number]), mark))
            start = None
    return blocks


def commands(text: str) -> list[str]:
    """The lines of a script, continued ones joined, without comments."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line for line in (re.sub(r"\s+#(?!SBATCH|!).*", "", line) for line in joined.splitlines()) if line.strip()]


def shortened(line: str) -> str:
    """A command with the flags that make it short, before what ends it in the shell."""
    for program, flags in SHORT.items():
        if re.search(rf"python (-m )?{re.escape(program)}(\s|$)", line):
            if "realworld" in line or "basicsr" in line:
                flags += " --config.data.canvas=32"
            elif "configs/" not in line and program == "kdjax.train":  # a config of one's own has fewer keys
                flags = ""
            if match := re.search(r"kdjax\.(?:train|cache) .*configs/(\w+)\.py(?!:quick)", line):
                flags += SMALL.get(match[1], "")
            command, ampersand, rest = line.partition(" &")
            return f"{command} {flags}{ampersand}{rest}"
    return line


# ---- what the pages say is there -----------------------------------------------------------------------------------


def photographs(folder: Path, count: int, suffix: str = ".png", *, name: str = "{}", noise: float = 0.0) -> None:
    """Cut from the photographs of the package, so that a denoiser knows them; no two folders have the same pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(Path(assets.locate("embedded", assets.TRAIN_PHOTOGRAPHS)).glob("*.png"))
    sources = sources or sorted(Path(assets.locate("embedded", assets.TRAIN_PHOTOGRAPHS)).iterdir())
    random = np.random.default_rng(sum(map(ord, folder.parent.name if noise else folder.name)))
    for i in range(count):
        image = read_image(sources[i % len(sources)])
        top, left = (int(random.integers(0, size - 130)) for size in image.shape[:2])
        image = image[top : top + 130, left : left + 130]
        noisy = np.clip(image + random.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
        write_image(folder / f"{name.format(i)}{suffix}", noisy)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every page takes for granted; each page works in a copy."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "tools", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train", "val", "test", "noisy"):
        photographs(folder / "photographs" / name, 2)
    photographs(folder / "cbsd68", 4)
    shutil.copytree(assets.locate("embedded", assets.TRAIN_PHOTOGRAPHS), folder / "bsds500_train")  # NIQE wants size
    photographs(folder / "pairs" / "gt", 3)
    (folder / "pairs" / "lq").mkdir()
    for path in (folder / "pairs" / "gt").iterdir():
        shutil.copy(path, folder / "pairs" / "lq" / f"{path.stem}_noisy.png")
        Image.open(path).point(lambda level: min(255, level + 5)).save(
            folder / "pairs" / "lq" / f"{path.stem}_noisy.png"
        )
    photographs(folder / "scans", 1, ".tif")
    photographs(folder, 1, ".jpg", name="noisy", noise=20.0)
    photographs(folder, 1, ".png", name="noisy", noise=20.0)
    key = jax.random.key(0)
    # Small convolutions compile in a fifth of the time of the embedded teacher's.
    teacher = network("rrdbnet", dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4)).init(key)
    save_model(teacher, folder / "teacher.pth")
    denoiser = network("dncnn", dict(num_feat=8, depth=20)).init(key)
    student = network("srvggnetcompact", dict(num_feat=8, num_conv=2, upscale=1)).init(key)
    save_model(denoiser, folder / "cdncnn_sigma25.pth")
    ffdnet = network("dncnn", dict(num_feat=8, depth=4, unshuffle=2, noise_map=True, residual=False)).init(key)
    save_model(ffdnet, folder / "ffdnet_color.pth")
    for name in ("student.pth", "net_g_latest.pth"):
        save_model(student, folder / name)
    compact = dict(num_feat=8, num_conv=2, upscale=4, act_type="prelu")
    save_model(network("srvggnetcompact", compact).init(key), folder / "realesr-animevideov3.pth")
    write_lpips(folder / "lpips_alex.pth", lpips_state("alex"))
    options = yaml.safe_load((ROOT / "tests" / "basicsr" / "guide.yml").read_text())
    training, val = options["datasets"]["train"], options["datasets"]["val"]
    training |= {
        "dataroot_gt_paired": "pairs/gt",
        "dataroot_lq_paired": "pairs/clean",
    }
    val |= {"dataroot_gt": "pairs/gt", "dataroot_lq": "pairs/clean"}
    shutil.copytree(folder / "pairs" / "gt", folder / "pairs" / "clean")
    for name in ("dataroot_gt_unpaired", "meta_info_unpaired", "meta_info_paired"):  # degrading them compiles long
        del training[name]
    options["network_g"] = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 2, "upscale": 1}
    options["network_teacher"] = {"type": "RRDBNet", "num_block": 2}
    options["path"]["pretrain_network_teacher"] = "teacher.pth"
    options["train"].pop("perceptual_opt", None)
    options["logger"]["use_tb_logger"] = False
    (folder / "train.yml").write_text(yaml.safe_dump(options))
    return folder


def environment(folder: Path) -> dict[str, str]:
    """A login shell's, with an activated environment; HOME keeps what matplotlib and others cache there."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"HOME": os.environ.get("HOME", str(folder)), "PATH": path, "LANG": "C.UTF-8"}


def run_block(folder: Path, script: str, *, seconds: int = 500) -> str:
    """Runs a script of Bash and returns what it printed."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment(folder), capture_output=True, text=True,
        timeout=seconds,
    )  # fmt: skip
    output = f"{script}\n{result.stdout}{result.stderr}"
    assert result.returncode == 0 and "Traceback" not in output, output
    return output


def run_line(folder: Path, line: str, *, in_a_shell: bool) -> None:
    """Runs one command."""
    words = shlex.split(line)
    if in_a_shell or words[:2] != ["python", "-m"] or set(line) & set("*?$|;&<>`\n"):
        run_block(folder, line)
        return
    result = programs.run(*words[2:], cwd=folder, environment=environment(folder))
    output = f"{line}\n{result.stdout}{result.stderr}"
    assert result.returncode == 0 and "Traceback" not in output, output


def run_page(page: Path, folder: Path, mark: str = "") -> int:
    """Runs the blocks of a page that have this mark, in their order; returns how many lines that were."""
    count = 0
    for block in blocks_of(page):
        if block.mark != mark or block.language != "sh":
            continue
        lines = [shortened(line) for line in commands(block.text) if not line.startswith("pip install ")]
        loops = any(line.startswith("for ") for line in lines)
        for script in ["\n".join(lines)] if loops else lines:
            if "kdjax.demo" in script:
                run_demo(folder, script)
            else:
                run_line(folder, script, in_a_shell=loops or page.stem == "README")
            count += 1
    return count


def run_demo(folder: Path, command: str) -> None:
    """Starts the page, waits for its address, and ends it as its user would."""
    script = f"exec {command}"
    with subprocess.Popen(
        ["bash", "-c", script], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            server.terminate()


# ---- the pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        place = f"{page.name}, line {block.line}"
        assert block.language in LANGUAGES, f"{place}: {block.language!r} is none of {LANGUAGES}"
        if block.language == "sh":
            checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            assert checked.returncode == 0 and not checked.stderr, f"{place}: {checked.stderr}"
        elif block.language == "python":
            ast.parse(block.text)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text), place
        elif block.language == "javascript" and (node := shutil.which("node")):
            checked = subprocess.run(
                [node, "--check", "--input-type=module", "-"], input=block.text, capture_output=True, text=True
            )
            assert "SyntaxError" not in checked.stderr, f"{place}: {checked.stderr}"
        elif block.language == "text":
            assert not re.match(r"\$ |python |pip ", block.text), f"{place} looks like a command"
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if "<!-- not run" in line or "<!-- only parsed" in line or "<!-- needs" in line:
            assert MARKS.fullmatch(line), f"{page.name}, line {number}: wanted a reason: {line}"


def runs(page: Path, mark: str) -> bool:
    return any(block.language == "sh" and block.mark == mark for block in blocks_of(page))


# docs/your_own_student.md has files of its own, and is run by test_own_student.py.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if runs(page, "") and page.stem != "your_own_student"], ids=lambda page: page.stem
)
def test_the_commands_of_a_page_run(page: Path, clone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder)
    if page.stem in ("comparing", "exporting"):  # pages about runs that have ended
        for name in ("denoise", "small", "tiny"):
            (folder / "runs" / name).mkdir(parents=True)
            shutil.copy(folder / "student.pth", folder / "runs" / name)
    if page.stem == "restoring":
        if shutil.which("ffmpeg") is None:
            pytest.skip("videos need ffmpeg")
        make_clip(folder / "clip.mp4")
    assert run_page(page, folder) > 0
    for block in blocks_of(page):
        if block.language == "python" and not block.mark and page.stem in ("README", "exporting", "scaling"):
            copies = {"student.onnx": "exported/student.onnx", "student.stablehlo": "exported/student.stablehlo"}
            for name, made in copies.items():
                if (folder / made).exists():
                    shutil.copy(folder / made, folder / name)
            run_block(folder, f"python -c {shlex.quote(IMAGES * (page.stem == 'README') + block.text)}")


@pytest.mark.torch
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page, "needs torch")], ids=lambda page: page.stem)
def test_the_commands_of_a_page_that_need_torch_run(page: Path, clone: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder)
    assert run_page(page, folder, "needs torch") > 0


def make_clip(path: Path) -> None:
    source = ["-f", "lavfi", "-i", "testsrc=size=32x24:rate=4:duration=0.5"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", str(path)], check=True)


# ---- the wheel -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist of this tree, and the wheel that is made from the sdist, as pip does."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    subprocess.run([*build, "-t", "wheel", "-t", "sdist"], cwd=ROOT, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    (folder / "unpacked").mkdir()
    subprocess.run(["tar", "-xzf", sdist, "-C", folder / "unpacked"], check=True)
    (source,) = (folder / "unpacked").iterdir()
    again = folder / "again"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", again, "-t", "wheel"], cwd=source, check=True)
    return {"wheel": wheel, "sdist": sdist, "source": source, "again": next(again.iterdir())}


def test_a_wheel_has_all_that_the_package_needs_and_nothing_else(built: dict[str, Path]) -> None:
    contents = {name: set(zipfile.ZipFile(built[name]).namelist()) for name in ("wheel", "again")}
    assert contents["wheel"] == contents["again"]
    of_package = {name for name in contents["wheel"] if name.startswith("kdjax/")}
    about = {name for name in contents["wheel"] if f"kdjax-{kdjax.__version__}.dist-info/" in name}
    assert contents["wheel"] == of_package | about
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "kdjax").rglob("*") if path.is_file()}
    configs = {f"kdjax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.py")}
    assert of_package == {name for name in here if "__pycache__" not in name} | configs
    assert "kdjax/py.typed" in of_package and str(assets.TEACHER.relative_to(ROOT)) in of_package


def test_an_sdist_has_what_builds_and_tests_it(built: dict[str, Path]) -> None:
    for name in ("LICENSE", "README.md", "pyproject.toml", "configs/denoise.py", "tests/test_docs.py", "docs/data.md"):
        assert (built["source"] / name).is_file(), name
    assert not [path for path in built["source"].rglob("*") if path.name in ("__pycache__", "build", ".venv", "runs")]


def test_a_wheel_runs_from_another_folder(clone: Path, built: dict[str, Path], tmp_path: Path) -> None:
    """Installed, without the repository, in a path with spaces and umlauts, under LC_ALL=C."""
    folder = tmp_path / "Bilder aus der Küche"
    site = folder / "venv" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    shutil.unpack_archive(built["again"], site, "zip")
    # The packages that kdjax needs are those of this environment; a path in a .pth brings no editable install along.
    (site / "needed.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    work = folder / "Größe"
    shutil.copytree(clone / "photographs", work / "photographs")
    shutil.copy(clone / "teacher.pth", work / "Lehrer ö.pth")
    program = folder / "venv" / "bin" / "python"
    short = shortened("python -m kdjax.train configs/").partition("configs/")[2]
    for line in (
        f"-c {shlex.quote(f'import kdjax; assert {str(folder)!r} in kdjax.__file__')}",
        "-m kdjax --help",
        "-m kdjax.train --config configs/denoise.py --config.teacher.weights='Lehrer ö.pth'"
        f" --config.data.gt=photographs/train --config.val.gt=photographs/val --workdir 'Läufe/eins' {short}",
        "-m kdjax.restore --model 'Läufe/eins/student.pth' photographs/noisy --output 'wieder gut'",
        "-m kdjax.export --model 'Läufe/eins/student.pth' --output 'fort' --format pth onnx",
    ):
        script = f"{shlex.quote(str(program))} {line}"
        result = subprocess.run(
            ["bash", "-c", script], cwd=work, env=environment(work) | {"LC_ALL": "C"}, capture_output=True, text=True
        )
        assert result.returncode == 0 and "Traceback" not in result.stderr, script + result.stdout + result.stderr
    assert sorted(path.name for path in (work / "wieder gut").glob("*.png")) == ["0.png", "1.png"]
