"""Shrunk networks: the teacher itself where nothing is smaller, known optima, and better than what they replace."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from kdjax import shrink
from kdjax.config import ConfigError
from kdjax.cost import check_network_fits
from kdjax.data import write_image
from kdjax.models import MODELS, Model, network, regression, shrinking
from kdjax.models.shrinking import check, fit, num_images
from kdjax.weights import load_weights, save_model

FULL = {
    "rrdbnet": dict(scale=1, num_feat=8, num_block=3, num_grow_ch=6),
    "srvggnetcompact": dict(num_feat=8, num_conv=3, upscale=1),
    "dncnn": dict(num_feat=8, depth=5),
    "edsr": dict(num_feat=8, num_block=3, upscale=2),
    "msrresnet": dict(num_feat=8, num_block=3, upscale=2),
    "rcan": dict(num_feat=8, num_group=3, num_block=1, squeeze_factor=4, upscale=2, norm=False),
    "nafnet": dict(width=4, middle_blk_num=2, enc_blk_nums=(1, 3), dec_blk_nums=(2, 1)),
}
SMALLER = {
    "rrdbnet": [
        dict(num_feat=5),
        dict(num_grow_ch=3),
        dict(num_block=2),
        dict(num_feat=6, num_block=2, num_grow_ch=4, ranks=(3, 0, 3, 3, 4) * 2 + (3, 3, 0, 3, 0)),
    ],
    "srvggnetcompact": [dict(num_feat=5), dict(num_conv=2, ranks=(0, 3, 4, 0))],
    "dncnn": [dict(num_feat=5), dict(depth=3), dict(ranks=(0, 3, 4, 3, 0)), dict(num_feat=6, ranks=(0, 3, 0, 3, 0))],
    "edsr": [dict(num_block=2), dict(num_feat=6, num_block=2)],
    "msrresnet": [dict(num_block=2), dict(num_feat=6, num_block=2)],
    "rcan": [dict(num_group=2)],
    "nafnet": [dict(enc_blk_nums=(1, 2)), dict(enc_blk_nums=(1, 1), middle_blk_num=1, dec_blk_nums=(1, 1))],
}
LOW_RANKS = {
    "dncnn": ((0, 3, 0, 2, 0), (0, 0, 0, 0, 0)),
    "srvggnetcompact": ((0, 3, 4, 2, 2),),
    "rrdbnet": ((0, 3, 0, 2, 5) * 3,),
}
FULL_DNCNN = network("dncnn", dict(num_feat=8, depth=5)).hparams
CASES = [(arch, sizes) for arch, several in SMALLER.items() for sizes in several]


def noise(*shape: int, seed: int = 1) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), shape)


IMAGES = noise(4, 16, 20, 3)


def edited(model: Model, change: Callable[[str, np.ndarray], np.ndarray]) -> Model:
    flat = traverse_util.flatten_dict(model.params, sep=".")
    params = {path: change(path, np.array(leaf)) for path, leaf in flat.items()}
    return Model(model.network, traverse_util.unflatten_dict(params, sep="."))


def lively(arch: str) -> Model:
    """A teacher whose every part counts: at the start of training, RRDBNet's branches are nearly zero, NAFNet's are."""
    model = network(arch, FULL[arch]).init(jax.random.key(0))
    random = np.random.default_rng(0)

    def enliven(path: str, leaf: np.ndarray) -> np.ndarray:
        if path.endswith(("beta", "gamma")):
            return random.uniform(0.3, 1, leaf.shape).astype(np.float32)
        return leaf * (6 if path.startswith("body") and arch == "rrdbnet" else 1)

    return edited(model, enliven)


@pytest.fixture(scope="module")
def teachers() -> dict[str, Model]:
    return {arch: lively(arch) for arch in FULL}


def shrunk(teacher: Model, sizes: dict, images: jax.Array = IMAGES, **options: object) -> Model:
    return fit(teacher, check(teacher, teacher.hparams | sizes), images, **options)


def distance(one: Model, other: Model, images: jax.Array = IMAGES) -> float:
    """RMS of the difference of their outputs."""
    return float(jnp.sqrt(jnp.mean((one(images)[0] - other(images)[0]) ** 2)))


def test_every_architecture_that_can_be_shrunk_is_tried() -> None:
    assert set(FULL) == set(SMALLER) == {name for name, known in MODELS.items() if known.shrink}
    for name, several in SMALLER.items():
        sizes = MODELS[name].shrink.sizes
        assert {size for one in several for size in one} == set(sizes)


@pytest.mark.once
@pytest.mark.parametrize("arch", FULL)
def test_with_everything_kept_it_is_the_teacher_bit_for_bit(teachers: dict[str, Model], arch: str) -> None:
    same = shrunk(teachers[arch], {})
    jax.tree.map(np.testing.assert_array_equal, same.params, jax.tree.map(np.asarray, teachers[arch].params))


@pytest.mark.parametrize("arch", FULL)
def test_the_trace_is_what_the_network_computes(teachers: dict[str, Model], arch: str) -> None:
    teacher = teachers[arch]
    outputs = shrinking.trace(teacher, IMAGES).outputs
    features = teacher(IMAGES)[1]
    lasts = (
        {name.rpartition(".")[0]: name for name in outputs} if arch == "nafnet" else {}
    )  # of a level, the last block
    known = {name: lasts.get(name, name) for name in features if lasts.get(name, name) in outputs}
    if arch == "msrresnet":
        del known["conv_first"]
    assert len(known) >= 3
    for feature, name in known.items():
        np.testing.assert_allclose(outputs[name], features[feature], atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(("arch", "sizes"), CASES)
def test_it_is_nearer_to_the_teacher_than_an_untrained_one_and_generalises(
    teachers: dict[str, Model], arch: str, sizes: dict
) -> None:
    teacher, unseen = teachers[arch], noise(3, 17, 13, 3, seed=2)
    student = shrunk(teacher, sizes)
    assert student.hparams == teacher.hparams | sizes
    nothing = edited(student, lambda path, leaf: leaf * 0)
    assert distance(student, teacher, unseen) < 0.5 * distance(nothing, teacher, unseen)
    random = student.network.init(jax.random.key(3))
    assert distance(student, teacher, unseen) < 0.5 * distance(random, teacher, unseen)


def test_channels_that_do_nothing_are_left_out_without_loss() -> None:
    """Random channels of every inner layer write nothing: the student without them is the same function."""
    for arch in ("dncnn", "srvggnetcompact"):
        dead = np.random.default_rng(1).permutation(8)[:3]

        def kill(path: str, leaf: np.ndarray, dead: np.ndarray = dead) -> np.ndarray:
            if path.endswith(("kernel", "bias")) and leaf.shape[-1] == 8:
                leaf[..., dead] = 0
            return leaf

        whole = edited(lively(arch), kill)
        assert distance(shrunk(whole, {"num_feat": 5}), whole) < 3e-3 * float(jnp.std(whole(IMAGES)[0]))


def test_blocks_that_do_nothing_are_left_out_without_loss() -> None:
    for arch in ("rrdbnet", "edsr", "msrresnet"):
        whole = edited(lively(arch), lambda path, leaf: leaf * 0 if path.startswith("body.1.") else leaf)
        assert distance(shrunk(whole, {"num_block": 2}, blocks={"body": (0, 2)}), whole) < 1e-5
    idle = ("encoders.1.0.beta", "encoders.1.0.gamma", "encoders.1.2.beta", "encoders.1.2.gamma")
    whole = edited(lively("nafnet"), lambda path, leaf: leaf * 0 if path in idle else leaf)
    assert distance(shrunk(whole, {"enc_blk_nums": (1, 1)}), whole) < 1e-5


@pytest.mark.parametrize("arch", ["edsr", "msrresnet"])
def test_channels_that_do_nothing_are_not_missed(arch: str) -> None:
    """Of the stream, within blocks, and through the pixel shuffle, where a channel is one of four."""

    def silence(path: str, leaf: np.ndarray) -> np.ndarray:
        count = leaf.shape[-1] // 8  # 1, or 4 before the shuffle; 0 in the last convolution
        for channel in (2, 5):
            leaf[..., channel * count : (channel + 1) * count] = 0
        return leaf

    whole = edited(lively(arch), silence)
    student = shrunk(whole, {"num_feat": 6})
    assert distance(student, whole) < 1e-3 * float(jnp.std(whole(IMAGES)[0]))
    assert distance(shrunk(whole, {"num_feat": 5}), whole) > 10 * distance(student, whole)


def test_ranks_that_suffice_lose_nothing() -> None:
    """Kernels of rank 3 are found again."""

    def reduce(path: str, leaf: np.ndarray) -> np.ndarray:
        if not path.endswith("kernel") or leaf.shape[-2:] != (8, 8):
            return leaf
        u, s, v = np.linalg.svd(leaf.reshape(-1, 8), full_matrices=False)
        return (u[:, :3] * s[:3] @ v[:3]).reshape(leaf.shape)

    whole = edited(lively("dncnn"), reduce)
    student = shrunk(whole, {"ranks": (0, 3, 3, 3, 0)})
    assert distance(student, whole) < 3e-3 * float(jnp.std(whole(IMAGES)[0] - IMAGES))
    assert student.network.count_macs(16, 16) < 0.7 * whole.network.count_macs(16, 16)


def test_later_layers_make_up_for_earlier_ones(teachers: dict[str, Model]) -> None:
    """Fitting to what the student computes is better than fitting each layer to what the teacher computes."""
    teacher = teachers["dncnn"]
    student = shrunk(teacher, {"ranks": (0, 3, 3, 3, 0)})
    trace = shrinking.trace(teacher, IMAGES)
    alone = {**student.params["model"]}
    for before, layer in (("0", "2"), ("2", "4"), ("4", "6")):
        x = jax.nn.relu(trace.outputs[f"model.{before}"])
        kernel, (mix, bias) = regression.fit_low_rank(x, trace.outputs[f"model.{layer}"], 3, 3)
        alone[layer] = {"0": {"kernel": kernel}, "1": {"kernel": mix, "bias": bias}}
    alone["8"] = teacher.params["model"]["8"]
    assert distance(student, teacher) < 0.95 * distance(Model(student.network, {"model": alone}), teacher)


@pytest.mark.once
@pytest.mark.parametrize("arch", ["rrdbnet", "edsr", "msrresnet"])
def test_the_block_that_does_least_is_dropped_first(arch: str) -> None:
    for least, next_one in ((0, 2), (1, 0), (2, 1)):
        factors = {f"body.{least}.": 1e-3, f"body.{next_one}.": 0.1}
        teacher = edited(
            lively(arch), lambda path, leaf, f=factors: leaf * next((v for k, v in f.items() if path.startswith(k)), 1)
        )
        rest = {0, 1, 2} - {least}
        assert shrinking.choose_blocks(teacher, IMAGES, {"body": 2}) == {"body": tuple(sorted(rest))}
        assert shrinking.choose_blocks(teacher, IMAGES, {"body": 1}) == {"body": tuple(rest - {next_one})}


@pytest.mark.parametrize("arch", ["rrdbnet", "edsr", "msrresnet"])
def test_a_dropped_block_is_made_up_for(teachers: dict[str, Model], arch: str) -> None:
    teacher = teachers[arch]
    student = shrunk(teacher, {"num_block": 2}, blocks={"body": (0, 2)})
    body = {"0": teacher.params["body"]["0"], "1": teacher.params["body"]["2"]}
    assert distance(student, teacher) < 0.8 * distance(Model(student.network, teacher.params | {"body": body}), teacher)


def test_convolutions_are_the_least_squares_ones() -> None:
    x, y = noise(3, 9, 11, 4), noise(3, 9, 11, 5, seed=2)
    kernel, bias = regression.fit(x, y, 3)
    patches = jax.lax.conv_general_dilated_patches(
        x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    a = np.asarray(patches).reshape(-1, 4, 9).transpose(0, 2, 1).reshape(-1, 36)
    a = np.concatenate([a, np.ones((len(a), 1))], 1)
    wanted = np.linalg.lstsq(a, np.asarray(y).reshape(-1, 5), rcond=None)[0]
    np.testing.assert_allclose(kernel.reshape(36, 5), wanted[:-1], atol=2e-3)
    np.testing.assert_allclose(bias, wanted[-1], atol=2e-3)


def test_what_the_inputs_do_not_decide_stays_near_the_prior() -> None:
    x, y = noise(2, 8, 8, 3), noise(2, 8, 8, 2, seed=2)
    x = x.at[..., 2].set(x[..., 1])  # of which only the sum of the two kernels counts
    kernel = np.asarray(noise(3, 3, 3, 2, seed=3))
    prior = regression.Kernel(kernel, np.zeros(2, np.float32))
    fitted = regression.fit(x, y, 3, prior).kernel
    np.testing.assert_allclose(fitted[..., 1, :] - fitted[..., 2, :], kernel[..., 1, :] - kernel[..., 2, :], atol=1e-3)


def test_the_best_channels_predict_the_others() -> None:
    """Of three independent channels and sums of them, a set of three that spans all is chosen."""
    random = np.random.default_rng(0)
    own = random.normal(size=(2, 30, 30, 3))
    mixed = np.concatenate([own[..., :1], own[..., :1] * 1.01, own[..., 1:2] + own[..., 2:], own[..., 1:]], -1)
    chosen = regression.best_channels(jnp.asarray(mixed, jnp.float32), 3)
    rest = np.linalg.lstsq(mixed[..., chosen].reshape(-1, 3), mixed.reshape(-1, 5), rcond=None)[1]
    assert rest.max() < 1e-3


@pytest.mark.parametrize(("arch", "ranks"), [(arch, ranks) for arch, several in LOW_RANKS.items() for ranks in several])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_low_ranks_are_read_back(
    tmp_path: Path, teachers: dict[str, Model], suffix: str, arch: str, ranks: tuple[int, ...]
) -> None:
    """Also with all of them full, as a budget of a short stack may want it."""
    student = shrunk(teachers[arch], {"ranks": ranks})
    save_model(student, tmp_path / f"student{suffix}")
    loaded = load_weights(tmp_path / f"student{suffix}", ranks=ranks).model
    assert loaded.network == student.network
    jax.tree.map(np.testing.assert_array_equal, loaded.params, student.params)


@pytest.mark.once
@pytest.mark.parametrize("arch", LOW_RANKS)
def test_ranks_cost_what_was_asked_for_and_more_where_they_explain_more(arch: str) -> None:
    teacher = network(arch, FULL[arch] | {"num_feat": 16}).init(jax.random.key(0))
    trace = shrinking.trace(teacher, IMAGES)
    full = teacher.network.count_macs(16, 16)
    costs = []
    for part in (0.3, 0.6, 0.9):
        ranks = shrinking.spread_ranks(teacher, trace, teacher.hparams, part)
        costs.append(network(arch, teacher.hparams | {"ranks": ranks}).count_macs(16, 16) / full)
    assert costs == sorted(costs) and costs[0] < costs[1] <= 1
    structure = shrinking.structure_of(teacher)
    last = ranks[-1] if structure.stack else ranks[structure.ranked.index(structure.writer)]
    assert last == 0 and (not structure.stack or ranks[0] == 0)
    idle = edited(teacher, lambda path, leaf: leaf * 0 if path.endswith(("model.4.kernel", "body.4.kernel")) else leaf)
    if structure.stack:  # the layer in which nothing varies gets no more than the least
        ranks = shrinking.spread_ranks(idle, shrinking.trace(idle, IMAGES), teacher.hparams, 0.7)
        assert ranks[2] == 4 < max(rank or 16 for rank in ranks[1:-1])


@pytest.mark.once
def test_a_student_can_have_as_many_ranks_as_layers() -> None:
    check_network_fits(network("dncnn", dict(num_feat=8, depth=20, ranks=(0, *[4] * 18, 0))))
    with pytest.raises(ConfigError, match=r"ranks=.* must be at most 1024"):
        check_network_fits(network("dncnn", dict(num_feat=8, depth=3, ranks=(0, 2000, 0))))


def test_a_shrunk_network_can_be_shrunk_again(teachers: dict[str, Model]) -> None:
    once = shrunk(teachers["dncnn"], {"ranks": (0, 4, 4, 4, 0)})
    same = shrunk(once, {})
    jax.tree.map(np.testing.assert_array_equal, same.params, once.params)
    twice = shrunk(once, {"ranks": (0, 4, 3, 4, 0)})
    assert distance(twice, teachers["dncnn"]) < 0.5 * float(jnp.std(IMAGES - teachers["dncnn"](IMAGES)[0]))


@pytest.mark.once
def test_the_number_of_images_follows_from_their_size() -> None:
    small = network("dncnn", FULL["dncnn"]).init(jax.random.key(0))
    assert num_images(small, 100) == 10 and num_images(small, 1000) == 1
    large = network("rrdbnet", dict(num_block=6)).init(jax.random.key(0))
    assert 1 <= num_images(large, 32) < 80  # what it computes from 97 images would take more than its memory


@pytest.mark.once
@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        ("dncnn", {"num_feat": 9}, "cannot be larger: num_feat=9, the teacher has 8"),
        ("dncnn", {"num_in_ch": 1}, "differ from its teacher in num_feat, depth, ranks only: num_in_ch=1 is not 3"),
        ("dncnn", {"ranks": (1, 2)}, "ranks=.* has 2 numbers; DnCNN of depth 5 needs as many"),
        ("dncnn", {"ranks": (0, 9, 0, 0, 0)}, "rank 9 of a convolution with 8 outputs; it can be at most 8"),
        ("srvggnetcompact", {"ranks": (1, 2)}, "has 2 numbers; SRVGGNetCompact with num_conv=3 needs 5, or none"),
        ("rrdbnet", {"ranks": (1, 2)}, "has 2 numbers; a block of RRDBNet needs 15, or none"),
        ("nafnet", {"enc_blk_nums": (2, 1)}, r"cannot be larger: enc_blk_nums=\(2, 1\), the teacher has \(1, 3\)"),
        ("nafnet", {"enc_blk_nums": (1, 0)}, r"of the 3 blocks of encoders\.1, at least one must stay"),
        ("unet", {}, "unknown architecture to shrink 'unet'"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(arch: str, sizes: dict, message: str) -> None:
    teacher = network(arch, FULL.get(arch)).init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        shrunk(teacher, sizes)


def test_impossible_blocks_are_refused(teachers: dict[str, Model]) -> None:
    for blocks in ((0,), (1, 0), (0, 3), (-1, 2)):
        with pytest.raises(ValueError, match=r"blocks\['body'\]=.* must be 2 different numbers from 0 to 2, ascending"):
            shrunk(teachers["rrdbnet"], {"num_block": 2}, blocks={"body": blocks})


# ---- the program -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Model]) -> Path:
    """model.pth, double.pth (which upscales 2x), and photographs in gt/."""
    folder = tmp_path_factory.mktemp("shrink")
    save_model(teachers["dncnn"], folder / "model.pth")
    double = network("srvggnetcompact", dict(num_feat=8, num_conv=1, upscale=2)).init(jax.random.key(0))
    save_model(double, folder / "double.pth")
    (folder / "gt").mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        write_image(folder / "gt" / f"{i}.png", random.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8))
    return folder


def run(folder: Path, capsys: pytest.CaptureFixture[str], *flags: object, model: str = "model.pth") -> str:
    images = () if {"--data", "--lq"} & {*flags} else ("--data", folder / "gt", "--sigma", 25)
    shrink.main(["--model", str(folder / model), *map(str, images), *map(str, flags)])
    return capsys.readouterr().out


@pytest.mark.once
def test_the_program_takes_sizes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(folder, capsys, "--size", "depth=4", "--size", "num_feat=6", "--output", tmp_path / "out.pth")
    assert load_weights(tmp_path / "out.pth").model.hparams == FULL_DNCNN | {"depth": 4, "num_feat": 6}
    model, student = (line.split() for line in printed.splitlines() if line.startswith(("model", "student")))
    assert model[0] == "model" and student[0] == "student" and " dB to the model" in printed
    assert "num_feat=6 depth=4" in printed.splitlines()[-1]
    parameters = [int(line[1].replace(",", "")) for line in (model, student)]
    assert parameters[1] < parameters[0]


@pytest.mark.once
@pytest.mark.parametrize("budget", [("--macs", 0.5), ("--speedup", 1.2)])
def test_the_program_keeps_a_budget(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    budget: tuple[str, float],
) -> None:
    whole = load_weights(folder / "model.pth").model.network.count_macs(64, 64)  # the same every time, unlike seconds
    monkeypatch.setattr(shrink.Clock, "part", lambda clock, model: model.network.count_macs(64, 64) / whole)
    printed = run(folder, capsys, *budget, "--crops", 3, "--output", tmp_path / "out.pth")
    teacher, student = load_weights(folder / "model.pth").model, load_weights(tmp_path / "out.pth").model
    tried = [line.split() for line in printed.splitlines() if line.startswith("  ") and line.endswith("to the model")]
    assert len(tried) >= 3
    qualities = [float(words[words.index("dB") - 1]) for words in tried]
    assert printed.splitlines()[-1].split(": ")[1].startswith(" ".join(tried[int(np.argmax(qualities))]).split(":")[0])
    part = student.network.count_macs(64, 64) / teacher.network.count_macs(64, 64)
    assert 0.2 < part <= (budget[1] if budget[0] == "--macs" else 1 / budget[1])


@pytest.mark.once
def test_models_that_upscale_take_small_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(
        folder,
        capsys,
        "--lq",
        folder / "gt",
        "--size",
        "num_feat=4",
        "--output",
        tmp_path / "x.pth",
        model="double.pth",
    )
    assert "num_feat=4" in printed and load_weights(tmp_path / "x.pth").model.network.scale == 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (("--size", "num_feat=9", "--output", "x.pth"), "cannot be larger: num_feat=9", 1),
        (("--size", "num_feat=4", "--output", "x.bin"), "cannot write .bin", 1),
        (("--size", "num_feat=4", "--output", "nowhere/x.pth"), "does not exist; create it first", 1),
        (("--macs", "0.001", "--output", "x.pth"), "no dncnn with smaller num_feat, depth, ranks takes 0.001", 1),
        (("--macs", "2", "--output", "x.pth"), "--macs 2 must be between 0 and 1", 2),
        (("--speedup", "1", "--output", "x.pth"), "--speedup 1 must be more than 1", 2),
        (("--macs", "0.5", "--speedup", "2", "--output", "x.pth"), "give one of --speedup, --macs and --size", 2),
        (("--output", "x.pth"), "give one of --speedup, --macs and --size", 2),
        (("--lq", "a", "--sigma", "5", "--macs", "0.5", "--output", "x.pth"), "--data and --sigma go together", 2),
        (("--macs", "0.5", "--crops", "-1", "--output", "x.pth"), "--crops -1 must be 0 or more", 2),
    ],
)
def test_bad_input_is_one_message(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str, code: int
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(folder, capsys, *flags)
    said = capsys.readouterr().err if code == 2 else str(caught.value)
    assert message in said and caught.value.code in (code, f"error: {said.removeprefix('error: ')}")


@pytest.mark.once
def test_one_image_is_too_few(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_image(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(SystemExit, match="at least two images"):
        run(folder, capsys, "--lq", tmp_path, "--macs", "0.5", "--output", tmp_path / "x.pth")
