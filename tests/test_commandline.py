"""What all programs share, tried as programs: help, exit codes, what reaches the terminal, who decides the devices."""

import functools
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kdjax
from kdjax import assets, commandline
from kdjax.__main__ import PROGRAMS
from kdjax.config import Config, ConfigError, keys, parse
from kdjax.degradations import make_degrade

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


def start(*arguments: str | Path, cwd: Path = ROOT, code: int = 0, **variables: str) -> str:
    """Runs Python with these arguments and returns what it printed on both streams."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | variables, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def parser_of(program: str) -> commandline.Parser:
    module = importlib.import_module(program)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{program}.__main__")
    return module.make_parser()


# ---- help ----------------------------------------------------------------------------------------------------------


def test_the_package_lists_its_programs() -> None:
    listed = start("-m", "kdjax")
    for program in PROGRAMS:
        assert re.search(rf"^  {program} +[A-Z].{{20,}}$", listed, re.M), program
    assert start("-m", "kdjax", "--help") == listed
    assert start("-m", "kdjax", "--version") == f"kdjax {kdjax.__version__}\n"
    assert "error: there is no program 'trian'; did you mean 'train'?" in start("-m", "kdjax", "trian", code=2)


def test_the_package_starts_its_programs(tmp_path: Path) -> None:
    teacher = str(assets.TEACHER)
    alone = start("-m", "kdjax.convert", "--info", teacher)
    assert (
        start("-m", "kdjax", "convert", "--info", teacher)
        == alone
        == start("tools/convert_torch_weights.py", "--info", teacher)
    )
    assert start("-m", "kdjax", "export", "--help").startswith("usage: kdjax export ")
    assert "usage: kdjax convert" in start("-m", "kdjax", "convert", teacher, code=2)
    assert start("-m", "kdjax", "convert", "--info", "nowhere.pth", code=1).startswith(
        "error: nowhere.pth: does not exist"
    )


def test_options_are_written_with_dashes_or_underscores() -> None:
    parser = parser_of("kdjax.train")
    for options in (["--num-processes", "2", "--process_id=1"], ["--num_processes=2", "--process-id", "1"]):
        parsed = parser.parse_args(["--config", "x_y", *options])
        assert (parsed.config, parsed.num_processes, parsed.process_id) == ("x_y", 2, 1)


def test_every_program_is_listed() -> None:
    """A module that ends with `commandline.run(main)` is one, and no other way to start one exists."""
    found = set()
    for path in (ROOT / "kdjax").rglob("*.py"):
        if '\nif __name__ == "__main__":\n' in (text := path.read_text(encoding="utf-8")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            found.add(name)
            is_own_process = name == "kdjax.teacher.spandrel_worker"  # another program starts it
            assert name == "kdjax" or is_own_process or text.endswith("    commandline.run(main)\n"), name
    assert found - {"kdjax", "kdjax.teacher.spandrel_worker"} == set(PROGRAMS.values())


@pytest.mark.parametrize("program", PROGRAMS.values())
def test_help_has_usage_an_example_and_every_option_with_its_default(program: str) -> None:
    parser = parser_of(program)
    text = parser.format_help()
    assert text.startswith(f"usage: python -m {program} ") and f"\n    python -m {program} " in text
    for action in parser._actions:
        assert action.help, action.dest
        if action.default not in (None, "", [], (), "==SUPPRESS==") and action.default is not False:
            shown = text[text.rindex(f"\n  {action.option_strings[0]}") + 1 :].partition("\n  -")[0]
            assert "default" in shown, action.dest
    for name in ("train.steps=250000", "data.crop=128", "student.arch='srvggnetcompact'"):
        assert (f"--config.{name}" in text or f"--config.base.{name}" in text) == ("--config FILE" in text)


def test_help_is_the_first_thing_a_person_types(tmp_path: Path) -> None:
    printed = start("-m", "kdjax.train", "--help", cwd=tmp_path)
    assert printed == parser_of("kdjax.train").format_help() or "usage: python -m kdjax.train" in printed
    needed = start("-m", "kdjax.cache", "--config", "configs/denoise.py", code=2)
    assert "the following arguments are required: --output, --samples" in needed


# ---- the config ----------------------------------------------------------------------------------------------------


def read(*arguments: str) -> dict:
    parser = commandline.Parser("kdjax.train", "")
    parser.add_config()
    parser.add_argument("--workdir")
    return parser.parse(arguments)[1]


def test_keys_are_set_in_every_way_that_flags_are_written() -> None:
    values = read(
        "--config.train.steps", "7", "--config.train.lr.value=1e-3", "--noconfig.data.hflip", "--config.log.diagnose",
        "--workdir", "x", "--config", str(ROOT / "configs" / "denoise.py:debug"), "-config.data.workers=3",
        "--config.train.betas=(0.5,0.6)", "--config.val.lq", "a b",
    )  # fmt: skip
    assert (values["train"]["steps"], values["train"]["lr"]["value"], values["data"]["workers"]) == (7, 1e-3, 3)
    assert (values["data"]["hflip"], values["log"]["diagnose"]) == (False, True)
    assert (values["train"]["betas"], values["val"]["lq"]) == ((0.5, 0.6), "a b")


@pytest.mark.parametrize("name", ["denoise", "teacher", "hint", "study_denoise"])
def test_every_key_can_be_set_whatever_the_file_left_out(name: str) -> None:
    prefix = "base." if name.startswith("study") else ""
    parser = commandline.Parser("kdjax.train", "")
    parser.add_config(prefix)
    flags, wanted = [], {}
    for path, _, default in keys(Config()):
        changed = default
        if isinstance(default, bool):
            changed = not default
        elif isinstance(default, int | float):
            changed = default + 1
        elif isinstance(default, str):
            changed = f"{default}x"
        flags.append(f"--config.{prefix}{path}={changed}")
        wanted[prefix + path] = changed
    values = parser.parse(["--config", str(ROOT / "configs" / f"{name}.py"), *flags])[1]
    for path, value in wanted.items():
        found = functools.reduce(lambda group, part: group[part], path.split("."), values)
        assert (type(found), found) == (type(value), value), path


def test_groups_schedules_and_new_terms_are_set_by_flags() -> None:
    file = ("--config", str(ROOT / "configs" / "denoise.py"))
    assert read(*file, "--config.train.lr=1e-4")["train"]["lr"] == 1e-4
    lr = read(*file, "--config.train.lr=dict(name='cosine', value=1e-3, steps=9)")["train"]["lr"]
    assert lr == {"name": "cosine", "value": 1e-3, "steps": 9}
    lr = read(*file, "--config.train.lr=1", "--config.train.lr.name=linear", "--config.train.lr.value=2")["train"]["lr"]
    assert lr == {"name": "linear", "value": 2}
    flags = (
        "terms.fft.weight=0.1", "terms.output.gate=True", "terms.hint.pairs=(('body.9', 'body.1', 1.0),)",
        "teacher.hparams.act_type=relu", "degrade={}", "data.lq=1",
    )  # fmt: skip
    values = read(*file, *(f"--config.{flag}" for flag in flags))
    assert values["terms"]["fft"] == {"weight": 0.1} and values["terms"]["output"]["gate"] is True
    assert values["teacher"]["hparams"] == {"act_type": "relu"} and values["data"]["lq"] == "1"
    assert values["terms"]["hint"]["pairs"] == (("body.9", "body.1", 1.0),) and values["degrade"] == {}
    # A number becomes a range, a share or a schedule, and these a number again.
    other = ("degrade.name=awgn_blind", "degrade.sigma=(0, 30)", "terms.output.weight=dict(share=0.3)")
    values = read(*file, *(f"--config.{flag}" for flag in other))
    assert values["degrade"] == {"name": "awgn_blind", "sigma": (0, 30)}
    assert values["terms"]["output"]["weight"] == {"share": 0.3}
    assert read(*file, f"--config.{other[2]}", "--config.terms.output.weight=2")["terms"]["output"]["weight"] == 2
    with pytest.raises(ValueError, match="sigma='much' must be a number"):
        make_degrade(read(*file, "--config.degrade.sigma=much")["degrade"])


def test_references_follow_flags_and_files_import_their_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = read("--config", str(ROOT / "configs" / "denoise.py:quick"), "--config.train.steps=9")
    assert quick["train"]["lr"]["steps"] == 9
    (tmp_path / "base.py").write_text("from kdjax.config import defaults\n")
    (tmp_path / "mine.py").write_text("from base import defaults\n\ndef get_config():\n    return defaults()\n")
    monkeypatch.chdir(tmp_path.parent)
    for file in (tmp_path / "mine.py", Path(tmp_path.name) / "mine.py"):
        assert read("--config", str(file))["train"]["steps"] == 250_000
        assert "base" not in sys.modules and str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "nowhere.py"), "config file 'nowhere.py' does not exist; give a path"),
        (("--config", "configs/denoise.py", "--config.train.steps=many"), "steps='many' must be a whole number"),
        (("--config", "configs/denoise.py", "--config.train.steps"), "needs a value: --config.train.steps=VALUE"),
        (("--config", "configs/denoise.py", "--config.train.betas=1"), "must be a tuple, such as"),
        (("--config", "configs/denoise.py", "--config.data.hflip=perhaps"), "must be True or False"),
        (("--config", "configs/denoise.py", "--config.data..x=1"), "has an empty part"),
        (("--config", "configs/denoise.py:quik"), "no variant 'quik'"),
        (("--config", "README.md"), "its name must end in .py"),
    ],
)
def test_what_cannot_be_read_is_one_message(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        read(*arguments)
    assert str(ended.value).startswith("error: ") and message in str(ended.value)


def test_a_key_that_does_not_exist_is_refused_with_the_nearest() -> None:
    file = str(ROOT / "configs" / "denoise.py")
    for flag, message in (("train.stpes=4", "did you mean 'steps'"), ("nothing.at=4", "key 'nothing' does not exist")):
        with pytest.raises(ConfigError, match=message):
            parse(read("--config", file, f"--config.{flag}"))


def test_shipped_configs_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("--config", "configs/denoise.py:debug")["name"] == "denoise_debug"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "denoise.py").write_text("from ml_collections import ConfigDict\nget_config = ConfigDict\n")
    assert read("--config", "configs/denoise.py") == {}  # one's own comes first


# ---- devices -------------------------------------------------------------------------------------------------------


READS = """
import sys
from jax._src.xla_bridge import backends_are_initialized
from kdjax import commandline, config, study
for path in sys.argv[1:]:
    parser = commandline.Parser("", "")
    parser.add_config()
    _, values = parser.parse(["--config", path])
    (study if "columns" in values else config).parse(values)
    assert not backends_are_initialized(), path
