"""Architectures against BasicSR's outputs and parameter counts, and the properties every model must have."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, load_npz

from kdjax import macs
from kdjax.models import count_params, network
from kdjax.models.layers import mish
from kdjax.weights import load_model

TINY = {
    "rrdbnet": dict(scale=1, num_feat=8, num_block=2, num_grow_ch=4),
    "srvggnetcompact": dict(num_feat=8, num_conv=2, upscale=1),
    "dncnn": dict(num_feat=8, depth=4),
    "drunet": dict(num_feat=(4, 6, 8, 10), num_block=1),
    "edsr": dict(num_feat=8, num_block=2, upscale=1),
    "msrresnet": dict(num_feat=8, num_block=2, upscale=1),
    "nafnet": dict(width=4, enc_blk_nums=(1, 1), dec_blk_nums=(1, 1)),
    "unet": dict(num_feat=4, num_level=2, num_conv=1),
    "span": dict(feature_channels=6, upscale=1),
    "rcan": dict(num_feat=8, num_group=2, num_block=2, squeeze_factor=4, upscale=1),
    "mosr": dict(dim=8, n_block=2, upscale=1, kernel_size=3),
    "realplksr": dict(dim=8, n_blocks=2, upscale=1, kernel_size=5),
}
# The same at a half of the height and width.
UNSHUFFLED = {arch: TINY[arch] | {"unshuffle": 2} for arch in ("srvggnetcompact", "dncnn", "edsr")}
REFERENCES = sorted(path.stem for arch in TINY for path in (GOLDEN / "archs").glob(f"{arch}*.npz"))


def load_reference(folder: Path, name: str) -> tuple:
    """The model in a reference file; relu and leakyrelu have the same keys, so the file's name decides."""
    told = {"act_type": name.split("_")[1]} if name.startswith("srvggnetcompact") else {}
    told |= {"res_scale": 0.1} if name.startswith("edsr") else {}
    return load_model(folder / "archs" / f"{name}.pth", **told), load_npz(folder / "archs" / f"{name}.npz")


@pytest.mark.versions
@pytest.mark.parametrize("name", REFERENCES)
def test_output_and_features_equal_the_reference(golden: Path, name: str) -> None:
    model, vectors = load_reference(golden, name)
    x = vectors["x"]
    if model.network.takes_sigma:  # the last channel is its noise level map
        x, vectors["sigma"] = x[..., :-1], 255 * x[0, 0, 0, -1]
    output, features = model(x, vectors.get("sigma"))
    np.testing.assert_allclose(output, vectors["y"], atol=1e-5)
    for key, expected in vectors.items():
        if key.startswith("feat:"):
            np.testing.assert_allclose(features[key.removeprefix("feat:")], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "hparams", "expected"),
    [
        ("RRDBNet", dict(scale=4), 16_697_987),
        ("RRDBNet", dict(scale=2), 16_703_171),
        ("RRDBNet", dict(scale=1), 16_723_907),
        ("RRDBNet", dict(scale=4, num_block=6), 4_467_779),
        ("RRDBNet", dict(scale=1, num_feat=32, num_block=8, num_grow_ch=16), 1_491_715),
        ("SRVGGNetCompact", dict(upscale=1), 595_459),
        ("SRVGGNetCompact", dict(upscale=4, num_conv=32), 1_213_296),
        ("SRVGGNetCompact", dict(upscale=1, num_feat=32, num_conv=8), 76_035),
        ("DnCNN", {}, 668_227),
        ("EDSR", dict(upscale=1), 1_222_147),
        ("EDSR", dict(upscale=1, num_feat=32, num_block=8), 158_979),
        ("MSRResNet", dict(upscale=4), 1_517_571),
        ("SPAN", dict(feature_channels=52), 498_208),  # 498K in the paper
        ("SPAN", dict(upscale=2), 410_700),  # 411K
        ("RCAN", {}, 15_592_355),  # 15.59 M
        ("RealPLKSR", {}, 7_389_680),  # 7.39 M, and 7.37 M below, as spandrel's
        ("RealPLKSR", dict(upscale=2, layer_norm=True), 7_368_908),
    ],
)
def test_parameter_counts_are_the_published_ones(arch: str, hparams: dict, expected: int) -> None:
    assert count_params(network(arch, hparams).abstract_params) == expected


