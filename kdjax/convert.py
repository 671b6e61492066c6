"""Converts weight files: any .pth or .safetensors that kdjax reads to .pth (BasicSR's layout) or .safetensors.

    python -m kdjax.convert ESRGAN_old.pth teacher.safetensors
    python -m kdjax.convert --info student.pth
    python -m kdjax.convert compact_relu.pth out.pth --hparam act_type=relu

`tools/convert_torch_weights.py` in the repository is the same program.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdjax import commandline
from kdjax.models import count_params
from kdjax.weights import load_weights, save_model, weights_options


def make_parser() -> commandline.Parser:
    parser = commandline.Parser("kdjax.convert", __doc__)
    parser.add_argument("input", metavar="INPUT", help="a .pth or .safetensors file")
    parser.add_argument("output", metavar="OUTPUT", nargs="?", help="file to write: .pth or .safetensors")
    parser.add_argument("--info", action="store_true", help="print what the file holds, write nothing")
    parser.add_weights_options()
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.info == (options.output is not None):
        parser.error("give either OUTPUT or --info")
    try:
        loaded = load_weights(options.input, **weights_options(options))
        if options.output:
            save_model(loaded.model, options.output)
    except ValueError as error:
        commandline.fail(" ".join(str(error).split()))
    print(f"arch:    {loaded.model.arch}")
    print(f"hparams: {', '.join(f'{name}={value}' for name, value in loaded.model.hparams.items())}")
    print(f"layout:  {loaded.layout}")
    print(f"key:     {loaded.key}")
    print(f"params:  {count_params(loaded.model.params):,}")
    print(f"sha256:  {loaded.sha256}")
    if options.output:
        print(f"written: {options.output}")


if __name__ == "__main__":
    commandline.run(main)
