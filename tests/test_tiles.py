"""Tiles against the whole image, the stream of bands, and what `restore_image` makes of arrays of all kinds."""

import functools
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import models, tiles
from kdjax.models import Model
from kdjax.models.ensemble import self_ensemble
from kdjax.tiles import Restorer, restore_image
from kdjax.weights import save_model

DNCNN = ("dncnn", dict(num_feat=4, depth=3))
GREY = ("dncnn", dict(num_in_ch=1, num_feat=4, depth=3))
TWICE = ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2))
# A network and how far an output pixel sees, in input pixels.
NETWORKS = {
    "dncnn": (*DNCNN, 3),
    "grey": (*GREY, 3),
    "unshuffled": ("dncnn", dict(num_feat=4, depth=2, unshuffle=3), 8),
    "x2": (*TWICE, 3),
    "x3": ("edsr", dict(num_feat=4, num_block=1, upscale=3), 6),
    "x4": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=4), 3),
    "unshuffled x2": ("srvggnetcompact", dict(num_feat=4, num_conv=1, upscale=2, unshuffle=2), 7),
    "unet": ("unet", dict(num_feat=4, num_level=2, num_conv=1), 16),
}

# Networks that only say what they saw.
OWN = """
import jax.numpy as jnp
from flax import linen, nnx

class Mean(nnx.Module):
    "The mean of the whole input, everywhere."
    def __init__(self, *, rngs): self.gain = nnx.Param(jnp.ones(()))
    def __call__(self, x): return self.gain[...] * jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), {}

class Blocks(linen.Module):
    "The mean of every 5x5 block; the last ones are filled with zeros."
    mode: str = "constant"
    multiple = 5
    @property
    def pad_mode(self): return self.mode
    @linen.compact
    def __call__(self, x):
        b, h, w, c = x.shape
        padded = jnp.pad(x, ((0, 0), (0, -h % 5), (0, -w % 5), (0, 0)), mode=self.mode)
        means = padded.reshape(b, padded.shape[1] // 5, 5, -1, 5, c).mean((2, 4))
        gain = self.param("gain", lambda key: jnp.ones(()))
        return gain * means.repeat(5, 1).repeat(5, 2)[:, :h, :w], {}

class Double(nnx.Module):
    "Enlarges, and does not say so."
    def __init__(self, *, rngs): self.gain = nnx.Param(jnp.ones(()))
    def __call__(self, x): return self.gain[...] * x.repeat(2, 1).repeat(2, 2), {}

class Half(Mean):
    multiple = 2.5

class Wrap(Mean):
    pad_mode = "wrap"
"""


@functools.cache
def network(arch: str, **hparams: object) -> Model:
    """A network with random weights, from NumPy, since initialising one compiles its layers one by one."""
    net = models.network(arch, hparams)
    random = np.random.default_rng(0)

    def fill(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        bound = np.sqrt(3 / np.prod(leaf.shape[:-1])) if leaf.ndim == 4 else 0.1
        return random.uniform(-bound, bound, leaf.shape).astype(np.float32)

    return Model(net, jax.tree.map(fill, net.abstract_params))


@functools.cache
def own_network(name: str, **hparams: object) -> Model:
    return models.network(f"nets_for_tiles:{name}", hparams).init(jax.random.key(0))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, np.float32)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_for_tiles.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", NETWORKS)
def test_tiles_equal_the_whole_image_where_the_context_is_large_enough(name: str) -> None:
    arch, hparams, reach = NETWORKS[name]
    model = network(arch, **hparams)
    restorer = Restorer(model, tile=24, tile_pad=reach)
    for height, width in ((77, 95), (11, 83)):  # divided both ways, one way
        image = noise(height, width, model.network.channels)
        whole = np.asarray(model(image[None])[0][0])
        output = restorer(image)
        assert output.dtype == np.float32 and output.shape == whole.shape
        assert output.shape[0] == height * restorer.scale
        np.testing.assert_allclose(output, whole, atol=2e-6)


def test_what_fits_into_one_tile_is_not_divided() -> None:
    model, image = network("unet", num_feat=4, num_level=2, num_conv=1), noise(21, 26, 3)
    whole = model(image[None])[0][0]
    for tile in (0, 24):  # 21 and 26 pixels fit into the square of 24 + 2 x 4
        np.testing.assert_allclose(Restorer(model, tile=tile, tile_pad=1)(image), whole, atol=1e-6)


