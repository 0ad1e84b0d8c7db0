"""load_pretrained: a checkpoint into a model from the meta device, one tensor at a time.

In memory are the model as it is wanted, of 4 bits, say, and one layer's dense weight. `sources` says
which Parameter has which tensor's values, here and for `lora.distributed.load_sharded`, which fills a
model that is spread over processes. Not handled: names that are not the model's own, and weights that
are quantised otherwise than to bitsandbytes' NF4.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._base import LoRALayer
from .adapter.check import row_blocks
from .adapter.checkpoint import Checkpoint
from .adapter.contents import AdapterError, listed
from .full import originals
from .kernels.nf4_tensor import NF4Tensor
from .quantized import is_quantized
from .sharded import is_sharded, refuse_sharded
from .switch import adapters_of, inner_model
from .variants import begins_as

Named = Sequence[tuple[str, nn.Module]]


def load_pretrained(
    model: nn.Module, folder: str | Path, device: torch.device | str | None = None
) -> None:
    """Fill a model that was built on the meta device from a checkpoint.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora.patch_phi3(model, target_modules="all-linear", quantize="nf4")
        lora.load_pretrained(model, "Phi-3-mini-4k-instruct", device="cuda")

    Values are converted to the dtypes of the model. A 4-bit weight takes a dense one, which is
    quantised on `device`, or the codes of a checkpoint that transformers and bitsandbytes saved (nf4),
    to the bit. Factors begin as `lora.patch` draws them, or as the loaded weight says (DoRA, PiSSA, and
    LoftQ, which needs a dense one); what `lora.load_adapter` gave stays. Tied weights stay tied.

    Args:
        model: on the meta device, patched or not. Buffers that no checkpoint holds, such as Phi-3's
            rotary frequencies, are made as a transformers model makes them (5.0 or newer); another
            model's must not be on the meta device: build their modules outside of it.
        folder: with `model.safetensors` or its shards and index, in the model's own names.
        device: where everything goes; None is the CPU. Make the optimizer afterwards: Parameters are
            new objects.

    Raises AdapterError before anything is read, by name: tensors that are missing, of another shape,
    or of 4 bits where the model's are not, a LoftQ layer without its dense weight, Parameters that are
    not on the meta device, buffers that cannot be made. Later for a weight that is not finite.
    ValueError for a sharded model, or the meta device. The model is then as it was.
    """
    checkpoint = Checkpoint(folder)
    place = torch.empty(0, device="cpu" if device is None else device).device  # with its number
    if place.type == "meta":
        raise ValueError(
            "device='meta' has no values: expected one with memory, or None for the CPU"
        )
    model = inner_model(model)
    refuse_sharded(
        model, "this fills whole tensors", "lora.distributed.load_sharded fills its parts"
    )
    modules = _modules(model)
    buffers = [
        (_joined(path, own), module, own)
        for path, module in modules
        for own, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    stored = [at for at in buffers if at[2] not in at[1]._non_persistent_buffers_set]
    found = sources(modules, checkpoint, _misfits(stored, checkpoint), _of_adapter(modules))
    with _unchanged_on_error(modules), torch.no_grad():
        for path, module in modules:
            _initialize_buffers(path, module, modules, place)
        for name, module, own in stored:
            buffer = module._buffers[own]
            assert buffer is not None
            module._buffers[own] = _read(checkpoint, name, torch.empty_like(buffer, device=place))
        passing = _passing(checkpoint, found, place)
        for source in found:
            try:
                _load(checkpoint, source, passing)
            except ValueError as error:
                raise AdapterError(f"{source.key!r} of {checkpoint.folder}: {error}") from error
        moved: dict[int, Tensor] = {}
        for registry in _registries(modules):  # what was not on the meta device
            for own, tensor in registry.items():
                if tensor is not None and tensor.device != place:
                    registry[own] = moved.setdefault(id(tensor), _moved(tensor, place))


class Source(NamedTuple):
    """The name of a tensor of the checkpoint, and the modules that have its Parameter, as which."""

    key: str
    places: list[tuple[nn.Module, str]]

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now."""
        module, own = self.places[0]
        parameter = module._parameters[own]
        assert parameter is not None
        return parameter


