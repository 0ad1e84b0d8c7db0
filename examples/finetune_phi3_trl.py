"""Fine-tune Phi-3 by the published recipes, on TRL's SFTTrainer, with lora in the place of PEFT.

    python finetune_phi3_trl.py                          # anywhere: CPU, no network, two minutes
    python finetune_phi3_trl.py --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl

The recipes are those of Microsoft's Phi-3 cookbook: sample_finetune.py, with a learning rate for
adapters or, by --recipe sample, with its own; or with --recipe notebook its
Phi-3-finetune-lora-python.ipynb. Of their lines for LoRA, two are left: patching and the
callback. With --recipe notebook --quantize nf4 it is the cookbook's Phi-3-finetune-qlora-python.ipynb;
the merged model is the update on the dequantised weights, on which it was trained.

Without --model a small stand-in is trained first (once, kept in the user's cache), and without --data
it learns questions about Python's standard library; each line of a data file is
{"messages": [{"role": "user", "content": "..."}, ...]}. The last line on stdout is a summary in JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see finetune_phi3.py

import torch
from chat_data import InputError, read_conversations, split
from datasets import Dataset
from models import adapt, load
from run_folder import make_room, user_cache
from settings import assign, hardly_moved, plan
from standin import STEPS as BASE_STEPS
from standin import standin_checkpoint
from stdlib_docs import chat_pairs, read_docs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import lora
import lora.hf

# sample_finetune.py, under its own names; any entry can be changed by --set NAME=VALUE.
training_config: dict[str, Any] = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
    "max_seq_length": 2048,
    "packing": True,
}
peft_config: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}

# What the default has instead of sample_finetune.py's 5e-6: adapters need ten to a hundred times the
# learning rate of full fine-tuning. `--recipe sample` keeps the published value.
default_config: dict[str, Any] = {"learning_rate": 1.0e-04}

# What Phi-3-finetune-lora-python.ipynb has instead.
notebook_training_config: dict[str, Any] = {
    "output_dir": "./phi-3-mini-LoRA",
    "evaluation_strategy": "steps",
    "do_eval": True,
    "optim": "adamw_torch",
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 8,
    "log_level": "debug",
    "save_strategy": "epoch",
    "logging_steps": 100,
    "learning_rate": 1e-4,
    "eval_steps": 100,
    "num_train_epochs": 3,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "linear",
    "seed": 42,
    "gradient_checkpointing": False,
    "save_total_limit": None,
    "max_seq_length": 512,
    "packing": False,
}
# Its target_modules are the names of models that do not fuse these layers: 'k_proj', 'q_proj',
# 'v_proj', 'o_proj', 'gate_proj', 'down_proj', 'up_proj'. On Phi-3 only two of the seven are there;
# PEFT adapts these and says nothing, `lora.patch_phi3` refuses the list and names the layers below.
notebook_peft_config: dict[str, Any] = {
    "lora_alpha": 16,
    "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}

# What differs for the stand-in, which is thousands of times smaller.
standin_config: dict[str, Any] = {
    "bf16": False,
    "evaluation_strategy": "steps",
    "eval_steps": 50,
    "learning_rate": 5.0e-03,
    "log_level": "warning",
    "max_steps": 100,
    "save_strategy": "steps",
    "save_steps": 50,
    "per_device_eval_batch_size": 16,
    "per_device_train_batch_size": 16,
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 128,
    "use_cpu": True,
}
# Its chat template, with marks around what the assistant says. TRL has these for Phi-3's own.
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# The names that transformers and TRL have today; None: it is gone.
TODAY = {
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "overwrite_output_dir": None,
    "warmup_ratio": "warmup_steps",  # below 1 it is a share of all steps
}


def chats(conversations: Sequence[dict[str, Any]], recipe: str) -> Dataset:
    """A `messages` column; sample_finetune.py opens every chat with a system message, if empty."""
    rows = [row["messages"] for row in conversations]
    if recipe == "sample":
        empty = {"role": "system", "content": ""}
        rows = [[empty] * (row[0]["role"] != "system") + row for row in rows]
    plain = ("role", "content")
    return Dataset.from_list(
        [{"messages": [{key: m[key] for key in plain} for m in row]} for row in rows]
    )


def prepare(args: argparse.Namespace) -> tuple[str, PreTrainedTokenizerBase, Dataset, Dataset]:
    """The base model's name or folder, its tokenizer, and the chats to train on and held out."""
    docs = split(read_docs()) if not (args.model and args.data) else ([], [])
    base = args.model
    if base is None:  # what is held out is kept from the stand-in too
        texts = [doc.text() for doc in docs[0]]
        base = str(standin_checkpoint(texts, user_cache(), args.base_steps))
    tokenizer = load(AutoTokenizer, base)
    if args.model is None:
        tokenizer.chat_template = MARKED_TEMPLATE
    rows = split(read_conversations(args.data)) if args.data else map(chat_pairs, docs)
    train, held_out = (chats(part, args.recipe) for part in rows)
    return base, tokenizer, train, held_out


