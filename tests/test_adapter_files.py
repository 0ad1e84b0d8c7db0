"""Nothing is lost: writers that are killed or fail, files that are damaged or hostile, bad places."""

import contextlib
import errno
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import lora
from lora.adapter import Adapter, AdapterError, Layer, read_adapter, write_adapter
from lora.adapter import files as adapter_files
from lora.adapter.peft_format import CONFIG_NAME, TENSORS_NAME
from lora.adapter.storage import digest, heal, parse_safetensors


def small_adapter(value=1.0):
    A, B = torch.full((2, 3), float(value)), torch.full((4, 2), -float(value))
    layers = {
        "a": Layer("Linear", A, B, lora_alpha=3, scaling=1.5, lora_dropout=0.25, fingerprint="ab"),
        "b": Layer(
            "MergedLinear",
            torch.arange(6.0).reshape(2, 3) + value,
            torch.arange(4.0).reshape(4, 1) - value,
            lora_alpha=1,
            scaling=1.0,
            enable_lora=(True, False, True),
            out_splits=(3, 2, 1),
        ),
    }
    return Adapter(
        layers, base="somewhere", saved={"c.weight": A.bfloat16()}, modules_to_save=("c",)
    )


def same(one, other):
    """Whether two adapters are equal, to the bit."""
    facts = ("bias", "modules_to_save", "base", "task_type")
    if (
        any(getattr(one, f) != getattr(other, f) for f in facts)
        or one.layers.keys() != other.layers.keys()
    ):
        return False
    mine, theirs = one.tensors(), other.tensors()
    if mine.keys() != theirs.keys():
        return False
    if not all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine):
        return False
    own = [f for f in Layer.__dataclass_fields__ if f not in ("lora_A", "lora_B")]
    return all(
        getattr(one.layers[n], f) == getattr(other.layers[n], f) for n in one.layers for f in own
    )


def test_what_is_read_is_what_was_written(tmp_path):
    write_adapter(small_adapter(), tmp_path / "new" / "adapter")
    file = read_adapter(tmp_path / "new" / "adapter")
    assert file.verified
    assert not file.problems
    assert same(file.checked(), small_adapter())
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == [
        CONFIG_NAME,
        TENSORS_NAME,
    ]
    assert same(
        read_adapter(tmp_path / "new" / "adapter" / TENSORS_NAME).checked(), small_adapter()
    )


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_adapter_files import same, small_adapter
from lora.adapter import read_adapter, write_adapter
from lora.adapter.storage import heal

random.seed(0)
folder = Path({folder!r})
write_adapter(small_adapter(0), folder / "kept")

def save(number, target):
    child = os.fork()
    if child == 0:
        write_adapter(small_adapter(number), target)
        os._exit(0)
    return child

began = time.perf_counter()
for _ in range(5):
    os.waitpid(save(0, folder / "kept"), 0)
