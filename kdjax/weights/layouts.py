"""Recognises a state dict's network by its keys: the layout in `kdjax.models` that knows most of them wins."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from kdjax.models import MODELS, Architecture
from kdjax.models.reading import Layout, WeightsError, listed
from kdjax.weights.tensors import Tensor

# Networks kdjax does not have, by keys that only they have: name, patterns that must all occur.
UNSUPPORTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a discriminator (net_d instead of net_g?)", (r"conv0\.weight", r"conv1\.weight_orig")),
    ("a discriminator (net_d instead of net_g?)", (r"conv0_0\.weight", r"linear1\.weight")),
    ("HAT", (r"layers\.0\.residual_group\.blocks\.0\.conv_block\..*",)),
    ("SwinIR", (r"layers\.0\.residual_group\.blocks\.0\.norm1\.weight",)),
    ("Restormer", (r"patch_embed\.proj\.weight", r"encoder_level1\.0\..*")),
    ("SCUNet", (r"m_head\.0\.weight", r"m_tail\.0\.weight")),
    ("MPRNet", (r"shallow_feat1\.0\.weight",)),
    ("Uformer", (r"input_proj\.proj\.0\.weight",)),
    ("RealCUGAN", (r"unet1\.conv1\.conv\.0\.weight",)),
    ("MDSR, which has one network for several scales", (r"pre_process\.0\.0\.body\.0\.weight", r"head\.0\.weight")),
    ("RealPLKSR with DySample", (r"feats\.1\.lk\.conv\.weight", r"to_img\.offset\.weight")),
    ("MoSR with DySample", (r"gblocks\.1\.fc1\.weight", r"upsampler\.offset\.weight")),
    ("PLKSR, the one that is not RealPLKSR", (r"feats\.1\.channe_mixer\.0\.weight",)),
    ("RCAN with an un-shuffled input", (r"head\.1\.weight", r"body\.0\.body\.0\.body\.3\.conv_du\.0\.weight")),
    ("SRResNet of the first ESRGAN (MSRResNet0 of KAIR)", (r"model\.1\.sub\.0\.res\.0\.weight",)),
    ("a network with weight normalisation", (r".*\.(weight_g|parametrizations\.weight\.original0)",)),
)


@dataclass(frozen=True)
class Fit:
    """How a layout names a file's tensors.

    Attributes:
      renamed: our name -> the file's key.
      constants: keys of tensors that are not parameters of ours.
      unused: keys the layout does not know.
    """

    architecture: Architecture
    layout: Layout
    renamed: dict[str, str]
    constants: list[str]
    unused: list[str]

    @property
    def part(self) -> float:
        """The fraction of the keys that the layout knows."""
        known = len(self.renamed) + len(self.constants)
        return known / max(1, known + len(self.unused))


def best_layout(keys: Iterable[str], architecture: Architecture | None) -> Fit:
    """Returns the layout that knows the most keys, of one architecture or of all.

    Raises:
      WeightsError: no layout knows any key, or the network is recognised but not supported.
    """
    keys = list(keys)
    among = MODELS.values() if architecture is None else [architecture]
    fits = [_fit(known, layout, keys) for known in among for layout in _layouts(known, keys)]
    best = max(fits, key=lambda fit: fit.part)  # the first of equals
    if architecture is None and best.part < 1:
        _refuse_unsupported(keys)
    if not best.renamed:
        raise WeightsError(
            f"its keys ({listed(keys, 5)}) fit no supported architecture"
            f"{'' if architecture is None else ' ' + architecture.name} (supported: {', '.join(MODELS)})"
        )
    return best


def known_part(state: Mapping[str, Tensor]) -> float:
    """Estimates the fraction of the keys, from 0 to 1, that the best layout knows.

    It samples about two hundred keys, so that repeated calls are cheap.
    """
    keys = list(state)
    some = keys[:: -(-len(keys) // 200) or 1]
    parts = []
    for architecture in MODELS.values():
        files = architecture.files
        own = [key for key in some if not (files and files.is_extra(key))]
        parts += [_fit(architecture, layout, own).part for layout in _layouts(architecture, keys)]
    return max(parts)


def is_constant(key: str) -> bool:
    """Whether a layout that does not depend on the file knows a tensor as one that is never trained."""
    return any(layout.is_constant(key) for known in MODELS.values() if known.files for layout in known.files.layouts)


def _layouts(architecture: Architecture, keys: Collection[str]) -> tuple[Layout, ...]:
    files = architecture.files
    return () if files is None else (*files.layouts, *files.layouts_of(keys))


def _fit(architecture: Architecture, layout: Layout, keys: list[str]) -> Fit:
    fit = Fit(architecture, layout, {}, [], [])
    for key in keys:
        if layout.is_constant(key):
            fit.constants.append(key)
        elif (name := layout.rename(key)) is None or name in fit.renamed:
            fit.unused.append(key)
        else:
            fit.renamed[name] = key
    return fit


def _refuse_unsupported(keys: Iterable[str]) -> None:
    """Raises a WeightsError that names the network, if its keys are recognised but it is not supported."""
    for name, patterns in UNSUPPORTED:
        if all(any(re.fullmatch(pattern, key) for key in keys) for pattern in patterns):
            raise WeightsError(
                f"it looks like {name}, which is not supported (supported: {', '.join(MODELS)}); what spandrel reads"
                " can still be a teacher, with config.teacher.backend='spandrel' (docs/cached_teacher.md)"
            )
