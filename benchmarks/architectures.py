"""Compares the time of a forward pass with that of spandrel's PyTorch network, which has the same weights:

    pip install -e . torch spandrel
    python benchmarks/architectures.py [--size 256] [--repeats 7] [--names SPAN RCAN] [--output FILE]

One image in float32, all cores, no torch.compile. kdjax writes random weights, spandrel reads them, and the outputs
have to agree to 1e-4 of the largest before the two take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
import spandrel
import torch

from kdjax import cost, models, sharding
from kdjax.files import whole_file
from kdjax.weights import save_model

NETWORKS = {
    "RRDBNet": ("rrdbnet", dict(num_block=6)),
    "SRVGGNetCompact": ("srvggnetcompact", {}),
    "DnCNN": ("dncnn", {}),
    "NAFNet": ("nafnet", dict(width=32, enc_blk_nums=(2, 2, 4, 8), middle_blk_num=12, dec_blk_nums=(2, 2, 2, 2))),
    "RCAN": ("rcan", dict(upscale=2)),
    "SPAN": ("span", {}),
    "RealPLKSR": ("realplksr", {}),
    "MoSR": ("mosr", {}),
}


def random_model(arch: str, hparams: dict) -> models.Model:
    """A model whose every part counts: at the start of training, NAFNet's branches add nothing.

    In RCAN's 200 blocks, rounding errors would grow with larger weights.
    """
    gain = 0.4 if arch == "rcan" else 0.7
    network, random = models.network(arch, hparams), np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) == 4 else 16
        return (gain * random.standard_normal(leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return models.Model(network, jax.tree.map(draw, network.abstract_params))


def measure(name: str, size: int, repeats: int) -> dict[str, object]:
    model = random_model(*NETWORKS[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.pth"
        save_model(model, path)
        net = spandrel.ModelLoader(device="cpu").load_from_file(str(path)).model.eval()
    image = np.random.default_rng(1).random((1, size, size, 3), np.float32)
    tensor = torch.tensor(image.transpose(0, 3, 1, 2))
    network, params = model.network.jitted, jax.device_put(model.params)

    def ours() -> np.ndarray:
        return np.asarray(network(params, image)[0])

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return net(tensor.clone()).numpy()  # spandrel's RCAN changes its input

    a, b = ours(), theirs().transpose(0, 2, 3, 1)
    error = float(np.abs(a - b).max() / np.abs(b).max())
    if not error < 1e-4:
        raise SystemExit(f"error: {name}: the outputs differ by {error:.1e} of the largest")
    seconds = cost.time_in_turns({"kdjax": ours, "PyTorch": theirs}, repeats=repeats, warm_up=1)
    ratios = sorted(b / a for a, b in zip(seconds["kdjax"], seconds["PyTorch"], strict=True))
    low, middle, high = (float(q) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    print(
        f"| {name} | {models.count_params(model.params) / 1e6:.2f} M | {medians['kdjax'] * 1e3:.0f} ms"
        f" | {medians['PyTorch'] * 1e3:.0f} ms | {middle:.2f} ({low:.2f} to {high:.2f}) | {error:.0e} |",
        flush=True,
    )
    return {"name": name, "hparams": model.hparams, "seconds": seconds, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/architectures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="side of the image (default: 256)")
    parser.add_argument("--repeats", type=int, default=7, help="turns that count (default: 7)")
    parser.add_argument("--names", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--output", type=Path, help="also write the numbers to this JSON file")
    options = parser.parse_args()
    sharding.use_all_cores(1)
    print(
        "| network | parameters | kdjax | PyTorch | PyTorch / kdjax | difference |\n" + "| --- " * 6 + "|", flush=True
    )
    rows = [measure(name, options.size, options.repeats) for name in options.names]
    machine = cost.describe_machine() | {"torch": torch.__version__}
    print(f"\n{machine['device']}, jax {machine['jax']}, torch {torch.__version__}, {machine['date']}")
    if options.output:
        with whole_file(options.output) as path:
            report = {"machine": machine, "size": options.size, "networks": rows}
            Path(path).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
