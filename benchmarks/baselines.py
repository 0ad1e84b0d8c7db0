"""What is measured against and is no layer of PEFT's or loralib's as it stands.

Two published schedules of a LoRA layer, written here in PyTorch operations:

    Unsloth     y = x Wᵀ,  y += s (x Aᵀ) Bᵀ           keeps x, makes x Aᵀ again; no dropout
    LoRAFusion  S = x̂ Aᵀ,  y = x Wᵀ,  y += s S Bᵀ     keeps x̂ = dropout(x), its mask and S

LoRAFusion (arXiv 2510.00206) runs both products of y, and of dX, in one Triton kernel each; here they
are two cuBLAS products, so only its order of work and what it keeps are compared.

And PEFT on bitsandbytes' 4-bit layer, on the very codes that our own layer has.
"""

from typing import Any

import torch
from torch import Tensor, nn

import lora


class UnslothSchedule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, p: float
    ) -> Tensor:
        if p > 0:
            raise ValueError(f"p={p}: this schedule has no dropout")
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling = scaling
        return (x @ weight.t()).addmm_(x @ A.t(), B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        ds = dy @ B
        dx = (dy @ weight).addmm_(ds, A, alpha=ctx.scaling)
        dA = (ds.t() @ x) * ctx.scaling
        dB = (dy.t() @ (x @ A.t())) * ctx.scaling
        return dx, None, dA, dB, None, None


class LoRAFusionSchedule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float, p: float
    ) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p > 0 else (x, None)
        s = dropped @ A.t()
        ctx.save_for_backward(dropped, mask, s, weight, A, B)
        ctx.scaling, ctx.p = scaling, p
        return (x @ weight.t()).addmm_(s, B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, s, weight, A, B = ctx.saved_tensors
        ds = (dy @ B) * ctx.scaling
        dx = ds @ A
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, 1 / (1 - ctx.p))
        dx.addmm_(dy, weight)
        return dx, None, ds.t() @ dropped, (dy.t() @ s) * ctx.scaling, None, None


class BaselineLinear(nn.Module):
    """A frozen linear layer without bias and the factors of one adapter, run by a schedule."""

    def __init__(self, base: nn.Linear, r: int, scaling: float, p: float, schedule: type) -> None:
        super().__init__()
        options = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.weight = base.weight
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scaling, self.p, self.schedule = scaling, p, schedule

    def forward(self, x: Tensor) -> Tensor:
        factors = (self.weight, self.lora_A, self.lora_B)
        y = self.schedule.apply(x.reshape(-1, x.shape[-1]), *factors, self.scaling, self.p)
        return y.view(*x.shape[:-1], -1)


def linear4bit(layer: lora.LinearNF4) -> nn.Module:
    """bitsandbytes' layer with the codes and scales of ours; it computes in the weight's dtype."""
    import bitsandbytes

    parts = {k.removeprefix("weight."): v for k, v in layer.state_dict().items()}
    sizes = (layer.in_features, layer.out_features)
    made = bitsandbytes.nn.Linear4bit(
        *sizes, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4", device="meta"
    )
    made.weight = bitsandbytes.nn.Params4bit.from_prequantized(
        parts.pop("weight"), parts, device=layer.weight.device, module=made
    )
    return made