print("read", len(sys.argv[1:]))
"""


def test_no_config_file_asks_for_devices() -> None:
    """The number of a CPU's devices is fixed at the first question for them, and follows from the config."""
    paths = [str(path) for path in sorted((ROOT / "configs").glob("*.py")) if path.stem != "basicsr"]
    paths += [f"{ROOT}/configs/basicsr.py:{path}" for path in sorted((ROOT / "tests" / "basicsr").glob("*_x4*.yml"))]
    assert start("-c", READS, *paths).splitlines()[-1] == f"read {len(paths)}"


ASKS_EARLY = """
import jax
from ml_collections import ConfigDict

jax.devices()

def get_config():
    return ConfigDict(dict(data=dict(batch_size=4), terms=dict(task=dict(criterion="l1", weight=1.0)),
                           degrade=dict(name="awgn", sigma=25.0), name="early",
                           student=dict(hparams=dict(upscale=1))))
"""


def test_a_config_that_takes_the_devices_is_named_as_the_cause(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(ASKS_EARLY)
    alone = start("-m", "kdjax.train", "--config", "early.py", cwd=tmp_path, code=1)
    assert "JAX'S DEVICES WERE IN USE BEFORE THE PROGRAM STARTED" in alone and "config file" in alone
    assert alone.splitlines()[-1].startswith("error: training images (gt): no path given")
    two = start(
        "-m", "kdjax.train", "--config", "early.py", "--num-processes", "2", "--process-id", "0",
        "--coordinator-address", "localhost:1", cwd=tmp_path, code=1,
    )  # fmt: skip
    assert "this one has used JAX's devices already: the config file" in two and "Traceback" not in two


# ---- what is printed, and how it ends ------------------------------------------------------------------------------

PRINTS = r"""
import logging, os, sys
import kdjax
from kdjax import assets, commandline
def main():
    commandline.start_logging()
    name = os.fsdecode(b"caf\xe9 \x1b[2J \xe2\x80\xae.png")
    print(name)
    logging.getLogger("kdjax").info("log " + name)
    print("K\u00fcche", file=sys.stderr)
    raise {error}
commandline.run(main)
"""


@pytest.mark.parametrize("variables", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_reach_the_terminal_as_text(variables: dict[str, str]) -> None:
    printed = start("-c", PRINTS.format(error="KeyboardInterrupt"), code=130, **variables)
    override = r"\u202e" if "PYTHONUTF8" not in variables else r"\xe2\x80\xae"  # to ASCII, any name is bytes
    assert printed.count(rf"caf\xe9 \x1b[2J {override}.png") == 2 and "\x1b" not in printed
    assert "Traceback" not in printed
    assert "Küche" in printed or r"K\xfcche" in printed


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        ("SystemExit(3)", 3, ""),
        ("BrokenPipeError", 128 + signal.SIGPIPE, ""),
        ("commandline.Stopped('SIGTERM')", 143, "stopped by SIGTERM; run the same command to continue"),
        ("RuntimeError('a fault')", 1, "RuntimeError: a fault"),
    ],
)
def test_exit_codes_are_those_of_a_shell(error: str, code: int, last: str) -> None:
    printed = start("-c", PRINTS.format(error=error), code=code)
    assert last in printed.splitlines()[-1]


def test_help_through_a_pipe_that_closes() -> None:
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m kdjax.train --help | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert result.returncode in (0, 141) and "Traceback" not in result.stderr and "Broken" not in result.stderr
