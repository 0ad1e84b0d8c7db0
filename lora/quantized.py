"""Linear layers on a 4-bit weight: the type, its entries in a state dict, and models made of them.

A weight is an `NF4Tensor` (lora.kernels): a Parameter of the dense weight's shape and dtype. In a state
dict it lies in parts, plain tensors, as bitsandbytes writes them and transformers reads them:

    weight                                  codes, two a byte, uint8 (⌈out · in / 2⌉, 1)
    weight.absmax, weight.nested_absmax     nested codes, uint8; their scales, fp32
    weight.quant_map, weight.nested_quant_map           the values of either code, fp32
    weight.quant_state.bitsandbytes__nf4    JSON in uint8: shape, dtype, sizes of blocks, offset

bitsandbytes is imported nowhere. Not handled: its other types, and blocks of other sizes (refused).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .kernels import nf4
from .kernels.nf4 import BLOCK, GROUP, NF4
from .kernels.nf4_tensor import NF4Tensor
from .sharded import is_sharded, sharded_like, whole

if TYPE_CHECKING:
    from typing_extensions import Self

STATE = "quant_state.bitsandbytes__"
_CPU = torch.device("cpu")


class NF4State(nn.Module):
    """Mixin before `nn.Linear`: a weight that may be an NF4Tensor, whole or sharded, in state dicts.

    Loading takes the parts, or a dense weight, which is quantised.
    """

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self._parameters.get("weight")
        if is_quantized(weight):
            own = destination.pop(f"{prefix}weight")
            destination.update({f"{prefix}{k}": v for k, v in _entries(own.detach()).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, errors = args
        if isinstance(local(self._parameters.get("weight")), NF4Tensor):
            try:
                weight, now = joined(state_dict, prefix), self._parameters["weight"]
                if weight is not None:
                    part = is_sharded(now) and not is_sharded(weight)
                    state_dict[f"{prefix}weight"] = sharded_like(weight, now) if part else weight
            except ValueError as error:
                errors.append(f"{prefix}weight: {error}")
                state_dict[f"{prefix}weight"] = self._parameters["weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        weight = local(self._parameters.get("weight"))
        said: str = super().extra_repr()
        if isinstance(weight, NF4Tensor):
            bits = 8 * weight.nbytes / max(weight.numel(), 1)
            said += f", weight=nf4 of {weight.nbytes:,} bytes ({bits:.2f} bits each)"
        return said


class LinearNF4(NF4State, nn.Linear):
    """`nn.Linear` on a frozen 4-bit weight (QLoRA, arXiv 2305.14314): y = x Wᵀ + bias.

    W (out, in) is dequantised for each product, forward and backward, and not kept. Made by
    `from_module`, or by `lora.patch(model, ..., quantize="nf4")` of the layers that get no update.

    >>> layer = LinearNF4.from_module(torch.nn.Linear(64, 32, bias=False))
    >>> layer
    LinearNF4(in_features=64, out_features=32, bias=False, weight=nf4 of 1,064 bytes (4.16 bits each))
    """

    @classmethod
    def from_module(cls, layer: nn.Module) -> Self:
        """On the quantised weight of an `nn.Linear`, or the very parts of a bitsandbytes `Linear4bit`.

        Bias, hooks, mode and device stay. The weight may be fp32, bf16 or fp16. Raises TypeError for
        another type of layer, ValueError for elements that are not finite and for other 4-bit types.
        """
        if type(layer) is not nn.Linear and not is_linear4bit(layer):
            raise TypeError(
                f"LinearNF4.from_module: got {type(layer).__module__}.{type(layer).__name__}, "
                "expected exactly torch.nn.Linear, or bitsandbytes' Linear4bit"
            )
        if is_linear4bit(layer):
            state = layer.state_dict()  # in the stored order, also where a CPU has it in another
            weight = joined(state, "")
            if weight is None:
                raise ValueError(
                    "bitsandbytes has not quantised this Linear4bit yet: move it first"
                )
        else:
            weight = NF4Tensor.quantize(layer._parameters["weight"].detach())  # type: ignore[union-attr]
        new = cls.__new__(cls)
        kept = nn.Linear(1, 1, device="meta").__dict__.keys() | {"training"}
        new.__dict__.update({k: v for k, v in layer.__dict__.items() if k in kept})
        new.__dict__["_parameters"] = layer._parameters.copy()
        new.weight = nn.Parameter(weight, requires_grad=False)
        return new

    def to_dense(self, weight: Tensor) -> nn.Linear:
        """The `nn.Linear` with this layer's bias, hooks and mode, on a dense weight."""
        new = nn.Linear.__new__(nn.Linear)
        new.__dict__.update(self.__dict__)
        new.__dict__["_parameters"] = {**self._parameters, "weight": None}
        new.weight = nn.Parameter(weight, requires_grad=False)
        return new

    def reset_parameters(self) -> None:
        raise TypeError(
            "a 4-bit weight is made from a pretrained one: LinearNF4.from_module(linear)"
        )


def local(weight: Any) -> Any:
    """What this process has of a weight."""
    return weight._local_tensor if is_sharded(weight) else weight


def is_quantized(weight: object) -> bool:
    return isinstance(local(weight), NF4Tensor)


