"""Hybrid runs: pairs, clean images beside them and unlabelled ones, in batches of one schema."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdjax.config import ConfigError, parse
from kdjax.data import DataError, ImagePair, find_pairs, find_unlabelled, training_batches, write_image
from kdjax.training import preparation

Sources = dict[str, list[ImagePair]]


def write_folder(folder: Path, level: int, count: int = 5, height: int = 20, width: int = 24) -> str:
    """Images of one level each, from `level` on: a crop tells which image it shows."""
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i}.png", np.full((height, width, 3), level + i, np.uint8))
    return str(folder)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    gt, lq = write_folder(tmp_path / "gt", 10), write_folder(tmp_path / "lq", 20)
    return {
        "pairs": find_pairs(gt=gt, lq=lq),
        "unpaired": find_pairs(gt=write_folder(tmp_path / "clean", 100)),
        "unlabelled": find_unlabelled(write_folder(tmp_path / "noisy", 200), degraded=True),
    }


def take(count: int, pairs: list[ImagePair], **options: object) -> list[dict[str, np.ndarray]]:
    with training_batches(pairs, **(dict(crop=8, batch_size=8, seed=3) | options)) as batches:
        return [next(batches) for _ in range(count)]


def level(row: np.ndarray) -> int:
    assert row.min() == row.max()
    return int(row.max())


def test_a_batch_has_pairs_and_clean_images_under_one_schema(sources: Sources) -> None:
    seen = set()
    for step, batch in enumerate(take(6, sources["pairs"], unpaired=sources["unpaired"], unpaired_part=0.25)):
        assert sorted(batch) == ["gt", "index", "is_paired", "lq"]
        assert batch["gt"].shape == batch["lq"].shape == (8, 8, 8, 3) and batch["lq"].dtype == np.uint8
        assert batch["is_paired"].dtype == np.bool_ and batch["is_paired"].sum() == 6
        np.testing.assert_array_equal(batch["index"], np.arange(8) + 8 * step)
        for row, is_paired in enumerate(batch["is_paired"]):
            seen.add(shown := level(batch["gt"][row]))
            assert level(batch["lq"][row]) == (shown + 10 if is_paired else 0)
            assert shown in (range(10, 15) if is_paired else range(100, 105))
    assert seen == {*range(10, 15), *range(100, 105)}


def test_the_lq_of_a_clean_image_has_the_size_of_the_others(sources: Sources, tmp_path: Path) -> None:
    pairs = find_pairs(gt=str(tmp_path / "gt"), lq=write_folder(tmp_path / "small", 20, height=10, width=12))
    (batch,) = take(1, pairs, unpaired=sources["unpaired"], scale=2, channels=1)
    assert batch["gt"].shape == (8, 8, 8, 1) and batch["lq"].shape == (8, 4, 4, 1)
    assert not batch["lq"][~batch["is_paired"]].any() and batch["lq"][batch["is_paired"]].all()


def test_runs_of_one_kind_keep_their_schema(sources: Sources) -> None:
    assert sorted(take(1, sources["pairs"])[0]) == ["gt", "index", "lq"]
    assert sorted(take(1, sources["unpaired"])[0]) == ["gt", "index"]


def test_all_three_kinds_share_a_batch(sources: Sources) -> None:
    options = dict(unlabelled=sources["unlabelled"], unlabelled_part=0.25, batch_size=16)
    with_two = take(3, sources["pairs"], **options)
    with_three = take(3, sources["pairs"], **options, unpaired=sources["unpaired"], unpaired_part=0.5)
    for two, three in zip(with_two, with_three, strict=True):
        assert sorted(three) == ["gt", "index", "is_paired", "labelled", "lq"]
        # Unlabelled images are where they would be without unpaired ones, and the same.
        np.testing.assert_array_equal(three["labelled"], two["labelled"])
        np.testing.assert_array_equal(three["gt"][~three["labelled"]], two["gt"][~two["labelled"]])
        assert three["is_paired"][~three["labelled"]].all()
        kinds = [level(row) // 100 for row in three["gt"]]
        assert (kinds.count(0), kinds.count(1), kinds.count(2)) == (4, 8, 4)
        assert [kind != 1 for kind in kinds] == three["is_paired"].tolist()
        assert [kind != 2 for kind in kinds] == three["labelled"].tolist()


def test_every_epoch_of_each_kind_shows_every_image_once(sources: Sources) -> None:
    options = dict(unlabelled=sources["unlabelled"], unlabelled_part=0.25, batch_size=16)
    batches = take(5, sources["pairs"], **options, unpaired=sources["unpaired"], unpaired_part=0.5)
    levels = [level(row) for batch in batches for row in batch["gt"]]
    orders = set()
    for first, in_batch in ((10, 4), (100, 8), (200, 4)):  # 5 batches: as many epochs of 5 images as samples in a batch
        epochs = np.array([value for value in levels if first <= value < first + 5]).reshape(in_batch, 5)
        np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(first, first + 5), (in_batch, 1)))
        orders.add(tuple(epochs.ravel()[:20] - first))
    assert len(orders) == 3  # each kind has an order of its own


def test_pairs_do_not_depend_on_the_other_images(sources: Sources, tmp_path: Path) -> None:
    others = find_pairs(gt=write_folder(tmp_path / "others", 150, count=9))
    one, other = (take(4, sources["pairs"], unpaired=unpaired) for unpaired in (sources["unpaired"], others))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["is_paired"], b["is_paired"])
        for key in ("gt", "lq"):
            np.testing.assert_array_equal(a[key][a["is_paired"]], b[key][b["is_paired"]])


def test_processes_workers_and_restarts_share_one_stream(sources: Sources) -> None:
    options = dict(unpaired=sources["unpaired"], unlabelled=sources["unlabelled"], unlabelled_part=0.25)
    whole = take(4, sources["pairs"], **options)
    for count in (2, 4):
        parts = [take(4, sources["pairs"], **options, process_index=i, process_count=count) for i in range(count)]
        for step in range(4):
            for key, expected in whole[step].items():
                np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), expected)
    halves = [take(4, sources["pairs"], **options, process_index=i, process_count=2) for i in range(2)]
    assert all((~half[step]["is_paired"]).sum() == 2 for half in halves for step in range(4))
    for batch, expected in zip(take(2, sources["pairs"], **options, start_step=2, workers=2), whole[2:], strict=True):
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])


def test_damaged_images_of_one_name_in_two_folders_are_both_told(sources: Sources, tmp_path: Path) -> None:
    for folder in ("gt", "clean"):
        (tmp_path / folder / "2.png").write_bytes(b"")
    with training_batches(sources["pairs"], unpaired=sources["unpaired"], crop=8, batch_size=8, seed=3) as batches:
        shown = [batch["gt"] for batch, _ in zip(batches, range(5), strict=False)]
        assert not np.isin(shown, (12, 102)).any()
        assert len(batches.damaged) == 2 and "2.png" in batches.damaged
        assert {Path(reason.split(": ")[0]).parent.name for reason in batches.damaged.values()} == {"gt", "clean"}


def test_sources_that_do_not_go_together_are_refused(sources: Sources) -> None:
    for options, message in [
        (
            dict(pairs=sources["unpaired"], unpaired=sources["unpaired"]),
            "have no lq files: give all clean images as gt",
        ),
        (dict(unpaired=sources["pairs"]), "unpaired images are clean, and these have lq files"),
        (dict(unpaired=sources["unpaired"], unpaired_part=0.01), "0 of the 8 .* unpaired.* change .*unpaired_part"),
        (
            dict(unpaired=sources["unpaired"], unlabelled=sources["unlabelled"]),
            "4 of the 8 .* and 0 of the main kind; each kind needs at least one",
        ),
    ]:
        with pytest.raises(DataError, match=message):
            take(1, **(dict(pairs=sources["pairs"]) | options))


def config(tmp_path: Path, **data: object) -> dict:
    return dict(
        student=dict(arch="srvggnetcompact", hparams=dict(num_feat=4, num_conv=1, upscale=1)),
        terms=dict(task=dict(criterion="l1", weight=1.0)),
        degrade=dict(name="awgn", sigma=25.0),
        data=dict(gt=str(tmp_path / "gt"), lq=str(tmp_path / "lq"), crop=8, batch_size=8) | data,
    )


def test_config_is_checked(tmp_path: Path) -> None:
    for data, message in [
        (dict(lq="", unpaired="x"), "data.unpaired='x' needs config.data.lq. .*set config.data.lq"),
        (dict(unpaired_meta_info="x"), "data.unpaired_meta_info='x' needs config.data.unpaired"),
        (dict(unpaired_part=1.0), "data.unpaired_part=1.0 must be between 0 and 1"),
        (dict(canvas=7), "data.canvas=7 must be 0, or at least data.crop=8"),
        (dict(canvas=-1), "data.canvas=-1 must be from 0"),
        (dict(gt_usm=1), "of type bool"),
    ]:
        with pytest.raises(ConfigError, match=message):
            parse(config(tmp_path, **data))
    assert parse(config(tmp_path, canvas=8, unpaired="x")).data.canvas == 8


def test_a_run_finds_the_unpaired_images_and_loads_the_canvas(
    sources: Sources, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clean.txt").write_text("3.png (20,24,3)\n1.png\n")
    clean = dict(unpaired=str(tmp_path / "clean"), unpaired_meta_info=str(tmp_path / "clean.txt"))
    setup = preparation.prepare(parse(config(tmp_path, **clean, canvas=12)))
    assert [pair.name for pair in setup.unpaired] == ["3.png", "1.png"] and len(setup.pairs) == 5
    with preparation.open_batches(setup, start_step=0) as batches:
        batch = next(batches)
    assert batch["gt"].shape == batch["lq"].shape == (8, 12, 12, 3) and batch["is_paired"].sum() == 4
    monkeypatch.setattr(preparation.log, "propagate", True)
    with caplog.at_level("INFO", "kdjax"):
        preparation.report(setup)
    assert f"unpaired images: 2 from {tmp_path / 'clean'}" in caplog.text and "squares of 12" in caplog.text
    with pytest.raises(DataError, match=r"unpaired images \(gt\): .*nowhere' does not exist"):
        preparation.prepare(parse(config(tmp_path, unpaired=str(tmp_path / "nowhere"))))


def test_pairs_alone_are_loaded_at_the_size_of_the_crop(sources: Sources, tmp_path: Path) -> None:
    setup = preparation.prepare(parse(config(tmp_path, canvas=12)))
    with preparation.open_batches(setup, start_step=0) as batches:
        assert next(batches)["gt"].shape == (8, 8, 8, 3)
    assert preparation.batch_shapes(setup)["gt"].shape == preparation.batch_shapes(setup)["lq"].shape == (8, 8, 8, 3)


def test_crop_and_canvas_are_multiples_of_the_scale(sources: Sources, tmp_path: Path) -> None:
    for options, message in [
        (dict(crop=10, canvas=12), "config.data.crop=10 is not a multiple of the student's scale 4; use 12"),
        (dict(crop=8, canvas=14), "config.data.canvas=14 is not a multiple of .* 4; use 16"),
    ]:
        values = config(tmp_path, **options)
        values["student"]["hparams"]["upscale"] = 4
        with pytest.raises(ConfigError, match=message):
            preparation.prepare(parse(values))


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        (dict(lq=""), ""),
        (dict(lq="", degrade=dict(name="awgn_blind", sigma=(0.0, 50.0))), ""),
        (dict(val=dict(lq="somewhere")), ""),
        (dict(lq="", degrade=dict(name="jpeg"), val=dict(degrade=dict(name="jpeg"))), ""),
        (dict(lq="", val=dict(sigma=50.0)), "config.degrade='awgn' of sigma 25.0, but on noise of config.val.sigma=50"),
        (dict(lq="", degrade=dict(name="awgn_blind", sigma=(0.0, 20.0))), "'awgn_blind' of sigma"),
        (dict(lq="", degrade=dict(name="jpeg")), "config.degrade='jpeg', but"),
        (dict(), "the pairs of config.data.lq="),
    ],
)
def test_validation_on_another_degradation_is_warned_about(
    values: dict,
    warned: str,
    sources: Sources,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = {"lq": values.pop("lq")} if "lq" in values else {}
    setup = preparation.prepare(parse(config(tmp_path, **data) | values))
    monkeypatch.setattr(preparation.log, "propagate", True)
    preparation.report(setup)
    assert ("WARNING: VALIDATION IS NOT ON WHAT THE RUN TRAINS ON" in caplog.text) == bool(warned)
    assert warned in caplog.text