def test_one_pixel_less_of_context_shows() -> None:
    model, image = network(DNCNN[0], **DNCNN[1]), noise(70, 70, 3)
    whole = model(image[None])[0][0]
    errors = [np.abs(Restorer(model, tile=24, tile_pad=pad)(image) - whole).max() for pad in (2, 3)]
    assert errors[0] > 1e-5 and errors[1] < 2e-6


@pytest.mark.usefixtures("own")
def test_neighbouring_tiles_fade_into_each_other() -> None:
    mean = own_network("Mean")
    ramp = np.broadcast_to(np.linspace(0, 1, 112, dtype=np.float32)[None, :, None], (20, 112, 3))
    line = Restorer(mean, tile=32, tile_pad=4)(ramp)[0, :, 0]
    steps = np.diff(line)
    assert steps.min() > -1e-6  # each tile is a plateau, higher than the one before
    # Windows begin 24 pixels after one another, so their means are 24/111 apart: nine steps over eight pixels.
    np.testing.assert_allclose(steps[steps > 1e-5], 24 / 111 / 9, rtol=1e-3)
    assert (steps > 1e-5).sum() == 3 * 9
    np.testing.assert_allclose(Restorer(mean, tile=32, tile_pad=4)(np.ones((90, 90, 3), np.float32)), 1, atol=1e-6)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_tiles_keep_to_the_multiple_and_the_padding_of_a_network(mode: str) -> None:
    model = own_network("Blocks", mode=mode)
    assert (model.network.multiple, model.network.pad_mode) == (5, mode)
    image = noise(83, 58, 3)
    for tile, tile_pad in ((20, 0), (21, 1), (5, 5)):
        np.testing.assert_allclose(
            Restorer(model, tile=tile, tile_pad=tile_pad)(image), model(image[None])[0][0], atol=1e-6
        )


def test_every_architecture_says_what_it_pads_to() -> None:
    said = {
        ("rrdbnet", 1): 4, ("rrdbnet", 2): 2, ("rrdbnet", 4): 1, ("msrresnet", 4): 1, ("unet", 1): 8, ("nafnet", 1): 16,
    }  # fmt: skip
    names = {"rrdbnet": "scale", "msrresnet": "upscale"}
    small = {"rrdbnet": dict(num_feat=4, num_block=1), "msrresnet": dict(num_feat=4, num_block=1)}
    small |= {"unet": dict(num_feat=2), "nafnet": dict(width=2, enc_blk_nums=(1, 1, 1, 1))}
    for (arch, scale), multiple in said.items():
        hparams = small[arch] | ({names[arch]: scale} if arch in names else {})
        model = Model(models.network(arch, hparams), {})
        assert model.network.multiple == multiple, (arch, scale)
        assert model.network.pad_mode == ("constant" if arch == "nafnet" else "reflect")
    for arch in ("dncnn", "edsr", "srvggnetcompact"):
        assert models.network(arch, dict(num_feat=4, unshuffle=3)).multiple == 3


def test_bands_are_the_image_from_top_to_bottom() -> None:
    model, image = network(TWICE[0], **TWICE[1]), noise(101, 60, 3)
    restorer = Restorer(model, tile=24, tile_pad=3)
    told, tops, parts = [], [], []
    for top, rows in restorer.bands(image, progress=lambda *counts: told.append(counts)):
        tops.append(top)
        parts.append(rows)
    assert tops == [0, *np.cumsum([len(rows) for rows in parts])[:-1]] and len(parts) > 4
    assert all(len(rows) <= 2 * 30 for rows in parts)
    np.testing.assert_array_equal(np.concatenate(parts), restorer(image))
    assert told == sorted(told) and {total for _, total in told} == {18} and told[-1][0] == told[-1][1]
    assert len(told) == 5  # batches of four, the last of which is half empty


