"""LoRALayer: what every layer shares. r, alpha, scaling, dropout; merging; wrapping and unwrapping.

A layer computes weight + scaling · update(lora_A, lora_B) without ever writing to `weight`. Merging
makes a second tensor that eval forward uses; it is not part of the state, so `state_dict()` is the
same in both modes, and a weight that is tied to another module cannot be harmed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels.nf4_tensor import NF4Tensor
from .kernels.ops import autocast_off
from .sharded import (
    FSDP_MARK,
    TENSOR_PARALLEL,
    is_sharded,
    own_class,
    refuse_sharded,
    say_once,
    sharded_like,
    whole_of,
)
from .variants import Variant, checked

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    _Module = nn.Module
else:
    _Module = object


class _Merged(NamedTuple):
    """The merged weight, and what it was made from."""

    weight: Tensor
    base: Tensor  # an alias of the frozen weight: while it lives, no other tensor has its address
    versions: tuple[object, ...]
    factors: tuple[Tensor, ...]


class LoRALayer(_Module):
    """Mixin of the LoRA layers, to stand before the torch module in the bases.

    Merging (`merge_weights=True`): `eval()` makes a second tensor, weight + update, computed in at
    least fp32 and rounded once to weight's dtype, and eval forward uses it. It costs as much memory
    as the weight. `train()`, loading, `.to()`, `deepcopy` and pickling drop it. If the weight, a factor
    or `scaling` changed since, the next forward in eval makes it anew. (PyTorch does not count changes
    through `.data`: those of a factor are found by value, on a CPU at once, on other devices after a
    forward with gradients; those of the weight need another `eval()`, which always merges anew.)
    With gradients enabled and something to train, eval forward takes the unmerged path, so that
    training in eval mode works. So does a forward inside `torch.compile`, where staleness cannot be
    seen, and one under `torch.func.functional_call` with tensors that are no Parameters.
    So does a layer whose Parameters are sharded over processes (FSDP, tensor parallelism): merging
    would gather them, and a process that evaluates alone would wait for the others. It says so once.

    In a subclass of your own call the torch module's `__init__` before this class's.

    Attributes:
        r, lora_alpha, scaling: rank, alpha, and lora_alpha / r (LoRA, arXiv 2106.09685, section 4.1),
            or lora_alpha / √r with use_rslora.
        variant: the options of `lora.variants` that the layer was made with.
        lora_dropout: an `nn.Dropout` that says p and whether it acts; `forward` reads it.
        merge_weights: whether eval merges. May be changed at any time.
        merged: whether the second tensor exists.
        disabled: when True, forward is the plain layer's (see `lora.disabled`).
    """

    # Instance attributes that the plain module does not have.
    _OWN: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "variant",
        "merge_weights",
        "merged",
        "disabled",
        "_merged",
        "_look_closer",
        "_plain_type",
    )

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    variant: Variant = Variant()  # of layers that were pickled before there were any
    _VARIANTS: tuple[str, ...] = ("use_rslora",)  # those that the class has

    def __init__(
        self,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        merge_weights: bool,
        **variant: Unpack[Variant],
    ) -> None:
        kind = type(self).__name__
        if isinstance(r, bool) or not hasattr(r, "__index__") or r < 0:
            raise ValueError(f"{kind}: r={r!r}: expected a whole number, 0 (no LoRA) or more")
        if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
            raise ValueError(f"{kind}: lora_alpha={lora_alpha!r}: expected a finite number")
        if not isinstance(lora_dropout, (int, float)) or not 0 <= lora_dropout < 1:
            raise ValueError(f"{kind}: lora_dropout={lora_dropout!r}: expected a number in [0, 1)")
        chosen = checked(kind, variant, self._VARIANTS)
        self.r = operator.index(r)
        self.variant = chosen if self.r > 0 else Variant()
        self.lora_alpha = lora_alpha
        if r > 0:
            self.scaling = lora_alpha / (math.sqrt(r) if variant.get("use_rslora") else r)
        self.lora_dropout = nn.Dropout(lora_dropout).train(self.training)
        self.merge_weights = merge_weights
        self.merged = False
        self.disabled = False
        self._merged: _Merged | None = None
        self._look_closer = False

    def _delta(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """The dense update without its scale, in weight's shape; the one method a layer must give."""
        raise NotImplementedError(f"{type(self).__name__} does not define _delta()")

    def update_parameters(self) -> dict[str, nn.Parameter]:
        """What the update is made of, frozen or not, by own name; nothing with r = 0."""
        named = self._parameters.items() if self.r > 0 else ()
        return {own: p for own, p in named if p is not None and own.startswith("lora_")}

    def is_frozen(self, own: str) -> bool:
        """Whether the update's parameter of this name is never trained."""
        return False

    @property
    def depends_on_weight(self) -> bool:
        """Whether the update begins as a function of the weight."""
        return False

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole update: lora_A and lora_B, if there is nothing else to it."""
        return self.lora_A, self.lora_B

    def total_bias(self) -> Tensor | None:
        """The layer's bias, and that of its update if there is one."""
        bias: Tensor | None = self._parameters.get("bias")
        return bias

    def delta_weight(self) -> Tensor:
        """The dense update, scaling included, in weight's shape and at least fp32; a new tensor."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with autocast_off(self.weight.device):
            A, B = self.factors()
            return self._delta(A.to(dtype), B.to(dtype)) * self.scaling

    def merged_weight(self) -> Tensor:
        """weight + update in weight's shape and dtype, rounded once; a new tensor, detached.

        ValueError for a 4-bit weight (see `lora.unpatch`).
        """
        if isinstance(self.weight, NF4Tensor):
            raise ValueError(
                "the weight is of 4 bits, in which an update would be lost: "
                "lora.unpatch(model, merge=True, dtype=...) merges into dense weights"
            )
        with torch.inference_mode(False), torch.no_grad():
            if self.r == 0:
                return self.weight.detach().clone()
            return torch.empty_like(self.weight).copy_(self.delta_weight().add_(self.weight))

    @property
    def _dropout_p(self) -> float:
        """The probability with which dropout acts now; what replaced `lora_dropout` may have none."""
        p: float = getattr(self.lora_dropout, "p", 0.0)
        return p if self.lora_dropout.training else 0.0

    # Construction

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of lora_A and lora_B."""
        raise NotImplementedError(f"{type(self).__name__} does not define _factor_shapes()")

    def _add_factors(self, dtype: torch.dtype | None = None) -> None:
        """Register the update's parameters: zeros, on weight's device."""
        if self.r == 0:
            return
        for own, shape in self._update_shapes().items():
            zeros = self.weight.new_zeros(shape, dtype=self._update_dtype(own, dtype))
            setattr(self, own, nn.Parameter(zeros, not self.is_frozen(own)))

    def _adapt(self, dtype: torch.dtype | None) -> None:
        """Add a fresh update to the pretrained weight; freeze that last, when nothing can fail."""
        if self.r > 0:
            self._add_factors(dtype)
            self._reset_factors()
            self.weight.requires_grad = False

    def _update_dtype(self, own: str, dtype: torch.dtype | None) -> torch.dtype:
        """Of the update's parameter `own`, where factors of `dtype` (None: weight's) are asked for."""
        return dtype or self.weight.dtype

    def _update_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the update's parameters, by own name."""
        shape_A, shape_B = self._factor_shapes()
        return {"lora_A": shape_A, "lora_B": shape_B}

    def _reset_factors(self) -> None:
        """A as nn.Linear draws its weight, B zero (LoRA, section 4.1: the update begins at zero)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @classmethod
    def _adopt(cls, layer: nn.Module, plain_types: tuple[type, ...]) -> Self:
        """An object of this class on `layer`'s own Parameters, buffers, hooks, mode and settings."""
        if type(layer) not in plain_types:
            names = " or ".join(f"{t.__module__}.{t.__name__}" for t in plain_types)
            raise TypeError(
                f"lora.{cls.__name__}.from_module: got {type(layer).__module__}."
                f"{type(layer).__name__}, expected exactly {names}: any other class may be quantised or"
                " compute something else from its weight"
            )
        weight = layer._parameters.get("weight")
        if is_sharded(weight) or hasattr(weight, "ds_id"):
            engine = type(weight).__name__ if is_sharded(weight) else "DeepSpeed ZeRO-3"
            raise TypeError(
                f"lora.{cls.__name__}.from_module: the weight is sharded over processes "
                f"({engine}): expected a plain nn.Parameter; patch "
                "the model, or load the adapter into it, before an engine shards it"
            )
        plain = type(weight) is nn.Parameter or isinstance(weight, NF4Tensor)
        if weight is None or not plain or not weight.is_floating_point():
            raise TypeError(
                f"lora.{cls.__name__}.from_module: the weight is a {type(weight).__name__} of "
                f"{getattr(weight, 'dtype', None)} (quantised, sharded or parametrised?), expected "
                "a plain floating-point nn.Parameter"
            )
        if "forward" in layer.__dict__:
            raise TypeError(
                f"lora.{cls.__name__}.from_module: forward was replaced on this very object "
                f"({layer.__dict__['forward']}); wrap the layer before that, or restore it"
            )
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        for registry in ("_parameters", "_buffers", "_modules"):
            new.__dict__[registry] = layer.__dict__[registry].copy()
        new.__dict__["_plain_type"] = type(layer)
        return new

    def to_module(self, merge: bool = False) -> nn.Module:
        """The plain torch module on the same Parameters: the inverse of `from_module`.

        With merge=True its weight is a new Parameter, weight + update. A layer that was built by
        its constructor gives the torch class that it extends.
        """
        refuse_sharded(
            self, "no plain module can take over from the engine", "save the adapter instead"
        )
        plain_type = self.__dict__.get("_plain_type", self._default_plain_type())
        plain: nn.Module = plain_type.__new__(plain_type)
        plain.__dict__.update({k: v for k, v in self.__dict__.items() if k not in self._OWN})
        plain.__dict__["_parameters"] = {
            k: p for k, p in self._parameters.items() if not k.startswith("lora_")
        }
        plain.__dict__["_buffers"] = self._buffers.copy()
        plain.__dict__["_modules"] = {k: m for k, m in self._modules.items() if k != "lora_dropout"}
        if merge and self.r > 0:
            plain.weight = nn.Parameter(self.merged_weight(), self.weight.requires_grad)
            if "lora_bias" in self.variant and (bias := self.total_bias()) is not None:
                like = self._parameters.get("bias")
                trains = (self.weight if like is None else like).requires_grad
                plain.bias = nn.Parameter(bias.detach(), trains)
        return plain

    @classmethod
    def _default_plain_type(cls) -> type[nn.Module]:
        return next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn."))

    # Merging

    def _weight_to_use(self) -> Tensor | None:
        """The merged weight if this forward may use it, made anew if it is missing or stale."""
        if self.training or not self.merge_weights or torch.compiler.is_compiling():
            return None
        if self.is_sharded:
            return self._merge()
        sources = self._merged_from()
        if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
            self._look_closer = True
            if self.weight.requires_grad:
                self._drop_merged()
            return None
        return self._merge()

    def _merge(self) -> Tensor | None:
        """Make the merged weight, unless there is a fresh one.

        None if a tensor is no plain Parameter with values and a count of its changes: on the meta
        device, fake, born in inference mode, or put in by `torch.func.functional_call`.
        """
        if self.is_sharded:
            say_once(
                "a LoRA layer whose Parameters are sharded over processes is not merged in eval mode "
                "(merge_weights=True): it stays exact, at the cost of the update in each forward"
            )
            return None
        sources = self._merged_from()
        if any(type(t) is not nn.Parameter or t.is_meta or t.is_inference() for t in sources):
            return None
        versions = (self.scaling, *((id(t), t.data_ptr(), t._version) for t in sources))
        kept = self._merged
        if kept is not None and kept.versions == versions:
            look = self._look_closer or self.weight.device.type == "cpu"
            if not look or all(map(torch.equal, kept.factors, sources[1:])):
                self._look_closer = False
                return kept.weight
        with torch.inference_mode(False), torch.no_grad():
            factors = tuple(factor.clone() for factor in sources[1:])
        self._merged = _Merged(self.merged_weight(), self.weight.detach(), versions, factors)
        self.merged, self._look_closer = True, False
        return self._merged.weight

    def _merged_from(self) -> tuple[Tensor, ...]:
        """The weight, and the update's tensors, be they Parameters or parametrised."""
        return (self.weight, *(getattr(self, own) for own in self._update_shapes()))

    @property
    def is_sharded(self) -> bool:
        """Whether an engine has spread the Parameters over processes, gathered now or not."""
        managed = self.__dict__.get(FSDP_MARK, False)
        return bool(managed) or any(map(is_sharded, self._parameters.values()))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. FSDP's mark on a merged layer raises ValueError.

        The mark stays a plain attribute of the instance: torch.compile looks it up statically and
        would take a property for it.
        """
        if name == FSDP_MARK and value and self.merged:
            raise ValueError(
                f"fully_shard on a merged {type(self).__name__} (eval mode, merge_weights=True): every "
                "process would keep its whole merged weight; build the model again and call "
                "model.train() before fully_shard, or take merge_weights=False"
            )
        super().__setattr__(name, value)

    def in_one_process(self, weight: bool = True) -> Self:
        """This layer with whole Parameters, as if nothing were sharded. Collective.

        weight=False leaves the plain layer's own Parameters as they are.
        """
        one: Self = object.__new__(own_class(self))
        one.__dict__.update(self.__dict__)
        one.__dict__["_parameters"] = {
            own: nn.Parameter(whole_of(self, own), p.requires_grad)
            if p is not None and (weight or own.startswith("lora_"))
            else p
            for own, p in self._parameters.items()
        }
        for name in (FSDP_MARK, TENSOR_PARALLEL, "forward"):
            one.__dict__.pop(name, None)
        return one

    def _drop_merged(self) -> None:
        self._merged, self.merged = None, False

    def train(self, mode: bool = True) -> Self:
        """Set the mode and return self; eval merges anew (if `merge_weights`), train drops it."""
        super().train(mode)
        self._drop_merged()
        if not mode and self.r > 0 and self.merge_weights:
            self._merge()
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._drop_merged()
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load; a whole tensor into a sharded Parameter too, of which each process takes its part."""
        self._drop_merged()
        for own, parameter in self._parameters.items():
            value = state_dict.get(prefix + own)
            if value is None or not is_sharded(parameter) or is_sharded(value):
                continue
            if TENSOR_PARALLEL not in self.__dict__:  # which has a hook of its own
                state_dict[prefix + own] = sharded_like(value, parameter)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_merged": None, "merged": False}

    def extra_repr(self) -> str:
        if self.r == 0:
            return f"{super().extra_repr()}, r=0"
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"scaling={self.scaling:g}, lora_dropout={getattr(self.lora_dropout, 'p', 0.0)}, "
            f"merged={self.merged}"
        ) + "".join(f", {name}={value}" for name, value in self.variant.items())


def lora_layers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, LoRALayer]]:
    """(name, layer) of every LoRA layer in `model`, the model itself included."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, LoRALayer):
            yield name, module
