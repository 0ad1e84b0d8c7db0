"""What every benchmark needs: correctness, paired timing, the roofline, bytes kept, one CSV schema.

A time is a median over rounds; a round runs every provider once, in an order that turns, so a ratio
within a round sees one state of the machine. On CUDA the time is the GPU's own, between two events,
after a write of more than the L2 cache holds: data left there by the last run would flatter a kernel.
"""

import csv
import functools
import hashlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PHI_3_MINI = {  # (in, rows of every part)
    "qkv_proj": (3072, (3072, 3072, 3072)),
    "o_proj": (3072, (3072,)),
    "gate_up_proj": (3072, (8192, 8192)),
    "down_proj": (8192, (3072,)),
}
LAYERS = {name: (size, sum(parts)) for name, (size, parts) in PHI_3_MINI.items()}  # (in, out)
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-12}  # relative RMS error
REPEATS = 5  # of a step in one round on CUDA; the round's time is their median
MORE_THAN_L2 = 256 << 20
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most

# Cells that do not apply to a benchmark are empty.
COLUMNS = (
    *("bench", "layer", "in", "out", "parts", "dtype", "p", "tokens", "rank", "pass", "provider"),
    *("ms_p20", "ms_p50", "ms_p80", "over_frozen", "kept_in_x"),
    *("gb_per_s", "tflop_per_s", "of_roofline", "peak_mb", "tokens_per_s"),
    *("ranks", "held_mb", "trained_mb", "reduced_mb", "gathered_mb", "wire_mb"),
    *("command", "device", "versions", "source"),
)


def source_hash() -> str:
    """First 12 digits of a SHA-256 over the kernel sources: a row is of this source or it is old."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def provenance(device: str) -> dict[str, str]:
    """The columns that say what was run, on what, with which versions."""
    versions = []
    for name in ("torch", "triton", "loralib", "peft", "bitsandbytes"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "versions": "; ".join(versions),
        "source": source_hash(),
    }


def paired_times(
    steps: Mapping[str, Callable[..., Any]],
    rounds: int,
    device: str,
    setups: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every step in every round. A setup runs before the clock; its result is passed on."""
    names, setups = list(steps), setups or {}
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = _cuda_seconds if device == "cuda" else _host_seconds
    for turn in range(-1, rounds):  # round -1 warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds = clock(steps[name], setups.get(name))
            if turn >= 0:
                times[name].append(seconds)
    return times


def _host_seconds(step: Callable[..., Any], setup: Callable[[], Any] | None) -> float:
    ready = (setup(),) if setup else ()
    start = time.perf_counter()
    step(*ready)
    return time.perf_counter() - start


def _cuda_seconds(step: Callable[..., Any], setup: Callable[[], Any] | None) -> float:
    """Of the GPU alone: while it flushes its cache and spins, the host enqueues the whole step."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    flush = torch.empty(MORE_THAN_L2, dtype=torch.int8, device="cuda")
    ready = (setup(),) if setup else ()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    step(*ready)
    enqueueing = time.perf_counter() - begun
    for start, stop in events:
        ready = (setup(),) if setup else ()
        flush.zero_()
        torch.cuda._sleep(int(1.5 * enqueueing * CYCLES_PER_SECOND))
        start.record()
        step(*ready)
        stop.record()
    torch.cuda.synchronize()
    return quantile([start.elapsed_time(stop) / 1e3 for start, stop in events], 0.5)


@functools.cache
def roofline(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(GB/s of a large copy, bytes read and written; TFLOP/s of a large GEMM), measured here."""
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 26, 1024)
    source = torch.zeros(size, dtype=torch.int8, device=device)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    target, c = torch.empty_like(source), torch.empty_like(a)
    steps = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(a, b, out=c)}
    times = paired_times(steps, 5, device)
    copy, gemm = (quantile(times[name], 0.5) for name in ("copy", "gemm"))
    return 2 * size / copy / 1e9, 2 * side**3 / gemm / 1e12


def quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def time_cells(times: Sequence[float], frozen: Sequence[float] | None = None) -> dict[str, float]:
    """The columns of a time: quantiles in ms, and the median of its ratios to the pairs in frozen."""
    cells = {f"ms_p{q}": round(1e3 * quantile(times, q / 100), 4) for q in (20, 50, 80)}
    if frozen is not None:
        ratios = [t / f for t, f in zip(times, frozen, strict=True)]
        cells["over_frozen"] = round(quantile(ratios, 0.5), 4)
    return cells


def rate_cells(times: Sequence[float], work: float, unit: str, roof: float) -> dict[str, float]:
    """The columns of a rate: work in bytes (gb_per_s) or operations (tflop_per_s) a second."""
    rate = work / quantile(times, 0.5) / {"gb_per_s": 1e9, "tflop_per_s": 1e12}[unit]
    return {unit: round(rate, 4), "of_roofline": round(rate / roof, 4)}


def off_by(got: Tensor, want: Tensor, noise: float = 0.0) -> str:
    """Empty if got is want to its dtype's BOUND in relative RMS plus noise, else what was found."""
    got, want = got.detach(), want.detach()
    error = float((got.to(want.dtype) - want).norm() / want.norm())
    bound = BOUND[got.dtype] + noise
    return "" if error <= bound else f"off by {error:.1e}, more than {bound:.1e}"  # so is a NaN


def kept_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, the parameters' left out."""
    own = {storage.data_ptr() for p in parameters for storage in storages(p)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in storages(tensor):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y
    return sum(kept.values())


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory of a tensor, or of the parts that it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name).untyped_storage() for name in names]


def weights_mb(model: nn.Module) -> float:
    """All weights as they are held: of 4 bits by their codes and scales, bitsandbytes' too."""
    total = 0
    for p in model.parameters():
        total += sum(storage.nbytes() for storage in storages(p))
        state = getattr(p, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.state2.absmax.nbytes
    return round(total / 1e6, 1)


def peak_mb(
    step: Callable[..., Any], device: str, setup: Callable[[], Any] | None = None
) -> float | str:
    """Most that the GPU's allocator holds during the step, over what it held before."""
    if device != "cuda":
        return ""
    ready = (setup(),) if setup else ()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(*ready)
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], device: str) -> None:
    """All rows so far with their provenance; called after every part, so that a stop loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows({**row, **provenance(device)} for row in rows)
