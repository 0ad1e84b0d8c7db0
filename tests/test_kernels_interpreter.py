"""The Triton kernels without a GPU: their tests in the interpreter, in a process of their own.

Triton decides when a kernel is decorated whether it is interpreted, so a process does one or the other.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_fused_kernels_in_the_interpreter(interpreted):
    files = ("tests/test_kernels_fused.py", "tests/test_kernels_nf4_fused.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env=interpreted,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 100
    assert "skipped" not in done.stdout
