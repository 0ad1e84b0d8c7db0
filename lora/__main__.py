"""The command line, `python -m lora` or `lora`: look into adapters, check, convert, merge them.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done; 1 the adapter has problems
(`check`); 2 bad input, in one line; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from ._version import __version__
from .adapter import files
from .adapter.contents import Adapter, AdapterError, Layer
from .adapter.describe import as_text, facts_of
from .adapter.storage import read_adapter, write_adapter

_FORMS = ("peft", "loralib", "split", "fused", "portable")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (AdapterError, OSError) as error:
        print(f"lora: error: {_in_words(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora: interrupted", file=sys.stderr)
        return 130
    return code


def _in_words(error: Exception) -> str:
    """The error without Python's way of showing errno."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


# What an adapter holds


def _info(args: argparse.Namespace) -> int:
    file = read_adapter(args.path)
    facts = facts_of(file)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def _check(args: argparse.Namespace) -> int:
    try:
        file = read_adapter(args.path)
    except AdapterError as error:
        print(f"problem: {error}")
        return 1
    for problem in file.problems.values():
        print(f"problem: {problem}")
    if file.problems:
        print(f"{file.path}: {len(file.problems)} problems")
        return 1
    verified = "SHA-256 verified" if file.verified else "not verified: no digest of ours"
    print(f"{file.path}: {len(file.adapter.layers)} layers, {verified}")
    if file.adapter.does_nothing():
        print("this adapter does nothing yet: B is zero")
    if args.base is not None:
        from .adapter.checkpoint import Checkpoint
        from .adapter.merge import rehearse

        base = Checkpoint(args.base)  # not inside: if it cannot be read, the adapter may be fine
        try:
            report = rehearse(base, file.adapter, progress=_progress("comparing"))
        except AdapterError as error:
            print(f"problem: {error}")
            return 1
        print(report)
    return 0


# Into other forms


