"""A Trainer of a patched Phi-3: what test_hf_fsdp.py runs in one process and, by torchrun, in two.

torchrun --standalone --nproc-per-node 2 tests/hf_fsdp_cases.py FOLDER

On one process the Trainer is a plain one; on two, each of which takes half of every batch, accelerate
shards the model by FSDP2.
"""

import faulthandler
import gc
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lora
import lora.hf

CASES = ("fp32", "resumed", "bf16")
STEPS = 4
SAVED = 2  # the step of the checkpoint that "resumed" goes on from
WORLD = int(os.environ.get("WORLD_SIZE", "1"))


def make(case: str) -> nn.Module:
    """The small Phi-3 of conftest.py, plain."""
    config = Phi3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return Phi3ForCausalLM(config).to(torch.bfloat16 if case == "bf16" else torch.float32)


def rows() -> list[dict[str, list[int]]]:
    """Rows of twelve tokens that count up from anywhere, which is quickly learned."""
    starts = torch.randint(3, 60, (24, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x.tolist(), "labels": x.tolist()} for x in starts + torch.arange(12)]


class ShardingTrainer(Trainer):
    """A Trainer that shards on CPUs too.

    accelerate (1.15) knows FSDP for GPUs alone: where `PartialState` says MULTI_CPU, `AcceleratorState`
    drops the plugin without a word, and the Trainer trains under DDP. So the state says MULTI_GPU
    while the Accelerator is made. All else, the device too, is as accelerate has it.
    """

    def create_accelerator_and_postprocess(self) -> None:
        PartialState().distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        assert (state.is_fsdp2, state.device.type) == (True, "cpu")


class SaveAdapter(TrainerCallback):
    """What a user writes for an adapter beside each checkpoint; it is called in every process."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lora.save_adapter(kwargs["model"], Path(args.output_dir) / f"adapter-{state.global_step}")


def make_trainer(case: str, folder: Path) -> Trainer:
    model = make(case)
    torch.manual_seed(2 if case == "resumed" else 1)  # a checkpoint brings its own factors
    lora.patch_phi3(model, r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    # bf16 rounds a sum over all rows otherwise than the sum of two over half of them, and Adam takes
    # a step of the full length in the direction of every gradient that is all rounding. So one
    # process goes through the halves in turn, and fp32 alone shows that this is the same.
    halves = 2 if case == "bf16" and WORLD == 1 else 1
    sharding: dict[str, Any] = {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Phi3DecoderLayer"]},
        # Without it fully_shard would take a mesh of GPUs wherever torch was built for them.
        "parallelism_config": ParallelismConfig(dp_shard_size=WORLD),
        "ddp_backend": "gloo",
    }
    return (ShardingTrainer if WORLD > 1 else Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / case),
            max_steps=STEPS,
            learning_rate=2e-2,
            per_device_train_batch_size=8 // halves // WORLD,
            gradient_accumulation_steps=halves,
            per_device_eval_batch_size=4,
            save_steps=SAVED,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            seed=7,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **(sharding if WORLD > 1 else {}),
        ),
        train_dataset=rows()[:16],
        eval_dataset=rows()[16:],
        callbacks=[SaveAdapter()],
    )


def logged(trainer: Trainer, key: str) -> list[float]:
    return [e[key] for e in trainer.state.log_history if key in e]


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lora.lora_state_dict(model).items()}


def run(case: str, folder: Path) -> tuple[Trainer, dict[str, Any]]:
    """Train one case, save its adapter in `folder`; the Trainer, and what is to be compared."""
    trainer = make_trainer(case, folder)
    resume = str(folder / "fp32" / f"checkpoint-{SAVED}") if case == "resumed" else None
    trainer.train(resume_from_checkpoint=resume)
    if WORLD > 1:
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    lora.save_adapter(trainer.model, folder / case / "adapter")
    results = {key: logged(trainer, key) for key in ("loss", "eval_loss", "grad_norm")}
    return trainer, {**results, "factors": factors(trainer.model)}


def refusal(model: nn.Module) -> str:
    """What AdapterCallback says to a model that is sharded, although no argument told of FSDP."""
    del os.environ["ACCELERATE_USE_FSDP"]  # accelerate has set it
    try:
        lora.hf.AdapterCallback().on_init_end(SimpleNamespace(), None, None, model=model)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(600, exit=True)  # a rank that is stuck says where
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Slicing a flattened dim", UserWarning)  # accelerate does so
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    rank = dist.get_rank()
    for case in CASES:
        trainer, results = run(case, folder)
        torch.save(results, folder / f"{case}-{rank}.pt")
    (folder / f"refusal-{rank}.txt").write_text(refusal(trainer.model))
    del trainer
    gc.collect()
    print(f"rank {rank} of {WORLD}: done", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Threads that outlive the group can abort the interpreter while it shuts down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