def build(args: argparse.Namespace) -> SFTTrainer:
    """The recipe's trainer on a patched model."""
    base, tokenizer, train, held_out = prepare(args)
    tokenizer.padding_side = "right"
    today = {TODAY.get(name, name): value for name, value in training_config.items()}
    config = {name: value for name, value in today.items() if name is not None}
    model = load(
        AutoModelForCausalLM,
        base,
        dtype=torch.bfloat16 if config["bf16"] else torch.float32,
        attn_implementation=args.attn_implementation,
    )
    torch.manual_seed(config["seed"])
    adapt(model, base, quantize=args.quantize, **peft_config)
    lora.summary(model)
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            assistant_only_loss=args.assistant_only_loss,
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            **config,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[lora.hf.AdapterCallback()],
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, train, evaluate, save the adapter, merge, evaluate, save the model: a summary."""
    output = Path(training_config["output_dir"])
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if args.resume and last is None:
        raise InputError(f"there is no checkpoint in {output}: start without --resume")
    if not args.resume:
        written = ("checkpoint-*", "best", "adapter", "merged")
        make_room(output, training_config["overwrite_output_dir"], written)
    trainer = build(args)
    batches = len(trainer.get_train_dataloader())
    print(plan(training_config, peft_config["r"], batches), file=sys.stderr)
    before = trainer.evaluate()["eval_loss"]
    try:
        trainer.train(resume_from_checkpoint=last if args.resume else None)
    except lora.AdapterError as error:
        raise InputError(f"cannot go on from {last}: {error}") from error
    after = trainer.evaluate()["eval_loss"]
    if warning := hardly_moved(before, after, training_config["learning_rate"]):
        print(f"warning: {warning}", file=sys.stderr)
    trainer.save_model(str(output / "adapter"))
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)

    lora.unpatch(trainer.model, merge=True, dtype=trainer.model.dtype if args.quantize else None)
    trainer.model.config.use_cache = True  # which training turned off
    merged = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(output / "merged"))  # a whole model now, that needs no lora
    return {
        "recipe": args.recipe,
        "steps": trainer.state.global_step,
        "eval_loss_before": before,
        "eval_loss_after": after,
        "eval_loss_merged": merged,
        "trainable_parameters": trained,
    }


def arguments() -> argparse.Namespace:
    """Read the command line and carry its settings into the dictionaries above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--recipe",
        choices=("sample", "notebook"),
        help="with every published value (default: sample, but with a learning rate of 1e-4)",
    )
    add("--lr", type=float, help="learning rate; the same as --set learning_rate=LR")
    add("--model", help="folder or Hub name of a Phi-3 model (default: a small stand-in)")
    add("--data", type=Path, help="JSONL file of chats (default: made from Python's documentation)")
    add("--output", metavar="FOLDER", help="default: as in the recipe")
    add("--resume", action="store_true", help="go on from the newest checkpoint in the output")
    add("--steps", type=int, help="training steps; the same as --set max_steps=STEPS")
    add("--quantize", choices=("nf4",), help="QLoRA: frozen projections of 4 bits (default: dense)")
    add("--assistant-only-loss", action="store_true", help="learn what the assistant says alone")
    add("--attn-implementation", default="sdpa", help="flash_attention_2 in the recipes")
    add("--base-steps", type=int, default=BASE_STEPS, help="training steps of the stand-in")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="change an entry")
    args = parser.parse_args()
    if args.recipe == "notebook":
        training_config.update(notebook_training_config)
        peft_config.update(notebook_peft_config)
    if args.model is None:
        training_config.update(standin_config)
    elif args.recipe is None:
        training_config.update(default_config)
    args.recipe = args.recipe or "sample"
    given = {"output_dir": args.output, "max_steps": args.steps, "learning_rate": args.lr}
    training_config.update({name: value for name, value in given.items() if value is not None})
    return args


def main() -> int:
    began = time.perf_counter()
    args = arguments()
    try:
        assign((training_config, peft_config), args.set)
        report = run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**report, "seconds": round(time.perf_counter() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
