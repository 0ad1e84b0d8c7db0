"""Everything that a GPU can tell in a few minutes, the most important first.

Each part is a process of its own with a limit, and writes its rows as it goes: a stop, here or from
outside, loses nothing that was measured. On a CPU the parts run on shrunk sizes, as a proof; those rows
say nothing about the project and go to build/benchmarks. Exit status 1 if a part failed.

    python benchmarks/run_gpu.py [--minutes 9] [--out benchmarks/results]
    python benchmarks/run_gpu.py --device cpu --quick
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 5  # seconds in which a part can do something
PLOTS = 15  # seconds kept for the plots
CPU_PATIENCE = 5  # times as long on a CPU, which may be busy: nothing is rented there
# Without PEFT compiled: a compilation takes longer than the rest of its row.
SWEPT = ("lora", "loralib", "peft", "unsloth-schedule", "lorafusion-schedule")


def parts(args: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """(name, most seconds, what python runs), in order."""
    out, small = args.out, args.device == "cpu"
    common = ["--device", args.device] + (["--shrink", str(args.shrink)] if small else [])
    quick = ["--quick"] if args.quick else []

    def script(name: str, csv: str, *options: str) -> list[str]:
        return [
            f"benchmarks/{name}.py",
            *common,
            "--csv",
            f"{out}/{csv}_{args.device}.csv",
            *options,
        ]

    def experiments(*names: str) -> list[str]:
        return ["benchmarks/experiments.py", *common, "--out", str(out), "--only", *names]

    names = ("kernels_fused", "kernels_nf4_fused", "kernels_gpu")
    files = [f"tests/test_{name}.py" for name in names]
    workers = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # compiling takes the time
    tests = [("tests", 180, ["-m", "pytest", "-q", *workers, *files])]
    dtype = "fp32" if small else "bf16"  # for which many a CPU takes several times longer
    headline = ["--tokens", "64" if small else "8192", "--dtypes", dtype, *quick]
    wide = ["--dtypes", dtype, "--rounds", "2", "--providers", *SWEPT]
    step = ["--parts", "grid", "nf4", "--dtypes", dtype]
    if small:
        wide += ["--tokens", "16", "--ranks", "16", "--models", "phi-3-mini", "--passes", "both"]
        step += ["--layers", "2", "--batch", "1", "--length", "32", "--checkpointing", "none"]
        step += ["--providers", "lora", "lora-nf4"]
    else:
        wide += [
            "--tokens",
            "2048",
            "16384",
            "1",
            "16",
            "128",
            "512",
            "65536",
            "--ranks",
            "16",
            "64",
        ]
        wide += ["--models", "phi-3-mini", "phi-3-medium", "phi-4-mini"]
        wide += ["--passes", "forward", "backward", "both"]
    return [
        *([] if small else tests),
        ("beta", 45, experiments("beta")),
        ("layers", 120, script("bench_layers", "layers", *headline)),
        ("kernels", 90, script("bench_kernels", "kernels", "--dtype", dtype, *quick)),
        ("step", 150, script("bench_step", "step", *quick, *step)),
        ("experiments", 100, experiments("bandwidth", "philox", "extended")),
        ("sweep", 600, script("bench_layers", "sweep", *wide)),
        ("plots", 60, ["benchmarks/plots.py", str(out)]),
    ]


def run(name: str, command: list[str], limit: float) -> str:
    print(f"\n=== {name}, {limit:.0f} s at most: python {' '.join(command)}", flush=True)
    if limit < SHORTEST:
        return "skipped, no time left"
    # In a session of its own, so that what it started stops with it.
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "stopped at its limit"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "ok" if status == 0 else f"failed with exit status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, ranks and tokens")
    parser.add_argument(
        "--out", type=Path, help="default benchmarks/results, on a CPU build/benchmarks"
    )
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--shrink", type=int, default=16, help="divides all sizes on a CPU")
    args = parser.parse_args()
    start, summary = time.monotonic(), []
    args.out = args.out or Path(
        "benchmarks/results" if args.device == "cuda" else "build/benchmarks"
    )
    patience = 1 if args.device == "cuda" else CPU_PATIENCE
    for name, most, command in parts(args):
        began = time.monotonic()
        left = 60 * args.minutes * patience - (began - start) - (0 if name == "plots" else PLOTS)
        outcome = run(name, command, min(most * patience, left))
        summary.append(f"{name:12} {outcome}, {time.monotonic() - began:.0f} s")
    print("\n" + "\n".join(summary))
    sys.exit(1 if any("failed" in line for line in summary) else 0)


if __name__ == "__main__":
    main()
