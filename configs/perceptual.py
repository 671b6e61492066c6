"""Perceptual and style losses (arXiv:1603.08155), with the layers and weights of the guide's YAML. Off by default.

    python -m kdjax.train --config configs/perceptual.py \\
        --config.terms.perceptual.vgg=vgg19.pth --config.terms.perceptual.weight=1.0

Needs torchvision's VGG file. Images look sharper but PSNR falls, which is why `denoise.py` does without these losses.
"""

from denoise import get_config as get_denoise
from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = get_denoise(variant)
    config.name = config.name.replace("denoise", "perceptual")
    layer_weights = dict(conv1_2=0.1, conv2_2=0.1, conv3_4=1.0, conv4_4=1.0, conv5_4=1.0)
    network = dict(vgg="", vgg_type="vgg19", use_input_norm=True, range_norm=False, criterion="l1", target="gt")
    config.terms.perceptual = dict(layer_weights=layer_weights, **network, weight=0.0)  # perceptual_weight
    config.terms.style = dict(layer_weights=layer_weights, **network, weight=0.0)  # style_weight
    return config
