"""Schedules against the values that torch's and BasicSR's schedulers have."""

import math

import numpy as np
import pytest

from kdjax.schedules import is_zero, make_schedule, reaches_zero


def test_constant() -> None:
    assert float(make_schedule(3)(10**6)) == 3.0


def test_multistep_decays_when_count_reaches_a_milestone() -> None:
    schedule = make_schedule(dict(name="multistep", value=8.0, milestones=(2, 5, 5), gamma=0.5))
    assert [float(schedule(count)) for count in range(7)] == [8, 8, 4, 4, 4, 1, 1]


def test_cosine_has_basicsr_values_and_stays_at_its_end() -> None:
    schedule = make_schedule(dict(name="cosine", value=2e-4, steps=250_000, final=1e-7))
    values = [float(schedule(count)) for count in (0, 125_000, 250_000, 250_001, 10**6)]
    np.testing.assert_allclose(values, [2e-4, 1.0005e-4, 1e-7, 1e-7, 1e-7], rtol=1e-5)


def test_piecewise_phases_of_the_guide() -> None:
    schedule = make_schedule(dict(name="piecewise", values=(5, 2, 1, 0), boundaries=(50, 100, 200)))
    assert [float(schedule(count)) for count in (0, 49, 50, 99, 100, 199, 200, 10**6)] == [5, 5, 2, 2, 1, 1, 0, 0]


def test_linear_ends_at_its_final_value_and_stays() -> None:
    schedule = make_schedule(dict(name="linear", value=1.0, steps=4, final=0.5))
    assert [float(schedule(count)) for count in (0, 2, 4, 100)] == [1, 0.75, 0.5, 0.5]


def test_warmup_reaches_the_full_value() -> None:
    schedule = make_schedule(dict(name="multistep", value=1.0, milestones=(8,), gamma=0.1, warmup=4))
    np.testing.assert_allclose([schedule(c) for c in (0, 1, 2, 3, 4, 7, 8)], [0.25, 0.5, 0.75, 1, 1, 1, 0.1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(name="multistop", value=1.0), "did you mean 'multistep'"),
        (dict(value=1.0), "unknown schedule None"),
        (dict(name="cosine", value=1.0), "'cosine' needs steps, got"),
        (dict(name="cosine", value=1.0, steps=9, gamma=0.5), "has no 'gamma' .it has: value, steps, final, warmup"),
        (dict(name="cosine", value=1.0, steps=0), "steps=0 must be a whole number from 1"),
        (dict(name="multistep", value=1.0, milestones=(1,), gama=0.5), "gama"),
        (dict(name="linear", value=1.0, steps=-1), "steps=-1 must be a whole number from 1"),
        (dict(name="linear", value=1.0, steps=10**30), "steps=1000.* must be a whole number from 1 to 2,147,483,647"),
        (dict(name="linear", value=1.0, steps=True), "steps=True"),
        (dict(name="linear", value=math.inf, steps=5), "value=inf must be a finite number"),
        (dict(name="linear", value=1.0, steps=5, final=1e39), "final=1e"),
        (dict(name="constant", value="1"), "value='1' must be a finite number"),
        (dict(name="constant", value=1.0, warmup=1.5), "warmup=1.5"),
        (dict(name="multistep", value=1.0, milestones=5), "milestones=5 must be a list"),
        (dict(name="multistep", value=1.0, milestones=(5.5,)), r"milestones=\(5.5,\) must be .* whole numbers"),
        (dict(name="multistep", value=1.0, milestones=(2**31,)), "milestones"),
        (dict(name="multistep", value=1.0, milestones=(1,) * 1001), "at most 1,000"),
        (dict(name="multistep", value=1.0, milestones=(1,), gamma=math.nan), "gamma=nan"),
        (dict(name="piecewise", values=(1, math.nan), boundaries=(5,)), "values=.* finite numbers"),
        (dict(name="piecewise", values=(1, 2), boundaries=(-5,)), "boundaries"),
        (dict(name=["linear"], value=1.0, steps=5), "unknown schedule"),
        (math.nan, "a schedule=nan must be a finite number"),
        (10**400, "a schedule=.* must be a finite number"),
        ("fast", "a schedule='fast' must be"),
        (None, "a schedule=None must be"),
        (dict(name="piecewise", values=(1, 0), boundaries=(5, 9)), "one more value than boundaries"),
        (dict(name="piecewise", values=(1, 2, 0), boundaries=(9, 5)), "rising boundaries"),
        (dict(name="constant", value=1.0, warmup=-1), "warmup=-1"),
    ],
)
def test_bad_specs_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(spec)


def test_is_zero() -> None:
    assert is_zero(0) and is_zero(0.0) and is_zero(dict(name="cosine", value=0.0, steps=5))
    assert is_zero(dict(name="piecewise", values=(0, 0), boundaries=(3,)))
    assert not is_zero(1e-9) and not is_zero(dict(name="cosine", value=0.0, steps=5, final=1.0))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (1.0, False),
        (dict(name="piecewise", values=(1, 0), boundaries=(3,)), True),
        (dict(name="piecewise", values=(2, 1), boundaries=(3,)), False),
        (dict(name="linear", value=1.0, steps=5), True),
        (dict(name="cosine", value=1.0, steps=5, final=0.1), False),
        (dict(name="multistep", value=1.0, milestones=(2,), gamma=0), True),
        (dict(name="multistep", value=1.0, milestones=(2,)), False),
        (dict(name="constant", value=1.0, warmup=3), False),
    ],
)
def test_reaches_zero(spec: float | dict, expected: bool) -> None:
    assert reaches_zero(spec) == expected
