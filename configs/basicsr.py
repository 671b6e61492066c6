"""Runs a BasicSR or Real-ESRGAN training YAML unchanged, the guide's included:

    python -m kdjax.train --config configs/basicsr.py:train.yml [--config.train.steps=N ...]

First prints how every key was translated; a key that cannot be honoured is an error. Any config key can still be set on
the command line. A network of your own, `type: my_package.my_net:MyNet`, is imported only if the command line names it
too: --config.student.arch=my_package.my_net:MyNet. See docs/migrating.md for the table of keys.
"""

import sys
from pathlib import Path

from ml_collections import ConfigDict

from kdjax.basicsr import format_account, translate
from kdjax.basicsr.reader import MAX_BYTES, read_yaml


def get_config(path: str = "") -> ConfigDict:
    if not path:
        sys.exit("error: name the YAML behind a colon: --config configs/basicsr.py:train.yml")
    try:
        with Path(path).expanduser().open("rb") as file:
            options = read_yaml(file.read(MAX_BYTES + 1))
        config, account = translate(options)
    except (ValueError, OSError, RuntimeError) as error:  # raising it would print a traceback
        sys.exit(f"error: {path}: {error}")
    print(format_account(account))
    return ConfigDict(config)