def sources(
    modules: Named,
    checkpoint: Checkpoint,
    problems: Iterable[str] = (),
    loaded: Collection[int] = (),
    tied: Mapping[str, str] | None = None,
) -> list[Source]:
    """Where every Parameter of `modules` comes from, but for the factors and those `loaded`, by id.

    `tied` has the names of Parameters that are stored under another, though they are objects apart.
    AdapterError with `problems`, and those that are found here, if there are any.
    """
    problems, found = list(problems), []
    holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in modules:
        for own, parameter in module._parameters.items():
            factor = isinstance(module, LoRALayer) and own.startswith("lora_")
            if parameter is None or factor or id(parameter) in loaded:
                continue
            held = holders.setdefault(id(parameter), [])
            held.append((_joined(path, own), module, own))
    for held in holders.values():
        names = [name for name, _, _ in held]
        others = [tied[name] for name in names if name in tied] if tied else []
        key = next((name for name in (*names, *others) if name in checkpoint), None)
        source = Source(key or names[0], [(module, own) for _, module, own in held])
        problem = _misfit(names[0], source, checkpoint)
        problems += [] if problem is None else [problem]
        found.append(source)
    if problems:
        raise AdapterError(f"{checkpoint.folder}: {listed(problems)}; nothing was read")
    return found


def _misfit(name: str, source: Source, checkpoint: Checkpoint) -> str | None:
    """Why a tensor cannot be loaded; None if it can."""
    key, parameter = source.key, source.parameter
    if not parameter.is_meta:
        return f"{name} is not on the meta device"
    problem = _unlike(key, parameter, checkpoint)
    if problem is not None:
        return problem
    if is_sharded(parameter) and any("Strided" in str(p) for p in parameter.placements):  # type: ignore[attr-defined]
        return f"{name} is sharded by two engines at once"
    if not checkpoint.is_quantized(key):
        return None
    if not is_quantized(parameter):
        return (
            f"{key} is of 4 bits, in the model it is dense: patch that with quantize='nf4', or, if it "
            "is the output head, load the model with from_pretrained (and bitsandbytes), then patch it"
        )
    if any(begins_as(layer.variant, "loftq") for layer in _fresh(source)):
        return (
            f"{key} is of 4 bits, and its layer has init_lora_weights='loftq', which begins as what "
            "quantising lost: give the original checkpoint"
        )
    return None


def _misfits(
    buffers: Iterable[tuple[str, nn.Module, str]], checkpoint: Checkpoint
) -> Iterator[str]:
    for name, module, own in buffers:
        buffer = module._buffers[own]
        assert buffer is not None
        problem = _unlike(name, buffer, checkpoint)
        if problem is not None:
            yield problem


