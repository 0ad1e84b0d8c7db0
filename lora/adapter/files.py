"""Files that are either the old ones or the new ones: atomic, durable writes and whole reads.

`write_folder` puts several files into a folder. A folder that is not there yet appears whole: it is
filled beside its place and renamed. In one that is there, every file is written under a temporary
name, synced and renamed, in the order given; the first is the commit point. A process that dies
leaves temporary files that nobody reads; they are locked while their writer lives, so that the next
write or read can tell and remove them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import secrets
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .contents import AdapterError

try:
    import fcntl
except ImportError:  # as on Windows, where nobody can remove an open file
    fcntl = None  # type: ignore[assignment]

_MARK = ".lora-tmp-"
_LARGEST_JSON = 64 << 20


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Make `folder` hold `contents` (file name to bytes); other files in it stay.

    Raises OSError, its own kind, with the folder and the reason in words. What was there is then as
    it was, unless the first file is there already and a later one failed, which the error says.
    """
    try:
        if not folder.exists():
            _make_folder(folder, contents)
        elif folder.is_dir():
            tidy(folder)
            _replace_all(folder, contents)
        else:
            raise NotADirectoryError(errno.ENOTDIR, "it is a file; give a folder")
    except OSError as error:
        reason = error.strerror or str(error)
        if not isinstance(error, _HalfWayError):
            reason += "; what was there is unchanged"
        kind = OSError if isinstance(error, _HalfWayError) else type(error)
        raise kind(error.errno, f"cannot save to {folder}: {reason}") from error


class _HalfWayError(OSError):
    """The first of several files was replaced, and another was not."""


def write_file(path: Path, data: bytes) -> None:
    """Write one file as `write_folder` writes several."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; give the name of a file")
    write_folder(path.parent, {path.name: data})


def _make_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    try:
        with new_folder(folder) as temporary:
            for name, data in contents.items():
                with (temporary / name).open("xb") as file:
                    _write(file.fileno(), data)
    except OSError:
        if not folder.is_dir():
            raise
        _replace_all(folder, contents)  # another process made it meanwhile


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name at the end, or vanishes with all it has."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder.parent, folder.name)
    with _temporary(folder, _open_folder) as (temporary, _):
        yield temporary
        for inner, _, _ in os.walk(temporary):
            _sync(Path(inner))
        if folder.is_dir():
            folder.rmdir()  # it is empty; Windows renames to no folder that exists
        os.rename(temporary, folder)
    _sync(folder.parent)


def _replace_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files under temporary names first, so that hardly anything can fail in between."""
    with contextlib.ExitStack() as stack:
        temporary = {}
        for name, data in contents.items():
            path, descriptor = stack.enter_context(_temporary(folder / name, _open_file))
            _write(descriptor, data)
            temporary[name] = path
        for number, name in enumerate(contents):
            try:
                os.replace(temporary[name], folder / name)
            except OSError as error:
                if number == 0:
                    raise
                done = ", ".join(list(contents)[:number])
                reason = f"{done} is the new one, but {name} stayed: {error.strerror}"
                raise _HalfWayError(error.errno, reason) from error
    _sync(folder)


@contextlib.contextmanager
def _temporary(path: Path, create: Callable[[Path], int]) -> Iterator[tuple[Path, int]]:
    """Something beside `path`, made by `create` and locked; removed at the end, if not renamed."""
    while True:
        temporary = path.with_name(f".{path.name}{_MARK}{secrets.token_hex(6)}")
        descriptor = create(temporary)
        try:
            # Before it is locked, another process may take it for a dead writer's, and remove it.
            if _lock(descriptor) and not _is(temporary, descriptor):
                continue
            yield temporary, descriptor
            return
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            _remove(temporary)


def _open_file(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def _open_folder(path: Path) -> int:
    path.mkdir()
    if sys.platform == "win32":  # which cannot open a folder
        return -1
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # taken for a dead writer's
        return _open_folder(path)


def _is(path: Path, descriptor: int) -> bool:
    """Whether `path` is still what was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Lock what was opened until it is closed; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks: nothing of it is ever taken for stale
        return False
    return True


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`, onto the disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)


def _sync(folder: Path) -> None:
    """Make renames in `folder` durable; Windows cannot open a folder."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tidy(folder: Path) -> None:
    """Remove what writers that died have left in `folder`, and beside it in its name."""
    _remove_stale(folder, "")
    _remove_stale(folder.parent, folder.name)


def _remove_stale(folder: Path, name: str) -> None:
    for path in list(folder.glob(f".{glob.escape(name) or '*'}{_MARK}*")):
        with contextlib.suppress(OSError):  # gone meanwhile, in use, or only others may remove it
            _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    if sys.platform == "win32":
        return _remove(path)
    if fcntl is None:  # nobody can tell whether it is in use
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Reading


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file, at one moment: a file renamed over it later is not mixed in."""
    # Without waiting, since a pipe that nobody writes to would wait for ever.
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AdapterError(f"{path} is no regular file")
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 64 MiB, without duplicate keys."""
    data = read_bytes(path)
    if len(data) > _LARGEST_JSON:
        raise AdapterError(f"{path} has {len(data):,} bytes: expected a small JSON file")
    return parse_json(data, str(path))


def parse_json(data: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in `data`; AdapterError for anything else."""
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return values


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt` or `.bin` file, by torch's loader that runs no code of the file."""
    data = io.BytesIO(read_bytes(path))
    try:
        with zipfile.ZipFile(data) as archive:  # torch writes a zip but does not check its sums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"the sum of {damaged} does not match")
        data.seek(0)
        state = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # its zip, unpickler and storage code raise nearly anything
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{path}: torch.load(weights_only=True) cannot read it ({reason}); expected a dict of "
            "tensors that torch.save wrote"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise AdapterError(f"{path}: expected a dict of names to tensors")
    return state