def is_linear4bit(layer: object) -> bool:
    """Whether it is bitsandbytes' 4-bit layer, or a subclass of its own."""
    return any(
        c.__name__ == "Linear4bit" and c.__module__.partition(".")[0] == "bitsandbytes"
        for c in type(layer).__mro__
    )


def adoptable(layer: nn.Module) -> nn.Module:
    """bitsandbytes' 4-bit layer as ours, on the same codes; any other as it is."""
    return LinearNF4.from_module(layer) if is_linear4bit(layer) else layer


# State dicts


def _entries(weight: Any) -> dict[str, Tensor]:
    """The parts of an NF4Tensor, or of one that FSDP2 has sharded, by own name."""
    parts = local(weight).parts
    codes, absmax = parts.packed[:, None], parts.absmax
    if is_sharded(weight):
        codes, absmax = (_sharded(part, weight) for part in (codes, absmax))
    device = parts.packed.device
    levels, dynamic = nf4.levels(_CPU).to(device, copy=True), nf4.dynamic(_CPU)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    entries = {"weight": codes, "weight.absmax": absmax, "weight.quant_map": levels}
    if parts.nested_absmax is not None and parts.offset is not None:
        entries["weight.nested_absmax"] = parts.nested_absmax
        entries["weight.nested_quant_map"] = dynamic.to(device, copy=True)
        state |= {
            "nested_blocksize": GROUP,
            "nested_dtype": "float32",
            "nested_offset": 0.0 if parts.offset.is_meta else parts.offset.item(),
        }
    text = bytearray(json.dumps(state).encode())
    entries[f"weight.{STATE}nf4"] = torch.frombuffer(text, dtype=torch.uint8)
    return entries


def _sharded(part: Tensor, weight: Any) -> Tensor:
    """A part of a weight that is sharded by rows, sharded alike."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False)
    return made


def joined(state: dict[str, Any], prefix: str) -> Tensor | None:
    """The weight whose entries `state` has, which are taken out; None if there is none. Whole.

    A dense weight is quantised, so that it takes the place of a 4-bit one whole. ValueError for parts
    of another type of quantisation, or that do not fit together.
    """
    name = f"{prefix}weight"
    parts = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
    weight: Tensor | None = state.pop(name, None)
    if not parts:
        if weight is not None and not is_sharded(weight) and not is_quantized(weight):
            weight = NF4Tensor.quantize(weight)
        return weight
    own = {key.removeprefix(f"{name}."): whole(part) for key, part in parts.items()}
    made: Tensor = from_entries({"": None if weight is None else whole(weight), **own})
    return made


def from_entries(entries: Mapping[str, Any]) -> NF4Tensor:
    """The inverse of `_entries`: "" names the codes, the rest are named without `weight.`."""
    kinds = [key.removeprefix(STATE) for key in entries if key.startswith(STATE)]
    if kinds != ["nf4"]:
        raise ValueError(f"quantised as {', '.join(kinds) or 'something unknown'}: expected nf4")
    described = json.loads(bytes(entries[f"{STATE}nf4"].tolist()))
    codes, absmax = entries[""], entries.get("absmax")
    if codes is None or absmax is None:
        missing = "codes, `weight`" if codes is None else "scales, absmax"
        raise ValueError(f"the {missing}, are missing beside the other parts")
    nested = "nested_absmax" in entries
    if nested != ("nested_offset" in described) or absmax.dtype.is_floating_point == nested:
        raise ValueError(
            f"absmax is of {absmax.dtype}, nested_absmax is {'there' if nested else 'missing'}, and "
            f"nested_offset is {described.get('nested_offset')}: expected codes (uint8) with both, or "
            "floating-point values with neither"
        )
    expected = {"quant_type": "nf4", "blocksize": BLOCK}
    expected |= {"nested_blocksize": GROUP, "nested_dtype": "float32"} if nested else {}
    for key, value in expected.items():
        if described.get(key) != value:
            raise ValueError(f"{key}={described.get(key)!r}: expected {value!r}")
    maps = {"quant_map": nf4.levels(_CPU)}
    maps |= {"nested_quant_map": nf4.dynamic(_CPU)} if nested else {}
    for key, table in maps.items():
        held = entries.get(key)
        if held is not None and not held.is_meta and not torch.equal(held.cpu(), table):
            raise ValueError(f"{key} is not the one of NF4: quantised by a changed bitsandbytes")
    shape, dtype = tuple(described["shape"]), getattr(torch, described["dtype"])
    packed = codes.contiguous().view(torch.uint8).reshape(-1)
    like = NF4Tensor.empty(shape, dtype, torch.device("meta"))
    nested_absmax = offset = None
    if nested:
        nested_absmax = entries["nested_absmax"]
        offset = torch.full((1,), described["nested_offset"], dtype=torch.float32)
        offset = offset.to(packed.device)
    else:
        absmax = absmax.float()
    parts = NF4(packed, absmax, nested_absmax, offset)
    for key, part, wanted in zip(NF4._fields, parts, like.parts, strict=True):
        if part is not None and wanted is not None and part.shape != wanted.shape:
            raise ValueError(
                f"{key} has {part.numel()} elements: a weight {shape} has {wanted.numel()}"
            )
    return NF4Tensor(parts, shape, dtype)
