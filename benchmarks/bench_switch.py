"""Switching among many adapters on one model: lora.set_adapter against PEFT's, and a forward after it.

Phi-3-mini's 32 layers with all four projections adapted, its widths divided by --shrink, for a switch
does not depend on them and a hundred adapters are to fit. Checked first: after a switch the output is
that of a model which has this adapter alone, to the bit. "frozen" is one forward of a token without a
switch; "both" is a switch and then a forward.

    python benchmarks/bench_switch.py [--adapters 100] [--rounds 30] [--csv FILE]
"""

import argparse
import copy
import itertools
import sys
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

import lora

from harness import PHI_3_MINI, paired_times, quantile, time_cells, write_csv

R, LORA_ALPHA = 8, 16
TARGETS = list(PHI_3_MINI)


def build(layers: int, shrink: int) -> nn.Module:
    config = transformers.Phi3Config(
        vocab_size=32064 // shrink,
        hidden_size=3072 // shrink,
        intermediate_size=8192 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=32 // shrink,
        num_key_value_heads=32 // shrink,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_adapters(base: nn.Module, folder: Path, count: int) -> list[Path]:
    """PEFT's kind, one update a layer, so that both libraries load the same files."""
    model = lora.patch(copy.deepcopy(base), TARGETS, r=R, lora_alpha=LORA_ALPHA)
    paths = []
    for number in range(count):
        for name, factor in lora.lora_state_dict(model).items():
            factor.normal_(std=0.02 if name.endswith("lora_B") else 0.05)
        paths.append(folder / f"adapter{number}")
        lora.save_adapter(model, paths[-1])
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    base = build(args.layers, args.shrink)
    ids = torch.randint(3, 100, (1, 1))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        paths = save_adapters(base, Path(folder), args.adapters)
        names = [path.name for path in paths]
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        start = time.perf_counter()
        for path in paths:
            lora.load_adapter(ours, path, name=path.name)
        print(
            f"loading {args.adapters} adapters: lora {time.perf_counter() - start:.1f} s", end="; "
        )
        start = time.perf_counter()
        theirs = peft.PeftModel.from_pretrained(theirs, paths[0], adapter_name=names[0])
        for path in paths[1:]:
            theirs.load_adapter(path, adapter_name=path.name)
        print(f"peft {time.perf_counter() - start:.1f} s")
        alone = copy.deepcopy(base)
        lora.load_adapter(alone, paths[-1])
    with torch.inference_mode():
        lora.set_adapter(ours, names[-1])
        if not torch.equal(ours(ids).logits, alone(ids).logits):
            sys.exit(
                "after a switch the output is not that of the adapter alone: nothing was timed"
            )
        rows = measure(ours, theirs, alone, ids, names, args.rounds)
    for row in rows:
        row |= {"bench": "switch", "layer": f"{args.layers} layers", "rank": R, "tokens": 1}
        ratio = f", {row['over_frozen']:.2f} of a forward"
        print(f"{row['pass']:>7} {row['provider']:>6}: {row['ms_p50']:8.3f} ms{ratio}")
    if args.csv:
        write_csv(args.csv, rows, "cpu")
    return 0


def measure(ours, theirs, alone, ids, names, rounds):
    """Rows of a switch, and of a switch with a forward, for both libraries."""
    mine, other = itertools.cycle(names), itertools.cycle(names)

    def with_forward(model, switch):
        switch()
        return model(ids)

    steps = {
        "frozen": lambda: alone(ids),
        "lora switch": lambda: lora.set_adapter(ours, next(mine)),
        "peft switch": lambda: theirs.set_adapter(next(other)),
        "lora both": lambda: with_forward(ours, lambda: lora.set_adapter(ours, next(mine))),
        "peft both": lambda: with_forward(theirs, lambda: theirs.set_adapter(next(other))),
    }
    times = paired_times(steps, rounds, "cpu")
    rows = [
        {"provider": "frozen", "pass": "forward", **time_cells(times["frozen"], times["frozen"])}
    ]
    for name in list(steps)[1:]:
        provider, kind = name.split()
        rows.append(
            {"provider": provider, "pass": kind, **time_cells(times[name], times["frozen"])}
        )
    assert all(quantile(values, 0.5) > 0 for values in times.values())
    return rows


if __name__ == "__main__":
    sys.exit(main())
