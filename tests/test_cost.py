"""Costs: memory against counts by hand, turns, models that do not fit. No test depends on how long anything takes."""

import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kdjax import cost, memory, models, sharding
from kdjax.config import ConfigError, parse

HEIGHT, WIDTH, FEATURES = 48, 40, 8
IMAGE_BYTES = HEIGHT * WIDTH * 3 * 4


class OneLayer(nnx.Module):
    """A convolution."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.conv(x), {}


class Greedy(OneLayer):
    """Sorts 2^40 values for every pixel, which no memory holds."""

    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        many = (
            jnp.broadcast_to(self.conv(x), (2**40, *x.shape))
            * jax.lax.iota(jnp.float32, 2**40)[:, None, None, None, None]
        )
        return jnp.sort(many, axis=0)[2**39], {}


@pytest.fixture(scope="module")
def one_layer() -> models.Model:
    return models.network("test_cost:OneLayer").init(jax.random.key(0))


@pytest.fixture(scope="module")
def greedy() -> models.Model:
    return models.network("test_cost:Greedy").init(jax.random.key(0))


@pytest.fixture(scope="module")
def dncnn() -> models.Model:
    return models.network("dncnn", dict(num_feat=FEATURES, depth=3)).init(jax.random.key(0))


def test_memory_of_one_layer_is_what_one_counts_by_hand(one_layer: models.Model) -> None:
    memory = cost.compile_model(one_layer, (2, HEIGHT, WIDTH, 3)).memory
    assert memory.arguments == (3 * 3 * 3 * 3 + 3) * 4 + 2 * IMAGE_BYTES
    assert memory.outputs == 2 * IMAGE_BYTES
    assert memory.temporaries <= 2 * IMAGE_BYTES + 4096  # nothing but, perhaps, the image before the bias
    assert memory.peak == memory.arguments + memory.outputs + memory.temporaries


def test_memory_holds_features_that_are_needed_and_no_others(dncnn: models.Model) -> None:
    """DnCNN's two hidden layers are there one or two at a time; all its features together would be five."""
    layer = HEIGHT * WIDTH * FEATURES * 4
    memory = cost.compile_model(dncnn, (1, HEIGHT, WIDTH, 3)).memory
    assert layer <= memory.temporaries <= 2 * layer + 2 * IMAGE_BYTES
    assert memory.outputs == IMAGE_BYTES


def test_weights_take_half_in_bfloat16(dncnn: models.Model) -> None:
    compiled = cost.compile_model(dncnn, (1, HEIGHT, WIDTH, 3), dtype=jnp.bfloat16)
    assert compiled.memory.arguments == models.count_params(dncnn.params) * 2 + IMAGE_BYTES
    assert compiled.run().dtype == jnp.float32 and compiled.run().shape == (1, HEIGHT, WIDTH, 3)


def test_a_pass_is_the_model(dncnn: models.Model) -> None:
    image = jax.random.uniform(jax.random.key(0), (1, 9, 7, 3))
    output = cost.compile_model(dncnn, image.shape).run()
    assert jnp.abs(output - dncnn(image)[0]).max() < 1e-5


def test_turns() -> None:
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
    seconds = cost.time_in_turns(runs, repeats=4, warm_up=2)
    assert calls == list("ABC") * 6
    assert list(seconds) == list("ABC") and all(len(values) == 4 for values in seconds.values())
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_who_runs_out_of_memory_leaves_the_turns() -> None:
    calls = []

    def fail() -> None:
        calls.append("A")
        if len(calls) > 3:
            raise cost.OutOfMemory

    seconds = cost.time_in_turns({"A": fail, "B": lambda: calls.append("B")}, repeats=3, warm_up=1)
    assert calls == list("ABABABB")
    assert list(seconds) == ["B"] and len(seconds["B"]) == 3


def test_quartiles() -> None:
    assert cost.quartiles([5, 1, 4, 2, 3]) == cost.Quartiles(2, 3, 4)
    assert cost.quartiles([7]) == cost.Quartiles(7, 7, 7)


