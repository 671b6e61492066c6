"""Damaged images end in an `ImageError` or are read, whatever is wrong with them, in little time and memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.once


def test_damaged_images_are_read_or_refused(tmp_path: Path) -> None:
    program = Path(__file__).parent / "mutate_images.py"
    started = time.monotonic()
    command = [sys.executable, program, tmp_path, "500"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert len(list(tmp_path.iterdir())) > 500 and time.monotonic() - started < 60
