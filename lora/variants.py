"""Variants of LoRA: the options that the layers, `patch` and `patch_phi3` share, and their formulas.

    use_rslora          scaling = lora_alpha / √r (rsLoRA, arXiv 2312.03732, theorem 3.2)
    use_dora            W' = m ∘ (W + ΔW) / ‖W + ΔW‖, norms of the rows of (out, in), m trained and ‖W‖
                        at first (DoRA, arXiv 2402.09353, equation 5; section 4.3: the norm is a
                        constant in backward)
    init_lora_weights   "pissa": A and B begin as the r greatest singular triples of W, divided by the
                        scale: B₀ A₀ = U_r S_r V_rᵀ / scaling. PiSSA (arXiv 2404.02948, equations 2
                        to 4) trains B A on the residual W - scaling · B₀ A₀; here W stays, and the
                        update is scaling · (B A - B₀ A₀), of rank 2 r, with A₀ and B₀ frozen.
                        "loftq": A and B begin as what quantising W lost, at its best with rank r:
                        scaling · B A ≈ W - Q, the first step of LoftQ (arXiv 2310.08659, algorithm 1,
                        T = 1; a second would change Q, and the adapter would fit no other copy of it)
    use_lorafa          A is frozen as drawn, so x is not kept for backward (LoRA-FA, arXiv 2308.03303,
                        section 3)
    lora_bias           the update has a bias b, zero at first: scaling · (B A x + b) (PEFT's option)

The names are those of PEFT's `LoraConfig`, but for LoRA-FA, which is an optimizer there. LoRA+, which
needs no other layer, is `lora.parameter_groups`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor


class Variant(TypedDict, total=False):
    """The options; what is left out is plain LoRA."""

    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    use_lorafa: bool
    init_lora_weights: bool | str


# Other arguments of the functions that take the options: what a misspelt one may have been.
_BESIDE = (
    *("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "merge_weights", "lora_dtype"),
    "quantize",
)
NAMES = tuple(Variant.__annotations__)
_INITS = re.compile(r"(?:pissa|loftq)(?:_niter_([1-9]\d*))?")


def taken_from(options: dict[str, Any]) -> Variant:
    """The options of a variant, removed from `options`."""
    return {name: options.pop(name) for name in NAMES if name in options}  # type: ignore[return-value]


def checked(kind: str, variant: Variant, supported: Sequence[str] = NAMES) -> Variant:
    """The options that are not plain LoRA's.

    TypeError for an unknown name, ValueError for a value or a combination that is not there.
    """
    for name, value in variant.items():
        if name not in NAMES:
            near = difflib.get_close_matches(name, (*NAMES, *_BESIDE), 1)
            raise TypeError(
                f"{kind}: unexpected option {name!r}{f' (nearest: {near[0]!r})' if near else ''}: "
                f"expected one of the documented arguments, or of the variants {NAMES}"
            )
        if name != "init_lora_weights" and not isinstance(value, bool):
            raise ValueError(f"{kind}: {name}={value!r}: expected a bool")
    init = variant.get("init_lora_weights", True)
    if init is not True and not (isinstance(init, str) and _INITS.fullmatch(init)):
        raise ValueError(
            f"{kind}: init_lora_weights={init!r}: expected True, 'pissa', 'loftq', or either with a "
            "number of iterations, such as 'pissa_niter_16'"
        )
    if variant.get("lora_bias") and variant.get("use_dora"):
        raise ValueError(
            f"{kind}: lora_bias=True with use_dora=True: expected one of them; PEFT's format cannot "
            "hold both"
        )
    chosen = {n: value for n, value in variant.items() if value != (n == "init_lora_weights")}
    for name in chosen.keys() - set(supported):
        raise ValueError(
            f"{kind}: {name}={chosen[name]!r}: only linear layers have this variant; leave other "
            "layers out of the targets"
        )
    return chosen  # type: ignore[return-value]


def row_norms(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    rows: Sequence[tuple[int, int]],
) -> Tensor:
    """‖W_i + scaling · B_i A_j‖ of every row i of the parts j, in at least fp32, without derivatives.

    By ‖W_i‖² + 2 s (W_i A_jᵀ) · B_i + s² B_i (A_j A_jᵀ) · B_i: neither B A nor a copy of W is formed.
    Where the two nearly cancel, the norm is no less than their lengths times the root of the weight's
    machine epsilon, below which the sum is noise. Without an update it is ‖W_i‖ to the bit.
    W Aᵀ is a product in the weight's dtype, all else is in at least fp32.
    weight (out, in), lora_A (n·r, in), lora_B (rows of the n parts, r), rows: of the parts.
    """
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    eps = torch.finfo(weight.dtype).eps
    norms = []
    factors_A = torch.split(lora_A.to(dtype), lora_B.shape[1])
    factors_B = torch.split(lora_B.to(dtype), [stop - start for start, stop in rows])
    for (start, stop), A, B in zip(rows, factors_A, factors_B, strict=True):
        part = weight[start:stop]
        frozen = torch.linalg.vector_norm(part, dim=1, dtype=dtype).square()
        cross = ((part @ A.to(weight.dtype).t()).to(dtype) * B).sum(1)
        update = scaling**2 * (B @ (A @ A.t()) * B).sum(1).clamp(min=0)
        square = frozen + 2 * scaling * cross + update
        norms.append(torch.maximum(square, eps * (frozen + update)).sqrt())
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def begins_as(variant: Variant, init: str) -> bool:
    """Whether the factors begin as "pissa" or "loftq" says."""
    return str(variant.get("init_lora_weights")).startswith(init)


def check_principal(weight: Tensor, r: int, scaling: float, init: str) -> None:
    """ValueError if `principal_factors` of this weight would not do."""
    if r > min(weight.shape):
        raise ValueError(
            f"init_lora_weights={init!r}: a weight of {tuple(weight.shape)} has no {r} singular "
            f"values; expected r of at most {min(weight.shape)}"
        )
    if not scaling > 0:
        raise ValueError(
            f"init_lora_weights={init!r}: scaling is {scaling}: expected lora_alpha > 0"
        )


def principal_factors(weight: Tensor, r: int, scaling: float, init: str) -> tuple[Tensor, Tensor]:
    """(A₀ (r, in), B₀ (out, r)): scaling · B₀ A₀ is weight (out, in) at its best with rank r.

    init: "pissa" or "loftq", by the whole singular value decomposition; with "_niter_N", by the
    randomised one with N iterations (Halko et al., arXiv 0909.4061), much faster. In at least fp32.
    """
    found = _INITS.fullmatch(init)
    assert found is not None
    check_principal(weight, r, scaling, init)
    dense = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not dense.is_meta and not torch.isfinite(dense).all():
        raise ValueError(f"init_lora_weights={init!r}: the weight has a NaN or infinite value")
    if found[1] is None:
        U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(dense, r, niter=int(found[1]))
        Vt = V.t()
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root
