"""A training YAML of BasicSR or Real-ESRGAN as it is, the guide's among them:

    python -m kdjax.train --config configs/basicsr.py:train.yml [--config.train.steps=N ...]

What became of every key is printed first; a key that cannot be honoured is an error. Any key of the config can still be
set on the command line. A network of your own, `type: my_package.my_net:MyNet`, is imported only when the command line
names it as well: --config.student.arch=my_package.my_net:MyNet. docs/migrating.md has the table.
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
    except (ValueError, OSError, RuntimeError) as error:  # raised, it would come with a traceback around it
        sys.exit(f"error: {path}: {error}")
    print(format_account(account))
    return ConfigDict(config)
