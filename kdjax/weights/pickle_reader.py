"""Reads the pickles inside torch files without running anything they ask for.

Pickle is a small stack language. This module interprets the part of it that a saved state dict needs, using the opcode
list of `pickletools`. It builds plain numbers, strings, lists, tuples, dicts and `Tensor`s, and accepts only the names
in ALLOWED, by exact match. Python's unpickler is never called and nothing is ever imported, so a file has no way to
execute anything. Deliberately unsupported: every opcode that constructs or changes other objects (INST, OBJ, NEWOBJ,
EXT*, ...), sets, protocol-5 buffers, numpy scalars.

Every opcode costs about as much as its bytes. Anything that could grow faster (copies of a list, integers chosen to
make a dict quadratic) is counted or rejected.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdjax.models.reading import WeightsError
from kdjax.names import brief
from kdjax.weights.tensors import BFLOAT16, Storage, Tensor

MAX_STEPS = 1_000_000  # a state dict takes about 40 opcodes per tensor
MAX_INTEGER_KEY = 2**60  # below it, Python hashes integers to themselves, so none can be chosen to collide
MAX_MEMO = 2**32
RESAVE = "re-save the weights in torch with torch.save({'params': model.state_dict()}, path) or as .safetensors"

STORAGE_DTYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Name:
    """A global that a pickle refers to and ALLOWED lists; `dtype` is set for storage types."""

    module: str
    name: str
    dtype: np.dtype | None = None


ALLOWED: dict[tuple[str, str], Name] = {
    (name.module, name.name): name
    for name in (
        Name("collections", "OrderedDict"),
        Name("collections", "Counter"),  # the milestones of torch's MultiStepLR
        Name("torch", "Size"),
        Name("torch._utils", "_rebuild_tensor"),
        Name("torch._utils", "_rebuild_tensor_v2"),
        Name("torch._utils", "_rebuild_parameter"),
        *(Name("torch", storage, dtype) for storage, dtype in STORAGE_DTYPES.items()),
    )
}

# Opcodes whose argument is the value to push.
_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
))  # fmt: skip
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FIXED_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes, start: int, find_storage: Callable[[Any], Storage]) -> tuple[Any, int]:
    """Returns the object pickled at `start`, and the position after it.

    Args:
      data: the whole file.
      start: where the pickle begins.
      find_storage: maps a persistent id to its storage.

    Raises:
      WeightsError: anything but plain values and tensors. Damaged pickles may raise other exceptions too; the caller
        converts those to a WeightsError with the file's name.
    """
    stream = io.BytesIO(data)
    stream.seek(start)
    return _Machine(find_storage, min(MAX_STEPS, len(data))).run(stream), stream.tell()


class _Machine:
    def __init__(self, find_storage: Callable[[Any], Storage], max_steps: int) -> None:
        self.find_storage, self.max_steps = find_storage, max_steps
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self, stream: io.BytesIO) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            self.count(1)
            if opcode.name == "STOP":
                return self.stack.pop()
            self.execute(opcode.name, argument)
        raise WeightsError("the pickle ends without a STOP; the file is truncated")

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.max_steps:
            raise WeightsError(f"the pickle takes more than {self.max_steps} steps; this is not a state dict; {RESAVE}")

    def execute(self, op: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if op in _LITERALS:
            push(argument)
        elif op in _CONSTANTS:
            push(_CONSTANTS[op])
        elif op in ("BINPUT", "LONG_BINPUT", "PUT"):
            if not 0 <= argument < MAX_MEMO:
                raise WeightsError("the pickle numbers its values in a way that torch never does; the file is damaged")
            self.memo[argument] = self.stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif op in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif op == "MARK":
            self.marks.append(len(self.stack))
        elif op == "TUPLE":
            push(tuple(self.pop_to_mark()))
        elif op in _FIXED_TUPLES:
            items = [pop() for _ in range(_FIXED_TUPLES[op])]
            push(tuple(reversed(items)))
        elif op == "EMPTY_LIST":
            push([])
        elif op == "LIST":
            push(self.pop_to_mark())
        elif op == "EMPTY_DICT":
            push({})
        elif op == "DICT":
            push(_update({}, self.pop_to_mark()))
        elif op in ("APPEND", "APPENDS"):
            items = [pop()] if op == "APPEND" else self.pop_to_mark()
            _expect(self.stack[-1], list, op).extend(items)
        elif op == "SETITEM":
            value, key = pop(), pop()
            _update(_expect(self.stack[-1], dict, op), [key, value])
        elif op == "SETITEMS":
            items = self.pop_to_mark()
            _update(_expect(self.stack[-1], dict, op), items)
        elif op == "GLOBAL":
            # pickletools joins the two lines with a space; no allowed name contains one.
            push(_find_name(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = pop(), pop()
            push(_find_name(module, name))
        elif op == "REDUCE":
            arguments = _expect(pop(), tuple, op)
            push(self.call(_expect(pop(), Name, op), arguments))
        elif op == "BUILD":
            # torch attaches `_metadata` (module versions) to the state dict; it is not needed and dropped.
            _expect(pop(), dict, op)
            _expect(self.stack[-1], dict, op)
        elif op == "BINPERSID":
            push(self.find_storage(pop()))
        elif op == "POP":
            pop()
        elif op == "POP_MARK":
            self.pop_to_mark()
        elif op == "DUP":
            push(self.stack[-1])
        elif op not in ("PROTO", "FRAME"):
            raise WeightsError(f"the pickle uses the opcode {op}, which no state dict needs; {RESAVE}")

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def call(self, name: Name, arguments: tuple[Any, ...]) -> Any:
        """Returns what torch's function of that name would return, as plain values."""
        match name.name, arguments:
            case "OrderedDict", ():
                return {}
            case "OrderedDict", (list(pairs),):
                # Python 2 wrote the items as lists. Counted, because copying a long list over and over takes long.
                self.count(len(pairs))
                if all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
                    return _update({}, [part for pair in pairs for part in pair])
            case "Counter", (dict(counts),):
                return counts
            case "Size", (tuple(sizes),):
                return sizes
            case "_rebuild_parameter", (Tensor() as tensor, *_):
                return tensor
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (Storage() as data, offset, tuple(shape), tuple(stride), *_):
                return Tensor(data, offset, shape, stride)
        raise WeightsError(f"the pickle calls {name.module}.{name.name} with arguments torch never gives; {RESAVE}")


