"""Every term: its gradient, bfloat16, that it can be wrong, and that what does not fit is refused with the choices."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import distill, models
from kdjax.models import network
from kdjax.terms import TERMS, Context, Forward, Loss, Setting, make_terms, needs_teacher
from kdjax.terms.features import adapt

PAIRS = (("model.1", "body.0", 1.0), ("model.1", "conv_body", 0.5))
# ruff: noqa: E501 (tables)
# One of each, as configs write them. The student's features are at full resolution, the teacher's at a quarter.
SPECS: dict[str, dict] = {
    "task": dict(criterion="charbonnier"),
    "recorrupted": dict(sigma=25.0),
    "output": dict(criterion="l1"),
    "gated output": dict(kind="output", criterion="mse", gate=True),
    "feature": dict(pairs=PAIRS),
    "feature of equals": dict(kind="feature", pairs=(("model.0", "conv_first", 1.0),), criterion="l1", resample="unshuffle"),
    "normalised feature": dict(kind="feature", pairs=PAIRS, normalise="instance"),
    "hint": dict(pairs=PAIRS, normalise="pixel"),
    "attention": dict(pairs=PAIRS, mode="paper"),
    "affinity": dict(pairs=PAIRS),
    "laplace": dict(pairs=PAIRS),
    "soft_target": dict(space="spatial", temperature=1.0),
    "soft target of features": dict(kind="soft_target", space="spatial", temperature=2.0, pairs=(("wide", "body.0", 1.0),)),
    "soft target of colours": dict(kind="soft_target", space="rgb", temperature=3.0),
    "wavelet": dict(levels=2, bands=(0.5, 1.0, 1.0, 2.0)),
    "fft": dict(),
    "label_consistency": dict(criterion="l1"),
    "contrastive": dict(layers=(("body.0", 1.0), ("conv_body", 0.5))),
}  # fmt: skip


class Networks:
    """A student and a teacher with random weights, and a batch for them."""

    def __init__(self) -> None:
        teacher = dict(scale=1, num_feat=8, num_block=1, num_grow_ch=4)
        self.student = models.network("dncnn", dict(num_feat=6, depth=3)).init(jax.random.key(0))
        self.teacher = models.network("rrdbnet", teacher).init(jax.random.key(1))
        self.teacher_apply = jax.jit(self.teacher.network.make_apply())
        self.gt = jax.random.uniform(jax.random.key(2), (4, 16, 16, 3))
        self.lq = self.gt + 0.1 * jax.random.normal(jax.random.key(3), self.gt.shape)

    def student_apply(self, params: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        output, features = self.student.network.make_apply()(params, x)
        return output, features | {"wide": jnp.concatenate([features["model.1"]] * 2, -1)[..., :8]}

    def setting(self) -> Setting:
        return distill.make_setting(
            self.student_apply,
            self.student.params,
            self.teacher_apply,
            self.teacher.params,
            self.lq.shape,
            jax.random.key(4),
        )

    def ask(self, images: jax.Array) -> Forward:
        return Forward(*self.teacher_apply(self.teacher.params, images))

    def context(self, student: Forward, teacher: Forward, labelled: jax.Array | None = None) -> Context:
        keys = jax.random.split(jax.random.key(5), 4)
        return Context(student, teacher, self.gt, self.lq, labelled, self.ask, keys)


@functools.cache
def networks() -> Networks:
    return Networks()


@pytest.fixture(scope="module")
def setting() -> Setting:
    return networks().setting()


@pytest.fixture(scope="module")
def passes() -> tuple[Forward, Forward]:
    """What student and teacher make of the batch."""
    student = Forward(*jax.jit(networks().student_apply)(networks().student.params, networks().lq))
    return student, networks().ask(networks().lq)


@functools.cache
def built(name: str) -> Loss:
    (term,) = make_terms({name: SPECS[name] | {"weight": 1.0}}, networks().setting())
    return term.loss


def value_of(name: str) -> Callable[[Forward, Forward, dict], jax.Array]:
    """The term's value as a function of the two networks' results and its adapters."""
    loss = built(name)
    return jax.jit(lambda student, teacher, adapters: loss.value(networks().context(student, teacher), adapters, {}))


def test_every_term_is_tried() -> None:
    tried = {spec.get("kind", name) for name, spec in SPECS.items()}
    assert tried == set(TERMS) - {"perceptual", "style"}  # which have tests of their own


@pytest.mark.parametrize("name", SPECS)
def test_gradient(name: str, passes: tuple) -> None:
    """Along random directions the gradient is what finite differences say, for the student and the adapters."""
    student, teacher = passes
    value, adapters = value_of(name), built(name).adapters
    grads = jax.jit(jax.grad(value, argnums=(0, 2)))(student, teacher, adapters)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    total = float(np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads))))
    assert total > 0
    # Along the gradient itself the slope is largest, so float32 differences can see it.
    slopes = []
    for sign in (1, -1):
        moved = jax.tree.map(lambda x, g, sign=sign: x + sign * 1e-2 * g / total, (student, adapters), grads)
        slopes.append(float(value(moved[0], teacher, moved[1])))
    assert (slopes[0] - slopes[1]) / 2e-2 == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_features_give_a_float32_value_near_that_of_float32(name: str, passes: tuple) -> None:
    student, teacher = passes
    value, adapters = value_of(name), built(name).adapters
    lower = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (student.features, teacher.features))
    low = value(student._replace(features=lower[0]), teacher._replace(features=lower[1]), adapters)
    assert low.dtype == jnp.float32
    assert float(low) == pytest.approx(float(value(student, teacher, adapters)), rel=0.03)


@pytest.mark.parametrize("name", SPECS)
def test_it_says_what_it_looks_at(name: str) -> None:
    """A cache of the teacher keeps the features that a term names, and no others."""
    read, asked = set(), []

    class Watched(dict):
        def __getitem__(self, key: str) -> jax.Array:
            read.add(key)
            return super().__getitem__(key)

    def value(student: Forward, teacher: Forward) -> jax.Array:
        context = networks().context(student, teacher._replace(features=Watched(teacher.features)))
        ask = lambda images: asked.append(images) or networks().ask(images)  # noqa: E731
        return loss.value(context._replace(ask_teacher=ask), loss.adapters, {})

    loss, setting = built(name), networks().setting()
    jax.eval_shape(value, setting.student, setting.teacher)
    assert read == set(loss.reads) and bool(asked) == loss.asks


@pytest.mark.parametrize("name", SPECS)
def test_it_can_be_wrong(name: str, passes: tuple) -> None:
    """A student that is what the term wants costs less than one that is further away."""
    student, teacher = passes
    value, loss = value_of(name), built(name)
    wanted = {
        "task": lambda: student._replace(output=networks().gt),
        "recorrupted": lambda: student._replace(output=recorrupted_target()),
        "label_consistency": lambda: student._replace(output=consistent_target()),
    }
    if loss.adapters or name in ("attention", "affinity", "feature of equals"):
        # Features that pool or un-shuffle to the teacher's own.
        pytest.skip("see test_perfect_features_cost_less_than_wrong_ones")
    good = wanted.get(name, lambda: student._replace(output=teacher.output, features=student.features | {
        "wide": jnp.repeat(jnp.repeat(teacher.features["body.0"], 4, 1), 4, 2)}))()  # fmt: skip
    noise = 0.05 * jax.random.normal(jax.random.key(6), student.output.shape)
    worse = good._replace(output=good.output + noise, features=jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(7), x.shape), good.features))  # fmt: skip
    low, high = (float(value(forward, teacher, loss.adapters)) for forward in (good, worse))
    assert low < 1e-5 < high


def recorrupted_target() -> jax.Array:
    """A second noisy image for each one, by NumPy."""
    gt, lq = (np.asarray(x, np.float64) for x in (networks().gt, networks().lq))
    added = lq - gt
    factors = [(25 / 255) ** 2 / np.mean(noise**2) for noise in added]
    return jnp.asarray(np.stack([y - k * noise for y, k, noise in zip(gt, factors, added, strict=True)]), jnp.float32)


def test_recorrupted_images_have_noise_that_has_nothing_to_do_with_the_students_input() -> None:
    """Its mean is the clean image: the target of a supervised student, but for noise of its own."""
    clean = jnp.full((1, 256, 256, 3), 0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    noise, added = (
        sigma / 255 * jax.random.normal(key, clean.shape) for sigma, key in zip((25, 40), keys, strict=True)
    )
    context = networks().context(None, None)._replace(gt=clean + noise, lq=clean + noise + added)
    loss = built("recorrupted")
    half = jax.grad(lambda y: clean.size / 2 * loss.value(context._replace(student=Forward(y, {})), {}, {}))
    target = clean - half(clean)
    theirs, ours = np.asarray(target - clean).ravel(), np.asarray(noise + added).ravel()
    assert abs(np.corrcoef(theirs, ours)[0, 1]) < 0.01 and abs(theirs.mean()) < 1e-3
    assert np.corrcoef(np.asarray(noise).ravel(), ours)[0, 1] > 0.5  # unlike the noise of gt itself


def consistent_target() -> jax.Array:
    """What the teacher says of the changed inputs, changed back, one sample at a time with NumPy's flips."""
    targets = []
    for image, key in zip(networks().lq, networks().context(None, None).keys, strict=True):
        invert, horizontal, vertical, transpose = np.asarray(jax.random.bernoulli(key, shape=(4,)))
        x = np.asarray(image)
        x = 1 - x if invert else x
        x = x[:, ::-1] if horizontal else x
        x = x[::-1] if vertical else x
        x = x.transpose(1, 0, 2) if transpose else x
        y = np.asarray(networks().ask(jnp.asarray(x)[None]).output[0])
        y = y.transpose(1, 0, 2) if transpose else y
        y = y[::-1] if vertical else y
        y = y[:, ::-1] if horizontal else y
        targets.append(1 - y if invert else y)
    return jnp.asarray(np.stack(targets))


