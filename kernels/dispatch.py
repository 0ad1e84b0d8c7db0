"""The one public entry: check the arguments, settle the dtype, choose the code, draw the mask."""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import reference
from .dropout import draw_keep_bits, draw_seed, keep, keep_scale, seeded_keep_bits
from .fused import fused_forward
from .nf4_tensor import NF4Tensor
from .ops import LoRALinear, autocast_dtype
from .reference import part_rows

_IMPLEMENTATIONS = ("auto", "torch", "triton")
_VARIABLE = "LORA_KERNELS"
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LARGEST_RANK = 256


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    splits: Sequence[int] | None = None,
    enabled: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    impl: str | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling · (dropout(x) A_jᵀ) B_jᵀ in the rows of every enabled part j.

    LoRA, arXiv 2106.09685, section 4.1 (one part); loralib's MergedLinear (several).

    Args:
        x: (..., K), one dimension or more, possibly empty.
        weight: (N, K), frozen or not; any strides, so a (K, N) weight is passed as `weight.t()`. Or
            an `NF4Tensor`, which is dequantised for each product and never kept dense.
        bias: (N,) or None.
        lora_A: (n·r, K), the factors of the n enabled parts, stacked.
        lora_B: (rows of the enabled parts, r), stacked likewise.
        scaling: the factor of the update, lora_alpha / r.
        splits: output rows of every part, N in the sum; None is one part.
        enabled: which parts have an update; None is all of them.
        dropout_p: probability in [0, 1) with which an element of x is dropped from the update's
            input, resolved to 2^-16; one mask for all parts.
        seed: one int64 element on x's device that alone decides the mask; None draws the mask from
            torch's generator of the device.
        impl: "triton", the fused kernels; "torch", PyTorch; "auto", the fused kernels wherever they
            can run (see `explain`). None is the environment variable LORA_KERNELS, or else "auto".

    Returns:
        (..., N) in x's dtype, or in autocast's where that is on. weight must have x's dtype unless
        autocast is on; bias and factors may have any (fp32 factors on a bf16 base: the products run
        in bf16, the factors' gradients are fp32).

    Raises:
        ValueError: shapes, parts, devices, dropout_p or impl that do not fit.
        TypeError: x and weight of different dtypes without autocast.
        RuntimeError: impl is "triton" and it cannot run; the message says why.
    """
    splits = (weight.shape[0],) if splits is None else tuple(splits)
    enabled = (True,) * len(splits) if enabled is None else tuple(enabled)
    impl = _requested(impl)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p!r}: expected a probability in [0, 1)")
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if not tracing:  # which would record every comparison
        _check_shapes(x, weight, bias, lora_A, lora_B, splits, enabled)

    if lora_A.shape[0] == 0:  # rank 0, or no enabled part
        return F.linear(x, weight, bias)
    x = x.to(_product_dtype(x, weight))
    if isinstance(weight, NF4Tensor):
        weight = weight.to(x.dtype)  # what its elements are rounded to
    path, reason = _choose(impl, x, x.dtype, weight, lora_A, lora_B)
    if impl == "triton" and path != "triton":
        raise RuntimeError(
            f'impl="triton" (or {_VARIABLE}=triton) cannot run here: {reason}; '
            f'"auto" takes PyTorch instead'
        )
    if path == "formula":
        return reference.lora_linear(
            x,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            lora_A.to(x.dtype),
            lora_B.to(x.dtype),
            float(scaling),
            splits=splits,
            enabled=enabled,
            mask=_mask(x, dropout_p, seed) if dropout_p > 0 else None,
        )
    parts = part_rows(splits, enabled)
    if path == "triton":
        drawn = _seed(x, seed) if dropout_p > 0 else None
        edges = [edge for pair in parts for edge in pair]
        keep_s = torch.is_grad_enabled() and lora_B.requires_grad
        arguments = (x, weight, bias, lora_A, lora_B, drawn, float(dropout_p), float(scaling))
        y: Tensor = fused_forward(*arguments, edges, keep_s)[0]
        return y
    bits, alpha = None, float(scaling)
    if dropout_p > 0:
        bits = _draw(x, dropout_p, seed)
        alpha *= keep_scale(dropout_p)
    tensors = (x, weight, bias, lora_A, lora_B)
    # A Function's call costs several small products: without gradients its forward is called itself.
    records = torch._C._are_functorch_transforms_active() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )
    run: Callable[..., tuple[Tensor, Tensor]] = LoRALinear.apply if records else LoRALinear.forward
    return run(*tensors, bits, alpha, parts)[0]


def explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    splits: Sequence[int] | None = None,
    enabled: Sequence[bool] | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    impl: str | None = None,
) -> str:
    """Which code `lora_linear` takes for these arguments, and why, in one sentence.

    Nothing is computed. "triton: ..." are the fused kernels, "torch: ..." is PyTorch. Raises what
    `lora_linear` raises for an unknown impl and for dtypes that do not fit; of an impl that cannot
    run the sentence tells why.
    """
    impl = _requested(impl)
    if lora_A.shape[0] == 0:
        return "torch: of rank 0, or with no part enabled, this is the frozen layer alone"
    path, reason = _choose(impl, x, _product_dtype(x, weight), weight, lora_A, lora_B)
    base = ", on an NF4 weight that is dequantised before" if isinstance(weight, NF4Tensor) else ""
    return f"{'triton' if path == 'triton' else 'torch'}: {reason}{base}"


def _requested(impl: str | None) -> str:
    source = "impl" if impl is not None else _VARIABLE
    impl = os.environ.get(_VARIABLE, "auto") if impl is None else impl
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"{source}={impl!r}: expected one of {_IMPLEMENTATIONS}")
    return impl


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """autocast's where it is on and applies, else that of both."""
    autocast = autocast_dtype(x.device)
    if autocast is not None and x.is_floating_point() and x.dtype != torch.float64:
        return autocast
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: expected the same dtype; "
            f"pass x.to({weight.dtype}) or run under torch.autocast({x.device.type!r})"
        )
    return x.dtype


