"""What merging an adapter into a checkpoint did, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..table import aligned


@dataclass(frozen=True)
class LayerError:
    """What merging did to one weight; norms are Frobenius's.

    Attributes:
        update_norm: of the dense update.
        error_norm, max_error: of the rounded merged weight minus the exact sum in float64.
        changed: share of the elements that differ from the base's.
        distance: of the base's weight from the 4-bit one of the training, where that was another.
    """

    update_norm: float
    error_norm: float
    max_error: float
    changed: float
    distance: float = 0.0

    @property
    def relative(self) -> float:
        """How much of the update was lost in rounding."""
        return self.error_norm / self.update_norm if self.update_norm else 0.0

    @property
    def relative_distance(self) -> float:
        """How far the weights of the base and of the training are apart, in updates."""
        return self.distance / self.update_norm if self.update_norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` did; `str()` of it is a table, the worst layer first.

    Attributes:
        layers: name of the module to what merging did to its weight.
        tensors, bytes: of the checkpoint that was written.
        copied_files: the files that were carried over, relative to the base's folder.
        base: whether it is the base of the training: "matches", or "not checked: ..." and why.
    """

    layers: Mapping[str, LayerError]
    tensors: int
    bytes: int
    copied_files: tuple[str, ...]
    base: str

    def __str__(self) -> str:
        worst = sorted(self.layers.items(), key=lambda item: -item[1].relative)
        moved = any(error.distance for error in self.layers.values())
        cells = [
            ("layer", "|update|", "|rounding|", "relative", "largest", "changed")
            + (("change of base",) if moved else ())
        ] + [
            (
                name,
                f"{error.update_norm:.4g}",
                f"{error.error_norm:.4g}",
                f"{error.relative:.2e}",
                f"{error.max_error:.2e}",
                f"{error.changed:.2%}",
                *([f"{error.relative_distance:.2e}"] if moved else []),
            )
            for name, error in worst
        ]
        total = (
            f"{len(self.layers)} layers; {self.tensors:,} tensors, {self.bytes:,} bytes; "
            f"{len(self.copied_files)} other files"
        )
        lines = [*aligned(cells), total, f"frozen weights: {self.base}"]
        if moved:
            lines.append("change of base: from the 4-bit weights of the training, in updates")
        return "\n".join(lines)