@pytest.mark.parametrize("name", ["feature", "hint", "attention", "affinity", "laplace", "feature of equals"])
def test_perfect_features_cost_less_than_wrong_ones(name: str, passes: tuple) -> None:
    """The student's features become the teacher's, enlarged, and adapters the identity; then they are disturbed."""
    _, teacher = passes
    spec = SPECS[name] | {"weight": 1.0, "pairs": (("same", "body.0", 1.0),), "resample": "pool"}
    enlarged = jnp.repeat(jnp.repeat(teacher.features["body.0"], 4, 1), 4, 2)
    setting = networks().setting()
    shapes = setting.student.features | {"same": jax.ShapeDtypeStruct(enlarged.shape, jnp.float32)}
    (term,) = make_terms({name: spec}, setting._replace(student=setting.student._replace(features=shapes)))
    identity = {"kernel": jnp.eye(8)[None, None], "bias": jnp.zeros(8)}
    narrow = {"kernel": jnp.zeros((1, 1, 8, 8)), "bias": jnp.full(8, -3.0)}
    adapters = {"0": {"mean": identity, "width": narrow} if name == "laplace" else identity}
    if not term.loss.adapters:
        adapters = {}

    @jax.jit
    def value(features: jax.Array) -> jax.Array:
        student = Forward(networks().gt, {"same": features})
        return term.loss.value(networks().context(student, teacher), adapters, {})

    perfect = value(enlarged)
    disturbed = value(enlarged + 0.3 * jax.random.normal(jax.random.key(8), enlarged.shape))
    assert disturbed > perfect + 1e-5
    if name != "laplace":  # a likelihood, which has no zero
        assert perfect == pytest.approx(0, abs=1e-6)