def _choose(
    impl: str, x: Tensor, dtype: torch.dtype, weight: Tensor, lora_A: Tensor, lora_B: Tensor
) -> tuple[str, str]:
    """("triton" | "torch" | "formula", why): the formula is PyTorch that anything can look into."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "formula", "torch.jit is tracing, which records plain operations alone"
    if forward_ad._current_level >= 0:
        return "formula", "forward-mode differentiation sees through plain operations alone"
    wrapped = [type(t).__name__ for t in (x, weight, lora_A, lora_B) if _is_wrapper(t)]
    if "DTensor" in wrapped:
        return "formula", "a DTensor runs as plain operations, whose sharding PyTorch knows"
    if impl == "torch":
        return "torch", f'impl="torch" (or {_VARIABLE}=torch) was asked for'
    if wrapped:
        return "torch", f"a {wrapped[0]} is not a plain tensor"
    if torch._C._are_functorch_transforms_active():
        return "torch", "a torch.func transform is active"
    if dtype not in _FUSED_DTYPES:
        return "torch", f"there are no fused kernels for {dtype}"
    if lora_B.shape[1] > _LARGEST_RANK:
        return "torch", f"r = {lora_B.shape[1]} is above {_LARGEST_RANK}"
    obstacle = _obstacle(x.device, impl == "triton")
    if obstacle:
        return "torch", obstacle
    return "triton", f"{dtype} on {x.device.type} runs the fused kernels"


def _is_wrapper(tensor: Tensor) -> bool:
    return type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor)


_PLAIN = (Tensor, torch.nn.Parameter, NF4Tensor)


def _obstacle(device: torch.device, explicit: bool) -> str:
    return _find_obstacle(device, explicit)


# What torch.compiler.assume_constant_result sets; calling it would import the compiler, and triton.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _find_obstacle(device: torch.device, explicit: bool) -> str:
    """Why Triton cannot run on this device; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "" if explicit else 'on a CPU the kernels are interpreted, and only if impl="triton"'
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}, the fused kernels need a CUDA or ROCm GPU"
    if not torch.cuda.is_available():
        return "there is no GPU that can be used (torch.cuda.is_available() is False)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor} is below 8.0"
    return ""


def _draw(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """Packed mask of x, from the seed or from torch's generator."""
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    if seed is None:
        bits: Tensor = draw_keep_bits(rows * columns, p, _own(x), device=x.device)
        return bits
    return seeded_keep_bits(_seed(x, seed), rows, columns, p)


def _seed(x: Tensor, seed: Tensor | int | None) -> Tensor:
    """One int64 element on x's device: the caller's, or one from torch's generator."""
    if seed is None:
        drawn: Tensor = draw_seed(_own(x), device=x.device)
        return drawn
    seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
    if seed.numel() != 1:
        raise ValueError(f"seed has shape {tuple(seed.shape)}: expected one element")
    return seed


def _own(x: Tensor) -> Tensor:
    """An empty tensor, which tells this draw from another one of the same size."""
    return torch.empty(0, device=x.device)


def _mask(x: Tensor, p: float, seed: Tensor | int | None) -> Tensor:
    """The mask as a tensor like x, with its keep-scale, by operations that can be traced."""
    ones = torch.ones_like(x)
    if seed is None:
        return F.dropout(ones, p)
    kept: Tensor = keep(ones, _draw(x, p, seed))
    return kept * keep_scale(p)


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    splits: tuple[int, ...],
    enabled: tuple[bool, ...],
) -> None:
    devices = {t.device for t in (x, weight, bias, lora_A, lora_B) if t is not None}
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the tensors are on {named}: expected one device; move them with .to()")
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            "weight, lora_A and lora_B must be matrices, got shapes "
            f"{tuple(weight.shape)}, {tuple(lora_A.shape)}, {tuple(lora_B.shape)}"
        )
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (..., {in_features})")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({out_features},)")
    if len(enabled) != len(splits) or sum(splits) != out_features or min(splits) < 0:
        raise ValueError(
            f"splits={splits} and enabled={enabled}: expected one flag a part, "
            f"and parts that sum to the {out_features} rows of weight"
        )
    r, parts = lora_B.shape[1], sum(map(bool, enabled))
    rows = sum(size for size, on in zip(splits, enabled, strict=True) if on)
    if lora_A.shape != (r * parts, in_features) or lora_B.shape[0] != rows:
        raise ValueError(
            f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit: {parts} "
            f"enabled parts with {rows} rows need lora_A ({parts}·r, {in_features}) and "
            f"lora_B ({rows}, r)"
        )
