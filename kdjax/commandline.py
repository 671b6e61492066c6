"""What all programs share: help, options, the run's config, logging, error messages and exit codes.

A program is a module with `make_parser()`, `main(arguments)` and a docstring that says what it does and gives an
example. It ends with

    if __name__ == "__main__":
        commandline.run(main)

Exit codes follow the shell's conventions: 0 for success, 1 for an error, 2 for a wrong command line, and 128 + N when
signal N stopped the program (130 for Ctrl-C, 143 for SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from kdjax.files import printable
from kdjax.signals import Stopped

log = logging.getLogger("kdjax")

_OPTION = re.compile(r"--[a-z_]+(?==|$)")
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.")  # --config.data.crop=64, and --noconfig.log.diagnose for False


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program as its own process, with terminal-safe output and shell exit codes."""
    with contextlib.suppress(OSError, AttributeError):  # there may be no standard streams at all
        sys.stdout, sys.stderr = _Printable(1, line_buffering=True), _Printable(2, line_buffering=True)
    logging.getLogger("jax").setLevel(logging.WARNING)  # at INFO it lists the accelerators it did not find
    after_imports()
    code = 0
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # the reader is gone: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def after_imports() -> None:
    """Turns on JAX's compilation cache, if the program uses JAX; the garbage collector skips what was imported.

    The collector would search the modules again and again while networks are traced: an eighth of a training's start.
    """
    gc.freeze()
    if "jax" in sys.modules:
        from kdjax import compiled

        compiled.keep()


def fail(message: str, *, alone: bool = False) -> NoReturn:
    """Prints one message to standard error and exits with code 1.

    Args:
      alone: exit immediately, without waiting for threads or for other processes that do not know of the error. Once
        this one is gone, they end too.
    """
    if alone:
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)
    sys.exit(f"error: {message}")


class _Printable(io.TextIOWrapper):
    """A standard stream that escapes control characters and can encode any text."""

    def __init__(self, descriptor: int, *, line_buffering: bool) -> None:
        encoding = (sys.stdout if descriptor == 1 else sys.stderr).encoding
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115  (it stays open as long as the process)
        super().__init__(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)

    def write(self, text: str, /) -> int:
        super().write(printable(text))
        return len(text)


# ---- the log of a run ----------------------------------------------------------------------------------------------


def start_logging(workdir: Path | None = None, *, process: int = 0) -> None:
    """Logs to standard output and, if `workdir` is given, to `workdir/train.log`, one plain line per message.

    In a multi-process run, only the first process logs everything. The others log warnings only, with their process
    number.
    """
    log.handlers.clear()
    log.setLevel(logging.WARNING if process else logging.INFO)
    log.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if workdir and not process:
        handlers.append(_LogFile(workdir / "train.log", encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        who = f"process {process}: " if process else ""
        handler.setFormatter(_PrintableFormatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log file that ends the run when it cannot be written, as the run's other files do, without a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the exception `emit` caught


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


# ---- options -------------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows an option's default, where there is one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        hidden = action.default in (None, argparse.SUPPRESS, "", [], ()) or action.default is False
        if hidden or not action.option_strings or action.required or "default" in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
        return f"{text} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An argument parser whose help starts with the program's docstring, which includes an example.

    Args:
      program: its module, such as "kdjax.train".
    """

    def __init__(self, program: str, docstring: str | None) -> None:
        started_as = sys.argv[0] if sys.argv[0].startswith("kdjax ") else f"python -m {program}"
        super().__init__(prog=started_as, description=docstring, formatter_class=_Help)
        self._prefix = ""

    # ty: ignore[incompatible-method-override] (argparse declares overloads by the type of `namespace`)
    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Also accepts --num_processes for --num-processes, the spelling of ml_collections flags."""
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([_OPTION.sub(_with_dashes, each) for each in given], namespace)

    def add_config(self, prefix: str = "", example: str = "configs/denoise.py") -> None:
        """Adds --config FILE[:VARIANT] and --config.KEY=VALUE.

        Args:
          prefix: put before the keys of a training run; "base." in a study.
        """
        self.add_argument(
            "--config", required=True, metavar="FILE[:VARIANT]",
            help=f"a config file such as {example}, optionally followed by a colon and a variant",
        )  # fmt: skip
        from kdjax.config import Config, keys  # imports JAX, which programs without a config do not need

        self._prefix = prefix
        lines = ["keys of the config, with their defaults:"]
        for path, field, value in keys(Config()):
            lines.append(f"  --config.{prefix}{path}={value!r}\n      {field.metadata['about']}")
        self.epilog = "\n".join(lines)

    def add_weights_options(self, whose: str = "the file") -> None:
        """Adds --key, --arch and --hparam, which `kdjax.weights.weights_options` reads.

        Args:
          whose: "the file" or "the files" the options apply to.
        """
        add = self.add_argument
        add("--key", default="auto", help=f"which weights of {whose} to take, such as params (default: the best)")
        add("--arch", help=f"architecture of {whose}, in place of the recognised one")
        add("--hparam", action="append", default=[], metavar="NAME=VALUE",
            help=f"what {whose} does not say: scale=3, res_scale=0.1, act_type=relu, enc_blk_nums=1,1,28")  # fmt: skip

    def add_processes(self, what: str) -> None:
        """Adds --num-processes and --process-id."""
        self.add_argument("--num-processes", type=int, metavar="N", help=f"number of processes {what}")
        self.add_argument("--process-id", type=int, metavar="N", help="number of this process, from 0")

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """Returns the options, and the config as a nested dict with the command line's overrides applied.

        Exits with code 2 for wrong options and with code 1 for a config that cannot be read.
        """
        options, overrides = _split(sys.argv[1:] if arguments is None else arguments)
        parsed = self.parse_args(options)
        return parsed, _read_config(parsed.config, overrides, self._prefix)


def _with_dashes(option: re.Match[str]) -> str:
    return "--" + option[0][2:].replace("_", "-")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str | bool]]]:
    """Splits arguments into the program's options and config overrides, whose value may be the next argument."""
    options: list[str] = []
    overrides: list[tuple[str, str | bool]] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        match = _OVERRIDE.match(argument)
        if not match:
            options.append(argument)
            continue
        key, equals, value = argument[match.end() :].partition("=")
        if equals:
            overrides.append((key, value))
        elif match["no"]:
            overrides.append((key, False))
        elif waiting and not waiting[0].startswith("--"):
            overrides.append((key, waiting.pop(0)))
        else:
            overrides.append((key, True))  # a bare --config.log.diagnose
    return options, overrides


def _read_config(path: str, overrides: Sequence[tuple[str, str | bool]], prefix: str) -> dict[str, Any]:
    """Returns the config file's result with overrides applied, as a nested dict. Exits if that fails."""
    from kdjax import config_file
    from kdjax.config import kind_of

    def kind_within(key: str) -> Any:
        return kind_of(key.removeprefix(prefix)) if key.startswith(prefix) else None

    try:
        config = config_file.load(path)
        for key, value in overrides:
            config_file.set_key(config, key, value, kind_within)
        return config_file.plain(config)
    except (config_file.ConfigFileError, ValueError, TypeError, KeyError) as error:
        fail(str(error.args[0] if error.args else error))