def test_adapter_is_a_1x1_convolution() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    adapter = {"kernel": jax.random.normal(jax.random.key(1), (1, 1, 3, 7)), "bias": jnp.arange(7.0)}
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, adapter["kernel"], (1, 1), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(adapt(adapter, x), expected + adapter["bias"], atol=1e-5)


def test_gate_imitates_only_where_the_teacher_is_nearer_to_the_clean_image(passes: tuple) -> None:
    student, teacher = passes
    near = teacher._replace(output=jnp.where(jnp.arange(16)[:, None, None] < 8, networks().gt, 5.0))
    value = value_of("gated output")
    grad = jax.jit(jax.grad(value))(student, near, {}).output
    assert bool((grad[:, :8] != 0).all()) and not bool((grad[:, 8:] != 0).any())


@pytest.mark.parametrize("name", ["task", "gated output"])
def test_unlabelled_samples_have_no_clean_image(name: str, passes: tuple) -> None:
    """Where only the teacher knows, the clean image changes nothing, and the gate is open."""
    student, teacher = passes
    labelled = jnp.array([2.0, 0, 2, 0])[:, None, None, None]
    loss = built(name)

    @jax.jit
    def value(gt: jax.Array, output: jax.Array) -> jax.Array:
        context = networks().context(student._replace(output=output), teacher, labelled)._replace(gt=gt)
        return loss.value(context, {}, {})

    other = networks().gt.at[1].set(0.3).at[3].set(7.0)
    np.testing.assert_array_equal(value(networks().gt, student.output), value(other, student.output))
    grad = jax.jit(jax.grad(value, argnums=1))(networks().gt, student.output)
    used = [bool((grad[i] != 0).any()) for i in range(4)]
    assert used[1::2] == ([False, False] if name == "task" else [True, True])
    if name == "task":  # the mean is over the labelled samples alone
        alone = jnp.mean(jnp.abs(student.output - networks().gt)[jnp.array([0, 2])])
        np.testing.assert_allclose(value(networks().gt, student.output), alone, rtol=1e-4)