def test_measure(dncnn: models.Model, one_layer: models.Model) -> None:
    first, second = cost.measure({"big": dncnn, "small": one_layer}, size=(6, 10), batch=3, repeats=5)
    assert (first.model, second.model) == ("big", "small")
    assert (first.height, first.width, first.batch, first.dtype) == (6, 10, 3, "float32")
    assert first.macs == 6 * 10 * 9 * (2 * 3 * FEATURES + FEATURES**2) and second.macs == 6 * 10 * 9 * 3 * 3
    assert first.compile_seconds > 0 and first.memory.outputs == 3 * 6 * 10 * 3 * 4 and not first.problem
    for row in (first, second):
        timing = row.timing
        assert len(timing.seconds) == 5
        assert 0 < timing.milliseconds.low <= timing.milliseconds.median <= timing.milliseconds.high
        assert timing.milliseconds.median == pytest.approx(1000 * sorted(timing.seconds)[2])
        assert timing.images_per_second == pytest.approx(3000 / timing.milliseconds.median)
        assert timing.megapixels_per_second == pytest.approx(timing.images_per_second * 60 / 1e6)
    assert first.timing.speed_up == cost.Quartiles(1, 1, 1)
    ratios = [a / b for a, b in zip(first.timing.seconds, second.timing.seconds, strict=True)]
    assert second.timing.speed_up.median == pytest.approx(sorted(ratios)[2])


def test_models_of_any_scale_and_channels_have_costs(dncnn: models.Model) -> None:
    hparams = dict(num_in_ch=1, num_out_ch=1, num_feat=4, num_conv=1, upscale=2)
    grey = models.network("srvggnetcompact", hparams).init(jax.random.key(0))
    rows = cost.measure({"dncnn": dncnn, "grey": grey}, size=(4, 4), repeats=1)
    assert [row.memory.outputs for row in rows] == [4 * 4 * 3 * 4, 8 * 8 * 4]


def test_a_model_that_does_not_fit_is_told_and_the_others_are_measured(
    dncnn: models.Model, greedy: models.Model
) -> None:
    rows = cost.measure({"greedy": greedy, "dncnn": dncnn}, size=(4, 4), repeats=2)
    assert rows[0].problem.startswith("out of memory: ") and rows[0].timing is None and rows[0].macs > 0
    assert len(rows[1].timing.seconds) == 2 and rows[1].timing.speed_up is None and not rows[1].problem