def test_a_stream_holds_a_band_of_the_image_only(tmp_path: Path) -> None:
    shape = (3000, 2000, 3)
    image = np.memmap(tmp_path / "large.raw", np.uint8, "w+", shape=shape)
    image[::7] = 200
    restorer = Restorer(network("dncnn", num_feat=2, depth=2), tile=256, tile_pad=2)
    restorer(image[:300, :300])  # compiling takes memory of its own
    height, on_devices = 0, 0
    tracemalloc.start()
    try:
        for _, rows in restorer.bands(image):
            height += len(rows)
            on_devices = max(on_devices, sum(array.nbytes for array in jax.live_arrays()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert height == shape[0]
    band = 260 * 2000 * 3 * 4
    assert peak < 4.5 * band, peak / band  # the whole output would be 11.5 bands
    assert on_devices < 3 * band


@pytest.mark.parametrize("tiles_per_device", [1, 3])
def test_one_device_and_four_give_the_same(tiles_per_device: int) -> None:
    model, image = network(DNCNN[0], **DNCNN[1]), noise(75, 90, 3)
    assert len(jax.local_devices()) == 4
    one = Restorer(model, tile=24, tile_pad=4, devices=jax.local_devices()[2:3])(image)
    four = Restorer(model, tile=24, tile_pad=4, tiles_per_device=tiles_per_device)
    np.testing.assert_allclose(four(image), one, atol=1e-6)
    np.testing.assert_array_equal(four(image[:20, :20]), Restorer(model)(image[:20, :20]))


def test_x8_is_the_self_ensemble_of_teachers() -> None:
    arch, hparams = TWICE
    model, image = network(arch, **hparams), noise(50, 41, 3)
    whole = self_ensemble(model.network.make_apply())(model.params, jnp.asarray(image[None]))[0][0]
    np.testing.assert_allclose(Restorer(model, tile=0, x8=True)(image), whole, atol=1e-6)
    np.testing.assert_allclose(Restorer(model, tile=16, tile_pad=4, x8=True)(image), whole, atol=2e-6)
    assert np.abs(Restorer(model, tile=0)(image) - whole).max() > 1e-4


def test_lower_precision_comes_back_as_float32() -> None:
    model, image = network(DNCNN[0], **DNCNN[1]), noise(20, 20, 3)
    output = Restorer(model, dtype=jnp.bfloat16)(image)
    assert output.dtype == np.float32
    difference = np.abs(output - Restorer(model)(image)).max()
    assert 1e-5 < difference < 0.05


def test_integers_are_scaled_to_the_unit_interval() -> None:
    restorer = Restorer(network(GREY[0], **GREY[1]), tile=16, tile_pad=3)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 1), np.uint8)
    expected = restorer(np.float32(image) / 255)
    deep = image.astype(np.uint16) * 257
    for same in (image, deep, deep.astype(">u2"), image / 255):
        np.testing.assert_allclose(restorer(same), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("model", [DNCNN, GREY, TWICE], ids=["RGB", "grey", "x2"])
@pytest.mark.parametrize("shape", [(14, 11), (14, 11, 1), (14, 11, 2), (14, 11, 3), (14, 11, 4)])
def test_restore_image_gives_back_what_it_was_given(model: tuple, dtype: type, shape: tuple[int, ...]) -> None:
    model = network(model[0], **model[1])
    image = noise(*shape)
    largest = 1 if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max
    given = (image * largest).astype(dtype)
    restored = restore_image(model, given)
    scale = model.network.scale
    assert restored.dtype == dtype and restored.shape == (14 * scale, 11 * scale, *shape[2:])
    # Each by hand, from floats.
    planes = np.float32(given.reshape(14, 11, -1) / largest)
    alpha = shape[2:] in ((2,), (4,))
    colours = planes[..., : planes.shape[2] - alpha]
    run = lambda x: np.asarray(model(x[None])[0][0])  # noqa: E731
    if model.network.channels == 1:
        expected = np.concatenate([run(colours[..., i : i + 1]) for i in range(colours.shape[2])], 2)
    elif colours.shape[2] == 1:
        expected = run(colours.repeat(3, 2)).mean(2, keepdims=True)
    else:
        expected = run(colours)
    if largest > 1:
        expected = np.clip(expected, 0, 1)
    there = (restored / largest).reshape(*restored.shape[:2], -1)
    np.testing.assert_allclose(there[..., : expected.shape[2]], expected, atol=0.51 / largest if largest > 1 else 1e-6)
    if alpha and scale == 1:
        np.testing.assert_allclose(there[..., -1], planes[..., -1], atol=1e-6)
    elif alpha:
        # Bilinear: between the centres of four pixels, a quarter of the way from the first.
        near = np.array([0.75, 0.25])
        between = near @ planes[3:5, 4:6, -1] @ near
        np.testing.assert_allclose(there[7, 9, -1], between, atol=0.51 / largest if largest > 1 else 1e-6)


def test_restore_image_does_not_clip_floats() -> None:
    model, image = network(DNCNN[0], **DNCNN[1]), noise(20, 20, 3) * 2 - 0.5
    restored = restore_image(model, image)
    np.testing.assert_array_equal(restored, Restorer(model)(image))
    assert restored.min() < 0 and restored.max() > 1


def test_restore_image_takes_a_file_and_tells_its_progress(tmp_path: Path) -> None:
    model, image = network(GREY[0], **GREY[1]), np.uint8(noise(50, 40, 3) * 255)
    save_model(model, tmp_path / "model.safetensors")
    told = []
    restored = restore_image(
        tmp_path / "model.safetensors", image, tile=16, tile_pad=3, progress=lambda *counts: told.append(counts)
    )
    np.testing.assert_array_equal(restored, restore_image(model, image, tile=0))
    assert told == sorted(told) and told[-1] == (60, 60) and {total for _, total in told} == {3 * 5 * 4}


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros(5, np.uint8), r"has the shape \(5,\); wanted \(h, w\)"),
        (np.zeros((4, 4, 5), np.uint8), "with c from 1 to 4"),
        (np.zeros((0, 4, 3), np.uint8), r"has the shape \(0, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int32), "is int32; wanted uint8, uint16, or float"),
        (np.zeros((4, 4, 3), bool), "is bool; wanted"),
        (np.full((4, 4, 3), 200.0), r"values up to 200; wanted \[0, 1\]: scale it"),
        (np.where(np.arange(16).reshape(4, 4) == 6, np.nan, 0), "nan or inf at row 1, column 2"),
    ],
)
def test_bad_images_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore_image(network(DNCNN[0], **DNCNN[1]), image)


