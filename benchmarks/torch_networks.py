"""The benchmarks' networks in PyTorch, written as in BasicSR, with its weight names."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import interpolate, leaky_relu, pixel_unshuffle


class DenseBlock(nn.Module):
    def __init__(self, feat: int, grow: int) -> None:
        super().__init__()
        for i in range(5):
            self.add_module(f"conv{i + 1}", nn.Conv2d(feat + i * grow, grow if i < 4 else feat, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            parts.append(leaky_relu(conv(torch.cat(parts, 1)), 0.2, inplace=True))
        return x + 0.2 * self.conv5(torch.cat(parts, 1))


class RRDB(nn.Module):
    def __init__(self, feat: int, grow: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(feat, grow) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """RRDBNet at scale 1: the body works on 48 input channels at a quarter of height and width."""

    def __init__(self, feat: int, blocks: int, grow: int) -> None:
        super().__init__()
        self.conv_first, self.conv_last = nn.Conv2d(48, feat, 3, padding=1), nn.Conv2d(feat, 3, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(feat, grow) for _ in range(blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(feat, feat, 3, padding=1) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_first(pixel_unshuffle(x, 4))
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = leaky_relu(conv(interpolate(x, scale_factor=2, mode="nearest")), 0.2, inplace=True)
        return self.conv_last(leaky_relu(self.conv_hr(x), 0.2, inplace=True))


class Compact(nn.Module):
    """SRVGGNetCompact at scale 1."""

    def __init__(self, feat: int, convs: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, feat, 3, padding=1), nn.PReLU(feat)]
        for _ in range(convs):
            layers += [nn.Conv2d(feat, feat, 3, padding=1), nn.PReLU(feat)]
        self.body = nn.Sequential(*layers, nn.Conv2d(feat, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)
