"""Adapter: what an adapter is, whatever file it came from. Shapes are those of lora's own layers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.reference import part_rows

if TYPE_CHECKING:
    from typing_extensions import Self


def check_number(name: str, value: object) -> None:
    """AdapterError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterError(f"{name}={value!r}: expected a number")
    if not abs(value) <= sys.float_info.max:
        raise AdapterError(f"{name}={str(value)[:20]}: expected a finite number")


def check_parts(out_splits: object, enable_lora: object) -> None:
    """AdapterError unless these are the rows of parts, and which of them have an update."""
    splits, mask = out_splits or (), enable_lora or ()
    if (
        not isinstance(splits, tuple)
        or not isinstance(mask, tuple)
        or len(splits) != len(mask)
        or not all(isinstance(rows, int) and rows > 0 for rows in splits)
        or not all(isinstance(on, bool) for on in mask)
        or not any(mask)
    ):
        raise AdapterError(
            f"parts of {splits!r} rows, enabled {mask!r}: expected numbers and bools"
        )


# Of the vectors of a Layer, their names in the LoRA layer.
_OWN_NAMES = {"magnitude": "lora_magnitude", "lora_bias": "lora_bias"}
KINDS = ("Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d", "Conv3d")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AdapterError(ValueError):
    """An adapter that cannot be read, does not fit, or cannot be converted exactly."""


def listed(problems: Iterable[str], most: int = 4) -> str:
    """The first problems in words, and the number of all."""
    found = list(problems)
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    count = f"{len(found)} problems: " if len(found) > 1 else ""
    return f"{count}{'; '.join(found[:most])}{more}"


