"""The config of every method, in its `:quick` form, cut short: it runs, and its term is there and counts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_config import METHODS, load
from test_perceptual import write_vgg

from kdjax import config as config_lib
from kdjax import models, train
from kdjax.models import shrinking
from kdjax.training import preparation
from kdjax.training.monitor import Monitor
from kdjax.weights import save_model

pytestmark = pytest.mark.once


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("name", METHODS)
def test_the_quick_form_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = load(name, "quick")
    values.data.update(crop=16, batch_size=4)
    values.val.update(crop=32, limit=1, every=4, save_images=1)
    values.train.steps = 4
    values.log.every = 1
    if name in ("hint", "phases"):  # whose phases follow from the length of the run
        for term in values.terms.values():
            if not isinstance(term.weight, float):
                count = len(term.weight.boundaries)
                term.weight.boundaries = tuple(range(1, count + 1))
    if name == "perceptual":
        write_vgg(tmp_path / "vgg.pth", "vgg19", "conv1_2")
        for term in ("perceptual", "style"):
            values.terms[term].update(vgg=str(tmp_path / "vgg.pth"), weight=0.1)
            values.terms[term].layer_weights = dict(conv1_2=1.0)
    values.teacher.weights = str(tmp_path / "teacher.pth")  # a small one compiles in a fifth of the time
    teacher = models.network("rrdbnet", dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4))
    save_model(teacher.init(jax.random.key(0)), values.teacher.weights)
    if name == "shrink":
        monkeypatch.setattr(shrinking, "_PIXELS", 5000)
        values.student.hparams = teacher.hparams | dict(num_block=1)  # test_shrink.py shrinks widths
    config = config_lib.parse(values.copy_and_resolve_references().to_dict())
    setup = preparation.prepare(config)
    result = train.train(setup, Monitor(config.val, setup.student, setup.teacher), tmp_path)
    assert "step 4:" in result
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss/total" in row]
    term = METHODS[name]
    for row in rows:
        assert all(value is None or np.isfinite(value) for value in row.values())
    assert any(row[f"weight/{term}"] > 0 and row[f"loss/{term}"] > 0 and row[f"share/{term}"] > 0 for row in rows)
    shares = [sum(value for key, value in row.items() if key.startswith("share/")) for row in rows]
    np.testing.assert_allclose(shares, 1, rtol=1e-4)
    if name == "hint":  # first the hint alone, then all but the hint
        assert [row["weight/hint"] for row in rows] == [1, 0, 0, 0]
        assert [row["loss/task"] > 0 for row in rows] == [False, True, True, True]
    if name == "phases":
        assert [row["weight/output"] for row in rows] == [5, 2, 1, 0]
        assert rows[-1]["loss/output"] == 0
    if name == "shrink":
        image = preparation.first_images(setup)[0][:4]
        untrained = setup.student.network.init(jax.random.key(0))
        wanted = setup.teacher.model(image)[0]
        errors = [float(jnp.mean((model(image)[0] - wanted) ** 2)) for model in (setup.student, untrained)]
        assert errors[0] < 0.1 * errors[1]
