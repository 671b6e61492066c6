"""The cached teacher: what is written is what the live run sees, and whatever does not fit is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from test_config import load

from kdjax import cache, config, data, distill, models, sharding
from kdjax.data import DataError, shards
from kdjax.files import locked, whole_file
from kdjax.teacher import cache as teacher_cache
from kdjax.training import preparation
from kdjax.weights import save_model

PAIRS = (("body.0", "body.0", 1.0),)
TERMS = {
    "task": dict(criterion="l1", weight=1.0),
    "output": dict(criterion="l1", weight=1.0),
    "hint": dict(pairs=PAIRS, weight=0.1),
    "attention": dict(pairs=(("body.0", "conv_body", 1.0),), weight=0.1),
    "wavelet": dict(levels=1, weight=0.5),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, their degraded partners, and two teachers."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for kind in ("gt", "lq", "noisy"):
        (folder / kind).mkdir()
        for i in range(5):
            data.write_image(folder / kind / f"{i}.png", rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
    hparams = dict(scale=1, num_feat=8, num_block=1, num_grow_ch=4)
    teacher = models.network("rrdbnet", hparams).init(jax.random.key(0))
    save_model(teacher, folder / "teacher0.pth")
    other = jax.tree.map(lambda leaf: np.asarray(leaf) / 2, teacher.params)
    save_model(dataclasses.replace(teacher, params=other), folder / "teacher1.pth")
    return folder


def configured(files: Path, **changes: dict) -> config.Config:
    values = load("denoise", "debug").to_dict()
    values["terms"] = TERMS
    values["data"] |= {"gt": str(files / "gt"), "crop": 16, "batch_size": 4}
    values["teacher"]["weights"] = str(files / "teacher0.pth")
    for section, entries in changes.items():
        whole = section in ("terms", "degrade", "seed")
        values[section] = entries if whole else values[section] | entries
    return config.parse(values)


def written(setup: preparation.Setup, out: Path, samples: int, **options: object) -> Path:
    assert cache.write(cache.plan(setup, out, samples, **options), tell=lambda line: None)
    return out


@pytest.fixture(scope="module")
def made(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten samples in three shards."""
    folder = tmp_path_factory.mktemp("made") / "cache"
    return written(preparation.prepare(configured(files)), folder, 10, shard_bytes=1)


def take(folder: Path, steps: int, **options: object) -> list[dict]:
    options = dict(batch_size=4, seed=0) | options
    with data.cached_batches(data.open_cache(str(folder)), **options) as batches:
        return [next(batches) for _ in range(steps)]


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without those that say who writes there."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


# The same losses as the live teacher


def quantised(setup: preparation.Setup) -> preparation.Setup:
    """The run with the teacher's answers rounded to sixteenths from -1 to 1, which a cache keeps exactly."""
    live = setup.teacher.apply
    apply = lambda *given: jax.tree.map(lambda y: jnp.round(jnp.clip(y, -1, 1) * 16) / 16, live(*given))  # noqa: E731
    teacher = dataclasses.replace(setup.teacher, apply=apply)
    return dataclasses.replace(setup, teacher=teacher, recipe=dataclasses.replace(setup.recipe, teacher=apply))


def losses(setup: preparation.Setup, steps: int = 3) -> list[dict[str, float]]:
    """Three steps, each on what the run's own stream gives."""
    mesh, recipe = setup.mesh, setup.recipe
    state = sharding.replicate(distill.init_state(recipe, setup.student.params), mesh)
    frozen = distill.make_frozen(recipe.terms, setup.teacher.params if recipe.teacher else None)
    frozen, key = sharding.replicate((frozen, jax.random.key(setup.config.seed)), mesh)
    step = jax.jit(functools.partial(distill.train_step, recipe))
    seen = []
    with preparation.open_batches(setup, start_step=0) as batches:
        for _ in range(steps):
            batch = sharding.shard_batch(next(batches), mesh)
            assert jax.tree.map(jnp.shape, batch) == jax.tree.map(
                lambda leaf: leaf.shape, preparation.batch_shapes(setup)
            )
            state, metrics = step(state, frozen, batch, key)
            seen.append({name: float(value) for name, value in metrics.items()})
    return seen