@dataclass(frozen=True)
class Layer:
    """The update of one module: scaling · update(lora_A, lora_B).

    kind: the class of `lora` that computes it, one of KINDS; a convolution here has kernel size 1
    and one group. Shapes of the factors, as in these classes:

        Linear          lora_A (r, in)           lora_B (out, r)
        MergedLinear    lora_A (r·n, in)         lora_B (rows of the n enabled parts, r)
        Embedding       lora_A (r, num)          lora_B (dim, r)
        Conv1d/2d/3d    lora_A (r, in)           lora_B (out, r)

    lora_alpha is what the user set; scaling is what counts (alpha / r, or alpha / √r with rsLoRA).
    Of the variants (`lora.variants`), whose vectors have a value for every row of the output:
        frozen_rank: PiSSA's; the last so many ranks of each part are A₀ and -B₀, which stay.
        magnitude (out,): DoRA's, in rows without an update the norm of the frozen row.
        lora_bias (out,): bias of the update without its scale, in rows without an update zero.
        use_lorafa: lora_A is not trained.
    fingerprint: of the frozen weight that it was trained on (`fingerprint.fingerprint`), or None; its
        marks say whether that was of 4 bits, and whether the update began as what quantising lost.
    transposed: the weight is stored (in, out), as in transformers' Conv1D.
    """

    kind: str
    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    scaling: float
    lora_dropout: float = 0.0
    enable_lora: tuple[bool, ...] | None = None
    out_splits: tuple[int, ...] | None = None
    transposed: bool = False
    fingerprint: str | None = None
    frozen_rank: int = 0
    magnitude: Tensor | None = None
    lora_bias: Tensor | None = None
    use_lorafa: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise AdapterError(f"kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        a, b, n = self.lora_A, self.lora_B, self.parts
        if a.ndim != 2 or b.ndim != 2 or self.r < 1 or a.shape[0] != n * self.r or not a.numel():
            raise AdapterError(
                f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no factors of one update "
                f"of kind {self.kind}: expected ({'r' if n == 1 else f'{n}·r'}, in) and (out, r)"
            )
        if self.kind == "MergedLinear":
            self._check_parts()
        for name in ("lora_alpha", "scaling", "lora_dropout"):
            check_number(name, getattr(self, name))
        if not 0 <= self.lora_dropout < 1:
            raise AdapterError(f"lora_dropout={self.lora_dropout!r}: expected a number in [0, 1)")
        if not isinstance(self.fingerprint, (str, type(None))):
            raise AdapterError(f"fingerprint={self.fingerprint!r}: expected a string")
        self._check_variant()

    def _check_variant(self) -> None:
        linear = self.kind in ("Linear", "MergedLinear")
        if not isinstance(self.frozen_rank, int) or not 0 <= self.frozen_rank < self.r:
            raise AdapterError(f"frozen_rank={self.frozen_rank!r} of rank {self.r}: expected less")
        for name, vector in self.vectors.items():
            if not linear or vector.shape != self.shape[:1]:
                raise AdapterError(
                    f"{name} {tuple(vector.shape)} on a {self.kind} of {self.shape}: expected a linear "
                    "layer's, with one value for every row"
                )

    def _check_parts(self) -> None:
        check_parts(self.out_splits, self.enable_lora)
        if sum(stop - start for start, stop in self.rows) != self.lora_B.shape[0]:
            raise AdapterError(
                f"MergedLinear: lora_B has {self.lora_B.shape[0]} rows, the enabled ones of the "
                f"parts {self.out_splits} are {[stop - start for start, stop in self.rows]}"
            )

    @property
    def r(self) -> int:
        """The rank of each part."""
        return self.lora_B.shape[1]

    @property
    def parts(self) -> int:
        """How many parts have an update."""
        return sum(self.enable_lora) if self.enable_lora else 1

    @property
    def rows(self) -> list[tuple[int, int]]:
        """First and last + 1 row of the output of every part that has an update."""
        if self.kind != "MergedLinear":
            return [(0, self.shape[0])]
        return list(part_rows(self.out_splits or (), self.enable_lora or ()))

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Those of `magnitude` and `lora_bias` that there are."""
        both = {"magnitude": self.magnitude, "lora_bias": self.lora_bias}
        return {name: vector for name, vector in both.items() if vector is not None}

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that it updates; of an embedding, (num, dim)."""
        if self.kind == "Embedding":
            return self.lora_A.shape[1], self.lora_B.shape[0]
        out = sum(self.out_splits) if self.out_splits else self.lora_B.shape[0]
        return out, self.lora_A.shape[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        """(A, B) with the update scaling · B A of the whole weight: B of a MergedLinear has blocks."""
        if self.kind != "MergedLinear":
            return self.lora_A, self.lora_B
        blocks = self.lora_B.new_zeros(self.shape[0], self.parts * self.r)
        lengths = [stop - start for start, stop in self.rows]
        for part, ((start, stop), B) in enumerate(
            zip(self.rows, torch.split(self.lora_B, lengths), strict=True)
        ):
            blocks[start:stop, part * self.r : (part + 1) * self.r] = B
        return self.lora_A, blocks

    def parameters(self) -> dict[str, Tensor]:
        """The parameters of the LoRA layer, by their own names in it."""
        found = {"lora_A": self.lora_A, "lora_B": self.lora_B}
        if self.frozen_rank:
            r = self.r - self.frozen_rank
            A = torch.unflatten(self.lora_A, 0, (self.parts, self.r))
            found = {"lora_A": A[:, :r].flatten(0, 1), "lora_B": self.lora_B[:, :r]}
            found |= {"lora_A0": A[:, r:].flatten(0, 1), "lora_B0": -self.lora_B[:, r:]}
        for name, vector in self.vectors.items():
            pieces = [vector[start:stop] for start, stop in self.rows]
            found[_OWN_NAMES[name]] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return found

    def is_zero(self) -> bool:
        """Whether the update is zero; False with DoRA, since it takes the base to know."""
        own = self.parameters()
        if self.magnitude is not None or (self.lora_bias is not None and self.lora_bias.any()):
            return False
        if self.frozen_rank:
            pairs = (own["lora_A"], own["lora_A0"]), (own["lora_B"], own["lora_B0"])
            return all(torch.equal(*pair) for pair in pairs)
        return not (self.lora_A.any() and self.lora_B.any())

    def with_parameters(self, values: Mapping[str, Tensor]) -> Layer:
        """The inverse of `parameters`: this layer with such values."""
        A, B = values["lora_A"], values["lora_B"]
        if self.frozen_rank:
            frozen = torch.unflatten(values["lora_A0"], 0, (self.parts, self.frozen_rank))
            A = torch.cat([torch.unflatten(A, 0, (self.parts, -1)), frozen], 1).flatten(0, 1)
            B = torch.cat([B, -values["lora_B0"]], 1)
        vectors = {}
        for name, full in self.vectors.items():
            value = values[_OWN_NAMES[name]]
            kept = value.new_zeros(full.shape) if full.is_meta else full.to(value, copy=True)
            parts = torch.split(value, [stop - start for start, stop in self.rows])
            for (start, stop), part in zip(self.rows, parts, strict=True):
                kept[start:stop] = part
            vectors[name] = kept
        return self.with_factors(A, B, **vectors)

    def with_factors(self, lora_A: Tensor, lora_B: Tensor, **changes: object) -> Layer:
        return replace(self, lora_A=lora_A, lora_B=lora_B, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Adapter:
    """Layers by the name of the module, and what else was trained.

    Attributes:
        layers: name of the module in the base model to its update.
        bias: "none", "all" or "lora_only", as in `lora.mark_only_lora_as_trainable`.
        biases: trained biases, by their name in the base's state dict.
        modules_to_save: names of modules that were trained in full.
        saved: their tensors, by their name in the base's state dict.
        copies: tensors of the frozen base that a PEFT file repeats; a base must have the same.
        base: name or folder of the base model; task_type: PEFT's, such as "CAUSAL_LM".
        target_modules: what PEFT is to adapt: names, or a regular expression; None: the layers' names.
    """

    layers: Mapping[str, Layer]
    bias: str = "none"
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    base: str | None = None
    task_type: str | None = None
    target_modules: tuple[str, ...] | str | None = None

    def replaced(self, **changes: object) -> Self:
        return replace(self, **changes)  # type: ignore[arg-type]

    def sound(self) -> tuple[Self, dict[str, str]]:
        """The adapter without tensors that no adapter may hold, and these, by name, in words.

        They are NaN, infinite values, and factors that are no floating-point numbers.
        """
        bad = {}
        for key, tensor in self.tensors().items():
            if not tensor.is_floating_point() and key in self.saved:
                continue  # such as a counter of BatchNorm
            if tensor.dtype not in DTYPES:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
                bad[key] = f"is {tensor.dtype}: expected {names}"
            elif not torch.isfinite(tensor).all():
                bad[key] = "has a NaN or infinite value"
        if not bad:
            return self, {}
        others = self.biases.keys() | self.saved.keys()
        named: dict[str, str] = {}
        for key in bad:
            module = key.rpartition(".")[0]
            named.setdefault(module if module in self.layers and key not in others else key, key)
        kept = {
            part: {key: value for key, value in getattr(self, part).items() if key not in named}
            for part in ("layers", "biases", "saved")
        }
        return self.replaced(**kept), {name: f"{key} {bad[key]}" for name, key in named.items()}

    def does_nothing(self) -> bool:
        """Whether every update is zero, as with a B that was never trained (not known with DoRA)."""
        zero = [layer.is_zero() for layer in self.layers.values()]
        return bool(zero) and all(zero) and not self.saved

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that was trained, by module name and own name."""
        factors = {
            f"{name}.{own}": tensor
            for name, layer in self.layers.items()
            for own, tensor in layer.parameters().items()
        }
        return {**factors, **self.biases, **self.saved}