@pytest.mark.parametrize(("width", "millions"), [(32, 29.16), (64, 115.98)])
def test_nafnets_sidd_layout_has_the_published_size(width: int, millions: float) -> None:
    hparams = dict(width=width, enc_blk_nums=(2, 2, 4, 8), middle_blk_num=12, dec_blk_nums=(2, 2, 2, 2))
    assert round(count_params(network("NAFNet", hparams).abstract_params) / 1e6, 2) == millions


def test_macs_are_those_of_the_formula() -> None:
    assert network("dncnn").count_macs(256, 256) == 256 * 256 * 9 * (2 * 3 * 64 + 18 * 64 * 64)
    # All of RRDBNet's trunk runs at a quarter of the side at scale 1: 73.5 GMAC, not the 1,089 of the full size.
    assert network("rrdbnet", dict(scale=1)).count_macs(256, 256) == pytest.approx(73.5e9, rel=1e-3)


@pytest.mark.parametrize("arch", UNSHUFFLED)
def test_unshuffled_networks_are_about_four_times_cheaper(arch: str) -> None:
    wide = {"num_feat": 32}
    macs = [network(arch, hparams[arch] | wide).count_macs(64, 64) for hparams in (TINY, UNSHUFFLED)]
    assert 3 < macs[0] / macs[1] < 4.5
    model = network(arch, UNSHUFFLED[arch]).init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (1, 7, 10, 3))
    output, features = model(x)
    assert output.shape == x.shape and next(iter(features.values())).shape == (1, 4, 5, 8)
    # Pixels come back to where they came from: a shift by the factor shifts the result, away from the borders.
    reach = 18
    x = jax.random.uniform(jax.random.key(2), (1, 2 * reach + 8, 2 * reach + 8, 3))
    inner = slice(reach, -reach)
    shifted = model(jnp.roll(x, 2, 1))[0][:, reach + 2 : -reach + 2, inner]
    np.testing.assert_allclose(shifted, model(x)[0][:, inner, inner], atol=1e-5)


def test_macs_of_a_depthwise_convolution() -> None:
    macs = [network("nafnet", dict(width=8, enc_blk_nums=(n,), dec_blk_nums=(0,))).count_macs(16, 16) for n in (1, 2)]
    # conv1, depthwise conv2, conv3, channel attention, conv4, conv5 of one more block
    assert macs[1] - macs[0] == 256 * (8 * 16 + 9 * 16 + 8 * 8 + 8 * 16 + 8 * 8) + 8 * 8


def test_functions_of_loops_and_conditions_count_what_is_run() -> None:
    x = jnp.ones((4, 4))
    assert macs.count(lambda x: jax.lax.map(lambda y: y @ y, jnp.stack([x] * 5)), x) == 5 * 64
    assert macs.count(lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x), x) == 2 * 64
    assert macs.count(lambda x: (x @ x, x + 1)[1], x) == 0


@pytest.fixture(scope="module", params=TINY)
def tiny(request: pytest.FixtureRequest) -> tuple:
    return request.param, TINY[request.param], network(request.param, TINY[request.param]).init(jax.random.key(0))


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 3)])
def test_any_height_and_width_works(tiny: tuple, size: tuple[int, int]) -> None:
    _, _, model = tiny
    assert model(jnp.ones((2, *size, 3)), 25.0)[0].shape == (2, *size, 3)


def test_padding_to_a_multiple_does_not_change_the_image_it_covers() -> None:
    model = network("rrdbnet", TINY["rrdbnet"]).init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (1, 6, 7, 3))
    padded = jnp.pad(x, ((0, 0), (0, 2), (0, 1), (0, 0)), mode="reflect")
    np.testing.assert_allclose(model(x)[0], model(padded)[0][:, :6, :7], atol=1e-6)


def test_feature_names_are_module_paths() -> None:
    x = jnp.ones((1, 8, 8, 3))
    nets = {arch: network(arch, TINY[arch]) for arch in TINY}
    names = {
        arch: list(jax.eval_shape(net.make_apply(), net.abstract_params, x, 25.0)[1]) for arch, net in nets.items()
    }
    assert names == {
        "rrdbnet": ["body.0", "body.1", "conv_body", "conv_first"],
        "srvggnetcompact": [f"body.{i}" for i in range(7)],
        "dncnn": [f"model.{i}" for i in range(7)],
        "drunet": ["m_body", *(f"m_down{i}" for i in (1, 2, 3)), "m_head", *(f"m_up{i}" for i in (1, 2, 3))],
        "edsr": ["body.0", "body.1", "conv_after_body", "conv_first"],
        "msrresnet": ["body.0", "body.1", "conv_first"],
        "nafnet": ["decoders.0", "decoders.1", "encoders.0", "encoders.1", "intro", "middle_blks"],
        "unet": ["decoder.0", "decoder.1", "encoder.0", "encoder.1", "encoder.2"],
        "span": [*(f"block_{i}" for i in range(1, 7)), "conv_1", "conv_2"],
        "rcan": ["body.0", "body.1", "conv_after_body", "conv_first"],
        "mosr": [*(f"gblocks.{i}" for i in (0, 1, 2, 3, 5, 7)), "shortcut"],
        "realplksr": ["feats.0", "feats.1", "feats.2", "feats.4"],
    }


