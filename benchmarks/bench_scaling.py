"""Time, memory and communication of a Phi-3's training step on several ranks: DDP against FSDP2.

The real architecture with random weights in bf16, patched with `target_modules="all-linear"`; on a CPU
of four layers, with the sizes divided by 16. The global batch is the same for every number of ranks,
each of which takes an equal share of its sequences.

    plain   one process without an engine, the floor
    ddp     `DistributedDataParallel` over the model
    fsdp2   `fully_shard` over every decoder layer, then over the model

Every (engine, ranks) runs in a torchrun of its own. Ranks on one CPU share its cores: there the times
tell what an engine costs, not what more machines would give. In MB, the most of any rank:

    held_mb      weights, factors and moments between steps, counted from the tensors
    peak_mb      most that is held during a step over what is held before it, as in bench_step.py
    trained_mb   all factors, of which a full gradient would have the size
    reduced_mb   what a rank puts into the reduction of gradients: DDP's buckets, or reduce-scatters
    gathered_mb  what a rank gets out of all-gathers of weights
    wire_mb      all ranks together, what the loopback interface counts in a step: the least of four, as
                 it counts what other processes send too; on a CPU under Linux

Checked first: before any step the update is zero, so the loss is the plain model's; and the reduced
gradients are the factors' and no more than their padding.

    python benchmarks/bench_scaling.py [--device cuda] [--quick] [--ranks 1 2 4] [--csv FILE]
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_step import LOSS_BOUND, Combination, adapt, build, host_peak_mb
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from harness import paired_times, peak_mb, quantile, time_cells, write_csv

ENGINES = ("ddp", "fsdp2")
STUCK = timedelta(seconds=600)  # after which a collective that waits for a rank fails
LIMIT = 900  # seconds of one torchrun
WIRE_STEPS = 4  # of which the one with the fewest bytes on the interface counts
LOOPBACK = Path("/proc/net/dev")


class Collectives(TorchDispatchMode):
    """Counts the bytes of the whole tensors of reduce-scatters (inputs) and all-gathers (outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = self.gathered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            if func is torch.ops.c10d._reduce_scatter_base_.default:
                self.reduced += args[1].nbytes
            elif func is torch.ops.c10d._allgather_base_.default:
                self.gathered += args[0].nbytes
        return func(*args, **(kwargs or {}))


class Buckets:
    """DDP's own all-reduce as a hook that counts the bytes of the buckets."""

    def __init__(self) -> None:
        self.reduced = 0

    def hook(self, group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.reduced += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)


def wrap(model: nn.Module, engine: str, device: str, buckets: Buckets) -> nn.Module:
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, buckets.hook)
        return wrapped
    if engine == "fsdp2":
        mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def local_bytes(tensors: Any) -> int:
    parts = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(part.nbytes for part in parts)


def padded_bytes(shape: torch.Size, itemsize: int, ranks: int) -> int:
    """Of a tensor whose rows are dealt to the ranks in equal shares, the last ones padded."""
    return -(-shape[0] // ranks) * ranks * shape[1:].numel() * itemsize


def loopback_bytes() -> int | None:
    """Received by the loopback interface since the start; None where no such counter is."""
    if not LOOPBACK.exists():
        return None
    found = re.search(r"^\s*lo:\s*(\d+)", LOOPBACK.read_text(), flags=re.MULTILINE)
    return int(found[1]) if found else None


def wire_bytes(step: Callable[[], None], device: str) -> int | None:
    """Of a step, all ranks together: the least of several, as others use the interface too."""
    counts = []
    for _ in range(WIRE_STEPS):
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()  # none sends before all have read
        step()
        dist.barrier()
        after = loopback_bytes()
        if device == "cpu" and before is not None and after is not None:
            counts.append(after - before)
    return min(counts, default=None)


def measure(c: Combination, engine: str) -> dict[str, Any]:
    """What this rank sees: the loss of the first step, seconds, bytes. `c` has the global batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = adapt(build(c), c)
    factors = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.nbytes for p in factors)
    padded = sum(padded_bytes(p.shape, p.itemsize, ranks) for p in factors)
    del factors
    buckets = Buckets()
    model = wrap(model, engine, c.device, buckets)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    vocabulary = model.module.config if engine == "ddp" else model.config
    whole = torch.randint(3, vocabulary.vocab_size, (c.batch, c.length), device=c.device)
    ids = whole.chunk(ranks)[rank]
    losses = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    with Collectives() as collectives:
        step()
    # DDP rebuilds its buckets after the first step, and from then on they are what it reduces.
    buckets.reduced = 0
    step()
    reduced = buckets.reduced if engine == "ddp" else collectives.reduced
    times = paired_times({engine: step}, c.rounds, c.device)[engine]
    wire = wire_bytes(step, c.device)
    moments = (v for state in optimizer.state.values() for v in state.values())
    held = local_bytes([*model.parameters(), *(v for v in moments if isinstance(v, Tensor))])
    peak = peak_mb(step, c.device) if c.device == "cuda" else host_peak_mb(step)
    return {
        "loss": float(losses[0]),
        "times": times,
        "held": held,
        "peak": peak,
        "trained": trained,
        "padded": padded,
        "reduced": reduced,
        "gathered": collectives.gathered,
        "wire": wire,
    }


def of_all(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean loss; of every round the slowest rank's time; of all else the most."""
    result = {k: max(r[k] for r in ranks) for k in ranks[0] if k not in ("loss", "times", "wire")}
    result["loss"] = sum(r["loss"] for r in ranks) / len(ranks)
    result["times"] = [max(round_) for round_ in zip(*(r["times"] for r in ranks), strict=True)]
    return {**result, "wire": ranks[0]["wire"]}


def run_rank(c: Combination, engine: str) -> None:
    """A rank, started by torchrun; the first one prints what all measured."""
    device = None
    if c.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if c.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=STUCK, device_id=device)
    mine = measure(c, engine)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        print(json.dumps(of_all(everyone)))
    gc.collect()  # a DDP module that outlives its process group can hang while it is freed
    dist.barrier()
    dist.destroy_process_group()
    # Threads that outlive the group can abort the interpreter while it shuts down.
    sys.stdout.flush()
    os._exit(0)