def test_what_a_cpu_has_no_memory_for_is_refused_before_it_runs(
    dncnn: models.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system would hand the memory out, and kill the process when it is used."""
    needed = cost.compile_model(dncnn, (1, 8, 8, 3)).memory.peak
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}.get)
    cost.compile_model(dncnn, (1, 8, 8, 3))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}.get)
    with pytest.raises(cost.OutOfMemory, match=r"a pass takes 0 MiB"):
        cost.compile_model(dncnn, (1, 8, 8, 3))


def test_what_jax_says_when_memory_is_short_is_told_apart_from_other_errors() -> None:
    with pytest.raises(cost.OutOfMemory, match="RESOURCE_EXHAUSTED"), cost.telling_out_of_memory():
        jnp.zeros((2**24, 2**24)).block_until_ready()
    with pytest.raises(ValueError), cost.telling_out_of_memory():
        raise ValueError


def test_a_size_that_a_network_does_not_take_is_told(one_layer: models.Model) -> None:
    unfit = models.Model(one_layer.network, {"conv": {"kernel": jnp.zeros((3, 3, 4, 3)), "bias": jnp.zeros(3)}})
    with pytest.raises(ValueError, match=r"^mine cannot be run on an image of 4x6: "):
        cost.measure({"mine": unfit}, size=(4, 6))


def test_the_machine_is_told() -> None:
    machine = cost.describe_machine()
    assert machine["platform"] == "cpu" and machine["device"] not in ("", "cpu") and machine["cores"] >= 1
    assert machine["jax"] == jax.__version__ and machine["date"][:2] == "20"
    assert cost.allocator_peak() is None or math.isfinite(cost.allocator_peak())


def test_a_planned_step_tells_what_it_takes_and_is_compiled_once(caplog: pytest.LogCaptureFixture) -> None:
    traced = []

    def step(state: jax.Array, batch: jax.Array) -> jax.Array:
        traced.append(1)
        return state + jnp.sin(batch).sum()

    planned = cost.Planned(jax.jit(step, donate_argnums=0), "a step")
    batch = jnp.ones((1 << 20,))
    with caplog.at_level("INFO", logger="kdjax"):
        state = planned(planned(jnp.zeros(()), batch), batch)
    assert float(state) == pytest.approx(2 * (1 << 20) * math.sin(1), rel=1e-3) and len(traced) == 1
    (line,) = (record.message for record in caplog.records)
    assert re.match(r"memory: a step takes \d+ MiB on each device, \d+ MiB of them for .*; [\d.]+ GiB are", line)
    assert float(planned(jnp.zeros(()), jnp.zeros((8,)))) == 0 and len(traced) == 2  # another batch is compiled for too


def test_devices_of_one_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = sharding.data_mesh(jax.devices()[:4])
    arguments = (sharding.replicate(jnp.zeros((1 << 20,)), mesh),)
    planned = cost.Planned(jax.jit(lambda state: state + 1, donate_argnums=0), "a step")
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 15 << 20}.get)
    with pytest.raises(cost.OutOfMemory, match="a step takes 16 MiB, the machine has 15 MiB"):
        planned(*arguments)
    assert "16 MiB: 4 MiB for each of 4 devices" in planned.needs


@pytest.mark.parametrize(("limit", "expected"), [("max", None), ("1048576", (1 << 20, 1 << 19))])
def test_a_container_may_have_less_memory_than_its_machine(
    limit: str, expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine = cost.device_memory()[0]
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 19}\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    there, free = cost.device_memory()
    assert (there, free) == expected if expected else there >= machine


# ---- what a config asks for ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "hparams", "message"),
    [
        ("srvggnetcompact", {"num_feat": 10**9}, "config.student.hparams.num_feat=1000000000 must be at most 1024"),
        ("srvggnetcompact", {"num_conv": 10**6}, "config.student.hparams.num_conv=1000000 must be at most 256"),
        ("rrdbnet", {"num_block": 999}, "config.student.hparams.num_block=999"),
        ("unet", {"num_level": 1024}, "config.student.hparams.num_level=1024 must be at most 16"),
        (
            "nafnet",
            {"enc_blk_nums": (0,) * 999, "dec_blk_nums": (0,) * 999},
            "config.student.hparams.enc_blk_nums has 999",
        ),
        ("unet", {"num_level": 14}, "config.student: unet with .* parameters; training them takes .* at least"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_before_it_is_made(arch: str, hparams: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cost.check_network_fits(models.network(arch, hparams))


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"data": {"batch_size": 10**9}}, "config.data.batch_size"),
        ({"data": {"crop": 10**9}}, "config.data.crop"),
        ({"data": {"canvas": 10**6}}, "canvas"),
        ({"data": {"workers": 10**6}}, "config.data.workers"),
        ({"val": {"crop": 10**9}}, "config.val.crop"),
    ],
)
def test_data_that_memory_cannot_hold_are_refused_before_they_are_loaded(values: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* takes .* at least, and the machine has .* [GM]iB"):
        cost.check_data_fits(parse(values), channels=3, scale=1)


def test_what_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse({"data": {"batch_size": 64, "crop": 256, "workers": 8, "lq": "x"}, "val": {"crop": 4096}})
    for there in (8 << 30, 0):  # 0: not known
        monkeypatch.setattr(cost, "host_memory", lambda there=there: (there, there))
        cost.check_data_fits(config, channels=3, scale=4, process_count=3)
        cost.check_network_fits(models.network("srvggnetcompact"))