def test_remat_changes_neither_output_nor_gradient_but_what_is_stored(tiny: tuple) -> None:
    arch, hparams, model = tiny
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3))

    def loss(remat: bool):
        apply = network(arch, hparams).make_apply(remat=remat)
        return lambda params: jnp.sum(jnp.square(apply(params, x, 25.0)[0]))

    (value, grads), (value_remat, grads_remat) = (
        jax.jit(jax.value_and_grad(loss(remat)))(model.params) for remat in (False, True)
    )
    np.testing.assert_allclose(value, value_remat, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_remat), strict=True):
        # Of biases in front of a normalisation, large gradients nearly cancel.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1, float(jnp.abs(a).max())))
    assert "remat" in str(jax.make_jaxpr(loss(True))(model.params))
    assert "remat" not in str(jax.make_jaxpr(loss(False))(model.params))


def test_bfloat16_inside_stays_near_and_comes_out_as_float32(tiny: tuple) -> None:
    arch, hparams, model = tiny
    x = jax.random.uniform(jax.random.key(1), (1, 8, 8, 3))
    output, features = network(arch, hparams).make_apply(dtype=jnp.bfloat16)(model.params, x, 25.0)
    assert output.dtype == jnp.float32
    assert all(feature.dtype == jnp.bfloat16 for feature in features.values())
    exact = model(x, 25.0)[0]
    np.testing.assert_allclose(output, exact, atol=0.03 * max(1.0, float(jnp.abs(exact).max())))


def test_initialisation_is_torchs() -> None:
    params = network("rrdbnet", dict(scale=1, num_block=1)).init(jax.random.key(0)).params
    dense = params["body"]["0"]["rdb1"]["conv4"]  # normal, std 0.1 * sqrt(2 / fan_in), bias 0
    fan_in = 9 * dense["kernel"].shape[2]
    assert np.std(dense["kernel"]) == pytest.approx(0.1 * np.sqrt(2 / fan_in), rel=0.02)
    assert np.max(np.abs(dense["kernel"])) > 3.5 * np.std(dense["kernel"])  # not truncated
    assert not np.any(dense["bias"])
    plain = params["conv_hr"]  # weight and bias uniform within 1/sqrt(fan_in)
    bound = 1 / np.sqrt(9 * 64)
    for leaf in plain.values():
        assert 0.9 * bound < np.max(np.abs(leaf)) <= bound
    assert np.std(plain["kernel"]) == pytest.approx(bound / np.sqrt(3), rel=0.02)


def test_mish_is_the_one_of_jax() -> None:
    x = jnp.concatenate([jnp.linspace(-30, 30, 201), jnp.array([-1e4, 0, 1e4])])
    ours, theirs = (jax.vmap(jax.value_and_grad(f))(x) for f in (mish, jax.nn.mish))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), ours, theirs)


def test_a_plain_stack_starts_with_activations_of_equal_size_and_near_its_input() -> None:
    x = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3))
    output, features = network("dncnn", dict(depth=20)).init(jax.random.key(0))(x)
    assert 0.3 < float(jnp.std(features["model.34"]) / jnp.std(features["model.2"])) < 3
    assert 0.001 < float(jnp.std(output - x) / jnp.std(x)) < 0.3


