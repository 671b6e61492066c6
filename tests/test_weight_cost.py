"""Reading a weight file costs at most a small multiple of its size, whatever is in it; and ends in one kind of error.

Every generator makes a file whose naive reading takes time or memory by the square of its size, or worse.
"""

from __future__ import annotations

import io
import json
import random
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weight_files import FORMATS, Opcodes, Strided, Writer, random_model, state_dict, write, zip_file, zip_records

from kdjax.losses.vgg_file import load_vgg
from kdjax.metrics.lpips_file import load_lpips
from kdjax.models import Model, network
from kdjax.weights import WeightsError, load_weights, save_model
from kdjax.weights.convert import torch_shapes

pytestmark = pytest.mark.once

MULTIPLE = 12  # of the file's size
FIXED = 32 << 20  # bytes
SECONDS = 10  # of a processor: a stopwatch against quadratic time, wide enough for a slow machine

ZERO = np.zeros(1, np.float32)


def expanded(*shape: int) -> Strided:
    """One scalar as a tensor of any shape."""
    return Strided(ZERO, 0, shape, (0,) * len(shape))


def pickled(*parts: bytes) -> bytes:
    return zip_records(b"\x80\x02" + b"".join(parts) + b".", {}, byteorder="little")


def one_tensor(keys: list[str], tensor: Any, byteorder: str = "little") -> bytes:
    """A state dict of the same tensor under many keys, which is pickled once."""
    writer = Writer()
    first = writer.code(tensor) + b"r\xff\x00\x00\x000"  # LONG_BINPUT 255, POP
    items = b"".join(writer.code(key) + b"j\xff\x00\x00\x00" for key in keys)
    return zip_records(b"\x80\x02" + first + b"}(" + items + b"u.", writer.storages, byteorder=byteorder)


def rrdb_keys(blocks: range) -> list[str]:
    return [f"body.{i}.rdb1.conv1.weight" for i in blocks]


def views_of_one_storage(byteorder: str) -> bytes:
    base = np.zeros(200_000, np.float32)
    state = {f"model.{2 * i}.bias": Strided(base, i, (4,), (1,)) for i in range(2_000)}
    return zip_file(state, byteorder=byteorder)


def safetensors(header: bytes, content: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + content


def tensor_entries(number: int) -> bytes:
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    return ("{" + ",".join(f'"{i}":{entry}' for i in range(number)) + "}").encode()


def many_records(number: int) -> bytes:
    """A zip directory of empty records, all of which lie at the same place."""
    entries = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0) + b"%05x" % i
        for i in range(number)
    )
    head = b"PK\x03\x04" + bytes(26)
    return head + entries + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(entries), len(head), 0)


def overlapping_records() -> bytes:
    """Fifty storages of one megabyte, which are the same bytes of the file."""
    state = {f"model.{2 * i}.bias": np.full(250_000, i, np.float32) for i in range(50)}
    content = zip_file(state)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
    program = next(info for info in infos if info.filename.endswith("data.pkl"))
    start = program.header_offset
    first = next(info for info in infos if info.filename.endswith("data/0"))
    end = infos[infos.index(first) + 1].header_offset
    kept = bytearray(content[start:end])
    directory = content[archive.start_dir :]
    entries = bytearray(directory[: directory.rindex(b"PK\x05\x06")])
    position = 0
    for info in infos:
        offset = first.header_offset if "/data/" in info.filename else 0
        struct.pack_into("<I", entries, position + 42, offset)
        position += 46 + len(info.filename)
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(infos), len(infos), len(entries), len(kept), 0)
    return bytes(kept + entries) + tail


def laughing(kind: bytes, depth: int = 30) -> bytes:
    """A list, tuple or dict that holds the one before it ten times, pushed."""
    code = b"]q\x00"
    for i in range(depth):
        get = bytes([ord("h"), i])
        body = {
            b"list": b"](" + get * 10 + b"e",
            b"tuple": b"(" + get * 10 + b"t",
            b"dict": b"}(" + b"".join(b"K" + bytes([j]) + get for j in range(10)) + b"u",
        }[kind]
        code += body + b"q" + bytes([i + 1]) + (b"" if i == depth - 1 else b"0")
    return code


