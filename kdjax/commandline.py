"""What all programs share: help, options, the config of a run, the log, one message for an error, the exit code.

A program is a module with a docstring that says what it does and has an example, with `make_parser()` and with
`main(arguments)`; it ends with

    if __name__ == "__main__":
        commandline.run(main)

Exit codes are those of a shell: 0 when all is done, 1 for an error, 2 for a wrong command line, and 128 + the number of
the signal that stopped the program (130 for Ctrl-C, 143 for SIGTERM).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from kdjax.files import printable
from kdjax.signals import Stopped

log = logging.getLogger("kdjax")

_OVERRIDE = re.compile(r"--?(no)?config\.")  # --config.data.crop=64, and --noconfig.log.diagnose for False


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a program as a process of its own: what it prints is safe for a terminal, and its exit code is a shell's."""
    with contextlib.suppress(OSError, AttributeError):  # no standard streams at all
        sys.stdout, sys.stderr = _Printable(1, line_buffering=True), _Printable(2, line_buffering=True)
    logging.getLogger("jax").setLevel(logging.WARNING)  # at INFO it says which accelerators it did not find
    if "jax" in sys.modules:
        from kdjax import compiled

        compiled.keep()
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
    except BrokenPipeError:  # the reader has gone: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def fail(message: str, *, alone: bool = False) -> NoReturn:
    """Ends the program with one message on standard error and exit code 1.

    Args:
      alone: end at once, without waiting for threads, nor for other processes that do not know of the error: when this
        one is gone, they end too.
    """
    print(f"error: {message}", file=sys.stderr, flush=True)
    if alone:
        sys.stdout.flush()
        os._exit(1)
    sys.exit(1)


class _Printable(io.TextIOWrapper):
    """A standard stream that shows control characters instead of sending them, and can encode everything."""

    def __init__(self, descriptor: int, *, line_buffering: bool) -> None:
        encoding = (sys.stdout if descriptor == 1 else sys.stderr).encoding
        raw = open(descriptor, "wb", closefd=False)  # noqa: SIM115  (it stays open as long as the process)
        super().__init__(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)

    def write(self, text: str, /) -> int:
        super().write(printable(text))
        return len(text)


# ---- the log of a run ----------------------------------------------------------------------------------------------


def start_logging(workdir: Path | None = None, *, process: int = 0) -> None:
    """Sends the log to standard output and, if there is one, to `workdir/train.log`, one plain line for each message.

    Of the processes of a run only the first one says everything; the others only warn, with their number.
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
    """A log file that ends the run when it cannot be written, as its other files do, and prints no tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # what `emit` caught


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


# ---- options -------------------------------------------------------------------------------------------------------


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        hidden = action.default in (None, argparse.SUPPRESS, "", [], ()) or action.default is False
        if hidden or not action.option_strings or action.required or "default" in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list | tuple) else action.default
        return f"{text} (default: {str(default).replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with the docstring of the program, which has an example.

    Args:
      program: its module, such as "kdjax.train".
    """

    def __init__(self, program: str, docstring: str | None) -> None:
        super().__init__(prog=f"python -m {program}", description=docstring, formatter_class=_Help)

    def add_config(self, prefix: str = "", example: str = "configs/denoise.py") -> None:
        """Adds --config FILE[:VARIANT] and --config.KEY=VALUE.

        Args:
          prefix: in front of the keys of a training run, "base." in a study.
        """
        self.add_argument(
            "--config", required=True, metavar="FILE[:VARIANT]",
            help=f"a config file such as {example}, and after a colon one of its variants",
        )  # fmt: skip
        from kdjax.config import Config  # which needs JAX, as programs without a config do not

        keys = [f"  --config.{prefix}{key}={value!r}" for key, value in _flattened(Config())]
        about = "keys of the config, and their values where the file sets none (configs/denoise.py explains them):"
        self.epilog = "\n".join([about, *keys])

    def add_processes(self, what: str) -> None:
        """Adds --num-processes and --process-id."""
        self.add_argument(
            "--num-processes", "--num_processes", type=int, metavar="N", help=f"how many processes {what}"
        )
        self.add_argument("--process-id", "--process_id", type=int, metavar="N", help="which of them this is, from 0")

    def parse(self, arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
        """The options, and the config as a nested dict with everything set that the command line says.

        Ends the program with code 2 for wrong options and with code 1 for a config that cannot be read.
        """
        options, overrides = _split(sys.argv[1:] if arguments is None else arguments)
        parsed = self.parse_args(options)
        return parsed, _read_config(parsed.config, overrides)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of the program, and those that set keys of the config, whose values may follow as an argument."""
    options: list[str] = []
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if not _OVERRIDE.match(argument):
            options.append(argument)
        elif "=" in argument or argument.lstrip("-").startswith("no"):
            overrides.append(argument)
        else:
            following = next(waiting, None)
            if following is not None and not following.startswith("--"):
                overrides.append(f"{argument}={following}")
                continue
            overrides.append(argument)  # --config.log.diagnose alone is True
            if following is not None:
                more = _split([following, *waiting])
                return options + more[0], overrides + more[1]
    return options, overrides


def _read_config(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What the config file returns, with the overrides, as a nested dict; ends the program where that cannot be."""
    arguments = ["", f"--config={_found(path)}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    with _one_message(overrides):
        left = values(arguments)
        if len(left) > 1:
            fail(f"unexpected argument {left[1]!r}; write --config.KEY=VALUE")
        return values.config.copy_and_resolve_references().to_dict()


def _found(path: str) -> str:
    """The path, or that of the file of the package when there is none such: `configs/` is inside of a wheel."""
    name, colon, variant = path.partition(":")
    places = [Path(__file__).parent, Path(__file__).parent.parent]  # of a wheel, of a clone
    if not Path(name).exists() and Path(name).parts[:1] == ("configs",):
        for place in places:
            if (place / name).is_file():
                return f"{place / name}{colon}{variant}"
    return path


@contextlib.contextmanager
def _one_message(overrides: Sequence[str]) -> Iterator[None]:
    """Turns what ml_collections, absl and config files raise into one message."""
    try:
        yield
    except (AttributeError, KeyError) as error:  # ml_collections, for a key the config lacks
        inner = error.args[0] if error.args else error  # a message, or a KeyError with one
        key, _, hint = str(inner.args[0] if isinstance(inner, KeyError) else inner).partition("\n")
        names = (word.partition("=")[0] for word in overrides)
        flag = next((name for name in names if key.strip("'") in name.split(".")[1:]), None)
        if flag is None:
            fail(f"the config file itself asks for a key that does not exist: {key}. {hint}".strip())
        empty = "A group that is empty in the config file is filled in the file, not on the command line"
        fail(f"no such config key: {flag}. {hint or empty}")
    except (flags.Error, ValueError, TypeError, OSError, RecursionError) as error:
        lines = str(error.args[0] if error.args else error).strip().splitlines() or [type(error).__name__]
        if lines[-1].startswith("ValueError: "):  # what a config file says of its variant, at the end of a traceback
            lines = [lines[-1].removeprefix("ValueError: ")]
        fail("; ".join(line.strip() for line in lines) if len(lines) < 6 else "\n".join(lines))


def _flattened(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flattened(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
