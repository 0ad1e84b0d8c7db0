"""Fine-tune Phi-3 on chats with LoRA: from a checkpoint to an adapter, and back to a checkpoint.

    python finetune_phi3.py                                      # anywhere: CPU, no network, minutes
    python finetune_phi3.py --model microsoft/Phi-3-mini-4k-instruct --data chats.jsonl [--lr 1e-4]

    torchrun --nproc-per-node 4 finetune_phi3.py [--parallel fsdp2]   # the same, in four processes
    python finetune_phi3.py --quantize nf4                       # QLoRA: on frozen weights of 4 bits

The first form trains a small stand-in for Phi-3 (once, kept in the user's cache) and tunes it on
questions about Python's standard library. The second does the same with the real one, on a GPU if
there is one; each line of the data is {"messages": [{"role": "user", "content": "..."}, ...]}.

With --quantize the linear projections are of 4 bits from the moment they are read; the rest is the
same. The report adds base_eval_loss, the loss of the dense base, beside eval_loss_before, that of the
quantised one. The merged checkpoint is dense, in the model's dtype: the update on the dequantised
weights, on which it was trained. (`lora merge` puts it on the original ones.)

Beside it: `chat_data` makes tokens of chats, `training` is the loop, `run_folder` what it writes,
`processes` shares the work, `stdlib_docs` and `standin` replace the downloads. The last line on stdout
is a summary in JSON.
Ctrl-C saves a checkpoint; the same command with --resume goes on from the newest one.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Read when torch is loaded: idle threads sleep rather than spin. On two quiet cores that costs this
# small model a quarter of its speed; beside one other busy process it saves 80 %.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import processes
import torch
import transformers
from chat_data import Data, InputError, encode_data, fingerprint, read_conversations, split
from models import (
    adapt,
    answers,
    base_bytes,
    checkpoint_activations,
    device,
    folder_of,
    load,
    load_in_shards,
    load_quantized,
    side_by_side,
)
from run_folder import (
    RunLog,
    load_checkpoint,
    make_room,
    plot_losses,
    user_cache,
)
from settings import assign, binding, check, hardly_moved, plan
from standin import STEPS as BASE_STEPS
from standin import standin_checkpoint
from stdlib_docs import Doc, chat_pairs, read_docs
from tqdm.contrib.logging import logging_redirect_tqdm
from training import Trainer, evaluate
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import lora
from lora.adapter import read_adapter
from lora.adapter.merge import merge_checkpoint

log = logging.getLogger("finetune")

# The published recipe for Phi-3-mini (`--recipe published`). Any entry can be changed by
# --set NAME=VALUE.
training_config: dict[str, Any] = {
    "bf16": True,
    "do_eval": False,  # during training, that is: before and after it, it is always done
    "learning_rate": 5.0e-06,  # see default_config
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,  # above 0, it counts instead of the epochs
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,  # earlier results are moved aside, not deleted
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
    # Stated elsewhere in the recipe, or left to its trainer's defaults:
    "max_seq_length": 2048,
    "max_grad_norm": 1.0,
    "eval_steps": 100,
    "eval_samples": 500,  # of the 5 % of the chats that are held out, at most
    "loraplus_lr_ratio": 1.0,  # of B's learning rate to A's; above 1 it is LoRA+
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
# Variants of LoRA, each with its flag (`lora.variants` has the papers); these values are plain LoRA.
variant_config: dict[str, Any] = {
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "use_lorafa": False,
    "init_lora_weights": True,
}
# What the default recipe has instead: adapters need ten to a hundred times the learning rate of full
# fine-tuning, and at the published one they learn next to nothing in an epoch.
default_config: dict[str, Any] = {"learning_rate": 1.0e-04}
SHOWN = 4  # held-out questions that are asked before and after
# What differs for the stand-in: thousands of times smaller, it learns at a much higher rate, and it
# is to be done within a minute.
standin_config: dict[str, Any] = {
    "bf16": False,
    "do_eval": True,
    "learning_rate": 5.0e-03,
    "max_steps": 250,
    "eval_steps": 50,
    "per_device_eval_batch_size": 32,
    "per_device_train_batch_size": 16,
    "save_total_limit": 2,
    "gradient_checkpointing": False,
    "gradient_accumulation_steps": 2,
}


@dataclass(frozen=True)
class Setup:
    """Where the run begins: the base model's name or folder, how it is loaded, and the data.

    parallel: "none", or the engine of several processes, "ddp" or "fsdp2". quantize: "nf4", or None.
    """

    base: str
    model_config: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: Data
    parallel: str
    quantize: str | None

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.model_config["dtype"])


def prepare(args: argparse.Namespace) -> Setup:
    """Choose the model and the data, and turn the data into tokens."""
    parallel = processes.check(args.parallel)
    if args.data:
        chats, held_out = read_conversations(args.data), None
    else:
        chats, held_out = map(chat_pairs, documentation())
    if args.model:
        base = args.model
    else:  # what is held out is kept from the stand-in too
        texts = [doc.text() for doc in documentation()[0]]
        cache = args.cache_dir or user_cache()
        with processes.first_alone() as alone:
            base = str(standin_checkpoint(texts, cache, args.base_steps)) if alone else ""
        base = base or str(standin_checkpoint(texts, cache, args.base_steps))
    tokenizer = load(AutoTokenizer, base, cache_dir=args.cache_dir)
    longest, most = training_config["max_seq_length"], training_config["eval_samples"]
    model_config = {
        "cache_dir": args.cache_dir,
        "dtype": args.dtype or ("bfloat16" if training_config["bf16"] else "float32"),
        "attn_implementation": args.attn_implementation,
    }
    data = encode_data(chats, held_out, tokenizer, longest, most)
    return Setup(base, model_config, tokenizer, data, parallel, args.quantize)


@functools.cache
def documentation() -> tuple[list[Doc], list[Doc]]:
    """What the built-in chats and the stand-in are made from: (for training, held out)."""
    return split(read_docs())


def load_adapted(setup: Setup) -> PreTrainedModel:
    """The pretrained model with LoRA layers, and everything but these frozen."""

    def change(model: PreTrainedModel) -> None:
        adapt(model, setup.base, quantize=setup.quantize, **peft_config, **variant_config)
        lora.mark_only_lora_as_trainable(model, bias=peft_config["bias"])

    if setup.quantize:
        model = load_quantized(setup.base, change, **setup.model_config)
        return processes.sharded(model) if setup.parallel == "fsdp2" else model
    if setup.parallel == "fsdp2":
        return load_in_shards(setup.base, change, **setup.model_config)
    model = load_plain(setup, setup.base)
    change(model)
    return model


def load_plain(setup: Setup, name: str) -> PreTrainedModel:
    """The model `name` without an update, loaded as the base is: over all processes, or in each."""
    if setup.parallel == "fsdp2":
        return load_in_shards(name, lambda model: None, **setup.model_config)
    return load(AutoModelForCausalLM, name, **setup.model_config).to(device())


def train(setup: Setup, resume: bool) -> Trainer:
    """Fine-tune, from the pretrained model or from a checkpoint; the trainer when it is done."""
    output = Path(training_config["output_dir"])
    settings = {
        "model": Path(setup.base).name,
        "data": fingerprint([*setup.data.train, *setup.data.held_out]),
        "dtype": setup.model_config["dtype"],
        "attn_implementation": setup.model_config["attn_implementation"],
        "device": device().type,
        "quantize": setup.quantize,
        **binding(training_config, peft_config | variant_config),
    }
    checkpoint = load_checkpoint(output / "checkpoints", settings) if resume else None
    torch.manual_seed(training_config["seed"])
    model = load_adapted(setup)
    if training_config["gradient_checkpointing"]:
        checkpoint_activations(model, training_config["gradient_checkpointing_kwargs"])
    if processes.is_first():
        lora.summary(model)
    if processes.count() > 1:
        log.info(
            "%d processes by %s: at most %.0f MB in one after loading its %.0f MB of weights",
            processes.count(),
            setup.parallel,
            processes.most(processes.peak_mb()),
            processes.most(base_bytes(model)) / 1e6,
        )

    events = RunLog(output / "log.jsonl", writes=processes.is_first())
    trainer = Trainer(model, setup.data, training_config, settings, output, events, setup.parallel)
    log.info("%s", plan(training_config, peft_config["r"], trainer.batches))
    if checkpoint is None:
        with processes.first_alone() as alone:
            if alone:
                make_room(output, training_config["overwrite_output_dir"])
        machine = {"threads": torch.get_num_threads(), "processes": processes.count()}
        events.write("start", settings=settings, **machine)
        events.write("data", **setup.data.counts())
        trainer.evaluate("before")
        replies = answers(model, setup.tokenizer, setup.data.held_out[:SHOWN])
        events.write("answers", when="before", answers=replies)
    else:
        trainer.resume(checkpoint)
        before = events.find("start")
        if (before["threads"], before["processes"]) != (torch.get_num_threads(), processes.count()):
            log.warning("another number of threads or processes: the last bits may differ")
    trainer.run()
    return trainer


def evaluate_and_save(setup: Setup, trainer: Trainer) -> dict[str, Any]:
    """Loss and answers after the training, beside those from before it; then save the adapter."""
    events, output = trainer.log, trainer.folder
    loss = trainer.evaluate("after")
    if processes.is_first():
        plot_losses(events.events, output / "loss.png")
    shown = setup.data.held_out[:SHOWN]
    before = events.find("answers", when="before")["answers"]
    after = answers(trainer.model, setup.tokenizer, shown)
    events.write("answers", when="after", answers=after)
    log.info("held-out questions, before and after:\n%s", side_by_side(shown, before, after))

    if setup.parallel == "fsdp2" or processes.is_first():  # of a sharded model, all gather it
        lora.save_adapter(trainer.model, output / "adapter", base_model_name_or_path=setup.base)
    loss_before = events.find("evaluate", when="before")["loss"]
    if warning := hardly_moved(loss_before, loss, training_config["learning_rate"]):
        log.warning("%s", warning)
    report = {
        "eval_loss_before": loss_before,
        "eval_loss_after": loss,
        "base_bytes": processes.most(base_bytes(trainer.model)),
        "trainable_parameters": sum(p.numel() for p in trainer.trained),
        "tokens_per_second": round(trainer.tokens_per_second, 1),
    }
    if processes.count() > 1:
        peak = round(processes.most(processes.peak_mb()), 1)
        report |= {"processes": processes.count(), "parallel": setup.parallel, "peak_mb": peak}
    return report


def check_and_export(setup: Setup, expected_loss: float) -> dict[str, float]:
    """Load the adapter into a fresh base, export the merged model, and compare their losses."""
    output = Path(training_config["output_dir"])
    size = training_config["per_device_eval_batch_size"]
    gc.collect()  # the trained model, of which nothing is needed any more
    with processes.first_alone():
        pass  # the adapter is written
    sharded = setup.parallel == "fsdp2"
    adapted = sharded or setup.quantize
    model = load_adapted(setup) if adapted else load_plain(setup, setup.base)
    lora.load_adapter(model, output / "adapter")
    reloaded = evaluate(model, setup.data.held_out, size, setup.data.pad_id)["loss"]

    differences = {"reload_difference": abs(reloaded - expected_loss)}
    if variant_config["lora_bias"]:
        log.info("not merged: Phi-3's layers have no biases to merge those of the updates into")
        return _checked(differences, setup.dtype)
    with processes.first_alone() as alone:
        if alone and sharded and not setup.quantize:  # a block of a weight at a time
            adapter = read_adapter(output / "adapter").checked()
            merge_checkpoint(
                folder_of(setup.base, setup.model_config["cache_dir"]), adapter, output / "merged"
            )
        elif alone:
            if sharded:
                model = load_adapted(replace(setup, parallel="none"))
                lora.load_adapter(model, output / "adapter")
            if setup.quantize:  # on the GPU there may be no room for the dense model
                lora.unpatch(model.to("cpu"), merge=True, dtype=setup.dtype)
            else:
                lora.unpatch(model, merge=True)
            model.save_pretrained(output / "merged")
            setup.tokenizer.save_pretrained(output / "merged")
    del model  # from here on as anyone would who has never heard of this library
    plain = load_if_it_fits(setup, str(output / "merged"))
    if plain is not None:
        merged = evaluate(plain, setup.data.held_out, size, setup.data.pad_id)["loss"]
        reply = answers(plain, setup.tokenizer, setup.data.held_out[:1])[0]
        log.info("the merged model, %s, answers: %s", output / "merged", reply)
        differences["merged_difference"] = abs(merged - expected_loss)
    return _checked(differences, setup.dtype)


def dense_base_loss(setup: Setup) -> dict[str, float]:
    """What the loss was before quantising, if there is room for the base as it was."""
    model = load_if_it_fits(setup, setup.base)
    if model is None:
        return {}
    size = training_config["per_device_eval_batch_size"]
    loss = evaluate(model, setup.data.held_out, size, setup.data.pad_id)["loss"]
    return {"base_eval_loss": loss}


def load_if_it_fits(setup: Setup, name: str) -> PreTrainedModel | None:
    """As `load_plain`; None if a GPU has room for the model's 4-bit form alone."""
    gc.collect()
    try:
        model = load_plain(setup, name)
    except torch.OutOfMemoryError:
        model = None
    if processes.most(model is None):
        log.warning("%s does not fit into the GPU's memory, so its loss is not compared", name)
        return None
    return model


