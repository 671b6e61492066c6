"""Reads and writes torch's `.pth` files without torch.

Reads the zip format (torch 1.6 and later) and the stream format before it. Values are returned as plain Python and
`Tensor`s. TorchScript archives, whole pickled modules and tar files of torch 0.1 are rejected with a specific message.
Writes the zip format in BasicSR's layout, with the same bytes for the same weights; `torch.load(weights_only=True)` can
read it, also memory-mapped.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np

from kdjax.models.reading import WeightsError
from kdjax.names import brief
from kdjax.weights.pickle_reader import RESAVE, Name, read_pickle
from kdjax.weights.tensors import Storage, row_major_strides

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
ALIGNMENT = 64  # of tensor data in the zip file, as in torch
MAX_RECORDS = 40_000  # per zip file: one per storage, and accepted files have fewer
MAX_STORAGE_KEY = 100  # characters


def is_torch_file(data: bytes) -> bool:
    """Whether the bytes begin like a zip file, a pickle or a tar file."""
    return data[:4] == b"PK\x03\x04" or data[:1] == b"\x80" or _is_tar(data)


def read_torch_file(data: bytes) -> Any:
    """Returns the object that was passed to torch.save.

    Raises:
      WeightsError: what is wrong. Damaged files may raise other exceptions too; `load_weights` converts them.
    """
    if data[:4] == b"PK\x03\x04":
        return _read_zip(data)
    if _is_tar(data):
        raise WeightsError(f"it is a tar file of torch 0.1; {RESAVE}")
    return _read_legacy(data)


def _is_tar(data: bytes) -> bool:
    return data[257:262] == b"ustar"


def _storage_id(identifier: Any, length: int) -> tuple[Any, ...]:
    """Returns the checked fields after "storage" of a persistent id: type, key, device, numel, ..."""
    match identifier:
        case ("storage", Name(dtype=np.dtype()), str(key), _, int(numel), *_) if (
            len(identifier) == length and 0 <= numel < 2**63 and len(key) <= MAX_STORAGE_KEY
        ):
            return identifier[1:]
        case ("module", *_):
            raise WeightsError(f"it is a whole pickled model, which cannot be read without its code; {RESAVE}")
    raise WeightsError(f"a storage has an identifier that torch never writes; the file is damaged; {RESAVE}")


# ---- the zip format --------------------------------------------------------------------------------------------


def _read_zip(data: bytes) -> Any:
    # Counted first: a directory entry becomes an object of ten times its size.
    if data.count(b"PK\x01\x02") > MAX_RECORDS:
        raise WeightsError(f"the zip file holds more than {MAX_RECORDS:,} records; not written by torch.save")
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    records = {info.filename: info for info in infos}
    if len(records) != len(infos):
        raise WeightsError(f"the zip file holds two records of the same name; {RESAVE}")
    roots = [name.removesuffix("data.pkl") for name in records if name.split("/")[-1] == "data.pkl"]
    if len(roots) != 1:
        raise WeightsError(f"it is a zip file with {len(roots)} records data.pkl, wanted 1: not written by torch.save")
    root = roots[0]
    if root + "constants.pkl" in records or any(name.startswith(root + "code/") for name in records):
        raise WeightsError(f"it is a TorchScript archive, which holds code and not only weights; {RESAVE}")
    # torch never compresses, so the declared record sizes cannot exceed the file. This rules out zip bombs and
    # overlapping records.
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise WeightsError(
            f"the zip file is compressed; torch never compresses; unpack and zip it with -0, or {RESAVE}"
        )
    declared = sum(info.file_size for info in infos)
    if declared > len(data):
        raise WeightsError(f"its records declare {declared} bytes, the file has {len(data)}; the file is damaged")
    byteorder = "little"
    if root + "byteorder" in records:
        byteorder = bytes(_record(data, records[root + "byteorder"])[:20]).decode()
    if byteorder not in ("little", "big"):
        raise WeightsError(f"its byteorder is {byteorder!r}, wanted 'little' or 'big'")

    storages: dict[str, Storage] = {}

    def find_storage(identifier: Any) -> Storage:
        kind, key, _, numel = _storage_id(identifier, 5)
        name = f"{root}data/{key}"
        if name not in records:
            raise WeightsError(f"the record {brief(name, 120)} of one of its tensors is missing; the file is damaged")
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = Storage(kind.dtype, numel, lambda: _record(data, records[name]), byteorder)
        if records[name].file_size != numel * kind.dtype.itemsize or storage.dtype != kind.dtype:
            raise WeightsError(
                f"the record {brief(name, 120)} has {records[name].file_size} bytes, its tensor wants {numel}"
                f" x {kind.dtype}; the file is damaged"
            )
        return storage

    return read_pickle(bytes(_record(data, records[root + "data.pkl"])), 0, find_storage)[0]


def _record(data: bytes, info: zipfile.ZipInfo) -> memoryview:
    """Returns a stored record's content without copying it, as `ZipFile.read` would."""
    header = data[info.header_offset : info.header_offset + 30]
    if header[:4] != b"PK\x03\x04" or info.flag_bits & 1:
        raise WeightsError(f"the record {brief(info.filename, 120)} is encrypted or misplaced; the file is damaged")
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
    content = memoryview(data)[start : start + info.file_size]
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise WeightsError(f"the record {brief(info.filename, 120)} has a wrong checksum; the file is damaged")
    return content