@pytest.mark.parametrize(
    ("arch", "hparams", "message"),
    [
        ("rrdb", {}, "did you mean 'rrdbnet'"),
        ("rrdbnet", dict(num_feats=3), "did you mean 'num_feat'"),
        ("rrdbnet", dict(num_feat="64"), "is a str, wanted int"),
        ("rrdbnet", dict(num_block=0), "must be positive"),
        ("rrdbnet", dict(scale=3), "scale=3 does not divide"),
        ("srvggnetcompact", dict(act_type="swish"), "relu, prelu, leakyrelu"),
        ("srvggnetcompact", dict(num_out_ch=1), "must be equal"),
        ("dncnn", dict(depth=1), "at least 2"),
        ("edsr", dict(upscale=5), "neither 3 nor a power of 2"),
        ("edsr", dict(res_scale=0.0), "must be positive"),
        ("msrresnet", dict(upscale=8), "1, 2, 3 or 4"),
        ("nafnet", dict(enc_blk_nums=(1, 1)), "as many levels up as down"),
        ("span", dict(num_in_ch=1), "norm=True is for 3 channels"),
        ("rcan", dict(num_feat=8), "squeeze_factor=16 of num_feat=8 channels leaves none"),
        ("rcan", dict(upscale=5), "neither 3 nor a power of 2"),
        ("mosr", dict(upsampler="dys"), "upsampler='dys' is unknown; choose ps or gps"),
        ("mosr", dict(kernel_size=4), "kernel_size=4 must be odd"),
        ("mosr", dict(conv_ratio=2.0), "the kernel would read 128 of 96 channels"),
        ("realplksr", dict(kernel_size=4), "kernel_size=4 must be odd"),
        ("realplksr", dict(dim=6), "dim=6 is no multiple of norm_groups=4"),
        ("realplksr", dict(dim=4, split_ratio=0.1), "split_ratio=0.1 of dim=4 channels has no large kernel"),
        ("nafnet", dict(enc_blk_nums=(1, 0.5)), "whole numbers"),
    ],
)
def test_bad_requests_are_refused(arch: str, hparams: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = network(arch, hparams).abstract_params


@pytest.mark.torch
def test_nafnet_is_the_published_network(tmp_path: Path) -> None:
    """Against the network written in torch after the paper and its published layout, with the same random weights."""
    torch = pytest.importorskip("torch")
    from torch import nn
    from torch.nn import functional

    class Norm(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

        def forward(self, x):
            y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
            return y * self.weight[:, None, None] + self.bias[:, None, None]

    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.conv1, self.conv3 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
            self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
            self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
            self.conv4, self.conv5 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
            self.norm1, self.norm2 = Norm(c), Norm(c)
            self.beta, self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1)), nn.Parameter(torch.zeros(1, c, 1, 1))

        def forward(self, x):
            a, b = self.conv2(self.conv1(self.norm1(x))).chunk(2, 1)
            y = a * b
            x = x + self.conv3(y * self.sca(y)) * self.beta
            a, b = self.conv4(self.norm2(x)).chunk(2, 1)
            return x + self.conv5(a * b) * self.gamma

    class Net(nn.Module):
        def __init__(self, width: int, middle: int, enc: tuple, dec: tuple) -> None:
            super().__init__()
            c, stage = width, lambda c, n: nn.Sequential(*(Block(c) for _ in range(n)))
            self.intro, self.ending = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 3, 3, padding=1)
            self.encoders, self.downs, self.ups, self.decoders = (nn.ModuleList() for _ in range(4))
            for n in enc:
                self.encoders.append(stage(c, n))
                self.downs.append(nn.Conv2d(c, 2 * c, 2, 2))
                c *= 2
            self.middle_blks = stage(c, middle)
            for n in dec:
                self.ups.append(nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)))
                c //= 2
                self.decoders.append(stage(c, n))

        def forward(self, image):
            h, w = image.shape[2:]
            multiple = 2 ** len(self.downs)
            padded = functional.pad(image, (0, -w % multiple, 0, -h % multiple))
            x, skips = self.intro(padded), []
            for encoder, down in zip(self.encoders, self.downs, strict=True):
                x = encoder(x)
                skips.append(x)
                x = down(x)
            x = self.middle_blks(x)
            for up, decoder in zip(self.ups, self.decoders, strict=True):
                x = decoder(up(x) + skips.pop())
            return (self.ending(x) + padded)[..., :h, :w]

    torch.manual_seed(0)
    net = Net(6, 2, (1, 2), (2, 1))
    with torch.no_grad():
        for parameter in net.parameters():  # beta and gamma start at 0, and would hide the blocks
            parameter.copy_(0.3 * torch.randn_like(parameter))
        x = torch.rand(2, 3, 10, 13)
        expected = net(x).permute(0, 2, 3, 1).numpy()
    torch.save({"params": net.state_dict()}, tmp_path / "nafnet.pth")
    model = load_model(tmp_path / "nafnet.pth")
    assert model.arch == "nafnet" and model.hparams["enc_blk_nums"] == (1, 2) and model.hparams["middle_blk_num"] == 2
    np.testing.assert_allclose(model(x.permute(0, 2, 3, 1).numpy())[0], expected, atol=2e-5)