def _checked(differences: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2  # bf16 has three digits
    if max(differences.values()) > tolerance:
        raise RuntimeError(f"saving or merging changed the loss: {differences}")
    return differences


def arguments() -> argparse.Namespace:
    """Read the command line and carry its settings into the dictionaries above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder or Hub name of a Phi-3 model (default: a small stand-in)")
    add("--data", type=Path, help="JSONL file of chats (default: made from Python's documentation)")
    add(
        "--recipe",
        choices=("default", "published"),
        default="default",
        help="published: with --model, every published value, the learning rate of 5e-6 included",
    )
    add(
        "--lr", type=float, help="learning rate; the same as --set learning_rate=LR (default: 1e-4)"
    )
    add("--output", metavar="FOLDER", help=f"default: {training_config['output_dir']}")
    add("--resume", action="store_true", help="go on from the newest checkpoint in the output")
    add("--steps", type=int, help="training steps; the same as --set max_steps=STEPS")
    add("--parallel", choices=("ddp", "fsdp2"), help="under torchrun: the engine (default: ddp)")
    add("--seed", type=int, help="the same as --set seed=SEED")
    add("--dtype", choices=("float32", "bfloat16"), help="of the model's weights")
    add("--quantize", choices=("nf4",), help="QLoRA: frozen projections of 4 bits (default: dense)")
    add("--attn-implementation", default="sdpa", help="or eager, flash_attention_2 (default: sdpa)")
    add("--cache-dir", type=Path, help="where models are kept (default: the user's cache)")
    add("--base-steps", type=int, default=BASE_STEPS, help="training steps of the stand-in")
    add("--use-rslora", action="store_true", help="scale the update by lora_alpha / sqrt(r)")
    add("--use-dora", action="store_true", help="DoRA: train the norms of the rows apart")
    add(
        "--lora-bias", action="store_true", help="give every update a bias (then nothing is merged)"
    )
    add("--use-lorafa", action="store_true", help="LoRA-FA: freeze A, which saves memory")
    add("--init-lora-weights", metavar="pissa", help="PiSSA; or pissa_niter_16, which is faster")
    add("--loraplus-lr-ratio", type=float, metavar="RATIO", help="LoRA+: of B's rate to A's")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change an entry of training_config or peft_config; may be repeated",
    )
    args = parser.parse_args()
    if args.model is None:
        if args.recipe == "published":
            parser.error("--recipe published needs --model: the stand-in has settings of its own")
        training_config.update(standin_config)
    elif args.recipe == "default":
        training_config.update(default_config)
    for name, value in (
        ("learning_rate", args.lr),
        ("output_dir", args.output),
        ("max_steps", args.steps),
        ("seed", args.seed),
        ("loraplus_lr_ratio", args.loraplus_lr_ratio),
    ):
        if value is not None:
            training_config[name] = value
    for name in variant_config:
        variant_config[name] = getattr(args, name) or variant_config[name]
    return args


def main() -> int:
    began = time.perf_counter()
    processes.start()
    args = arguments()
    try:
        assign((training_config, peft_config), args.set)
        check(training_config)
        logging.basicConfig(
            level=training_config["log_level"].upper() if processes.is_first() else logging.ERROR,
            format="%(name)s: %(message)s",
        )
        transformers.utils.logging.disable_progress_bar()
        with logging_redirect_tqdm():
            setup = prepare(args)
            report = evaluate_and_save(setup, train(setup, args.resume))
            report |= check_and_export(setup, report["eval_loss_after"])
            report |= dense_base_loss(setup) if setup.quantize else {}
    except InputError as error:
        if processes.is_first():
            print(f"error: {error}", file=sys.stderr)
        return processes.stop(2)
    except KeyboardInterrupt:
        if processes.is_first():
            print("interrupted", file=sys.stderr)
        return processes.stop(130)
    report["seconds"] = round(time.perf_counter() - began, 1)
    if processes.is_first():
        print(json.dumps(report))
    return processes.stop(0)


if __name__ == "__main__":
    sys.exit(main())
