"""A patched model in transformers' Trainer: checkpoints, resuming, the best, and DPO's reference."""

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lora
import lora.hf

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
PATCH = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
IDS = torch.arange(3, 43).view(2, 20)


def rows():
    """Rows of twelve tokens that count up from anywhere, which is quickly learned."""
    starts = torch.randint(3, 60, (24, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": x.tolist(), "labels": x.tolist()} for x in starts + torch.arange(12)]


@pytest.fixture
def make_trainer(make_phi3, tmp_path):
    """A Trainer of a freshly patched model, whose factors are drawn under a seed of their own."""
    torch.set_num_threads(1)

    def make(model=None, seed=1, folder="run", compute_metrics=None, **changes):
        if model is None:
            model = make_phi3()
            torch.manual_seed(seed)
            lora.patch_phi3(model, **PATCH)
        options = {
            "max_steps": 8,
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 4,
            "save_steps": 3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "seed": 7,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        return Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path / folder), **{**options, **changes}),
            train_dataset=rows()[:16],
            eval_dataset=rows()[16:],
            compute_metrics=compute_metrics,
            callbacks=[lora.hf.AdapterCallback()],
        )

    return make


def logged(trainer, key):
    """{step: value} of everything that the run logged under `key`."""
    return {e["step"]: e[key] for e in trainer.state.log_history if key in e}