def nested_dicts(depth: int, width: int) -> bytes:
    """Dicts of `width` names for the same dict, `depth` of them in one another; no tensor anywhere."""
    code = b"}q\x00"
    for i in range(depth):
        items = b"".join(Writer().code(f"{'ema' if j % 2 else 'g'}{j}") + bytes([ord("h"), i]) for j in range(width))
        code += b"0}(" + items + b"uq" + bytes([i + 1])
    return pickled(code)


NET = state_dict(random_model("dncnn", {"num_in_ch": 1, "num_feat": 4, "depth": 3}))
EDSR_BUFFERS = {"sub_mean.bias": expanded(3 << 30), "add_mean.bias": expanded(3 << 30), "head.0.weight": ZERO}
WIDE = {"num_in_ch": 3, "num_feat": 512, "depth": 10, "unshuffle": 1}  # 75 MB


def with_about(hparams: Any, arch: str = "dncnn") -> bytes:
    return zip_file({"params": NET, "kdjax": {"arch": arch, "hparams": hparams}})


GENERATORS: dict[str, Callable[[], bytes]] = {
    # One tensor without extent, or under many names.
    "expanded, many keys": lambda: one_tensor(rrdb_keys(range(1_000)), expanded(64, 64, 3, 3)),
    "expanded, a whole network": lambda: zip_file(
        {key: expanded(*shape) for key, shape in torch_shapes(network("dncnn", WIDE)).items()}),
    "expanded, one key": lambda: zip_file({"model.0.weight": expanded(1 << 14, 1 << 14, 3, 3)}),
    "expanded buffers": lambda: zip_file(EDSR_BUFFERS),
    "expanded statistics": lambda: zip_file(NET | {"model.1.running_mean": expanded(1 << 30)}),
    "tied, many keys": lambda: one_tensor([f"model.{2 * i}.bias" for i in range(2_000)], np.zeros(50_000, np.float32)),
    "expanded, in a VGG": lambda: zip_file({f"features.{i}.weight": expanded(512, 512, 3, 3) for i in range(30)}),
    "views": lambda: views_of_one_storage("little"),
    "views, big-endian": lambda: views_of_one_storage("big"),
    # Numbers in keys and sizes.
    "blocks up to 998": lambda: one_tensor(rrdb_keys(range(0, 998, 2)), ZERO),
    "blocks of one tensor": lambda: one_tensor(rrdb_keys(range(6_000)), ZERO),
    "a deep DnCNN": lambda: one_tensor([f"model.{2 * i}.weight" for i in range(6_000)], expanded(1, 1, 1, 1)),
    "a deep SRVGG": lambda: one_tensor([f"body.{i}.weight" for i in range(6_000)], expanded(1, 1, 1, 1)),
    "levels of NAFNet": lambda: one_tensor([f"downs.{i}.weight" for i in range(99)], expanded(1, 1, 1, 1)),
    "blocks of NAFNet": lambda: one_tensor(
        [f"{part}.{i}.{j}.beta" for part in ("encoders", "decoders") for i in range(9) for j in range(500)]
        + [f"downs.{i}.weight" for i in range(9)], ZERO),
    "levels times convolutions of UNet": lambda: one_tensor(
        [f"down.{i}.weight" for i in range(12)] + [f"encoder.0.convs.{i}.weight" for i in range(900)], ZERO),
    "upsamplings": lambda: one_tensor([f"conv_up{i}.weight" for i in range(1, 4_000)], ZERO),
    "no features, huge": lambda: zip_file({"conv_first.weight": Strided(ZERO, 0, (1 << 40, 0, 3, 3), (0,) * 4)}),
    "a huge width": lambda: zip_file({"intro.weight": expanded(1 << 40, 1, 3, 3), "downs.0.weight": ZERO}),
    "nine long digits": lambda: zip_file({f"body.{'9' * 400}.rdb1.conv1.weight": ZERO}),
    # Many keys, long keys, keys that collide.
    "many keys": lambda: one_tensor([f"k{i}" for i in range(100_000)], ZERO),
    "many networks": lambda: one_tensor([f"n{i}.conv_first.weight" for i in range(6_000)], ZERO),
    "many small networks": lambda: one_tensor(
        [f"n{i}.{key}" for i in range(50) for key in rrdb_keys(range(100))], ZERO),
    "long keys": lambda: one_tensor(["module." * 30_000 + str(i) for i in range(2)], ZERO),
    "many prefixes": lambda: one_tensor([f"{'net.' * 100}{i}" for i in range(5_000)], ZERO),
    "integers that collide": lambda: pickled(b"}(" + b"".join(
        b"\x8a\x0a" + ((2**61 - 1) * (i + 1)).to_bytes(10, "little") + b"N" for i in range(70_000)) + b"u"),
    "memo numbers that collide": lambda: pickled(b"N" + b"".join(
        b"p%d\n" % ((2**61 - 1) * (i + 1)) for i in range(70_000))),
    "long integers": lambda: pickled(b"}(" + b"".join(
        b"L" + b"7" * 4_000 + b"L\n" + b"N" for _ in range(50)) + b"u"),
    "one long integer often": lambda: pickled(
        b"\x8b\xa0\x86\x01\x00" + b"\x7f" * 100_000 + b"q\x000}(" + b"h\x00N" * 20_000 + b"u"),
    # Shared and nested values, in the places whose messages show a value.
    "laughing list": lambda: pickled(laughing(b"list")),
    "laughing dict": lambda: pickled(laughing(b"dict")),
    "laughing hyper-parameter": lambda: with_about({"depth": Opcodes(laughing(b"list"))}),
    "laughing tuple": lambda: with_about({"depth": Opcodes(laughing(b"tuple"))}),
    "laughing statement": lambda: with_about(Opcodes(laughing(b"dict"))),
    "laughing statement about itself": lambda: zip_file({"params": NET, "kdjax": Opcodes(laughing(b"list"))}),
    "laughing shape": lambda: pickled(
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + laughing(b"tuple") + b"K\x00" + laughing(b"tuple") + b"h\x05tR"),
    "laughing persistent id": lambda: pickled(laughing(b"tuple") + b"Q"),
    "laughing legacy magic": lambda: b"\x80\x02" + laughing(b"list") + b".",
    "laughing legacy protocol": lambda: (
        b"\x80\x02" + Writer().code(0x1950A86A20F9469CFC6C) + b".\x80\x02" + laughing(b"list") + b"."),
    "dicts in dicts": lambda: nested_dicts(8, 300),
    "one large dict under many names": lambda: pickled(
        b"}(" + b"".join(Writer().code(f"k{i}") + b"N" for i in range(10_000)) + b"uq\x000}("
        + b"".join(Writer().code(f"ema{i}") + b"h\x00" for i in range(10_000)) + b"u"),
    "deep hyper-parameter": lambda: with_about({"depth": Opcodes(b")" + b"\x85" * 50_000)}),
    "a long name of a hyper-parameter": lambda: with_about({"depth" * 20_000: 3}),
    "a long architecture": lambda: with_about({}, "rrdb" * 50_000 + ":Net"),
    "copies of a list": lambda: pickled(
        b"](" + b"](K\x00Ne" * 2_000 + b"e\x85q\x010(" + b"ccollections\nOrderedDict\nh\x01R" * 2_000 + b"t"),
    "many empty dicts": lambda: pickled(b"(" + b"}" * 100_000 + b"t"),
    "copies of a long tuple": lambda: pickled(b"(" + b"N" * 20_000 + b"tq\x000(" + (b"h\x00\x85\x850" * 20_000) + b"t"),
    "long storage keys": lambda: pickled(
        Writer().code("x" * 100_000) + b"q\x000(" + b"".join(
            b"(" + Writer().code("storage") + b"ctorch\nFloatStorage\nh\x00" + Writer().code("cpu") + b"K\x01tQ"
            for _ in range(2_000)) + b"t"),
    # The zip file and the header of safetensors.
    "zip with many records": lambda: many_records(50_000),
    "zip with overlapping records": overlapping_records,
    "zip with a long comment of directories": lambda: zip_file(NET) + b"PK\x01\x02" * 50_000,
    "safetensors, many tensors": lambda: safetensors(tensor_entries(25_000)),
    "safetensors, long header": lambda: safetensors(tensor_entries(120_000)),
    "safetensors, deep header": lambda: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "safetensors, deep metadata": lambda: safetensors(json.dumps(
        {"__metadata__": {"kdjax": "[" * 100_000 + "]" * 100_000}}).encode()),
    "safetensors, wide header": lambda: safetensors(b'{"a":[' + b"[]," * 50_000 + b"[]]}"),
    "safetensors, overlapping": lambda: safetensors(json.dumps(
        {f"model.{2 * i}.bias": {"dtype": "F32", "shape": [5_000], "data_offsets": [0, 20_000]} for i in range(2_000)}
        ).encode(), bytes(20_000)),
    "safetensors, twice": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4)),
    "safetensors, repeated dimensions": lambda: safetensors(json.dumps(
        {"a": {"dtype": "F32", "shape": [2**62] * 50_000, "data_offsets": [0, 4]}}).encode(), bytes(4)),
    "safetensors, a long number": lambda: safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 200_000 + b'],"data_offsets":[0,4]}}', bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