def test_a_model_that_overflows_is_told() -> None:
    model = network(DNCNN[0], **DNCNN[1])
    huge = Model(model.network, jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), model.params))
    with pytest.raises(ValueError, match="the model returns nan or inf for this image"):
        restore_image(huge, noise(8, 8, 3))


def test_a_restorer_takes_the_channels_of_its_model() -> None:
    restorer = Restorer(network(DNCNN[0], **DNCNN[1]), tile=16, tile_pad=3)
    for shape in ((8, 8), (8, 8, 1), (8, 8, 4), (8, 0, 3)):
        with pytest.raises(ValueError, match=r"this model takes \(height, width, 3\)"):
            restorer.bands(np.zeros(shape, np.uint8))  # before the first band is asked for
    image = noise(60, 60, 3)
    image[41, 50, 1] = np.inf
    with pytest.raises(ValueError, match="row 41, column 50"):
        list(restorer.bands(image))
    four = network("dncnn", num_in_ch=4, num_feat=2, depth=2)
    assert Restorer(four)(np.zeros((8, 8, 4), np.uint8)).shape == (8, 8, 4)
    with pytest.raises(ValueError, match="has 3 colours, but the model takes 4 channels"):
        restore_image(four, np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tile=-1), "tile=-1 must be a whole number of at least 0"),
        (dict(tile=25.6), "tile=25.6 must be a whole number"),
        (dict(tile_pad=-2), "tile_pad=-2 must be"),
        (dict(tiles_per_device=0), "tiles_per_device=0 must be a whole number of at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Restorer(network(DNCNN[0], **DNCNN[1]), **options)


@pytest.mark.usefixtures("own")
def test_bad_networks_of_the_users_are_refused() -> None:
    with pytest.raises(ValueError, match="returned 16x16 for 8x8 pixels, wanted 1x; is the network"):
        Restorer(own_network("Double"))(noise(8, 8, 3))
    for name, message in (
        ("Half", "multiple=2.5 must be a positive whole number"),
        ("Wrap", "pad_mode='wrap' must be"),
    ):
        with pytest.raises(ValueError, match=f"nets_for_tiles:{name}: its attribute {message}"):
            Restorer(own_network(name))


def test_restorers_of_one_network_compile_once() -> None:
    arch, hparams = DNCNN
    first = network(arch, **hparams)
    second = Model(first.network, jax.tree.map(lambda leaf: 2 * leaf, first.params))
    image = noise(19, 23, 3)
    Restorer(first)(image)
    step = tiles._compiled_step(first.network, False, jnp.dtype(jnp.float32))
    compiled = step._cache_size()
    Restorer(second)(image)
    assert compiled > 0 and step._cache_size() == compiled
