"""Converts weight files: any .pth or .safetensors that kdjax reads to .pth (BasicSR's layout) or .safetensors.

    python tools/convert_torch_weights.py ESRGAN_old.pth teacher.safetensors
    python tools/convert_torch_weights.py --info student.pth
    python tools/convert_torch_weights.py compact_relu.pth out.pth --hparam act_type=relu

Only arguments and printing; everything else is `kdjax.weights`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone without installing

from kdjax.models import count_params
from kdjax.weights import load_weights, parse_hparams, save_model


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert or describe image-restoration weights.")
    parser.add_argument("input", metavar="INPUT", help="a .pth or .safetensors file")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="the file to write: .pth or .safetensors")
    parser.add_argument("--key", default="auto", help="which set of weights to take (default: a moving average first)")
    parser.add_argument("--arch", help="the architecture, if it shall not be recognised")
    hparam_help = "what the tensors do not tell: scale=3, res_scale=0.1, act_type=relu, enc_blk_nums=1,1,1,28"
    parser.add_argument("--hparam", metavar="NAME=VALUE", action="append", default=[], help=hparam_help)
    parser.add_argument("--info", action="store_true", help="print what the file holds and write nothing")
    arguments = parser.parse_args()
    if arguments.info == (arguments.output is not None):
        parser.error("give either OUTPUT or --info")
    try:
        options = {"key": arguments.key, "arch": arguments.arch} | parse_hparams(arguments.hparam)
        loaded = load_weights(arguments.input, **options)
        if arguments.output:
            save_model(loaded.model, arguments.output)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"arch:    {loaded.model.arch}")
    print(f"hparams: {', '.join(f'{name}={value}' for name, value in loaded.model.hparams.items())}")
    print(f"layout:  {loaded.layout}")
    print(f"key:     {loaded.key}")
    print(f"params:  {count_params(loaded.model.params):,}")
    print(f"sha256:  {loaded.sha256}")
    if arguments.output:
        print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
