"""One training step of Phi-3-mini: forward, loss, backward, and AdamW on the factors.

The real configuration with random weights in bf16. "frozen" is the floor: forward and backward to the
input embeddings, nothing trained. Models are too large to be held side by side, so each provider runs
its steps alone and its ratio to the floor is one of medians. Checked first: before any step B = 0, so
the loss is the frozen model's.

    python benchmarks/bench_step.py --device cuda [--csv FILE]
"""

import argparse
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import lora

from harness import paired_times, peak_mb, quantile, time_cells, write_csv

R, LORA_ALPHA, DROPOUT = 16, 32, 0.05
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LOSS_BOUND = 1e-2  # of the frozen loss, in bf16


def build(layers: int, shrink: int, device: str) -> nn.Module:
    """A frozen Phi-3-mini, made on the device itself."""
    heads = max(32 // shrink, 1)
    config = transformers.Phi3Config(
        vocab_size=32064 // shrink,
        hidden_size=96 * heads,
        intermediate_size=8192 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return model.requires_grad_(False)


def _frozen(model: nn.Module) -> nn.Module:
    model.enable_input_require_grads()
    return model


def _ours(model: nn.Module) -> nn.Module:
    return lora.patch_phi3(
        model, r=R, lora_alpha=LORA_ALPHA, lora_dropout=DROPOUT, target_modules="all-linear"
    )


def _peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=DROPOUT,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


PROVIDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": _frozen,
    "lora": _ours,
    "peft": _peft,
}


def bench(
    provider: str, checkpointing: bool, ids: Tensor, args: argparse.Namespace
) -> tuple[list[float], float | str, float]:
    """(seconds a step, peak MB with the model, loss before any step)."""
    device = args.device
    model = PROVIDERS[provider](build(args.layers, args.shrink, device)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [q for q in model.parameters() if q.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def step() -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    loss = float(step())
    times = paired_times({provider: step}, args.rounds, device)[provider]
    peak = peak_mb(step, device)
    if device == "cuda":
        peak += round(torch.cuda.memory_allocated() / 1e6, 1)
    return times, peak, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes; at most 32")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    args.rounds = 2 if args.quick else 3
    tokens, rows, wrong, floors = args.batch * args.length, [], [], {}
    torch.manual_seed(0)
    ids = torch.randint(3, 32064 // args.shrink, (args.batch, args.length), device=args.device)
    for checkpointing, provider in itertools.product((False, True), PROVIDERS):
        times, peak, loss = bench(provider, checkpointing, ids, args)
        gc.collect()  # the model is a cycle; the next one needs its memory
        if args.device == "cuda":
            torch.cuda.empty_cache()
        kind = "step, checkpointed" if checkpointing else "step"
        median = quantile(times, 0.5)
        floor, floor_loss = floors.setdefault(checkpointing, (median, loss))
        if not abs(loss - floor_loss) <= LOSS_BOUND * floor_loss:
            wrong.append(
                f"{provider}, {kind}: loss {loss} where the frozen model's is {floor_loss}"
            )
            continue
        row = {"bench": "step", "layer": "phi-3-mini", "dtype": "bf16", "tokens": tokens}
        row |= {"pass": kind, "provider": provider, **time_cells(times), "peak_mb": peak}
        row |= {"p": DROPOUT, "rank": R} if provider != "frozen" else {}
        row |= {"over_frozen": round(median / floor, 4), "tokens_per_s": round(tokens / median, 1)}
        rows.append(row)
        memory = f", {peak} MB at most" if peak else ""
        print(
            f"{kind:20}{provider:8}{row['tokens_per_s']:>12} tokens/s, {row['over_frozen']}{memory}"
        )
        if args.csv:
            write_csv(args.csv, rows, args.device)
    if wrong:
        sys.exit("wrong, so not reported:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