def factors(source):
    """The factors of a model, or of a folder with an adapter as a fresh plain model loads it."""
    return {k: v.clone() for k, v in lora.lora_state_dict(source).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def loaded(base, folder):
    lora.load_adapter(base, folder)
    return base


# Checkpoints


def test_training_saves_the_adapter_alone_and_leaves_the_base_as_it_was(make_trainer, make_phi3):
    base = make_phi3().state_dict()
    trainer = make_trainer(max_steps=30, eval_steps=1, save_steps=10)
    trainer.train()
    for _ in range(3):
        trainer.evaluate()
    losses = logged(trainer, "eval_loss")
    assert losses[30] < 0.95 * losses[1]
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    for step in (10, 20, 30):
        folder = Path(trainer.args.output_dir, f"checkpoint-{step}")
        names = {path.name for path in folder.iterdir()}
        assert names > ADAPTER
        assert "config.json" not in names
        stored = load_file(folder / "model.safetensors")
        assert stored.keys() - {"lora_adapter"} == lora.lora_state_dict(trainer.model).keys()
    assert same(factors(loaded(make_phi3(), folder)), factors(trainer.model))


def test_peft_reads_a_checkpoint(make_trainer, make_phi3):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    expected = trainer.model.eval()(IDS).logits
    folder = Path(trainer.args.output_dir, "checkpoint-3")
    theirs = PeftModel.from_pretrained(make_phi3(), folder).eval()
    torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_save_model_writes_the_adapter_and_after_unpatching_the_model(
    make_trainer, make_phi3, tmp_path
):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert same(factors(loaded(make_phi3(), tmp_path / "saved")), factors(trainer.model))
    model = trainer.model.eval()
    model.save_pretrained(tmp_path / "other_process", is_main_process=False)
    assert not (tmp_path / "other_process").exists()
    model.save_pretrained(tmp_path / "whole", state_dict=lora.merged_state_dict(model))
    expected = model(IDS).logits
    lora.unpatch(model, merge=True).save_pretrained(tmp_path / "merged")
    for folder in ("whole", "merged"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert not ADAPTER & {path.name for path in (tmp_path / folder).iterdir()}


def test_uploading_from_save_pretrained_is_refused(make_trainer, tmp_path):
    model = make_trainer().model
    with pytest.raises(ValueError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


# Resuming


@pytest.fixture
def log_of_transformers():
    """What transformers logs as a warning or worse."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


# transformers has renamed it within its fifth version.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
RUNS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "checkpointed": {
        CHECKPOINTING: True,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_repeats_every_loss_to_the_bit(make_trainer, name, log_of_transformers):
    whole = make_trainer(**RUNS[name])
    whole.train()
    torch.manual_seed(99)  # the resumed run must not need the state of this process
    resumed = make_trainer(seed=2, folder="resumed", **RUNS[name])
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-3")))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert logged(whole, key) == logged(resumed, key)
    assert same(factors(whole.model), factors(resumed.model))
    assert not [line for line in log_of_transformers if "keys" in line]


VARIANTS = [
    {"use_dora": True, "use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"use_lorafa": True, "lora_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: next(iter(variant)))
def test_variants_are_resumed_to_the_bit(make_trainer, make_phi3, variant):
    def patched(seed):
        model = make_phi3()
        torch.manual_seed(seed)
        return lora.patch_phi3(model, **PATCH, **variant)

    whole = make_trainer(patched(1))
    whole.train()
    resumed = make_trainer(patched(2), folder="resumed")
    checkpoint = str(Path(whole.args.output_dir, "checkpoint-3"))
    resumed.train(resume_from_checkpoint=checkpoint)
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert same(factors(whole.model), factors(resumed.model))
    plain = make_trainer(seed=2, folder="plain")
    with pytest.raises(lora.AdapterError, match="a checkpoint of another adapter"):
        plain.train(resume_from_checkpoint=checkpoint)


def test_resuming_takes_the_newest_checkpoint(make_trainer):
    whole = make_trainer()
    whole.train()
    shutil.rmtree(Path(whole.args.output_dir, "checkpoint-8"))
    resumed = make_trainer(seed=2)
    resumed.train(resume_from_checkpoint=True)
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert resumed.state.global_step == 8


def test_what_trains_beside_the_factors_is_resumed_too(make_trainer, make_phi3):
    """A head that trains in full, and a parameter that was unfrozen by hand."""

    def patched(seed):
        torch.manual_seed(seed)
        model = lora.patch_phi3(make_phi3(), **PATCH | {"modules_to_save": ["lm_head"]})
        model.model.norm.weight.requires_grad = True
        return model

    whole = make_trainer(patched(1))
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        whole.train()
    checkpoint = Path(whole.args.output_dir, "checkpoint-3")
    resumed = make_trainer(patched(2), folder="resumed")
    with pytest.warns(UserWarning, match=r"model\.norm\.weight"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert torch.equal(whole.model.lm_head.weight, resumed.model.lm_head.weight)
    assert not torch.equal(whole.model.lm_head.weight, make_phi3().lm_head.weight)


def make_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_bias=True,
        )
    ).eval()


def test_biases_of_another_model_are_resumed_too(make_trainer):
    def patched(seed):
        model = make_llama()
        torch.manual_seed(seed)
        options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "bias": "lora_only"}
        return lora.patch(model, ["q_proj", "v_proj"], **options)

    whole = make_trainer(patched(1))
    whole.train()
    resumed = make_trainer(patched(2), folder="resumed")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-6")))
    assert logged(whole, "loss") == logged(resumed, "loss")
    bias = whole.model.model.layers[0].self_attn.q_proj.bias
    assert bias.any()  # it began at zero
    assert torch.equal(bias, resumed.model.model.layers[0].self_attn.q_proj.bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"down_proj has r=4 \(here 8\), scaling=2\.0 \(here 1\.0\)"),
        ({"lora_alpha": 16}, r"scaling=2\.0 \(here 4\.0\)"),
        ({"target_modules": ["qkv_proj", "down_proj"]}, "is in the checkpoint alone"),
        ({"enable_qkv": (True, False, True)}, "enable_lora="),
        ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight is in the model alone"),
        ({"base": 1}, "fingerprint="),
    ],
)
def test_a_checkpoint_of_another_adapter_is_refused(make_trainer, make_phi3, change, message):
    first = lora.patch_phi3(make_phi3(), **PATCH | {"enable_qkv": (True, True, False)})
    trainer = make_trainer(first, max_steps=3)
    trainer.train()
    options = {**PATCH, "enable_qkv": (True, True, False), **change}
    base = make_phi3()
    if options.pop("base", 0):
        base.model.layers[1].mlp.down_proj.weight.data.normal_()
    other = lora.patch_phi3(base, **options)
    before = copy.deepcopy(other.state_dict())
    resumed = make_trainer(other, folder="other")
    with pytest.raises(lora.AdapterError, match=message):
        resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir, "checkpoint-3")))
    assert same(before, other.state_dict())


def test_other_dropout_and_other_state_dicts_are_no_reason_to_refuse(make_trainer, make_phi3):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    other = lora.patch_phi3(make_phi3(), **PATCH | {"lora_dropout": 0.0})
    resumed = make_trainer(other, folder="other")
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir, "checkpoint-3")))
    missing, unexpected = other.load_state_dict(make_phi3().state_dict(), strict=False)
    assert set(missing) == set(lora.lora_state_dict(other))
    assert not unexpected
    trained = load_file(Path(trainer.args.output_dir, "checkpoint-3", "model.safetensors"))
    lora.unpatch(other)
    with pytest.raises(lora.AdapterError, match="in the checkpoint alone"):
        other.load_state_dict(trained, strict=False)


# The best


def test_the_best_adapter_is_kept_although_its_step_was_not_saved(make_trainer, make_phi3):
    seen = {}

    def worsen(evaluation):
        """Evaluations at steps 2, 4, 6, 8: the second is the best."""
        seen[trainer.state.global_step] = factors(trainer.model)
        return {"score": {2: 0.3, 4: 0.1, 6: 0.5, 8: 0.1}[trainer.state.global_step]}

    options = {"metric_for_best_model": "score", "greater_is_better": False, "save_steps": 5}
    trainer = make_trainer(compute_metrics=worsen, **options)
    trainer.train()
    best = Path(trainer.args.output_dir, "best")
    assert {path.name for path in best.iterdir()} == ADAPTER
    assert same(factors(loaded(make_phi3(), best)), seen[4])
    assert not same(seen[4], seen[8])


@pytest.mark.parametrize("greater", [True, False, None])
def test_greater_is_better_is_respected(make_trainer, make_phi3, greater):
    seen = {}

    def score(evaluation):
        seen[trainer.state.global_step] = factors(trainer.model)
        return {"score": {2: 0.3, 4: 0.1, 6: float("nan"), 8: 0.5}[trainer.state.global_step]}

    options = {"metric_for_best_model": "eval_score", "greater_is_better": greater}
    trainer = make_trainer(compute_metrics=score, save_strategy="no", **options)
    trainer.train()
    best = factors(loaded(make_phi3(), Path(trainer.args.output_dir, "best")))
    assert same(best, seen[4 if greater is False else 8])


def test_the_loss_is_the_default_and_only_training_counts(make_trainer, make_phi3):
    trainer = make_trainer(max_steps=12, save_strategy="no", learning_rate=5e-2)
    trainer.evaluate()
    best = Path(trainer.args.output_dir, "best")
    assert not best.exists()
    trainer.train()
    lowest = min(logged(trainer, "eval_loss").values())
    kept = (best / "adapter_model.safetensors").read_bytes()
    for parameter in lora.lora_state_dict(trainer.model).values():
        parameter.zero_()
    trainer.evaluate()
    assert (best / "adapter_model.safetensors").read_bytes() == kept
    found = make_trainer(loaded(make_phi3(), best), folder="found").evaluate()
    assert found["eval_loss"] == lowest


def test_a_resumed_run_knows_the_best_of_before(make_trainer, make_phi3):
    def score(evaluation):
        return {"score": {2: 0.9, 4: 0.1, 6: 0.2, 8: 0.3}[current.state.global_step]}

    options = {"metric_for_best_model": "score", "compute_metrics": score}
    current = whole = make_trainer(**options)
    whole.train()
    best = Path(whole.args.output_dir, "best")
    kept = (best / "adapter_model.safetensors").read_bytes()
    current = make_trainer(**options)
    current.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-3")))
    assert (best / "adapter_model.safetensors").read_bytes() == kept


def test_load_best_model_at_end(make_trainer, log_of_transformers):
    seen = {}

    def score(evaluation):
        seen[trainer.state.global_step] = factors(trainer.model)
        return {"score": {2: 0.3, 4: 0.7, 6: 0.5, 8: 0.1}[trainer.state.global_step]}

    options = {"metric_for_best_model": "score", "save_steps": 2, "save_total_limit": 1}
    trainer = make_trainer(compute_metrics=score, load_best_model_at_end=True, **options)
    trainer.train()
    assert same(factors(trainer.model), seen[4])
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    assert not [line for line in log_of_transformers if "keys" in line]


# The model that the Trainer is given


def test_models_that_the_callback_cannot_serve_are_refused(make_trainer, make_phi3):
    plain = make_phi3()
    with pytest.raises(ValueError, match=r"no LoRA layers: call lora\.patch_phi3\(model\)"):
        make_trainer(plain)
    assert "save_pretrained" not in plain.__dict__
    compiled = torch.compile(lora.patch_phi3(make_phi3()), backend="eager")
    with pytest.raises(ValueError, match="torch_compile=True"):
        make_trainer(compiled)
    other = torch.nn.Sequential(lora.Linear(4, 4, r=2))
    with pytest.raises(ValueError, match="Sequential: expected a model of transformers"):
        make_trainer(other)


def test_a_second_trainer_goes_on_with_the_model(make_trainer, make_phi3):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    again = make_trainer(trainer.model, max_steps=3, folder="again")
    again.train()
    assert again.model.save_pretrained is trainer.model.save_pretrained
    saved = Path(again.args.output_dir, "checkpoint-3")
    assert same(factors(loaded(make_phi3(), saved)), factors(trainer.model))


def test_model_init(make_trainer, make_phi3, tmp_path):
    """The Trainer makes its model anew when it trains."""
    trainer = make_trainer(max_steps=3)
    trainer = Trainer(
        model_init=lambda: lora.patch_phi3(make_phi3(), **PATCH),
        args=trainer.args,
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[lora.hf.AdapterCallback()],
    )
    trainer.train()
    saved = Path(trainer.args.output_dir, "checkpoint-3")
    assert same(factors(loaded(make_phi3(), saved)), factors(trainer.model))
    assert "config.json" not in {path.name for path in saved.iterdir()}


def test_resuming_a_model_that_model_init_makes_is_refused(make_trainer, make_phi3):
    """Its checkpoint is loaded before the callback can see the model."""
    args = make_trainer(max_steps=3).args
    trainer = Trainer(
        model_init=lambda: lora.patch_phi3(make_phi3(), **PATCH),
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(),
        callbacks=[lora.hf.AdapterCallback()],
    )
    trainer.train()
    with pytest.raises(ValueError, match="model_init made another model"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_that_save_otherwise_are_refused(engine, make_phi3, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
    model = lora.patch_phi3(make_phi3(), **PATCH)
    with pytest.raises(ValueError, match=f"{engine}: its checkpoints"):
        lora.hf.AdapterCallback().on_init_end(SimpleNamespace(), None, None, model=model)
    assert "save_pretrained" not in model.__dict__


def test_generation_by_vllm_is_refused(make_phi3):
    model = lora.patch_phi3(make_phi3(), **PATCH)
    with pytest.raises(ValueError, match="use_vllm=True"):
        lora.hf.AdapterCallback().on_init_end(
            SimpleNamespace(use_vllm=True), None, None, model=model
        )


def test_an_evaluation_after_an_interrupted_training_keeps_nothing(make_trainer):
    class Interrupt(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer = make_trainer()
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    best = Path(trainer.args.output_dir, "best", "adapter_model.safetensors").read_bytes()
    for parameter in lora.lora_state_dict(trainer.model).values():
        parameter.zero_()
    trainer.state.log_history.clear()  # so that any loss would be the best
    trainer.evaluate()
    assert Path(trainer.args.output_dir, "best", "adapter_model.safetensors").read_bytes() == best


def test_uploads_take_the_adapter_along(make_trainer):
    """The Trainer itself copies it into the folder that it uploads with PEFT installed alone."""
    trainer = make_trainer(max_steps=3)
    trainer.train()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert {path.name for path in Path(trainer.args.output_dir).iterdir()} >= ADAPTER


def test_running_statistics_of_a_module_that_trains_in_full_are_resumed(make_trainer, make_phi3):
    def patched():
        model = make_phi3()
        model.model.norm = Counted(model.model.norm)
        torch.manual_seed(1)
        return lora.patch_phi3(model, **PATCH, modules_to_save=["norm"])

    whole = make_trainer(patched(), folder="whole")
    whole.train()
    resumed = make_trainer(patched(), folder="whole")
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir, "checkpoint-3")))
    counts = [trainer.model.model.norm.calls for trainer in (whole, resumed)]
    assert counts == [8, 8]


class Counted(torch.nn.Module):
    """A norm that counts its training steps in its state."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.norm = torch.nn.Parameter(torch.ones(64)), norm
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += self.training
        return self.norm(x) * self.weight


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_save_themselves(make_trainer, make_phi3, tmp_path, duplicate):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    expected = factors(trainer.model)
    other = duplicate(trainer.model)
    for parameter in lora.lora_state_dict(trainer.model).values():
        parameter.fill_(0.5)
    other.save_pretrained(tmp_path / "copy")
    assert same(factors(loaded(make_phi3(), tmp_path / "copy")), expected)
    resumed = make_trainer(other, folder="resumed")
    resumed.train(resume_from_checkpoint=str(Path(trainer.args.output_dir, "checkpoint-3")))
    assert resumed.state.global_step == 8


def test_import_needs_transformers_and_lora_alone_does_not():
    script = (
        "import sys, lora\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try:\n    import lora.hf\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 'pip install "lora-layers[hf]"' in done.stdout, done.stderr


# DPO's reference


def tensors(model):
    return {t.data_ptr(): t.numel() for t in (*model.parameters(), *model.buffers())}


def test_the_reference_is_the_base_on_the_same_weights(make_trainer, make_phi3):
    expected = make_phi3()(IDS).logits
    trainer = make_trainer(max_steps=3)
    trainer.train()
    policy = trainer.model
    reference = lora.hf.reference_model(policy)
    assert type(reference) is type(policy)
    assert not reference.training
    assert not any(isinstance(m, lora.LoRALayer) for m in reference.modules())
    assert not any(p.requires_grad for p in reference.parameters())
    assert tensors(reference).keys() <= tensors(policy).keys()  # no memory of its own
    assert torch.equal(reference(IDS).logits, expected)
    assert not torch.equal(policy.eval()(IDS).logits, expected)
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(
        lora.lora_state_dict(policy)
    )


def test_the_adapted_reference_is_the_policy_of_its_time(make_trainer):
    trainer = make_trainer(max_steps=3)
    trainer.train()
    policy = trainer.model.eval()
    then = policy(IDS).logits
    reference = lora.hf.reference_model(policy, adapted=True)
    own = tensors(reference).keys() - tensors(policy).keys()
    assert sum(tensors(reference)[k] for k in own) == sum(
        p.numel() for p in lora.lora_state_dict(policy).values()
    )
    for parameter in lora.lora_state_dict(policy).values():
        parameter.mul_(2)
    assert torch.equal(reference(IDS).logits, then)
    assert not torch.equal(policy(IDS).logits, then)


def test_the_reference_stands_still_while_biases_and_heads_train():
    policy = lora.patch(
        make_llama(), ["q_proj"], r=2, lora_alpha=4, bias="all", modules_to_save=["lm_head"]
    )
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    reference = lora.hf.reference_model(policy)
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    expected = make_llama()(IDS).logits
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    assert torch.equal(reference(IDS).logits, expected)
    assert not torch.equal(policy(IDS).logits, expected)
    head = policy.lm_head.__dict__["_lora_original"].weight
    assert reference.lm_head.weight is head


def test_the_reference_calls_nothing_that_was_put_on_the_policy(make_trainer, make_phi3):
    """A trainer replaces the policy's forward, in mixed precision for one."""
    trainer = make_trainer(max_steps=2, bf16=True)
    trainer.train()
    assert "forward" in trainer.model.__dict__
    reference = lora.hf.reference_model(trainer.model)
    assert torch.equal(reference(IDS).logits, make_phi3()(IDS).logits)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    assert not reference(IDS).logits.any()


def test_the_description_says_nothing_but_json(make_trainer):
    """What is beside the tensors can be read without this library."""
    trainer = make_trainer(max_steps=3)
    trainer.train()
    folder = Path(trainer.args.output_dir, "checkpoint-3")
    entry = load_file(folder / "model.safetensors")["lora_adapter"]
    said = json.loads(bytes(entry.tolist()))
    assert said["model.layers.0.mlp.down_proj"]["kind"] == "Linear"
    assert said["model.layers.0.mlp.down_proj.lora_A"]["shape"] == [4, 112]
