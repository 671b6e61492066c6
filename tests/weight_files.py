"""Weight files for tests: their opcodes are written here by hand, so that nothing is tested against itself."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from kdjax.models import Model, network

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


# ---- writing torch files by hand -------------------------------------------------------------------------------

STORAGES = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage", np.dtype(np.float16): "HalfStorage",
    BFLOAT16: "BFloat16Storage", np.dtype(np.int64): "LongStorage", np.dtype(np.int32): "IntStorage",
    np.dtype(np.int16): "ShortStorage", np.dtype(np.int8): "CharStorage", np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}  # fmt: skip


@dataclass(eq=False)
class Strided:
    """A tensor over `base` (a 1-D array) as the file describes it, true or not."""

    base: np.ndarray
    offset: Any
    shape: Any
    stride: Any
    numel: int | None = None  # what the file says of the storage
    view: tuple[int, int] | None = None  # legacy: the tensor's storage is base[view[0]:][:view[1]]


@dataclass
class Opcodes:
    code: bytes


@dataclass
class Parameter:
    data: np.ndarray


class Writer:
    """Opcodes of a value; the storages it meets collect in `storages`."""

    def __init__(self, *, legacy: bool = False) -> None:
        self.legacy, self.storages, self.keys = legacy, {}, {}

    def code(self, value: Any) -> bytes:
        match value:
            case Opcodes():
                return value.code
            case None:
                return b"N"
            case bool():
                return b"\x88" if value else b"\x89"
            case int():
                size = value.bit_length() // 8 + 1
                return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
            case tuple():
                return b"(" + b"".join(map(self.code, value)) + b"t"
            case list():
                return b"](" + b"".join(map(self.code, value)) + b"e"
            case OrderedDict():  # with the _metadata that torch adds
                items = b"".join(self.code(part) for item in value.items() for part in item)
                metadata = self.code({"_metadata": {"": {"version": 1}}})
                return b"ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"b"
            case dict():
                return b"}(" + b"".join(self.code(part) for item in value.items() for part in item) + b"u"
            case Parameter():
                return b"ctorch._utils\n_rebuild_parameter\n(" + self.code(value.data) + b"\x88)tR"
            case np.ndarray():
                strides = tuple(step // value.itemsize for step in value.strides)
                return self.code(Strided(np.ascontiguousarray(value).reshape(-1), 0, value.shape, strides))
            case Strided():
                return self.tensor(value)
        raise TypeError(type(value))

    def tensor(self, tensor: Strided) -> bytes:
        key = self.keys.setdefault(id(tensor.base), str(len(self.keys)))
        self.storages[key] = tensor.base
        numel = tensor.base.size if tensor.numel is None else tensor.numel
        code = b"(" + self.code("storage") + f"ctorch\n{STORAGES[tensor.base.dtype]}\n".encode()
        code += self.code(key) + self.code("cpu") + self.code(numel)
        if self.legacy:
            code += self.code(None if tensor.view is None else ("view", *tensor.view))
        code += b"tQ" + self.code(tensor.offset) + self.code(tensor.shape) + self.code(tensor.stride)
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + code + b"\x89ccollections\nOrderedDict\n)RtR"


def zip_file(value: Any, *, byteorder: str | None = "little", **records: bytes) -> bytes:
    writer = Writer()
    program = b"\x80\x02" + writer.code(value) + b"."
    return zip_records(program, writer.storages, byteorder=byteorder, **records)


def zip_records(program: bytes, storages: dict[str, np.ndarray], *, byteorder: str | None, **records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("any name/data.pkl", program)
        if byteorder:
            archive.writestr("any name/byteorder", byteorder)
        for key, base in storages.items():
            words = base.view(f"u{base.itemsize}")
            archive.writestr(f"any name/data/{key}", (words.byteswap() if byteorder == "big" else words).tobytes())
        for name, content in records.items():
            archive.writestr(f"any name/{name.replace('__', '/')}", content)
    return file.getvalue()


def legacy_file(value: Any) -> bytes:
    writer = Writer(legacy=True)
    body = writer.code(value)
    sizes = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [writer.code(0x1950A86A20F9469CFC6C), writer.code(1001), writer.code(sizes), body]
    parts.append(writer.code(sorted(writer.storages)))
    file = b"".join(b"\x80\x02" + part + b"." for part in parts)
    for _, base in sorted(writer.storages.items()):
        file += struct.pack("<q", base.size) + base.tobytes()
    return file


FORMATS = {"zip": zip_file, "legacy": legacy_file}


# ---- small things to store -------------------------------------------------------------------------------------


def state_dict(model: Model) -> dict[str, np.ndarray]:
    """Torch names and layouts, written out once more."""
    state = {}
    for path, leaf in traverse_util.flatten_dict(model.params, sep=".").items():
        value = np.asarray(leaf)
        if path.endswith("kernel"):
            path, value = path[: -len("kernel")] + "weight", value.transpose(3, 2, 0, 1)
        state[path] = np.ascontiguousarray(value)
    return state


def random_model(arch: str, hparams: dict[str, Any]) -> Model:
    """Without jax, whose compilation would take most of the time of these tests."""
    rng = np.random.default_rng(0)
    net = network(arch, hparams)
    return Model(net, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), net.abstract_params))


def write(folder: Path, content: bytes, name: str = "file.pth") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def assert_same(a: Any, b: Any) -> None:
    """Equal trees, bit for bit, with numpy float32 leaves in the second."""
    a, b = traverse_util.flatten_dict(a, sep="."), traverse_util.flatten_dict(b, sep=".")
    assert a.keys() == b.keys()
    for path, value in b.items():
        assert type(value) is np.ndarray and value.dtype == np.float32, path
        np.testing.assert_array_equal(np.asarray(a[path]), value, err_msg=path)