def _convert(args: argparse.Namespace) -> int:
    from .adapter import convert

    if args.dtype is not None and args.to != "portable":
        raise AdapterError(f"--dtype={args.dtype}: only --to portable changes the dtype")
    output = Path(args.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise AdapterError(f"{output} is there already: give a new place, nothing is overwritten")
    adapter = _read_any(args)
    if args.to == "loralib":
        state = convert.to_loralib(adapter)
        _save_state_dict(state, args.output)
        print(f"{args.output}: build the layers with")
        for line, count in Counter(map(_constructor, adapter.layers.values())).items():
            print(f"  {count} x {line}")
        return 0
    notes = []
    if args.to == "split":
        adapter = convert.split(adapter, _qkv_rows(args.base))
    elif args.to == "fused":
        adapter = convert.fuse(adapter)
    elif args.to == "portable":
        adapter, rounding = convert.portable(adapter, _DTYPES.get(args.dtype))
        notes.append(
            "exact"
            if rounding == 0
            else f"rounded once, by {rounding:.1e} of the largest entry at most"
        )
    if args.lora_alpha is not None:
        notes.append(f"lora_alpha {args.lora_alpha:g} in every layer")
    write_adapter(adapter, args.output)
    print("; ".join([f"{args.output}: {len(adapter.layers)} layers", *notes]))
    return 0


def _read_any(args: argparse.Namespace) -> Adapter:
    """The adapter of a PEFT folder, or of a loralib file with what it does not say."""
    path = Path(args.input)
    if path.suffix not in (".pt", ".pth", ".bin") or (path.parent / "adapter_config.json").exists():
        if args.lora_alpha is not None or args.enable_lora is not None or args.embedding:
            raise AdapterError(
                "--lora-alpha, --enable-lora and --embedding are for loralib's files"
            )
        if args.base is not None and args.to != "split":
            raise AdapterError("--base is for loralib's files and for --to split")
        return read_adapter(path).checked()
    from .adapter.convert import from_loralib

    if args.lora_alpha is None or args.base is None:
        missing = "--lora-alpha" if args.lora_alpha is None else "--base"
        raise AdapterError(
            f"{path} is a state dict, which says neither alpha nor the kinds of its layers: {missing} "
            "is missing (expected --lora-alpha A and --base CHECKPOINT)"
        )
    return from_loralib(
        files.read_state_dict(path),
        _shapes(Path(args.base)),
        args.lora_alpha,
        enable_lora=args.enable_lora,
        embeddings=args.embedding,
    )


def _shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a checkpoint's folder, or of a state dict in a file."""
    if base.is_dir():
        from .adapter.checkpoint import Checkpoint

        checkpoint = Checkpoint(base)
        return {name: checkpoint.shape(name) for name in checkpoint.names}
    return {name: tuple(t.shape) for name, t in files.read_state_dict(base).items()}


def _qkv_rows(base: str | None) -> list[int] | None:
    """Rows of q, k and v by the config of the base model, if it was given."""
    if base is None:
        return None
    from .phi3 import qkv_splits

    path = Path(base) / "config.json"
    config = files.read_json(path)
    try:
        return qkv_splits(SimpleNamespace(**config))
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise AdapterError(f"{path} does not say heads and hidden size: {error}") from error


def _save_state_dict(state: Mapping[str, Tensor], output: str) -> None:
    import io

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    files.write_file(Path(output), buffer.getvalue())


def _constructor(layer: Layer) -> str:
    alpha = layer.scaling * layer.r
    parts = f", enable_lora={list(layer.enable_lora)}" if layer.enable_lora else ""
    return f"{layer.kind}(..., r={layer.r}, lora_alpha={alpha:g}{parts})"


# Into the base


def _merge(args: argparse.Namespace) -> int:
    from .adapter.merge import merge_checkpoint

    adapter = read_adapter(args.adapter).checked()
    dequantize = None if args.dequantize is None else _DTYPES[args.dequantize]
    report = merge_checkpoint(
        args.base, adapter, args.out, dequantize=dequantize, progress=_progress("merging")
    )
    print(report)
    print(f"{args.out}: {report.bytes:,} bytes; peak memory of this process {_peak():,} bytes")
    return 0


def _peak() -> int:
    """The largest resident set so far; 0 where the system does not say it."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _progress(what: str) -> Callable[[int, int], None] | None:
    """A line on stderr that counts, where somebody is watching."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        bar = "#" * (30 * done // max(total, 1))
        end = "\n" if done == total else ""
        print(f"\r{what} [{bar:<30}] {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


# The arguments


def _mask(text: str) -> list[bool]:
    if not re.fullmatch("[01](,[01])*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 and 1, such as 1,0,1")
    return [flag == "1" for flag in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora",
        description="Adapters on disk: what they hold, whether they are whole, conversions, merging.",
        epilog="example: lora check adapter --base ./Phi-3-mini-4k-instruct",
    )
    parser.add_argument("--version", action="version", version=f"lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    add = _adder(commands)

    info = add("info", _info, "what an adapter holds", "lora info checkpoint_dir/adapter --json")
    info.add_argument("path", help="folder or file of an adapter")
    info.add_argument("--json", action="store_true", help="everything, as JSON")

    check = add(
        "check",
        _check,
        "whether an adapter is whole, and fits its base",
        "lora check adapter --base ./Phi-3-mini-4k-instruct",
    )
    check.add_argument("path", help="folder or file of an adapter")
    check.add_argument(
        "--base",
        metavar="MODEL",
        help="folder of the base model, of 4 bits or not: compare names, shapes and weights, and "
        "rehearse the merge",
    )

    convert = add(
        "convert",
        _convert,
        "an adapter in another form, exactly or not at all",
        "lora convert adapter adapter-for-vllm --to portable",
    )
    convert.add_argument(
        "input", help="folder or file of an adapter, or a loralib state dict (.pt)"
    )
    convert.add_argument(
        "output", help="folder to write, new or empty; with --to loralib a new file"
    )
    convert.add_argument(
        "--to",
        choices=_FORMS,
        required=True,
        help="peft: as save_adapter writes it; loralib: a state dict; split: q_proj, k_proj, v_proj, "
        "gate_proj, up_proj; fused: back; portable: one rank, no patterns, the scale in B",
    )
    convert.add_argument(
        "--base", metavar="MODEL", help="the base model: a folder, or a state dict"
    )
    convert.add_argument("--dtype", choices=_DTYPES, help="of the factors, with --to portable")
    convert.add_argument(
        "--lora-alpha", type=float, help="of all layers of a loralib file, which does not say it"
    )
    convert.add_argument(
        "--enable-lora", type=_mask, help="of its MergedLinear layers, such as 1,0,1"
    )
    convert.add_argument(
        "--embedding", action="append", default=[], help="a name of its embeddings"
    )

    merge = add(
        "merge",
        _merge,
        "a plain checkpoint with the adapter merged in, for a base of any size",
        "lora merge ./Phi-3-mini-4k-instruct adapter ./Phi-3-mini-mine",
    )
    merge.description = (
        f"{merge.description} An adapter that was trained on 4-bit weights (QLoRA) is merged into the "
        "original base, or with --dequantize into the weights of the training: give the 4-bit base "
        "then, as transformers saves it (bitsandbytes, nf4), or the original, whose adapted weights "
        "are quantised first. A LoftQ adapter fits those alone."
    )
    merge.add_argument("base", help="folder of the base model, in safetensors")
    merge.add_argument("adapter", help="folder or file of the adapter")
    merge.add_argument("out", help="folder to write; new, or empty")
    merge.add_argument(
        "--dequantize",
        choices=_DTYPES,
        help="write the weights that were of 4 bits as dense ones of this dtype; other tensors keep "
        "theirs",
    )
    return parser


def _adder(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
) -> Callable[..., argparse.ArgumentParser]:
    def add(
        name: str, run: Callable[[argparse.Namespace], int], what: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: {example}",
        )
        command.set_defaults(run=run)
        return command

    return add


if __name__ == "__main__":
    sys.exit(main())