def test_terms_do_not_depend_on_the_order_of_samples(passes: tuple) -> None:
    order = jnp.array([2, 0, 3, 1])

    @jax.jit
    def values(order: jax.Array) -> dict[str, jax.Array]:
        context = networks().context(*passes)
        moved = Context(*jax.tree.map(lambda x: x[order], context[:4]), None, networks().ask, context.keys[order])
        return {name: built(name).value(moved, built(name).adapters, {}) for name in SPECS}

    expected = values(jnp.arange(4))
    for name, value in values(order).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, err_msg=name)


def test_adapters_do_not_depend_on_other_terms(setting: Setting) -> None:
    specs = {name: dict(pairs=PAIRS, weight=1.0) for name in ("feature", "hint")}
    (hint,) = make_terms({"hint": specs["hint"]}, setting)
    both = make_terms(specs, setting)
    jax.tree.map(np.testing.assert_array_equal, both[1].loss.adapters, hint.loss.adapters)
    assert not np.allclose(both[0].loss.adapters["0"]["kernel"], hint.loss.adapters["0"]["kernel"])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0, False),
        (1.0, True),
        (dict(share=0.1), True),
        (dict(name="piecewise", values=(0, 0), boundaries=(5,)), False),
        (dict(name="piecewise", values=(0, 1), boundaries=(5,)), True),
    ],
)
def test_needs_teacher(weight: float | dict, expected: bool) -> None:
    specs = {"task": dict(criterion="l1", weight=1.0), "output": dict(criterion="l1", weight=weight)}
    assert needs_teacher(specs) == expected


def test_terms_with_zero_weight_are_left_out(setting: Setting) -> None:
    terms = make_terms({"task": dict(criterion="l1", weight=1), "output": dict(criterion="l1", weight=0.0)}, setting)
    assert [term.name for term in terms] == ["task"]