def _unlike(key: str, tensor: Tensor, checkpoint: Checkpoint) -> str | None:
    """Why the stored tensor is none that `tensor` could have the values of."""
    if key not in checkpoint:
        return f"missing tensor {key}"
    if checkpoint.shape(key) != tuple(tensor.shape):
        return f"{key} is {checkpoint.shape(key)}, in the model {tuple(tensor.shape)}"
    if checkpoint.dtype(key).is_floating_point != tensor.is_floating_point():
        return f"{key} is {checkpoint.dtype(key)}, in the model {tensor.dtype}"
    return None


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All that may hold tensors: those of the tree, of inactive adapters, and frozen originals."""
    roots = [("", model)]
    store = adapters_of(model)
    for modules in (store.base, *store.modules.values()) if store is not None else ():
        roots += modules.items()
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, root in roots:
        for inner, module in (*root.named_modules(), *originals(root)):
            found.setdefault(id(module), (_joined(path, inner), module))
    return list(found.values())


def _joined(path: str, own: str) -> str:
    return f"{path}.{own}" if path and own else path or own


def _of_adapter(modules: Named) -> set[int]:
    """The ids of Parameters that `lora.load_adapter` filled: they train, in a patched model."""
    if not any(isinstance(module, LoRALayer) for _, module in modules):
        return set()
    parameters = [p for _, m in modules for p in m._parameters.values() if p is not None]
    return {id(p) for p in parameters if p.requires_grad and not p.is_meta}


@contextmanager
def _unchanged_on_error(modules: Named) -> Iterator[None]:
    """If the block raises, every module has the tensors that it had."""
    before = [(registry, registry.copy()) for registry in _registries(modules)]
    try:
        yield
    except BaseException:
        for registry, kept in before:
            registry.update(kept)
        raise


def _registries(modules: Named) -> Iterator[dict[str, Any]]:
    for _, module in modules:
        yield module._parameters
        yield module._buffers


# Parameters


def _fresh(source: Source) -> list[LoRALayer]:
    """The LoRA layers on this weight whose factors have no values yet."""
    layers = [m for m, own in source.places if isinstance(m, LoRALayer) and own == "weight"]
    return [layer for layer in layers if layer.r > 0 and layer.lora_A.is_meta]


def _passing(checkpoint: Checkpoint, found: Iterable[Source], place: torch.device) -> Tensor:
    """Memory for every dense weight on its way to 4 bits.

    One for all: were each freed, small tensors that stay would take its place, the next would lie
    behind them, and memory would grow by all dense weights after all (16 layers of 8 MB: by 141 MB).
    """
    sizes = [
        s.parameter.numel() * s.parameter.dtype.itemsize
        for s in found
        if is_quantized(s.parameter) and not checkpoint.is_quantized(s.key)
    ]
    return torch.empty(max(sizes, default=0), dtype=torch.uint8, device=place)


def _load(checkpoint: Checkpoint, source: Source, passing: Tensor) -> None:
    """Read a tensor; of a LoRA layer's weight, let the update begin on it, and then quantise."""
    old, fresh, place = source.parameter, _fresh(source), passing.device
    read = checkpoint.is_quantized(source.key)
    if read:
        value: Tensor = checkpoint.nf4(source.key).to(place, old.dtype)
    elif is_quantized(old):
        size = old.numel() * old.dtype.itemsize
        value = _read(checkpoint, source.key, passing[:size].view(old.dtype).view(old.shape))
    else:
        value = _read(checkpoint, source.key, torch.empty_like(old, device=place))
    _put(source, nn.Parameter(value, old.requires_grad))
    for layer in fresh:
        for own, factor in layer.update_parameters().items():
            empty = torch.empty_like(factor, device=place)
            layer._parameters[own] = nn.Parameter(empty, factor.requires_grad)
        layer._reset_factors()
    if not is_quantized(old) or read:
        return
    for layer in fresh:
        _put(source, nn.Parameter(value, old.requires_grad))
        layer.quantize_weight()  # type: ignore[operator]
    quantized = fresh[-1].weight if fresh else NF4Tensor.quantize(value)
    _put(source, nn.Parameter(quantized, requires_grad=False))


def _put(source: Source, parameter: nn.Parameter) -> None:
    for module, own in source.places:
        module._parameters[own] = parameter


def _read(checkpoint: Checkpoint, key: str, into: Tensor) -> Tensor:
    """The tensor in the memory and the dtype of `into`, in blocks of rows."""
    for rows in row_blocks(tuple(into.shape)):
        part = into[rows] if into.ndim else into
        part.copy_(checkpoint.rows(key, rows.start, rows.stop))
    return into


def _moved(tensor: Tensor, place: torch.device) -> Tensor:
    moved = tensor.detach().to(place)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


# Buffers that no checkpoint holds


def _initialize_buffers(path: str, module: nn.Module, modules: Named, place: torch.device) -> None:
    """Make the module's buffers on the meta device that are not stored, as transformers does.

    PreTrainedModel._init_weights (5.0) gives such buffers their values, or leaves some of other code
    out: so they begin as values that nothing gives. Parameters have no memory yet that it could change.
    """
    names = [
        own
        for own, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and own in module._non_persistent_buffers_set
    ]
    if not names:
        return
    outer = [m for p, m in modules if hasattr(m, "_init_weights") and _holds(p, path)]
    for own in names:
        buffer = module._buffers[own]
        assert buffer is not None
        if outer and (buffer.is_floating_point() or buffer.dtype in _INTEGERS):
            module._buffers[own] = torch.full_like(buffer, _unset(buffer), device=place)
    if outer:
        outer[-1]._init_weights(module)  # type: ignore[operator]
    for own in names:
        buffer = module._buffers[own]
        assert buffer is not None
        if buffer.is_meta or (buffer.isnan() | (buffer == _unset(buffer))).any():
            raise AdapterError(
                f"the buffer {_joined(path, own)} is on the meta device, and no checkpoint holds it: "
                f"build its module, a {type(module).__name__}, outside of torch.device('meta'); "
                "nothing was read"
            )


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


def _unset(buffer: Tensor) -> float | int:
    return math.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _holds(outer: str, path: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")
