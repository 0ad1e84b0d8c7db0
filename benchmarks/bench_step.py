"""Time and peak memory of a Phi-3's training step: forward, loss, backward, AdamW on the factors.

The real architecture with random weights; on a CPU of four layers, with the sizes divided by 8.
"frozen" is the floor: forward and backward to the input embeddings, nothing trained.

    grid          frozen, lora, PEFT; without and with gradient checkpointing; fp32, bf16, autocast
    compile       the same through torch.compile
    accumulation  the tokens in micro-batches of one sequence
    optimizer     AdamW's other implementations; everywhere else it is the fused one
    variants      lora's variants and PEFT's DoRA
    sweep         2k to 32k tokens in one sequence, checkpointed; on a CPU one layer of one head
    nf4           on frozen projections of 4 bits: alone, with lora, with PEFT on bitsandbytes' layer

Every combination runs in a fresh process, so that its peak is its own and no compiler's or allocator's
leavings help the next one. Measuring in pairs is therefore not possible: the machine may change between
two processes. So the floor runs again after the others of its group (whose ratios are over the median
of its runs), and the spread of its medians is printed: smaller differences say nothing.

peak_mb is the most that is held during a step over what is held before it (weights, factors, moments):
on CUDA by the allocator, on Linux by the process, on other systems empty. held_mb is the weights alone,
as they are held. Checked first: before any step the update is zero, so the loss is the frozen model's,
and near it if its weights are of 4 bits.

    python benchmarks/bench_step.py [--device cuda] [--quick] [--parts grid ...] [--csv FILE]
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import (
    PHI_3_MINI,
    paired_times,
    peak_mb,
    quantile,
    time_cells,
    weights_mb,
    write_csv,
)

R, LORA_ALPHA, DROPOUT = 16, 32, 0.05
LOSS_BOUND = 1e-2  # of the frozen loss, in bf16
DTYPES = ("bf16", "fp32", "autocast")
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
VARIANTS: tuple[dict[str, Any], ...] = (
    {"use_rslora": True},
    {"use_dora": True},
    {"lora_bias": True},
    {"use_lorafa": True},
    {"init_lora_weights": "pissa_niter_4"},
)


@dataclasses.dataclass(frozen=True)
class Combination:
    """All that a process of its own needs to know."""

    device: str
    layers: int
    shrink: int
    batch: int
    length: int
    rounds: int
    part: str = "grid"
    provider: str = "frozen"
    dtype: str = "bf16"
    checkpointing: str = "none"
    compiled: bool = False
    micro_batches: int = 1
    optimizer: str = "fused"
    variant: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        return self.provider.endswith("-nf4")

    def cells(self) -> dict[str, Any]:
        """What a row says of it."""
        kind = ["step"] + ["compiled"] * self.compiled
        kind += [self.checkpointing] if self.checkpointing != "none" else []
        kind += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        kind += [f"{self.optimizer} AdamW"] if self.optimizer != "fused" else []
        size = "phi-3-mini" if self.shrink == 1 else f"phi-3-mini / {self.shrink}"
        cells: dict[str, Any] = {
            "bench": f"step {self.part}",
            "layer": f"{size}, {self.layers} layers",
        }
        cells |= {"dtype": self.dtype, "tokens": self.batch * self.length, "pass": ", ".join(kind)}
        cells |= {"p": DROPOUT, "rank": R} if not self.provider.startswith("frozen") else {}
        names = [v if isinstance(v, str) else name for name, v in self.variant.items()]
        return {**cells, "provider": " ".join([self.provider, *names])}


def build(c: Combination) -> nn.Module:
    """The frozen model, made on the device itself."""
    import transformers

    heads = max(32 // c.shrink, 1)
    config = transformers.Phi3Config(
        vocab_size=32064 // c.shrink,
        hidden_size=96 * heads,
        intermediate_size=8192 // c.shrink,
        num_hidden_layers=c.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(c.length, 4096),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(c.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config,
            dtype=torch.bfloat16 if c.dtype == "bf16" else torch.float32,
            attn_implementation="sdpa",
        )
    return model.requires_grad_(False)


def adapt(model: nn.Module, c: Combination) -> nn.Module:
    options = {"r": R, "lora_alpha": LORA_ALPHA, "lora_dropout": DROPOUT, **c.variant}
    provider, _, scheme = c.provider.rpartition("-") if c.quantized else (c.provider, "", None)
    if provider == "lora":
        import lora

        model = lora.patch_phi3(model, target_modules="all-linear", quantize=scheme, **options)
    elif scheme:
        import lora

        lora.patch_phi3(model, target_modules="all-linear", r=1, lora_alpha=1, quantize=scheme)
        model = lora.unpatch(model)
    if provider == "peft-bitsandbytes":
        import baselines

        for name, module in list(model.named_modules()):
            if isinstance(module, lora.LinearNF4):
                model.set_submodule(name, baselines.linear4bit(module))
        model.is_loaded_in_4bit = True  # which PEFT asks of a model before it looks at its layers
    if provider.startswith("peft"):
        import peft

        targets = list(PHI_3_MINI)
        config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, config)
    if c.checkpointing != "none":
        reentrant = c.checkpointing == "reentrant"
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if not reentrant:  # which needs no input that requires gradients; the hook breaks the graph
            model.disable_input_require_grads()
    return model.train()


def measure(c: Combination) -> dict[str, Any]:
    """Seconds of every round, the peak of one more step, the loss before any step."""
    model = adapt(build(c), c)
    trained = [q for q in model.parameters() if q.requires_grad]
    implementation = {} if c.optimizer == "for-loop" else {c.optimizer: True}
    implementation = implementation or {"fused": False, "foreach": False}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, **implementation) if trained else None
    torch.manual_seed(1)  # the same tokens, whatever the factors have drawn
    ids = torch.randint(3, 32064 // c.shrink, (c.batch, c.length), device=c.device)
    casts = c.dtype == "autocast"
    losses = []

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        return model(**inputs).loss

    run = torch.compile(forward) if c.compiled else forward

    def step() -> None:
        total = ids.new_zeros((), dtype=torch.float32)
        for micro in ids.chunk(c.micro_batches):
            inputs = {"input_ids": micro, "labels": micro}
            if not trained:  # something must ask for gradients, outside of what is compiled
                embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
                inputs["inputs_embeds"] = embedded.detach().requires_grad_()
            with torch.autocast(c.device, torch.bfloat16) if casts else contextlib.nullcontext():
                loss = run(inputs) / c.micro_batches
            loss.backward()
            total += loss.detach()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)

    times = paired_times({c.provider: step}, c.rounds, c.device)[c.provider]
    peak = peak_mb(step, c.device) if c.device == "cuda" else host_peak_mb(step)
    return {"times": times, "peak": peak, "loss": float(losses[0]), "held": weights_mb(model)}


def host_peak_mb(step: Callable[[], None]) -> float | str:
    """Most that the process holds during the step, over what it held before; Linux alone tells."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return ""

    def kib(name: str) -> int:
        return int(status.read_text().partition(f"{name}:")[2].split()[0])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or pages that earlier steps freed would hide this one's
    reset.write_text("5")  # the high-water mark begins anew
    before = kib("VmRSS")
    step()
    return round((kib("VmHWM") - before) * 1024 / 1e6, 1)


