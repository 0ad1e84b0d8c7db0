"""Hugging Face's Trainer, and TRL's trainers over it, on a model that was patched by `lora`.

`AdapterCallback` makes them save, resume and keep the adapter alone; `reference_model` is DPO's
reference on the policy's own weights. Import it by name (`import lora.hf`): `import lora` needs no
transformers. In a checkpoint folder lie then, beside the Trainer's own files,

    adapter_config.json, adapter_model.safetensors    the adapter, in PEFT's format
    model.safetensors     what trains, by the model's own names: what the Trainer loads to go on; with
                          it a description of the adapter, so that another one is refused

and never the base, nor a config.json, with which `from_pretrained` would take the folder for a whole
model and fill it with random weights. Not served, and refused by name: FSDP and DeepSpeed, under which
the Trainer gathers and writes the whole model past anything that a callback or the model could hold
back (training itself works), and generation by vLLM, which is sent the model's parameters and knows
no update.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ._base import LoRALayer
from .adapter import AdapterError, save_adapter
from .adapter.contents import Layer, listed
from .adapter.files import write_file
from .adapter.save import active_modules, described
from .full import full_modules, original
from .sharded import sharded_tensor
from .state import adapter_parameters, bias_mode
from .switch import inner_model
from .unpatch import unpatch

try:
    from transformers import PreTrainedModel, TrainerCallback
    from transformers.utils import SAFE_WEIGHTS_NAME
except ImportError as error:
    raise ImportError(
        f'lora.hf needs transformers ({error}): pip install "lora-layers[hf]"'
    ) from error

__all__ = ["AdapterCallback", "reference_model"]

_Model = TypeVar("_Model", bound=nn.Module)
_Description = dict[str, dict[str, Any]]

_BEST = "best"  # folder of the best adapter in the Trainer's output_dir
_DESCRIPTION = "lora_adapter"  # entry of model.safetensors: `_describe`, in JSON, as bytes
_INSTEAD = (
    "train without AdapterCallback, and call lora.save_adapter(trainer.model, folder) in every "
    "process, in a callback's on_save or at the end: all gather the adapter, the first writes it"
)
_DEEPSPEED_ADVICE = (
    "train without AdapterCallback, and call lora.save_adapter(trainer.model, folder) in one process "
    "at the end; with ZeRO's stage 3 within deepspeed.zero.GatheredParameters(list(model.parameters()))"
)


class AdapterCallback(TrainerCallback):
    """Let a Trainer save, resume and keep the best of the adapter of its model, not the model.

        trainer = Trainer(model=lora.patch_phi3(model), ..., callbacks=[lora.hf.AdapterCallback()])

    Checkpoints and `trainer.save_model` hold the adapter alone (see the module). `train(
    resume_from_checkpoint=...)` goes on from one, on a CPU to the bit, and refuses one of another
    adapter or base by an AdapterError before anything is loaded. The adapter of the best evaluation
    of the training, by `metric_for_best_model` (or else by `eval_loss`, where the Trainer has one), is
    kept in `output_dir/best`, whether that step was saved or not.

    The model's `save_pretrained` saves the adapter from then on; after `lora.unpatch`, or with a
    `state_dict` of your own, the plain model as before.

    Raises ValueError when the Trainer is built: a model without LoRA layers, a compiled one, one
    that is none of transformers', one that is sharded over processes, FSDP, DeepSpeed (the message
    says what to do instead); with TRL, `sync_ref_model`, `use_vllm` and an update of the output
    head. When training begins: a resumed one whose model `model_init` has made meanwhile, since its
    checkpoint was loaded without a check.
    """

    def __init__(self) -> None:
        self._training = False

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _save_adapters_only(kwargs["model"], args)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not _is_served(model) and state.global_step > 0:
            raise ValueError(
                "model_init made another model after its checkpoint was checked: resume with "
                "Trainer(model=...), patched as it was for that run"
            )
        _save_adapters_only(model, args)  # with model_init it is another one than before
        self._training = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False  # should the step be interrupted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the adapter where the Trainer uploads from, which without PEFT leaves it behind."""
        if args.should_save:
            save_adapter(kwargs["model"], args.output_dir)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the adapter if no earlier evaluation, in the Trainer's own log, was as good."""
        metric = args.metric_for_best_model or "loss"
        key = metric if metric.startswith("eval_") else f"eval_{metric}"
        value = kwargs["metrics"].get(key)
        if not self._training or value is None or not math.isfinite(value) or not args.should_save:
            return
        sign = 1 if args.greater_is_better else -1
        earlier = [e[key] for e in state.log_history if key in e and e["step"] < state.global_step]
        if all(sign * value > sign * other for other in earlier if math.isfinite(other)):
            save_adapter(kwargs["model"], Path(args.output_dir) / _BEST)