def test_cost_is_bounded_by_the_file(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, GENERATORS[name]())
    size = path.stat().st_size
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=r"file\.pth") as caught:
            load_weights(path)
        if name == "expanded, in a VGG":
            with pytest.raises(WeightsError, match="unfold"):
                load_vgg(path, vgg_type="vgg19", layers=("conv5_4",))
            with pytest.raises(WeightsError, match="unfold"):
                load_lpips(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS
    assert peak <= MULTIPLE * size + FIXED, f"{peak:,} bytes for a file of {size:,}"
    assert len(str(caught.value)) < 5_000


def test_tied_tensors_are_read(tmp_path: Path) -> None:
    """A network that has just been averaged for the first time: every tensor twice, each storage once."""
    state = NET | {f"module_ema.{key}": value for key, value in NET.items()}
    assert load_weights(write(tmp_path, zip_file(state))).key == "module_ema"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_plain_file_takes_a_few_times_its_size(dtype: Any, tmp_path: Path) -> None:
    """The file, the parameters, and nothing else of that size."""
    model = random_model("dncnn", {"num_feat": 512, "depth": 3})
    path = write(tmp_path, zip_file({key: value.astype(dtype) for key, value in state_dict(model).items()}))
    load_weights(path)  # what is compiled and cached
    tracemalloc.start()
    loaded = load_weights(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    parameters = sum(value.nbytes for value in state_dict(loaded.model).values())
    assert peak < path.stat().st_size + 3.5 * parameters


# ---- mutations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    """A small file of every format that is read."""
    content = {"params": NET, "params_ema": NET, "epoch": 3}
    return {form: make(content) for form, make in FORMATS.items()}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model("dncnn", {"num_in_ch": 1, "num_feat": 4, "depth": 3})


@pytest.mark.parametrize("form", [*FORMATS, "pth", "safetensors"])
def test_mutated_files_end_in_a_model_or_in_a_weights_error(
    form: str, valid: dict[str, bytes], model: Model, tmp_path: Path
) -> None:
    if form not in valid:
        save_model(model, tmp_path / f"x.{form}")
        valid[form] = (tmp_path / f"x.{form}").read_bytes()
    content, rng = valid[form], random.Random(form)
    structure = [i for i in range(len(content)) if i < 1_500 or i > len(content) - 1_200]
    refused = 0
    for number in range(200):
        copy = bytearray(content)
        at = rng.choice(structure)
        match number % 5:
            case 0:  # cut out
                del copy[at : at + rng.randrange(1, 40)]
            case 1:  # repeated
                copy[at:at] = copy[at : at + rng.randrange(1, 40)] * rng.choice((1, 2, 100))
            case 2:  # moved
                part = copy[at : at + 16]
                del copy[at : at + 16]
                to = rng.choice(structure)
                copy[to:to] = part
            case 3:  # large numbers
                copy[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00"))
            case 4:  # another digit or letter
                for _ in range(3):
                    copy[rng.choice(structure)] = rng.choice(b'0123456789.[]{}",:ax\x80')
        try:
            load_weights(write(tmp_path, bytes(copy)))
        except WeightsError as error:
            assert "file.pth" in str(error) and len(str(error)) < 5_000
            refused += 1
    assert refused > 50