PAIR = (("model.1", "body.0", 1.0),)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"outputs": dict(criterion="l1", weight=1.0)}, "did you mean 'output'"),
        ({"deep": dict(kind="hints", pairs=PAIR, weight=1.0)}, "kind of the loss term 'deep' 'hints'; did you mean 'hint'"),
        ({"task": dict(criterion="l1")}, "'task' has no weight"),
        ({"task": dict(criterion="l3", weight=1.0)}, "'task'.*unknown criterion 'l3'"),
        ({"task": dict(criterion="l1", weight=1.0, layer="x")}, "'task'.*'layer'"),
        ({"fft": dict(weight=1.0, levels=2)}, "'fft'.*'levels'"),
        ({"task": dict(criterion="l1", weight=dict(name="cosin", value=1.0))}, "did you mean 'cosine'"),
        ({"task": dict(criterion="l1", weight=0)}, "no loss term has a weight above 0"),
        ({}, "no loss term has a weight above 0"),
        ({"hint": dict(pairs=(("model.9", "body.0", 1.0),), weight=1.0)}, r"student has no feature 'model.9'.*model.1 16x16x6"),
        ({"hint": dict(pairs=(("model.1", "body.1", 1.0),), weight=1.0)}, r"teacher has no feature 'body.1'; did you mean 'body.0'.*conv_body 4x4x8"),
        ({"hint": dict(pairs=(("model.1", "body.0"),), weight=1.0)}, "not .student feature, teacher feature, weight"),
        ({"hint": dict(pairs=(), weight=1.0)}, "pairs is empty.*model.0 16x16x6"),
        ({"feature": dict(pairs=PAIR, adapter="never", weight=1.0)}, 'adapter="auto"'),
        ({"feature": dict(pairs=PAIR, resample="nearest", weight=1.0)}, "unknown resample 'nearest'"),
        ({"feature": dict(pairs=PAIR, normalise="batch", weight=1.0)}, "unknown normalise 'batch'"),
        ({"attention": dict(pairs=PAIR, mode="seed", weight=1.0)}, "'seed'"),
        ({"soft_target": dict(space="spatial", pairs=PAIR, weight=1.0)}, "'soft_target'.*6.*8"),
        ({"soft_target": dict(space="rgb", temperature=0.0, weight=1.0)}, "temperature=0.0 must be positive"),
        ({"recorrupted": dict(sigma=0, weight=1.0)}, "sigma=0 must be positive"),
        ({"recorrupted": dict(weight=1.0)}, "missing 1 required keyword-only argument: 'sigma'"),
        ({"soft_target": dict(space="hsv", weight=1.0)}, "unknown space of soft_target 'hsv'"),
        ({"wavelet": dict(levels=0, weight=1.0)}, "'wavelet'.*levels"),
        ({"wavelet": dict(bands=(1.0, 1.0), weight=1.0)}, "'wavelet'.*bands"),
        ({"contrastive": dict(layers=(), weight=1.0)}, "layers is empty.*body.0 4x4x8"),
        ({"contrastive": dict(layers=(("conv1", 1.0),), weight=1.0)}, "teacher has no feature 'conv1'"),
        ({"output": dict(criterion="l1", weight=dict(share=0.5))}, "must sum to less than 1"),
        ({"task": dict(criterion="l1", weight=1), "output": dict(criterion="l1", weight=dict(share=1.5))}, "between 0 and 1"),
        ({"task": dict(criterion="l1", weight=dict(share=0.5, value=1))}, "'value'"),
    ],
)  # fmt: skip
def test_bad_terms_are_refused(specs: dict, message: str, setting: Setting) -> None:
    with pytest.raises(ValueError, match=message):
        make_terms(specs, setting)


def test_colour_softmax_warns_that_it_is_blind_to_brightness(
    caplog: pytest.LogCaptureFixture, setting: Setting
) -> None:
    caplog.clear()
    make_terms({"soft_target": dict(space="rgb", temperature=3.0, weight=1.0)}, setting)
    assert "brightness" in caplog.text


def test_the_documentation_can_be_built() -> None:
    """Every `terms = ...` of docs/distillation.md, for the networks it speaks of."""
    page = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text()
    blocks = re.findall(r"```python\n(terms = .*?)```", page, re.S)
    assert len(blocks) >= 6
    student = network("srvggnetcompact", dict(num_feat=8, num_conv=8, upscale=1)).make_apply()
    teacher = network("rrdbnet", dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4)).make_apply()
    params = [
        models.network("srvggnetcompact", dict(num_feat=8, num_conv=8, upscale=1)).abstract_params,
        models.network("rrdbnet", dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4)).abstract_params,
    ]
    setting = distill.make_setting(student, params[0], teacher, params[1], (2, 16, 16, 3), jax.random.key(0))
    kinds = set()
    for block in blocks:
        scope: dict = {}
        exec(block, scope)
        kinds |= {spec.get("kind", name) for name, spec in scope["terms"].items()}
        assert make_terms(scope["terms"], setting)
    rows = set(re.findall(r"^\| (`.*?`) \|", page, re.M))
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(TERMS) <= listed