def _find_name(module: Any, name: Any = "") -> Name:
    if isinstance(module, str) and isinstance(name, str) and (module, name) in ALLOWED:
        return ALLOWED[module, name]
    what = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "an unnamed object"
    hint = ""
    if isinstance(module, str) and module.split(".")[0] not in ("os", "posix", "nt", "builtins", "subprocess"):
        hint = " (a whole pickled model or a training state rather than a state dict?)"
    raise WeightsError(
        f"its pickle asks for {brief(what, 120)}, which is not on the list of names a state dict needs{hint};"
        f" nothing was executed; {RESAVE}"
    )


def _expect(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise WeightsError(f"the pickle applies {where} to a {type(value).__name__}; the file is damaged; {RESAVE}")
    return value


def _update(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """Sets key, value, key, value, ...; keys must be plain scalars, since hashing a deeply nested tuple can crash."""
    if len(items) % 2:
        raise WeightsError("the pickle fills a dict with a key that has no value; the file is damaged")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (key is None or type(key) in (str, int, float, bool)):
            raise WeightsError(f"the pickle has a {type(key).__name__} as dict key; wanted a string; {RESAVE}")
        if type(key) is int and abs(key) >= MAX_INTEGER_KEY:
            raise WeightsError(f"the pickle has the dict key {brief(key)}; wanted a string or a small number; {RESAVE}")
        target[key] = value
    return target
