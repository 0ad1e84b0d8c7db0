"""Tensor parallelism: `parallelize_module` plans under which every process computes a part of a layer.

    column-parallel   W, B by rows:     y_i = x W_iᵀ + α (x Aᵀ) B_iᵀ        x, A on every process
    row-parallel      W, A by columns:  y = Σ_i  x_i W_iᵀ + α (x_i A_iᵀ) Bᵀ    B on every process

(Megatron-LM, arXiv 1909.08053, section 3; the skinny factors go with the base.) One process's part is a
smaller layer of the same class, and computes as such: fused kernels, dropout, variants as ever. What
crosses processes is what a plain layer's parallelism sends, dX or y summed, and in backward the
gradient of the factor that every process has (r · in or out · r numbers): S is never sent.

The rows of a fused projection are dealt part by part, so that each process holds whole heads of q, k
and v, or like shares of gate and up: its Parameters are DTensors of these rows, one process's after
the other's. `state_dict`, `save_adapter` and `lora_state_dict` give them in the order of one process.

Dropout masks come from a seed that the first process draws and sends to the others. Not handled:
sequence parallelism, torch.compile, `fan_in_fan_out`, DoRA on row-parallel layers, whose norms span
the processes.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ._base import LoRALayer
from .linear import Linear
from .merged_linear import MergedLinear
from .phi3 import decoder_layers, qkv_splits
from .quantized import is_quantized
from .sharded import TENSOR_PARALLEL, is_sharded, own_class, take_from_first, whole, whole_of

__all__ = ["ColumnParallel", "LocalHeads", "RowParallel", "phi3_plan"]

_FACTORS_A = ("lora_A", "lora_A0")
_FACTORS_B = ("lora_B", "lora_B0")
_SEED_STEP = 0x5851F42D4C957F2D  # between the seeds of the parts of a row-parallel x


def phi3_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan for a Phi-3 model that `lora.patch_phi3` has adapted, or a plain one.

        mesh = init_device_mesh("cuda", (8,))
        parallelize_module(lora.patch_phi3(model), mesh, lora.tensor_parallel.phi3_plan(model))

    qkv_proj and gate_up_proj are column-parallel, o_proj and down_proj row-parallel, attention has its
    share of the heads; embeddings, norms and lm_head stay whole. Every process must hold the same
    model, and gets the same output. `parallelize_module` raises ValueError (or TypeError), by the
    module's name and before any change, where the heads or rows do not divide by the mesh, or a layer
    cannot be dealt.
    """
    plan: dict[str, _Style] = {}
    for name in decoder_layers(model):
        prefix = f"{name}." if name else ""
        attention = model.get_submodule(f"{prefix}self_attn")
        config: Any = getattr(attention, "config", None) or model.config
        plan[f"{prefix}self_attn.qkv_proj"] = ColumnParallel(qkv_splits(config))
        plan[f"{prefix}self_attn.o_proj"] = RowParallel()
        plan[f"{prefix}self_attn"] = LocalHeads()
        gate_up: Any = model.get_submodule(f"{prefix}mlp.gate_up_proj")
        plan[f"{prefix}mlp.gate_up_proj"] = ColumnParallel([gate_up.out_features // 2] * 2)
        plan[f"{prefix}mlp.down_proj"] = RowParallel()
    together = [(name, model.get_submodule(name), style) for name, style in plan.items()]
    for style in plan.values():
        style.together = together
    return {**plan}


class _Style(ParallelStyle):
    """How a module is dealt over a mesh.

    together: all (name, module, style) of its plan, which are checked before the first is dealt.
    """

    together: Sequence[tuple[str, nn.Module, _Style]] = ()

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """ValueError or TypeError if `module` cannot be dealt."""
        raise NotImplementedError

    def deal(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        together, self.together = self.together, ()
        for name, other, style in together:
            style.together = ()
            try:
                style.check(other, device_mesh)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}; nothing was dealt") from error
        self.check(module, device_mesh)
        return self.deal(module, device_mesh)


class ColumnParallel(_Style):
    """Rows of the weight and of lora_B are dealt; every process has x, and a share of each part of y.

    splits: rows of the parts of a fused projection, each of which is dealt; None is one part.
    """

    def __init__(self, splits: Sequence[int] | None = None) -> None:
        self.splits = None if splits is None else tuple(splits)

    def _columns(self, module: nn.Module, mesh: DeviceMesh) -> _Columns:
        splits = self.splits
        if splits is None:
            splits = getattr(module, "out_splits", None) or (module.out_features,)  # type: ignore[assignment]
        return _Columns(mesh, tuple(splits or ()))

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        self._columns(module, mesh).check(module)

    def deal(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return self._columns(module, mesh).shard(module)


class RowParallel(_Style):
    """Columns of the weight, and of lora_A, are dealt; x is a share, y the same in every process."""

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        _Rows(mesh).check(module)

    def deal(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return _Rows(mesh).shard(module)


class LocalHeads(_Style):
    """Phi-3's attention, with the heads that this process has."""

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        for own in ("num_attention_heads", "num_key_value_heads"):
            heads, n = getattr(module.config, own), mesh.size()
            if heads % n:
                raise ValueError(f"{own}={heads} on {n} processes: expected a multiple of {n}")

    def deal(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        attention: Any = module
        config, n = copy.copy(attention.config), mesh.size()
        for own in ("num_attention_heads", "num_key_value_heads"):
            config.__dict__[own] = getattr(config, own) // n
        attention.config = config  # of its own: the model's stays whole
        for own in ("num_heads", "num_attention_heads", "num_key_value_heads"):
            if own in attention.__dict__:
                attention.__dict__[own] //= n
        return attention  # type: ignore[no-any-return]


class _Parallel:
    """How one linear layer is dealt over `mesh`; it stands for the layer's forward."""

    def __init__(self, mesh: DeviceMesh) -> None:
        if mesh.ndim != 1:
            raise ValueError(f"a mesh of {mesh.ndim} dimensions: expected one; pass mesh['tp']")
        self.mesh = mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def placement(self, own: str) -> Placement:
        """Of the Parameter with this name."""
        raise NotImplementedError

    def row_order(self, module: nn.Module, own: str) -> Tensor | None:
        """Rows of one process's Parameter in the order in which they are dealt; None: as they are."""
        return None

    def check(self, module: nn.Module) -> None:
        """ValueError or TypeError if `module` cannot be dealt."""
        if is_quantized(module._parameters.get("weight")):
            raise ValueError(
                f"{type(module).__name__} has a 4-bit weight, whose blocks tensor parallelism would "
                "cut: expected a dense one, or fully_shard"
            )
        if type(module) not in (nn.Linear, Linear, MergedLinear):
            raise TypeError(
                f"{type(module).__name__}: expected an nn.Linear, lora.Linear or lora.MergedLinear"
            )
        if isinstance(module, LoRALayer) and module.merged:
            raise ValueError(
                f"a merged {type(module).__name__} (eval mode, merge_weights=True) cannot be dealt: "
                "call model.train() first, or take merge_weights=False"
            )
        if any(map(is_sharded, module._parameters.values())):
            raise ValueError(f"{type(module).__name__} is sharded already: parallelize it first")
        if getattr(module, "fan_in_fan_out", False):
            raise ValueError("fan_in_fan_out=True: expected a weight that is stored as (out, in)")

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError

    def shard(self, module: nn.Module) -> nn.Module:
        """Make the Parameters DTensors, with the values of the first process."""
        dealt: dict[str, Any] = {}
        for own, parameter in module._parameters.items():
            if parameter is not None:
                order, value = self.row_order(module, own), parameter.detach()
                if order is not None and not value.is_meta:
                    value = value[order.to(value.device)]
                tensor = distribute_tensor(value, self.mesh, [self.placement(own)])
                dealt[own] = nn.Parameter(tensor, parameter.requires_grad)
        module._parameters.update(dealt)
        module.__dict__[TENSOR_PARALLEL] = self
        module.__dict__["forward"] = functools.partial(self.forward, module)
        in_order = functools.partial(
            self._in_order
        )  # torch marks it, which a method does not allow
        module.register_state_dict_post_hook(in_order)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(self._dealt)  # type: ignore[no-untyped-call]
        return module

    def part(self, module: nn.Module, x: Tensor, seed_step: int) -> nn.Module:
        """The smaller layer that is this process's part, on local tensors."""
        part: Any = object.__new__(own_class(module))
        part.__dict__.update(module.__dict__)
        for name in ("forward", TENSOR_PARALLEL):
            del part.__dict__[name]
        part.__dict__["_parameters"] = {
            own: p.to_local() if isinstance(p, DTensor) else p
            for own, p in module._parameters.items()
        }
        if isinstance(module, LoRALayer):
            part.merge_weights = False
            if module._dropout_p > 0:
                part.dropout_seed = self._seed(x.device) + seed_step
        return part  # type: ignore[no-any-return]

    def _seed(self, device: torch.device) -> Tensor:
        """One that the first process draws from torch's generator, as all do, to stay in step."""
        seed = torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None)
        take_from_first(seed, self.mesh)
        return seed

    def summed_in_backward(self, tensor: Tensor) -> Tensor:
        """The same tensor, of which every process has the same; its gradient is the sum of all."""
        spread = DTensor.from_local(tensor, self.mesh, [Replicate()], run_check=False)
        local: Tensor = spread.to_local(grad_placements=[Partial()])
        return local

    def _in_order(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Put the rows of what `state_dict` gives into the order of one process."""
        for own, parameter in module._parameters.items():
            key = prefix + own
            if key not in state or state[key] is parameter:  # keep_vars
                continue
            if self.row_order(module, own) is not None and not state[key].is_meta:
                state[key] = distribute_tensor(
                    whole_of(module, own), self.mesh, [self.placement(own)], src_data_rank=None
                )

    def _dealt(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Deal what is about to be loaded, which is in the order of one process."""
        for own, parameter in module._parameters.items():
            value, order = state.get(prefix + own), self.row_order(module, own)
            if parameter is None or not isinstance(value, Tensor) or value.is_meta:
                continue
            if is_sharded(value) and order is None:
                continue
            value = whole(value)
            value = value if order is None else value[order.to(value.device)]
            state[prefix + own] = distribute_tensor(
                value, self.mesh, [self.placement(own)], src_data_rank=None
            )


class _Columns(_Parallel):
    def __init__(self, mesh: DeviceMesh, splits: tuple[int, ...]) -> None:
        super().__init__(mesh)
        self.splits = splits

    def placement(self, own: str) -> Placement:
        return Replicate() if own in _FACTORS_A else Shard(0)

    def row_order(self, module: nn.Module, own: str) -> Tensor | None:
        if own in _FACTORS_A or len(self.splits) == 1:
            return None
        sizes = self.splits
        if own.startswith("lora_") and isinstance(module, MergedLinear):  # the enabled parts' rows
            sizes = tuple(stop - start for start, stop in module.rows)
        return _dealing(sizes, self.size)

    def check(self, module: nn.Module) -> None:
        super().check(module)
        linear: Any = module
        parts = getattr(linear, "out_splits", None) or self.splits
        if parts != self.splits or sum(parts) != linear.out_features:
            raise ValueError(
                f"splits={list(self.splits)} for {type(linear).__name__} of {linear.out_features} rows "
                f"in parts of {list(parts)}: expected the same parts"
            )
        if bad := [rows for rows in parts if rows % self.size]:
            raise ValueError(
                f"a part of {bad[0]} rows on {self.size} processes: expected multiples of {self.size}"
            )

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        part: Any = self.part(module, x, 0)
        part.out_features //= self.size
        if isinstance(part, MergedLinear):
            part.out_splits = tuple(rows // self.size for rows in part.out_splits)
        for own in _FACTORS_A:
            if own in part._parameters:
                part._parameters[own] = self.summed_in_backward(part._parameters[own])
        y: Tensor = own_class(module).forward(part, self.summed_in_backward(x))
        return y


class _Rows(_Parallel):
    def placement(self, own: str) -> Placement:
        return Shard(1) if own in ("weight", *_FACTORS_A) else Replicate()

    def check(self, module: nn.Module) -> None:
        super().check(module)
        linear: Any = module
        if linear.in_features % self.size:
            raise ValueError(
                f"in_features={linear.in_features} on {self.size} processes: expected a multiple of "
                f"{self.size}"
            )
        if "use_dora" in getattr(linear, "variant", {}):
            raise ValueError(
                "use_dora on a row-parallel layer: its norms span the processes; leave o_proj and "
                "down_proj out of the targets, or shard the model by fully_shard"
            )

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        step = (self.rank * _SEED_STEP + 2**63) % 2**64 - 2**63  # as int64
        part: Any = self.part(module, x, step)
        part.in_features //= self.size
        updated = isinstance(part, LoRALayer) and not part.disabled
        bias = part.total_bias() if updated else part.bias
        part._parameters["bias"] = None  # added once, to the sum
        if isinstance(part, LoRALayer):
            rest = {n: v for n, v in part.variant.items() if n != "lora_bias"}
            part.__dict__["variant"] = rest
        for own in _FACTORS_B:
            if own in part._parameters:
                part._parameters[own] = self.summed_in_backward(part._parameters[own])
        partial = own_class(module).forward(part, x)
        spread = DTensor.from_local(partial, self.mesh, [Partial()], run_check=False)
        y: Tensor = spread.redistribute(placements=[Replicate()]).to_local()
        return y if bias is None else y + bias.to(y.dtype)


@functools.lru_cache(maxsize=64)
def _dealing(sizes: tuple[int, ...], n: int) -> Tensor:
    """Rows of parts of these sizes, an n-th of every part to each of n processes in turn."""
    parts = torch.arange(sum(sizes)).split(list(sizes))  # type: ignore[no-untyped-call]
    return torch.cat([part.view(n, -1)[rank] for rank in range(n) for part in parts])