def reference_model(model: _Model, adapted: bool = False) -> _Model:
    """DPO's reference model, on the frozen weights of `model` itself: no second copy of them.

        trainer = DPOTrainer(model, ref_model=lora.hf.reference_model(model), ...)

    It is the plain base, without LoRA layers, in eval mode: its logits are the untouched base's, to
    the bit, however the adapter trains. With adapted=True it has the update as well, as it is now:
    the reference for an adapter that was fine-tuned before. Copied are the module objects and what
    trains; not the frozen Parameters and the buffers. Make it before the trainer, and not anew for
    each step.

    Without `ref_model`, TRL's DPOTrainer loads a second copy of the base from
    `config._name_or_path`, or, with `precompute_ref_log_probs=True`, takes the policy as it is at
    the beginning, which needs no reference model either.
    """
    inner = inner_model(model)
    frozen = [p for p in inner.parameters() if not p.requires_grad]
    for _, module in full_modules(inner):
        frozen += original(module).parameters()
    shared = {id(tensor): tensor for tensor in (*frozen, *inner.buffers())}
    reference: Any = copy.deepcopy(inner, shared)
    # What a trainer or accelerate put on this very object: it would call the policy, not the copy.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        reference.__dict__.pop(name, None)
    if not adapted:
        reference = unpatch(reference)
    return reference.eval().requires_grad_(False)  # type: ignore[no-any-return]


class _AdapterOnly:
    """Stands for `save_pretrained` of one model, and watches what is loaded into that model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.resuming = False

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        if state_dict is not None or not active_modules(self.model):
            type(self.model).save_pretrained(
                self.model, save_directory, is_main_process, state_dict, **options
            )
        elif is_main_process:
            if options.get("push_to_hub"):
                raise ValueError(
                    "push_to_hub=True: expected False for a model with LoRA layers; use "
                    "model.push_to_hub(...), which uploads the adapter"
                )
            save_adapter(self.model, save_directory)
            self._save_what_trains(Path(save_directory))

    def _save_what_trains(self, folder: Path) -> None:
        from safetensors.torch import save

        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in _trained(self.model).items()
        }
        described = bytearray(json.dumps(_describe(self.model)).encode())
        tensors[_DESCRIPTION] = torch.frombuffer(described, dtype=torch.uint8)
        write_file(folder / SAFE_WEIGHTS_NAME, save(tensors, {"format": "pt"}))

    def before_load(
        self, model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object
    ) -> None:
        """Refuse a checkpoint of another adapter; let any other state dict pass."""
        entry = state.pop(f"{prefix}{_DESCRIPTION}", None)
        self.resuming = entry is not None
        if entry is not None:
            then: _Description = json.loads(bytes(entry.tolist()))
            now: _Description = json.loads(json.dumps(_describe(self.model)))
            if then != now:
                raise AdapterError(
                    f"a checkpoint of another adapter: {listed(_differences(then, now))}; patch the "
                    "model as it was patched for that run, or train without resume_from_checkpoint"
                )

    def after_load(self, model: nn.Module, keys: Any) -> None:
        """The frozen weights are not missing in a checkpoint: the Trainer would list them all."""
        if self.resuming:
            keys.missing_keys.clear()
            self.resuming = False


def _is_served(model: nn.Module) -> bool:
    """Whether an `_AdapterOnly` is on this very model."""
    return isinstance(model.__dict__.get("save_pretrained"), _AdapterOnly)


def _save_adapters_only(model: nn.Module, args: Any) -> None:
    """Put an `_AdapterOnly` on `model`, once; `args` are the Trainer's."""
    _check(model, args)
    if not _is_served(model):
        only = _AdapterOnly(model)  # type: ignore[arg-type]
        model.__dict__["save_pretrained"] = only
        model.register_load_state_dict_pre_hook(only.before_load)  # type: ignore[no-untyped-call]
        model.register_load_state_dict_post_hook(only.after_load)  # type: ignore[no-untyped-call]