# ---- the stream format before torch 1.6 ------------------------------------------------------------------------


def _read_legacy(data: bytes) -> Any:
    roots: dict[str, Storage] = {}
    contents: dict[str, memoryview] = {}

    def refuse(identifier: Any) -> Storage:
        raise WeightsError(f"its header contains a tensor; the file is damaged; {RESAVE}")

    def find_storage(identifier: Any) -> Storage:
        kind, key, _, numel, view = _storage_id(identifier, 6)
        # This format is always little-endian, whatever machine wrote it.
        root = roots.setdefault(key, Storage(kind.dtype, numel, lambda: contents[key], "little"))
        if root.dtype != kind.dtype or root.numel != numel:
            raise WeightsError(f"the storage {brief(key)} is declared twice, differently; the file is damaged")
        match view:
            case None:
                return root
            case (str(), int(offset), int(view_numel)):
                return root.view(offset, view_numel)
        raise WeightsError(f"a view of a storage is described in a way that torch never writes; {RESAVE}")

    magic, position = read_pickle(data, 0, refuse)
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise WeightsError(f"it is a pickle, but not one that torch.save wrote; {RESAVE}")
    protocol, position = read_pickle(data, position, refuse)
    if type(protocol) is not int or protocol != LEGACY_PROTOCOL:
        raise WeightsError(f"it is a torch file of protocol {brief(protocol)}, wanted {LEGACY_PROTOCOL}; {RESAVE}")
    _, position = read_pickle(data, position, refuse)  # sizes of C types on the machine that wrote it
    result, position = read_pickle(data, position, find_storage)
    keys, position = read_pickle(data, position, refuse)
    is_list = type(keys) is list and all(type(key) is str for key in keys)
    if not is_list or len(keys) != len(roots) or set(keys) != roots.keys():
        raise WeightsError("its list of storages does not fit its tensors; the file is damaged")
    for key in keys:
        root = roots[key]
        start, stop = position + 8, position + 8 + root.nbytes
        if stop > len(data):
            raise WeightsError(f"storage {brief(key)} ends at byte {stop}, the file at {len(data)}: truncated")
        (numel,) = struct.unpack_from("<q", data, position)
        if numel != root.numel:
            raise WeightsError(f"storage {brief(key)} has {numel} scalars, {root.numel} were declared; damaged")
        contents[key] = memoryview(data)[start:stop]
        position = stop
    return result


# ---- writing ---------------------------------------------------------------------------------------------------


def torch_file_bytes(state_dict: dict[str, np.ndarray], about: dict[str, Any]) -> bytes:
    """Returns a `.pth` file with {"params": state_dict, "kdjax": about}.

    Args:
      state_dict: float32 arrays in torch's layout, in the order to write them.
      about: plain strings, numbers, booleans and dicts of them.
    """
    storages: list[np.ndarray] = []
    params = [b"ccollections\nOrderedDict\n)R("]
    for key, array in state_dict.items():
        params += [_pickled(key), _pickled_tensor(array, str(len(storages)))]
        storages.append(array)
    program = b"\x80\x02}(" + _pickled("params") + b"".join(params) + b"u" + _pickled("kdjax") + _pickled(about) + b"u."

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, "archive/data.pkl", program)
        _add(archive, file, "archive/byteorder", b"little")
        for i, array in enumerate(storages):
            _add(archive, file, f"archive/data/{i}", array.astype("<f4", copy=False).tobytes())
        _add(archive, file, "archive/version", b"3\n")
    return file.getvalue()


def _add(archive: zipfile.ZipFile, file: io.BytesIO, name: str, content: bytes) -> None:
    """Adds a record whose content is aligned to ALIGNMENT, padded by an extra field of zeros before it."""
    info = zipfile.ZipInfo(name)  # dated 1980, so that equal weights give equal files
    info.create_system = 3
    used = file.tell() + 30 + len(name) + 4
    padding = -used % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    archive.writestr(info, content)


def _pickled(value: Any) -> bytes:
    """Returns protocol-2 opcodes that push a plain value."""
    match value:
        case bool():
            return b"\x88" if value else b"\x89"
        case int() if 0 <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        case int():
            content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + struct.pack("<B", len(content)) + content
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            content = value.encode()
            return b"X" + struct.pack("<I", len(content)) + content
        case tuple():
            return b"(" + b"".join(map(_pickled, value)) + b"t"
        case dict():
            return b"}(" + b"".join(_pickled(part) for item in value.items() for part in item) + b"u"
    raise WeightsError(f"cannot write the hyper-parameter value {brief(value)}; wanted a string, number or boolean")


def _pickled_tensor(array: np.ndarray, key: str) -> bytes:
    storage = b"(" + _pickled("storage") + b"ctorch\nFloatStorage\n" + _pickled(key) + _pickled("cpu")
    storage += _pickled(array.size) + b"tQ"
    shape = _pickled(array.shape) + _pickled(row_major_strides(array.shape))
    # _rebuild_tensor_v2(storage, offset 0, shape, strides, requires_grad False, no backward hooks)
    arguments = storage + _pickled(0) + shape + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