def in_its_own_process(c: Combination) -> dict[str, Any] | str:
    """What `measure` gives, or the last words of a process that failed."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(dataclasses.asdict(c))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


Group = list[Combination]


def groups(args: argparse.Namespace) -> Iterator[Group]:
    """Combinations that share a floor, which runs first, and again last unless it takes minutes."""
    sizes = {key: getattr(args, key) for key in ("device", "layers", "shrink", "batch", "length")}
    plain = Combination(**sizes, rounds=args.rounds, dtype=args.dtypes[0])

    def three(floor: Combination) -> Group:
        lora, peft = (dataclasses.replace(floor, provider=name) for name in ("lora", "peft"))
        return [floor, lora, peft] if args.quick else [floor, lora, peft, floor]

    if "grid" in args.parts:
        for dtype in args.dtypes:
            for how in args.checkpointing:
                if how == "reentrant" and dtype != args.dtypes[0]:
                    continue  # it differs from the other one in what dtypes do not change
                yield three(dataclasses.replace(plain, dtype=dtype, checkpointing=how))
    if "compile" in args.parts:
        for dtype in args.dtypes if args.device == "cuda" else args.dtypes[:1]:
            for how in args.checkpointing:
                if how != "reentrant":  # to the compiler they are one
                    changes = {"dtype": dtype, "checkpointing": how, "compiled": True}
                    yield three(dataclasses.replace(plain, part="compile", **changes))[:3]
    if "accumulation" in args.parts:
        micro_batches = min(4, args.batch)
        yield three(dataclasses.replace(plain, part="accumulation", micro_batches=micro_batches))
    if "optimizer" in args.parts:
        floor = dataclasses.replace(plain, part="optimizer")
        ours = dataclasses.replace(floor, provider="lora")
        others = [dataclasses.replace(ours, optimizer=name) for name in ("foreach", "for-loop")]
        yield [floor, ours, *others, ours, floor]
    if "variants" in args.parts:
        floor = dataclasses.replace(plain, part="variants")
        ours = dataclasses.replace(floor, provider="lora")
        kinds = [dataclasses.replace(ours, variant=variant) for variant in VARIANTS]
        dora = dataclasses.replace(ours, provider="peft", variant={"use_dora": True})
        yield [floor, ours, *kinds, dora, ours, floor]
    if "sweep" in args.parts:
        on_gpu = args.device == "cuda"
        changes = {"part": "sweep", "checkpointing": "non-reentrant", "batch": 1, "rounds": 1}
        changes |= {} if on_gpu else {"layers": 1, "shrink": 32}
        for length in (2048, 4096, 8192, 16384, 32768) if on_gpu else (2048, 8192, 32768):
            yield three(dataclasses.replace(plain, length=length, **changes))[:3]
    if "nf4" in args.parts:
        names = ["frozen", "lora", "frozen-nf4", "lora-nf4", "peft-bitsandbytes-nf4", "frozen"]
        if not importlib.util.find_spec("bitsandbytes"):
            names.remove("peft-bitsandbytes-nf4")
            print("peft-bitsandbytes-nf4: bitsandbytes is not installed, so it is not measured")
        kinds = [how for how in args.checkpointing if how != "reentrant"]
        for how in kinds[:1] if args.quick else kinds:
            floor = dataclasses.replace(plain, part="nf4", checkpointing=how)
            own = names[:-1] if args.quick else names
            yield [dataclasses.replace(floor, provider=name) for name in own]


def rows_of(done: list[tuple[Combination, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row each, with its ratio to the median of the floor's medians."""
    floor = quantile([quantile(m["times"], 0.5) for c, m in done if c.provider == "frozen"], 0.5)
    rows = []
    for c, measured in done:
        median = quantile(measured["times"], 0.5)
        row = {**c.cells(), **time_cells(measured["times"]), "peak_mb": measured["peak"]}
        row["held_mb"] = measured["held"]
        row["over_frozen"] = round(median / floor, 4)
        row["tokens_per_s"] = round(c.batch * c.length / median, 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="bf16, two rounds, one floor a group")
    parts = ("grid", "compile", "accumulation", "optimizer", "variants", "sweep", "nf4")
    parser.add_argument("--parts", nargs="+", choices=parts, help="default all, with --quick grid")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING, default=CHECKPOINTING)
    parser.add_argument("--providers", nargs="+", help="these beside the floor; default all")
    parser.add_argument("--layers", type=int, help="default 32, on a CPU 4")
    parser.add_argument("--shrink", type=int, help="divide all sizes; default 1, on a CPU 8")
    parser.add_argument("--batch", type=int, help="default 2, on a CPU 4")
    parser.add_argument("--length", type=int, help="default 4096, on a CPU 256")
    parser.add_argument("--rounds", type=int, help="default 3, on a CPU 11")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Combination(**json.loads(args.one)))))
        return
    sizes = {"layers": (32, 4), "shrink": (1, 8), "batch": (2, 4), "length": (4096, 256)}
    for name, (on_gpu, on_cpu) in {**sizes, "rounds": (3, 11)}.items():
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == "cuda" else on_cpu)
    args.rounds = 2 if args.quick else args.rounds
    args.parts = args.parts or (["grid"] if args.quick else parts)
    args.dtypes = args.dtypes or (["bf16"] if args.quick else DTYPES)
    rows: list[dict[str, Any]] = []
    wrong = []
    for group in groups(args):
        if args.providers:
            group = [c for c in group if c.provider in ("frozen", *args.providers)]
        done: list[tuple[Combination, dict[str, Any]]] = []
        for c in group:
            measured = in_its_own_process(c)
            label = "{pass}, {dtype}, {tokens} tokens, {provider}".format(**c.cells())
            if isinstance(measured, str):
                wrong.append(f"{label}: {measured}")
                if not done:
                    break  # without a floor there is no ratio
                continue
            loss, expected = measured["loss"], done[0][1]["loss"] if done else measured["loss"]
            if not abs(loss - expected) <= LOSS_BOUND * expected:
                wrong.append(f"{label}: loss {loss} where the frozen model's is {expected}")
                continue
            done.append((c, measured))
            of_group = rows_of(done)
            last = of_group[-1]
            print(
                f"{label:70}{last['ms_p50']:>10} ms, {last['over_frozen']:.2f}, "
                f"{last['peak_mb'] or '?'} MB",
                flush=True,
            )
            if args.csv:
                write_csv(args.csv, rows + of_group, args.device)
        rows += rows_of(done) if done else []
        floors = [quantile(m["times"], 0.5) for c, m in done if c.provider == "frozen"]
        if len(floors) > 1:
            print(f"{'the floor differs by':70}{max(floors) / min(floors) - 1:>12.1%}")
    if wrong:
        sys.exit("wrong, so not reported:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
