"""Converts weight files: any .pth or .safetensors that kdjax reads to .pth (BasicSR's layout) or .safetensors.

    python tools/convert_torch_weights.py ESRGAN_old.pth teacher.safetensors

Runs from a clone without installation. `python -m kdjax.convert` is the same program; `--help` lists its options.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kdjax import commandline, convert

if __name__ == "__main__":
    commandline.run(convert.main)