@pytest.mark.parametrize("lossless", [True, False])
def test_gives_the_losses_of_the_live_teacher(files: Path, tmp_path: Path, lossless: bool) -> None:
    setup = preparation.prepare(configured(files))
    setup = quantised(setup) if lossless else setup
    folder = written(setup, tmp_path / "cache", 12)
    from_cache = preparation.prepare(configured(files, teacher={"cache": str(folder)}))
    assert from_cache.recipe.teacher is None  # the step does not even have it
    live, cached = losses(setup), losses(from_cache)
    # The two programs differ, and so does the order of their sums on some CPUs.
    equal = [ours == pytest.approx(theirs, rel=1e-6) for ours, theirs in zip(cached, live, strict=True)]
    assert all(equal) if lossless else not any(equal)  # rounded, so it is the cache that was read
    for ours, theirs in zip(cached, live, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)


# What is kept of a sample


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, {"gt": "uint8"}),
        ({"degrade": dict(name="jpeg", quality=(30.0, 60.0))}, {"gt": "uint8", "lq": "uint8"}),
        ({"data": dict(canvas=20)}, {"gt": "uint8", "lq": "float16"}),
        (
            {"data": dict(canvas=20, gt_usm=True), "degrade": dict(name="jpeg", quality=(30.0, 60.0))},
            {"gt": "float16", "lq": "uint8"},
        ),
        ({"data": dict(gt_usm=True)}, {"gt": "uint8"}),
        ({"data": dict(unlabelled="noisy", unlabelled_part=0.25)}, {"gt": "uint8", "labelled": "bool"}),
        ({"data": dict(lq="lq", unlabelled="noisy", unlabelled_part=0.25)}, {"lq": "uint8", "labelled": "bool"}),
        ({"data": dict(lq="lq", unpaired="noisy", canvas=20)}, {"gt": "uint8", "lq": "float16"}),
    ],
)
def test_batches_are_what_the_live_step_sees(files: Path, tmp_path: Path, changes: dict, kept: dict) -> None:
    """gt and lq after crop, sharpening and degradation: to the last bit where bytes or the sample's number are kept."""
    folders = {key: str(files / value) for key, value in changes.get("data", {}).items() if isinstance(value, str)}
    changes = changes | {"data": changes.get("data", {}) | folders}
    setup = preparation.prepare(configured(files, **changes))
    folder = written(setup, tmp_path / "cache", 8)
    cached = preparation.prepare(configured(files, **changes | {"teacher": {"cache": str(folder)}}))
    fields = {field.name: field for field in cached.cache.fields}
    assert {name: fields[name].dtype for name in kept} == kept
    assert ("lq" in fields) == ("lq" in kept or bool(cached.config.data.lq)) and "is_paired" not in fields
    assert fields["output"].dtype == "float16" and fields["feature body.0"].dtype == "bfloat16"
    pairs = []
    key = jax.random.key(0)
    for run in (setup, cached):
        make_pair = jax.jit(functools.partial(distill.make_pair, run.recipe))
        with preparation.open_batches(run, start_step=1) as batches:
            batch = next(batches)
            pairs.append([*make_pair(batch, key), batch["index"], batch.get("labelled", np.ones(4))])
    for name, live, ours in zip(("gt", "lq", "index", "labelled"), *pairs, strict=True):
        if name in fields and fields[name].dtype == "float16":
            np.testing.assert_allclose(ours, live, rtol=2**-11, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, live)


def test_unlabelled_places_are_those_of_the_run(files: Path, tmp_path: Path) -> None:
    changes = {"data": dict(unlabelled=str(files / "noisy"), unlabelled_part=0.25)}
    folder = written(preparation.prepare(configured(files, **changes)), tmp_path / "cache", 8)
    for batch in take(folder, 2):
        assert batch["labelled"].tolist() == [True, True, True, False]


# Which sample comes when


def numbers(folder: Path, steps: int, **options: object) -> list[int]:
    return np.concatenate([batch["index"] for batch in take(folder, steps, **options)]).tolist()