def in_its_own_torchrun(c: Combination, engine: str, ranks: int) -> dict[str, Any] | str:
    """What the first rank printed, or the first error of a run that failed."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__]
    command += ["--rank-of", json.dumps([dataclasses.asdict(c), engine])]
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the other ranks' cores
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "PYTHONWARNINGS": "ignore",
    }
    if c.device == "cpu" and loopback_bytes() is not None:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        printed, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, which a kill would leave behind
        process.communicate()
        return f"not done after {LIMIT} s"
    if process.returncode:
        named = [line for line in errors.splitlines() if re.search(r"\w*(Error|Exception): ", line)]
        return (named or [f"exit status {process.returncode}"])[0]
    return json.loads(printed.splitlines()[-1])


def fault(measured: dict[str, Any], expected: float, ranks: int) -> str:
    """Empty if the first loss and the reduced gradients are what they must be, else what is wrong."""
    if not abs(measured["loss"] - expected) <= LOSS_BOUND * expected:
        return f"loss {measured['loss']} where one process has {expected}"
    least = measured["trained"] if ranks > 1 else 0  # one rank need not reduce anything
    if not least <= measured["reduced"] <= measured["padded"]:
        return (
            f"{measured['reduced']} bytes of gradients, of factors that have {measured['trained']}"
        )
    return ""


def row_of(c: Combination, engine: str, ranks: int, measured: dict[str, Any]) -> dict[str, Any]:
    def mb(name: str) -> float | str:
        return "" if measured[name] is None else round(measured[name] / 1e6, 4)

    return {
        **c.cells(),
        **time_cells(measured["times"]),
        "provider": engine,
        "tokens_per_s": round(c.batch * c.length / quantile(measured["times"], 0.5), 1),
        "peak_mb": measured["peak"],
        "ranks": ranks,
        **{f"{name}_mb": mb(name) for name in ("held", "trained", "reduced", "gathered", "wire")},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two rounds, one and two ranks")
    parser.add_argument("--ranks", type=int, nargs="+", help="default 1 2 4, with --quick 1 2")
    parser.add_argument("--layers", type=int, help="default 32, on a CPU 4")
    parser.add_argument("--shrink", type=int, help="divide all sizes; default 1, on a CPU 16")
    parser.add_argument("--batch", type=int, help="of all ranks together; default 4")
    parser.add_argument("--length", type=int, help="default 2048, on a CPU 64")
    parser.add_argument("--rounds", type=int, help="default 3, on a CPU 5")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {"layers": (32, 4), "shrink": (1, 16), "batch": (4, 4), "length": (2048, 64)}
    for name, (on_gpu, on_cpu) in {**sizes, "rounds": (3, 5)}.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == "cuda" else on_cpu)
    args.rounds = 2 if args.quick else args.rounds
    args.ranks = args.ranks or ([1, 2] if args.quick else [1, 2, 4])
    if bad := [ranks for ranks in args.ranks if ranks < 1 or args.batch % ranks]:
        parser.error(
            f"--batch {args.batch} on {bad[0]} ranks: expected a multiple of every --ranks"
        )
    return args


def main() -> None:
    args = parse()
    if args.rank_of:
        c, engine = json.loads(args.rank_of)
        run_rank(Combination(**c), engine)
        return
    sizes = {key: getattr(args, key) for key in ("device", "layers", "shrink", "batch", "length")}
    c = Combination(**sizes, rounds=args.rounds, part="scaling", provider="lora")
    runs = [("plain", 1), *((engine, ranks) for ranks in args.ranks for engine in ENGINES)]
    rows: list[dict[str, Any]] = []
    wrong, expected = [], float("nan")
    for engine, ranks in runs:
        label = f"{engine} on {ranks}"
        if args.device == "cuda" and ranks > torch.cuda.device_count():
            print(f"{label}: there are {torch.cuda.device_count()} GPUs, not measured", flush=True)
            continue
        measured = in_its_own_torchrun(c, engine, ranks)
        if isinstance(measured, str):
            wrong.append(f"{label}: {measured}")
            continue
        expected = measured["loss"] if engine == "plain" else expected
        if found := fault(measured, expected, ranks):
            wrong.append(f"{label}: {found}")
            continue
        rows.append(row_of(c, engine, ranks, measured))
        row = rows[-1]
        print(
            f"{label:12}{row['ms_p50']:>10} ms, {row['tokens_per_s']:>9} tokens/s, held "
            f"{row['held_mb']:.1f} + {row['peak_mb'] or '?'} MB, reduced {row['reduced_mb']:.2f} of "
            f"{row['trained_mb']:.2f} MB, gathered {row['gathered_mb']:.1f} MB, wire "
            f"{row['wire_mb'] or '?'} MB",
            flush=True,
        )
        if args.csv:
            write_csv(args.csv, rows, args.device)
    if wrong:
        sys.exit("wrong, so not reported:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