def _check(model: nn.Module, args: Any) -> None:
    """ValueError for a model that cannot be served, and for what would train or write wrongly."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            f"{kind}: the model is compiled already; give the Trainer the model that was compiled, "
            "and TrainingArguments(torch_compile=True)"
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{kind}: expected a model of transformers (a PreTrainedModel)")
    if not active_modules(model):
        raise ValueError(
            f"{kind} has no LoRA layers: call lora.patch_phi3(model) or lora.patch(model, ...) "
            "before the Trainer is built"
        )
    for engine, advice in (("fsdp", _fsdp_advice(args)), ("deepspeed", _DEEPSPEED_ADVICE)):
        by_accelerate = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower()
        if getattr(args, engine, None) or by_accelerate in ("1", "true"):
            raise ValueError(
                f"{engine}: its checkpoints are not the adapter's, but whole models, which it gathers "
                f"and writes without asking the model; {advice}"
            )
    if sharded_tensor(model) is not None:
        raise ValueError(
            f"{kind} is sharded over processes: expected a model that is whole in each; {_INSTEAD}"
        )
    if getattr(args, "use_vllm", False):
        raise ValueError(
            "use_vllm=True: vLLM is sent the model's parameters, without the update in them; "
            "expected False"
        )
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True: it writes into the reference's weights, which are the frozen "
            "base's; expected False"
        )
    of_trl = any(base.__module__.startswith("trl.") for base in type(args).__mro__)
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if of_trl and isinstance(head, LoRALayer):
        raise ValueError(
            "the output head is a LoRA layer, and TRL reads its weight without calling it, so the "
            "update would never train; leave the head out of target_modules, or name it in "
            "modules_to_save, which trains it in full"
        )


def _fsdp_advice(args: Any) -> str:
    """What to do instead under FSDP, whose version accelerate's launcher puts in the environment."""
    by_arguments = getattr(args, "fsdp_plugin_args", None) or {}
    version = by_arguments.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
    if str(version) == "2":
        return _INSTEAD
    return (
        f"of version {version} the adapter cannot be gathered either: take version 2 "
        "(fsdp_config={'version': 2}, or accelerate launch --fsdp_version 2), and then "
        f"{_INSTEAD}"
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors and whatever else trains, by the model's own names, each once."""
    chosen = {id(p) for p in adapter_parameters(model, bias_mode(model))}
    for _, module in full_modules(model):  # with its running statistics
        chosen |= {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    first: dict[int, str] = {}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if tensor.requires_grad or id(tensor) in chosen:
            first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def _describe(model: nn.Module) -> _Description:
    """What must be the same for a run to go on: layers, their options and base, and all shapes."""
    layers, _ = described(active_modules(model))
    description = {name: _options(layer) for name, layer in layers.items()}
    for name, parameter in _trained(model).items():
        description[name] = {"shape": list(parameter.shape), "dtype": str(parameter.dtype)}
    return description


def _options(layer: Layer) -> dict[str, Any]:
    """All but the tensors and dropout, which a resumed run may change."""
    values = {"r": layer.r, **{field.name: getattr(layer, field.name) for field in fields(layer)}}
    del values["lora_dropout"]
    return {name: value for name, value in values.items() if not isinstance(value, Tensor)}


def _differences(then: _Description, now: _Description) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name, {}), now.get(name, {})
        if not new or not old:
            yield f"{name} is {'in the checkpoint' if old else 'in the model'} alone"
        elif old != new:
            changes = [
                f"{k}={old.get(k)!r} (here {new.get(k)!r})"
                for k in {**old, **new}
                if old.get(k) != new.get(k)
            ]
            yield f"{name} has {', '.join(changes)}"
