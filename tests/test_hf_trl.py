"""A patched Phi-3 in TRL's SFTTrainer and DPOTrainer: chats as they are, no code but the callback."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.chat_template_utils import phi3_chat_template

import lora
import lora.hf

# TRL uses names that transformers has deprecated.

PUBLISHED_NAMES = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
COMMON = {
    "learning_rate": 2e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 12,
    "logging_steps": 1,
    "save_steps": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(autouse=True)
def _one_thread_and_no_cache(monkeypatch, tmp_path):
    torch.set_num_threads(1)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def tokenizer():
    """A token for each byte, Phi-3's special ones, and the chat template of the published Phi-3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        chat_template=phi3_chat_template,
    )


@pytest.fixture
def make_model(make_phi3, tokenizer):
    def make(seed=1):
        end = tokenizer.eos_token_id
        model = make_phi3(
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            pad_token_id=end,
            bos_token_id=end,
            eos_token_id=end,
        )
        torch.manual_seed(seed)
        return lora.patch_phi3(model, r=4, lora_dropout=0.1, target_modules="all-linear")

    return make


def said(role, content):
    return {"role": role, "content": content}


def chats():
    """Chats in a `messages` column; every reply is "Yes, it is n."."""
    rows = []
    for n in range(24):
        messages = [said("user", f"Is it {n}?"), said("assistant", f"Yes, it is {n}.")]
        rows.append({"messages": [said("system", "You agree.")] * (n % 2) + messages * (1 + n % 3)})
    return Dataset.from_list(rows)


