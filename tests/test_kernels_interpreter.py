"""The fused kernels without a GPU: test_kernels_fused.py in Triton's interpreter, in its own process.

Triton decides when a kernel is decorated whether it is interpreted, so a process does one or the other.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is for Linux alone")
def test_the_fused_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/test_kernels_fused.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 100
    assert "skipped" not in done.stdout