def test_goes_round_in_other_orders_whatever_the_batch(made: Path) -> None:
    seen = numbers(made, 10)  # four rounds
    rounds = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert rounds[0] == list(range(10)) and all(sorted(one) == rounds[0] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4
    assert numbers(made, 20, batch_size=2) == seen and numbers(made, 3, start_step=7) == seen[28:]
    assert numbers(made, 10, seed=1) != seen and numbers(made, 10, seed=1)[:10] == rounds[0]
    halves = [take(made, 5, process_index=i, process_count=2) for i in range(2)]
    for one, other, whole in zip(*halves, take(made, 5), strict=True):
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), one, other)
        jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_workers_give_the_same_batches(made: Path) -> None:
    for one, other in zip(take(made, 4), take(made, 4, workers=1), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
        assert other["teacher"]["features"]["body.0"].dtype == jnp.bfloat16


# Writing


def test_wherever_it_is_stopped_it_continues_with_the_same_bytes(files: Path, made: Path, tmp_path: Path) -> None:
    job = cache.plan(preparation.prepare(configured(files)), tmp_path / "cache", 10, shard_bytes=1)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 6:  # in the second shard
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(job, tell=stop, tell_every=0)
    assert " of 10 samples  " in said[0] and "samples/s  0:00:" in said[0] and said[0].endswith("00000.arrayrecord")
    assert sorted(content(job.out)) == ["00000.arrayrecord", "cache.unfinished.json"]
    with pytest.raises(DataError, match=r"unfinished; run the same `python -m kdjax.cache` again to continue it"):
        data.open_cache(str(job.out))
    with whole_file(job.out / "00001.arrayrecord") as temporary:
        temporary.touch()
    temporary.write_bytes(b"half")  # as a process that is killed leaves it
    (job.out / "00002.arrayrecord").write_bytes(b"damaged")
    assert cache.write(job, tell=said.append)
    assert "1 of 3 shards are already written" in said and content(job.out) == content(made)
    assert cache.write(job) and content(job.out) == content(made)


def test_processes_share_the_work(files: Path, made: Path, tmp_path: Path) -> None:
    job = cache.plan(preparation.prepare(configured(files)), tmp_path / "cache", 10, shard_bytes=1)
    assert not cache.write(job, process_index=1, process_count=2)
    assert sorted(content(job.out)) == ["00001.arrayrecord", "00002.arrayrecord", "cache.unfinished.json"]
    assert cache.write(job, process_index=0, process_count=2)
    assert content(job.out) == content(made)


def test_what_cannot_be_written_is_refused(files: Path, made: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(configured(files))
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    asking = preparation.prepare(configured(files, terms=TERMS | {"label_consistency": dict(weight=1.0)}))
    alone = preparation.prepare(configured(files, terms={"task": TERMS["task"]}))
    for arguments, message in [
        ((setup, tmp_path / "file", 8), "is a file"),
        ((setup, tmp_path / "other", 8), "holds other files"),
        ((setup, tmp_path / "new", 0), "--samples=0"),
        ((setup, made, 11), r"holds another cache \(cached -> now\):\n  samples: 10 -> 11"),
        ((asking, tmp_path / "new", 8), "label_consistency: they ask it about images"),
        ((alone, tmp_path / "new", 8), "no loss term of the config uses the teacher"),
    ]:
        with pytest.raises(config.ConfigError, match=message):
            cache.plan(*arguments, shard_bytes=1)
    too_many = cache.plan(setup, tmp_path / "new", 10**10)
    with pytest.raises(
        config.ConfigError, match=r"are needed and .* are free, room for [\d,]+ samples; lower --samples"
    ):
        cache.write(too_many)
    assert "10 samples take 0 MB in 3 shards" in cache.describe(cache.plan(setup, made, 10, shard_bytes=1))


def test_a_teacher_that_overflows_is_told(files: Path, tmp_path: Path) -> None:
    setup = preparation.prepare(configured(files))
    live = setup.teacher.apply
    apply = lambda *inputs: jax.tree.map(lambda y: y + 1e5, live(*inputs))  # noqa: E731
    setup = dataclasses.replace(setup, teacher=dataclasses.replace(setup.teacher, apply=apply))
    with pytest.raises(FloatingPointError, match="sample 0 is not finite in float16"):
        written(setup, tmp_path / "cache", 4)
    assert list(content(tmp_path / "cache")) == ["cache.unfinished.json"]


@pytest.mark.once
def test_the_program_survives_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "cache"
    flags = ("--config=configs/denoise.py:debug", f"--config.teacher.weights={programs.SMALL_TEACHER}")
    flags += ("--output", out, "--samples=192", "--config.data.batch_size=48")
    failed = programs.run("kdjax.cache", *flags, limits={resource.RLIMIT_FSIZE: 300 << 10})
    assert "a sample takes 2,304 bytes (gt uint8 16x16x3: 768; output float16 16x16x3: 1,536; lq: 0, " in failed.stdout
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert failed.stderr.startswith("error: ") and "cannot be written: " in failed.stderr
    assert list(content(out)) == ["cache.unfinished.json"]


def test_two_processes_never_write_the_same_part(files: Path, tmp_path: Path) -> None:
    job = cache.plan(preparation.prepare(configured(files)), tmp_path / "out", 10)
    job.out.mkdir()
    for held, message in (
        (".process-0-of-1.lock", "is being written by process"),
        (".00000.lock", "their own --process-id"),
    ):
        with locked(job.out, held), pytest.raises(config.ConfigError, match=message):
            cache.write(job)
        assert not list(job.out.glob("*.arrayrecord"))


# Caches that do not fit, or are damaged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"does not fit this run \(cached -> now\):\n  seed: 0 -> 1\nrun with the settings"),
        ({"data": dict(crop=20)}, "  data.crop: 16 -> 20"),
        ({"data": dict(canvas=20)}, "  data.canvas: 16 -> 20"),
        ({"data": dict(rot=False)}, "  data.rot: True -> False"),
        ({"data": dict(limit=4)}, r"  data.gt: 5 images \(names \w+\) -> 4 images"),
        ({"degrade": dict(name="awgn", sigma=30.0)}, r"  degrade.sigma: 25.0 -> 30.0"),
        ({"teacher": dict(weights="teacher1.pth")}, r"  teacher.identity: sha256 \w+ -> sha256 \w+\n"),
        ({"teacher": dict(self_ensemble=True)}, "over the eight flips"),
        ({"teacher": dict(dtype="bfloat16")}, "  teacher.dtype: float32 -> bfloat16"),
        (
            {"terms": {"attention": dict(pairs=(("body.0", "conv_first", 1.0),), weight=1.0)}},
            "lacks the teacher's features conv_first, which the loss terms attention read; it has body.0, conv_body",
        ),
        ({"terms": {"contrastive": dict(layers=(("body.0", 1.0),), weight=1.0)}}, "nothing can replace"),
        ({"terms": {"task": TERMS["task"]}}, "no loss term uses the teacher"),
        ({"teacher": dict(cache="nowhere")}, "'nowhere' does not exist; `python -m kdjax.cache` writes a cache"),
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(files: Path, made: Path, changes: dict, message: str) -> None:
    teacher = {"cache": str(made)} | changes.get("teacher", {})
    if "weights" in teacher:
        teacher["weights"] = str(files / teacher["weights"])
    with pytest.raises((config.ConfigError, DataError), match=message):
        preparation.prepare(configured(files, **changes | {"teacher": teacher}))


def test_the_number_of_images_in_a_batch_and_the_folder_may_change(files: Path, made: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "gt", tmp_path / "moved")
    changes = dict(batch_size=8, gt=str(tmp_path / "moved"))
    setup = preparation.prepare(configured(files, data=changes, teacher={"cache": str(made)}))
    assert setup.cache.samples == 10
    assert teacher_cache.without_cache(setup.config) == configured(files, data=changes)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "00001.arrayrecord").unlink(), r"not complete:\n  00001.arrayrecord: No such file"),
        (
            lambda folder: (folder / "cache.json").write_text("{"),
            "damaged or cut short .* make it again with `python -m",
        ),
        (lambda folder: (folder / "cache.json").unlink(), "is not a cache: it has no cache.json"),
        (lambda folder: spoil_index(folder, version=2), "has version 2 and this kdjax reads version 1"),
        (lambda folder: spoil_index(folder, fields=3), "is damaged .*TypeError"),
    ],
)
def test_damaged_caches_are_refused(made: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    shutil.copytree(made, tmp_path / "bad")
    spoil(tmp_path / "bad")
    with pytest.raises(DataError, match=f"^cached teacher: (.|\n)*{message}"):
        data.open_cache(str(tmp_path / "bad"))


def spoil_index(folder: Path, **changes: object) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_record_is_replaced_and_reported(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(made, folder)
    opened = data.open_cache(str(folder))
    size = sum(field.bytes for field in opened.fields)
    path, _ = opened.place(5)
    stored = bytearray(Path(path).read_bytes())
    sound = shards.read_bytes(path, 1, size)  # sample 5
    start = stored.index(sound[size // 2 : size // 2 + 64])
    stored[start : start + 8] = bytes(8)
    Path(path).write_bytes(stored)
    shards._reader.cache_clear()
    with data.cached_batches(opened, batch_size=4, seed=0) as batches:
        seen = [next(batches)["index"].tolist() for _ in range(5)]
        assert list(batches.damaged) == ["5 of the cache"] and batches.replaced == 2
    assert seen[0] == [0, 1, 2, 3] and seen[1][0] == 4 and seen[1][1] != 5 and seen[1][2:] == [6, 7]
    assert caplog.text.count("damaged training image 5 of the cache, others are used instead") == 1
    assert "record 1 of " in caplog.text and "00001.arrayrecord is damaged or cannot be read" in caplog.text
    for shard in folder.glob("*.arrayrecord"):
        shard.write_bytes(bytes(shard.stat().st_size))
    shards._reader.cache_clear()
    with (
        data.cached_batches(opened, batch_size=4, seed=0) as batches,
        pytest.raises(DataError, match="64 records in a row"),
    ):
        next(batches)
