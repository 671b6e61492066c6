"""Makes reference files of architectures with spandrel's PyTorch networks: tests/golden/archs/NAME.pth and NAME.npz.

    pip install torch spandrel
    python tests/make_golden.py

Weights are random, of a size at which every branch counts and rounding errors do not grow. NAME.npz has an image `x`
and the network's output `y`, (1, h, w, c). The last channel of DRUNet's `x` is its noise level map.
"""

from pathlib import Path

import numpy as np
import torch
from spandrel.architectures.DRUNet.__arch.network_unet import DRUNet
from spandrel.architectures.MoSR.__arch.mosr_arch import MoSR
from spandrel.architectures.PLKSR.__arch.RealPLKSR import RealPLKSR
from spandrel.architectures.RCAN.__arch.rcan_arch import RCAN
from spandrel.architectures.SPAN.__arch.span import SPAN

FOLDER = Path(__file__).parent / "golden" / "archs"


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in net.named_parameters():
        if "_mean." in name:  # RCAN's shifts of colours
            continue
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 400
        parameter.data = 0.7 * torch.randn_like(parameter) / fan_in**0.5
    return net.eval()


def write(
    name: str, net: torch.nn.Module, state: dict[str, torch.Tensor], size: tuple[int, int], sigma: float | None = None
) -> None:
    image = torch.rand(1, 3, *size)
    if sigma is not None:
        image = torch.cat([image, torch.full((1, 1, *size), sigma / 255)], 1)
    with torch.no_grad():
        output = net(image.clone())  # spandrel's RCAN changes its input
    arrays = {key: value.numpy().transpose(0, 2, 3, 1) for key, value in (("x", image), ("y", output))}
    print(f"{name}: {sum(value.numel() for value in state.values()):,} numbers, outputs to {output.abs().max():.2f}")
    torch.save(state, FOLDER / f"{name}.pth")
    np.savez(FOLDER / f"{name}.npz", **arrays)


def span() -> None:
    """As trained, normalised; and folded, with the mark of one that is not."""
    torch.manual_seed(0)
    net = randomised(SPAN(num_in_ch=3, num_out_ch=3, feature_channels=6, upscale=2))
    net.upsampler[0].weight.data /= 100  # its input is 255 times as large as the image
    write("span_x2", net, net.state_dict(), (17, 23))
    net = randomised(SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=1, norm=False))
    net(torch.rand(1, 3, 8, 8))  # folds
    folded = {key: value for key, value in net.state_dict().items() if ".sk." not in key and ".conv." not in key}
    write("span_folded_x1", net, folded, (16, 20))


def realplksr() -> None:
    """Normalised by groups, and by pixels."""
    torch.manual_seed(0)
    net = randomised(RealPLKSR(dim=12, n_blocks=2, upscaling_factor=2, kernel_size=7))
    write("realplksr_x2", net, net.state_dict(), (17, 23))
    net = randomised(RealPLKSR(dim=8, n_blocks=2, upscaling_factor=1, kernel_size=5, use_ea=False, layer_norm=True))
    write("realplksr_layers_x1", net, net.state_dict(), (16, 20))


def mosr() -> None:
    """Enlarged by a pixel shuffle, and by the mean of eight."""
    torch.manual_seed(0)
    net = randomised(MoSR(dim=8, n_block=2, upscale=2, kernel_size=5, conv_ratio=0.5))
    write("mosr_x2", net, net.state_dict(), (17, 23))
    net = randomised(MoSR(dim=6, n_block=1, upscale=3, upsampler="gps"))
    write("mosr_gps_x3", net, net.state_dict(), (16, 20))


def rcan() -> None:
    """In the authors' layout: normalised, and not."""
    torch.manual_seed(0)
    net = randomised(RCAN(scale=2, n_resgroups=2, n_resblocks=2, n_feats=8, reduction=4))
    write("rcan_x2", net, net.state_dict(), (17, 23))
    net = randomised(RCAN(scale=3, n_resgroups=1, n_resblocks=2, n_feats=8, reduction=2, norm=False))
    write("rcan_x3", net, net.state_dict(), (16, 20))


def drunet() -> None:
    torch.manual_seed(0)
    net = randomised(DRUNet(in_nc=4, out_nc=3, nc=[4, 6, 8, 10], nb=2))
    write("drunet_color", net, net.state_dict(), (16, 24), sigma=30.0)


if __name__ == "__main__":
    drunet()
    span()
    realplksr()
    rcan()
    mosr()