def prompts():
    """The same as prompts and completions."""
    rows = [
        {
            "prompt": [said("user", f"Is it {n}?")],
            "completion": [said("assistant", f"Yes, it is {n}.")],
        }
        for n in range(24)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def make_sft(make_model, tokenizer, tmp_path):
    def make(data, seed=1, folder="run", **changes):
        return SFTTrainer(
            model=make_model(seed),
            args=SFTConfig(output_dir=str(tmp_path / folder), **{**COMMON, **changes}),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
            processing_class=tokenizer,
            callbacks=[lora.hf.AdapterCallback()],
        )

    return make


def logged(trainer, key):
    return {e["step"]: e[key] for e in trainer.state.log_history if key in e}


CHATS = {
    "whole": (chats, {}),
    "packed": (chats, {"packing": True, "max_length": 128}),
    "completions": (prompts, {}),
    "completions_packed": (prompts, {"packing": True, "max_length": 128}),
    "assistant": (chats, {"assistant_only_loss": True}),
}


@pytest.mark.parametrize("name", CHATS)
def test_sft_with_the_callback_alone(make_sft, make_model, name):
    """With gradient checkpointing, which is TRL's default."""
    data, options = CHATS[name]
    base = lora.unpatch(make_model()).state_dict()
    trainer = make_sft(data(), eval_strategy="steps", eval_steps=4, **options)
    assert trainer.args.gradient_checkpointing
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.3
    state = trainer.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    for folder in ("checkpoint-4", "checkpoint-8", "checkpoint-12"):
        names = {path.name for path in Path(trainer.args.output_dir, folder).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "config.json" not in names
    fresh = lora.unpatch(make_model())
    lora.load_adapter(fresh, Path(trainer.args.output_dir, "checkpoint-12"))
    for key, factor in lora.lora_state_dict(fresh).items():
        assert torch.equal(factor, state[key])


@pytest.mark.parametrize(("name", "turns"), [("completions", 1), ("assistant", 3)])
def test_the_loss_is_on_what_the_assistant_says(make_sft, tokenizer, name, turns):
    data, options = CHATS[name]
    row = make_sft(data(), **options).train_dataset[2]
    learned = [i for i in row["labels"] if i != -100]
    assert tokenizer.decode(learned) == "Yes, it is 2.<|end|>\n" * turns + "<|endoftext|>"


@pytest.mark.parametrize("name", ["packed", "assistant"])
def test_a_resumed_sft_repeats_every_loss_to_the_bit(make_sft, name):
    data, options = CHATS[name]
    whole = make_sft(data(), **options)
    whole.train()
    resumed = make_sft(data(), seed=2, folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-4")))
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert logged(whole, "mean_token_accuracy") == logged(resumed, "mean_token_accuracy")


def test_the_names_of_the_published_recipe_are_refused_with_the_right_ones(make_model):
    """They are Llama's; on Phi-3 two of the seven match, and PEFT ignores the rest."""
    model = lora.unpatch(make_model())
    with pytest.raises(ValueError, match="qkv_proj") as error:
        lora.patch_phi3(model, r=16, lora_alpha=16, target_modules=PUBLISHED_NAMES)
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj"):
        assert name in str(error.value)
    assert not any(isinstance(m, lora.LoRALayer) for m in model.modules())


def test_an_update_of_the_output_head_is_refused(make_model, tokenizer, tmp_path):
    """TRL computes the loss from the head's weight, so that the update would not train."""
    model = lora.patch(lora.unpatch(make_model()), ["lm_head"], r=2, lora_alpha=4)
    with pytest.raises(ValueError, match="output head is a LoRA layer"):
        SFTTrainer(
            model=model,
            args=SFTConfig(output_dir=str(tmp_path), **COMMON),
            train_dataset=chats(),
            processing_class=tokenizer,
            callbacks=[lora.hf.AdapterCallback()],
        )
    assert "save_pretrained" not in model.__dict__


# DPO


def preferences():
    rows = [
        {
            "prompt": [said("user", f"Is it {n}?")],
            "chosen": [said("assistant", f"Yes, it is {n}.")],
            "rejected": [said("assistant", f"No, {n} it is not.")],
        }
        for n in range(24)
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def make_dpo(tokenizer, tmp_path):
    def make(model, reference, **changes):
        options = {**COMMON, "learning_rate": 5e-3, **changes}
        return DPOTrainer(
            model=model,
            ref_model=reference,
            args=DPOConfig(output_dir=str(tmp_path / "dpo"), **options),
            train_dataset=preferences(),
            processing_class=tokenizer,
            callbacks=[lora.hf.AdapterCallback()],
        )

    return make


def storage(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_dpo_against_the_base_without_a_second_copy_of_it(make_dpo, make_model):
    policy = make_model()
    trainer = make_dpo(policy, lora.hf.reference_model(policy))
    assert storage(trainer.ref_model) <= storage(policy)
    base = {k: v.clone() for k, v in trainer.ref_model.state_dict().items()}
    untouched = lora.hf.reference_model(make_model())  # of another model with the same weights
    assert not storage(untouched) & storage(policy)
    checker = make_dpo(make_model(), untouched)
    batch = next(iter(trainer.get_train_dataloader()))

    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[1] == pytest.approx(math.log(2))
    assert margins[1] == 0
    assert all(math.isfinite(loss) for loss in losses.values())
    assert margins[12] > margins[4] > 0
    assert losses[12] < losses[1]
    found = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    expected = checker.compute_ref_log_probs(untouched, batch)
    assert all(map(torch.equal, found, expected))
    moved = trainer.compute_ref_log_probs(trainer.model, batch)
    assert not any(map(torch.equal, moved, expected))
    state = trainer.ref_model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in base.items())
    names = {p.name for p in Path(trainer.args.output_dir, "checkpoint-12").iterdir()}
    assert "adapter_model.safetensors" in names


def test_dpo_of_an_adapter_that_was_fine_tuned_before(make_sft, make_dpo):
    """Policy and reference begin as one: the loss is that of a coin, and then falls."""
    sft = make_sft(prompts())
    sft.train()
    policy = sft.model
    trainer = make_dpo(policy, lora.hf.reference_model(policy, adapted=True))
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[1] == pytest.approx(math.log(2))
    assert margins[1] == 0
    assert losses[12] < losses[1]


def test_reference_log_probabilities_computed_beforehand(make_dpo, make_model):
    policy = make_model()
    options = {"precompute_ref_log_probs": True}
    from_base = make_dpo(policy, lora.hf.reference_model(policy), **options)
    from_policy = make_dpo(make_model(), None, **options)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert from_base.train_dataset[column] == from_policy.train_dataset[column]


def test_a_reference_that_follows_the_policy_is_refused(make_dpo, make_model):
    policy = make_model()
    with pytest.raises(ValueError, match="sync_ref_model=True"):
        make_dpo(policy, lora.hf.reference_model(policy), sync_ref_model=True)
