"""NIQE's pristine model: read from BasicSR's file, or fitted to a folder of clean photographs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from kdjax import assets, data
from kdjax.metrics import niqe


def load(path: str) -> tuple[niqe.Pristine, str]:
    """Loads the model; returns it with a description of its origin.

    Args:
      path: BasicSR's `niqe_pris_params.npz`, a folder of clean photographs, or "embedded".

    Raises:
      ValueError, OSError: if it cannot be read, or no photograph in the folder is sharp and large enough.
    """
    found = Path(assets.locate(path, assets.TRAIN_PHOTOGRAPHS))
    if found.suffix == ".npz":
        return _read(found), f"{found}, sha256 {hashlib.sha256(found.read_bytes()).hexdigest()}"
    return _fit(found), f"fitted to the photographs in {path}"


def _fit(folder: Path) -> niqe.Pristine:
    clean = data.find_pairs(gt=str(folder), what="clean")
    try:
        return niqe.fit(data.read_image(pair.gt) for pair in clean)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _read(path: Path) -> niqe.Pristine:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays["mu_pris_param"].reshape(-1), arrays["cov_pris_param"]
    except (KeyError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a file with mu_pris_param and cov_pris_param: {error}") from None
    if mean.shape != (niqe.NUM_FEATURES,) or covariance.shape != 2 * mean.shape:
        raise ValueError(f"{path}: mean {mean.shape} and covariance {covariance.shape}; wanted (36,) and (36, 36)")
    return niqe.Pristine(mean.astype(np.float64), covariance.astype(np.float64))