duration = (time.perf_counter() - began) / 5
current, counts = 0, {{"old": 0, "new": 0, "none": 0}}
for number in range(1, 201):
    fresh = number % 4 == 0
    target = folder / (f"fresh{{number}}" if fresh else "kept")
    child = save(number, target)
    time.sleep(random.uniform(0, 1.2 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if fresh and not target.exists():
        counts["none"] += 1
        continue
    found = read_adapter(target).checked()
    if same(found, small_adapter(number)):
        counts["new"] += 1
        current = current if fresh else number
    else:
        assert not fresh and same(found, small_adapter(current)), number
        counts["old"] += 1
write_adapter(small_adapter(0), folder / "fresh4")
heal(folder / "kept", read_adapter(folder / "kept"))
left = [p.name for p in folder.rglob("*") if "tmp" in p.name and "fresh" not in p.name]
assert not left, left
print(counts, "damaged: 0")
"""


def test_killed_at_200_random_moments_nothing_is_lost(tmp_path):
    script = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    for outcome in ("old", "new", "none"):  # else the moments did not fall into a save
        assert f"'{outcome}': 0" not in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="which cannot sync a folder")
def test_what_gets_its_name_is_on_the_disk(assert_durable, tmp_path):
    write_adapter(small_adapter(0), tmp_path / "adapter")
    assert_durable(1)  # a new folder
    write_adapter(small_adapter(1), tmp_path / "adapter")
    assert_durable(2)  # both files


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "open"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("exists", [True, False], ids=["kept", "fresh"])
def test_an_error_at_any_call_leaves_the_old_adapter(call, number, exists, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    if exists:
        write_adapter(small_adapter(1), folder)
    calls = iter(range(1000))
    original = getattr(os, call)

    def failing(*args, **kwargs):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(os, call, failing)
    with contextlib.suppress(OSError):
        write_adapter(small_adapter(2), folder)
    monkeypatch.undo()
    if exists or folder.exists():
        found = read_adapter(folder).checked()
        assert same(found, small_adapter(2)) or (exists and same(found, small_adapter(1)))
    write_adapter(small_adapter(3), folder)
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]


def test_a_running_writer_keeps_its_temporary_files(tmp_path):
    folder = tmp_path / "adapter"
    write_adapter(small_adapter(), folder)
    dead = folder / ".x.lora-tmp-dead"
    dead.write_bytes(b"")
    with adapter_files._temporary(folder / "x", adapter_files._open_file) as (running, _):
        heal(folder, read_adapter(folder))
        assert running.exists()
        assert not dead.exists()
    assert not running.exists()


READER = """
import sys
sys.path.insert(0, {tests!r})
from test_adapter_files import small_adapter
from lora.adapter import read_adapter
from lora.adapter.storage import heal
from pathlib import Path
folder = Path({folder!r})
print("ready", flush=True)
while not (folder / "stop").exists():
    file = read_adapter(folder)
    file.checked()
    heal(folder, file)
"""


def test_a_folder_is_read_and_healed_while_it_is_written(tmp_path):
    write_adapter(small_adapter(0), tmp_path)
    script = READER.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for reader in readers:
        assert reader.stdout.readline() == b"ready\n"
    try:
        for number in range(400):
            write_adapter(small_adapter(number), tmp_path)
    finally:
        (tmp_path / "stop").touch()
        errors = [reader.communicate(timeout=600)[1] for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0], errors
    assert same(read_adapter(tmp_path).checked(), small_adapter(399))
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


def test_an_old_reader_does_not_undo_a_newer_save(tmp_path):
    write_adapter(small_adapter(), tmp_path)
    old = read_adapter(tmp_path)
    (name, layer), *_ = small_adapter().layers.items()
    newer = Adapter(
        {name: layer.with_factors(layer.lora_A, layer.lora_B, lora_alpha=64, scaling=32.0)}
    )
    write_adapter(newer, tmp_path)
    said = (tmp_path / CONFIG_NAME).read_bytes()
    heal(tmp_path, old)
    assert (tmp_path / CONFIG_NAME).read_bytes() == said
    (tmp_path / CONFIG_NAME).write_bytes(b"{}")
    heal(tmp_path, old)
    assert json.loads((tmp_path / CONFIG_NAME).read_bytes())["lora_alpha"] == 64
    (tmp_path / CONFIG_NAME).write_bytes(b"{}")
    (tmp_path / TENSORS_NAME).write_bytes(b"damaged since")
    heal(tmp_path, old)  # the load that calls it is done and must not fail
    assert (tmp_path / CONFIG_NAME).read_bytes() == b"{}"


def test_the_json_is_healed_from_the_tensors(tmp_path, caplog):
    write_adapter(small_adapter(), tmp_path)
    before = (tmp_path / CONFIG_NAME).read_bytes()
    for broken in (None, b"", b"{", before.replace(b'"r"', b'"s"')):
        (tmp_path / CONFIG_NAME).unlink()
        if broken is not None:
            (tmp_path / CONFIG_NAME).write_bytes(broken)
        file = read_adapter(tmp_path)
        assert same(file.checked(), small_adapter())
        heal(tmp_path, file)
        assert (tmp_path / CONFIG_NAME).read_bytes() == before
        assert "written anew" in caplog.text
        caplog.clear()
    changed = json.loads(before) | {"base_model_name_or_path": "mine"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(changed))
    heal(tmp_path, read_adapter(tmp_path))
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == changed  # a user may say so
    (tmp_path / CONFIG_NAME).write_text(json.dumps(changed | {"r": 77}))
    heal(tmp_path, read_adapter(tmp_path))
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == changed


def test_a_json_that_cannot_be_replaced_leaves_the_new_tensors_and_says_so(tmp_path):
    write_adapter(small_adapter(1), tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    (tmp_path / CONFIG_NAME).mkdir()
    with pytest.raises(OSError, match=f"{TENSORS_NAME} is the new one, but {CONFIG_NAME} stayed"):
        write_adapter(small_adapter(2), tmp_path)
    file = read_adapter(tmp_path)
    assert same(file.checked(), small_adapter(2))
    heal(tmp_path, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, TENSORS_NAME]


def test_what_a_dead_writer_left_of_a_folder_with_brackets_is_removed(tmp_path):
    stale, other = (tmp_path / f".{name}.lora-tmp-0" for name in ("g[1]", "g1"))
    for folder in (stale, other):
        folder.mkdir()
        (folder / TENSORS_NAME).touch()
    write_adapter(small_adapter(), tmp_path / "g[1]")
    assert not stale.exists()
    assert other.exists()
    stale.mkdir()
    write_adapter(small_adapter(), tmp_path / "g[1]")
    assert not stale.exists()


# Bad places


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(NotADirectoryError, match=r"file.*it is a file; give a folder"):
        write_adapter(small_adapter(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(OSError, match=r"cannot save to .*below"):
        write_adapter(small_adapter(), tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    write_adapter(small_adapter(), tmp_path / "adapter")
    (tmp_path / "adapter").chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="what was there is unchanged"):
            write_adapter(small_adapter(2), tmp_path / "adapter")
        assert same(read_adapter(tmp_path / "adapter").checked(), small_adapter())
    finally:
        (tmp_path / "adapter").chmod(0o700)


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_adapter_files import same, small_adapter
from lora.adapter import read_adapter, write_adapter
write_adapter(small_adapter(1), {folder!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a full disk would, in the middle of a file
try:
    write_adapter(small_adapter(2), {folder!r})
except OSError as error:
    print(error)
else:
    raise AssertionError("it fitted")
assert same(read_adapter({folder!r}).checked(), small_adapter(1))
"""


def test_no_space_in_the_middle_of_a_file(tmp_path):
    script = FULL_DISK.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "adapter"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "what was there is unchanged" in done.stdout


def test_no_adapter_at_a_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such adapter"):
        read_adapter(tmp_path / "nothing")
    write_adapter(small_adapter(), tmp_path / "inside")
    with pytest.raises(FileNotFoundError, match="there is one in its folder 'inside'"):
        read_adapter(tmp_path)


# Damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_adapter(small_adapter(), folder)
    return (folder / TENSORS_NAME).read_bytes(), folder


def raises_or_is_the_same(data, folder):
    """'raised', or 'same' if the damage changed nothing; anything else fails."""
    path = folder / "damaged.safetensors"
    path.write_bytes(data)
    try:
        adapter = read_adapter(path).checked()
    except AdapterError:
        return "raised"
    assert same(adapter, small_adapter())
    return "same"


def test_every_single_flipped_bit(whole):
    data, folder = whole
    counts = {"raised": 0, "same": 0}
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        counts[raises_or_is_the_same(bytes(damaged), folder)] += 1
    print(f"{len(data)} bytes flipped: {counts}")
    assert counts["raised"] > 0.9 * len(data)


@settings(
    max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(choice=st.data())
def test_damage(whole, choice):
    data, folder = whole
    position = choice.draw(st.integers(0, len(data)))
    kind = choice.draw(st.sampled_from(["flip", "cut", "add", "truncate"]))
    some = choice.draw(st.binary(min_size=1, max_size=5))
    damaged = {
        "flip": data[:position] + some + data[position + len(some) :],
        "cut": data[:position] + data[position + len(some) :],
        "add": data[:position] + some + data[position:],
        "truncate": data[:position],
    }[kind]
    raises_or_is_the_same(damaged, folder)


def header(entries, data=b""):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text + data


HOSTILE = {
    "empty": b"",
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond the end": struct.pack("<Q", 1000) + b"{}",
    "a shape beyond the file": header(
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"1234"
    ),
    "a shape that overflows": header(
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]}}, b"1234"
    ),
    "offsets that overlap": header(
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234"
    ),
    "negative offsets": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "a list": header([1, 2]),
    "deep nesting": header(b"[" * 100_000),
    "a pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(data, tmp_path):
    (tmp_path / TENSORS_NAME).write_bytes(data)
    (tmp_path / CONFIG_NAME).write_text(
        '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["a"]}'
    )
    with pytest.raises(AdapterError, match="damaged or no safetensors"):
        read_adapter(tmp_path)


# Metadata that its digest says is ours


def rewritten(folder, change):
    """Change the facts in a file of ours, and its digest with them."""
    path = folder / TENSORS_NAME
    tensors, metadata = parse_safetensors(path.read_bytes(), "")
    facts = json.loads(metadata["lora"])
    change(facts)
    text = json.dumps(facts)
    save_file(tensors, path, {"format": "pt", "lora": text, "lora_sha256": digest(text, tensors)})


def of_layer(name, **changes):
    return lambda facts: facts["layers"][name].update(changes)


HOSTILE_FACTS = {
    "negative parts": of_layer("b", out_splits=[-4, 12, -2]),
    "parts that are no numbers": of_layer("b", out_splits=["3", 2, 1]),
    "a mask that is no bools": of_layer("b", enable_lora=[2, 0, 1]),
    "a fingerprint that is a number": of_layer("a", fingerprint=5),
    "dropout of 2": of_layer("a", lora_dropout=2),
    "a scale that is infinite": of_layer("a", scaling=float("inf")),
    "a kind of no layer": of_layer("a", kind="Evil"),
    "no layers": lambda facts: facts.pop("layers"),
    "a layer fewer": lambda facts: facts["layers"].pop("a"),
    "a layer more": lambda facts: facts["layers"].update(c=facts["layers"]["a"]),
    "layers in a list": lambda facts: facts.update(layers=[1]),
    "a later format": lambda facts: facts.update(format=2),
    "no config": lambda facts: facts.pop("config"),
    "no modules_to_save": lambda facts: facts.pop("modules_to_save"),
    "modules_to_save of numbers": lambda facts: facts.update(modules_to_save=3),
}


@pytest.mark.parametrize("change", HOSTILE_FACTS.values(), ids=HOSTILE_FACTS)
def test_hostile_metadata_is_refused(change, tmp_path):
    write_adapter(small_adapter(), tmp_path)
    rewritten(tmp_path, lambda facts: None)
    assert same(read_adapter(tmp_path).checked(), small_adapter())
    rewritten(tmp_path, change)
    with pytest.raises(AdapterError):
        read_adapter(tmp_path).checked()
    model = nn.ModuleDict({n: nn.Linear(3, out) for n, out in (("a", 4), ("b", 6), ("c", 2))})
    with pytest.raises(AdapterError):
        lora.load_adapter(model, tmp_path)
    assert {type(module) for module in model.values()} == {nn.Linear}


def test_the_digest_tells_names_dtypes_shapes_and_bytes_apart():
    half = torch.arange(6, dtype=torch.float16)
    others = [
        ("facts", {"b": half}),
        ("facts", {"a": half.view(torch.bfloat16)}),
        ("facts", {"a": half.view(2, 3)}),
        ("facts", {"a": half + 1}),
        ("other", {"a": half}),
    ]
    assert len({digest("facts", {"a": half}), *(digest(*other) for other in others)}) == 6


def test_no_pipe_no_device_and_no_huge_json(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", "/dev/zero"):
        with pytest.raises(AdapterError, match="no regular file"):
            read_adapter(path)
    with pytest.raises(AdapterError, match="the key 'r' appears twice"):
        adapter_files.parse_json('{"r": 1, "r": 2}', "x")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/lora-was-here",))


def test_loading_runs_no_code(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a.lora_A": Evil()}, buffer)
    (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    model = nn.Sequential(lora.Linear(3, 3, 2))
    with pytest.raises(AdapterError, match="weights_only"):
        lora.load_adapter(model, tmp_path / "evil.pt")
    assert not os.path.exists("/tmp/lora-was-here")


def test_a_damaged_state_dict_is_found(tmp_path):
    """torch.load checks no sums."""
    model = nn.Sequential(lora.Linear(3, 3, 2))
    torch.save(lora.lora_state_dict(model), tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    data[data.index(b"FB", info.header_offset) + 70] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(AdapterError, match=r"a\.pt"):
        lora.load_adapter(model, tmp_path / "a.pt")


def test_writing_refuses_what_reading_would(tmp_path):
    adapter = small_adapter(float("nan"))
    with pytest.raises(AdapterError, match=r"a\.lora_A has a NaN"):
        write_adapter(adapter, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(AdapterError, match="nothing to save"):
        write_adapter(Adapter({}), tmp_path / "adapter")
