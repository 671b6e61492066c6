"""A training YAML of BasicSR or Real-ESRGAN as it is, the guide's among them:

    python -m kdjax.train --config configs/basicsr.py:train.yml [--config.train.steps=N ...]

What became of every key is printed first; a key that cannot be honoured is an error. Any key of the config can still be
set on the command line. docs/migrating.md has the table.
"""

import sys
from pathlib import Path

import yaml
from ml_collections import ConfigDict

from kdjax.basicsr import format_account, translate


def get_config(path: str = "") -> ConfigDict:
    if not path:
        sys.exit("error: name the YAML behind a colon: --config configs/basicsr.py:train.yml")
    try:
        options = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
        config, account = translate(options)
    except (yaml.YAMLError, ValueError, OSError) as error:  # raised, it would come with a traceback around it
        sys.exit(f"error: {path}: {error}")
    print(format_account(account))
    return ConfigDict(config)
