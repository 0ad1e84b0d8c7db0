"""The emulator of PTX (tests/ptx) is right where the PTX is, and finds every rule broken on purpose."""

import re

import numpy as np
import pytest

triton = pytest.importorskip("triton", reason="Triton is for Linux alone")
tl = triton.language

import emulate  # noqa: E402
import torch  # noqa: E402
from ptx import RULES, machine, matrix, program, scalar  # noqa: E402
from ptx.memory import GlobalMemory  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


@triton.jit
def product(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """c (M, N) = a (M, K) bᵀ (N, K), by one program; more programs each compute all of it."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for i in range(0, K, BLOCK):
        x = tl.load(a + m * K + i + k[None, :])
        y = tl.load(b + n * K + i + k[:, None])
        total = tl.dot(x, y, total)
    tl.store(c + m * N + n, total)


LACKS_PROXY_FENCE = triton.__version__ in emulate.LACK_PROXY_FENCE
TILES = {80: ((64, 64, 64, 4), (128, 32, 32, 8)), 90: ((64, 64, 64, 4), (128, 64, 64, 8))}
K = 256


def compiled(capability, M, N, BLOCK, warps):
    """(PTX, bytes of shared memory)"""
    types = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "K": "i32"}
    source = ASTSource(
        product,
        types | dict.fromkeys(("M", "N", "BLOCK"), "constexpr"),
        {(4,): M, (5,): N, (6,): BLOCK},
        {(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True},
    )
    return made.asm["ptx"], made.metadata.shared


@pytest.fixture(scope="module", autouse=True)
def _compiled_anew(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture(scope="module")
def modules():
    return {(cc, tile): compiled(cc, *tile) for cc, tiles in TILES.items() for tile in tiles}


def emulated(ptx, shared, tile, copies="early", change=lambda memory, arguments: None, grid=1):
    """The largest error of c, and the rules that were broken."""
    M, N, *_ = tile
    random = np.random.default_rng(0)
    a, b = (scalar.bits_of_bf16(random.standard_normal((rows, K))) for rows in (M, N))
    memory = GlobalMemory(1 << 21)
    arguments = [memory.put(a), memory.put(b), memory.put(np.zeros((M, N), np.float32), False), K]
    change(memory, arguments)
    found = machine.run(program.parse(ptx, shared), memory, arguments, (grid, 1, 1), copies=copies)
    got, whole = memory.get(arguments[2], (M, N), np.float32)
    want = matrix.float_of_bf16(a) @ matrix.float_of_bf16(b).T
    return (np.abs(got - want).max() if whole else np.inf), {rule for rule, *_ in found}


CASES = [(cc, tile, copies) for cc in TILES for tile in TILES[cc] for copies in ("early", "late")]


@pytest.mark.parametrize(("capability", "tile", "copies"), CASES)
def test_a_matrix_product_is_right(modules, capability, tile, copies):
    error, broken = emulated(*modules[capability, tile], tile, copies)
    assert error < 1e-4
    assert broken == ({"proxy fence"} if capability == 90 and LACKS_PROXY_FENCE else set())


def without(pattern):
    """PTX in which the instructions that match are missing."""
    return lambda ptx: re.sub(rf"^\s*{pattern}[^;]*;", "", ptx, flags=re.MULTILINE)


def waiting_for_less(instruction):
    return lambda ptx: re.sub(rf"({instruction}\S*\s+)\d+;", r"\g<1>7;", ptx)


def without_the_first_copy(ptx):
    return re.sub(r"^\s*cp\.async\.cg[^;]*;", "", ptx, count=1, flags=re.MULTILINE)


def with_a_branch_of_five_threads(ptx):
    branch = (
        "mov.u32 %planted_r, %tid.x;\nsetp.lt.u32 %planted_p, %planted_r, 5;\n"
        "@%planted_p bra $planted;\n$planted:\n"
    )
    return re.sub(r"^(\s*ld\.param)", rf"{branch}\1", ptx, count=1, flags=re.MULTILINE)


def uninitialised(memory, arguments):
    at = arguments[0] - memory.BASE
    memory.written[at : at + 16] = False


def longer_rows(memory, arguments):
    arguments[3] *= 2


def an_odd_address(memory, arguments):
    arguments[0] += 2


# A rule, for which GPU, what is changed in the PTX, in the arguments, in the grid.
FAULTS = {
    "no barriers": ("race", 80, {"ptx": without(r"bar\.sync")}),
    "no barriers before wgmma": ("race", 90, {"ptx": without(r"bar\.sync")}),
    "no wait for copies": ("in flight", 80, {"ptx": waiting_for_less(r"cp\.async\.wait_group")}),
    "no wait before wgmma": ("in flight", 90, {"ptx": waiting_for_less(r"cp\.async\.wait_group")}),
    "no wait for wgmma": ("registers", 90, {"ptx": waiting_for_less(r"wgmma\.wait_group")}),
    "a copy over operands": ("in flight", 90, {"ptx": waiting_for_less(r"wgmma\.wait_group")}),
    "no fence of registers": ("wgmma fence", 90, {"ptx": without(r"wgmma\.fence")}),
    "no fence of proxies": ("proxy fence", 90, {"ptx": without(r"fence\.proxy")}),
    "a copy less": ("uninitialised", 80, {"ptx": without_the_first_copy}),
    "a tensor not written": ("uninitialised", 80, {"change": uninitialised}),
    "beyond a tensor": ("bounds", 80, {"change": longer_rows}),
    "an odd address": ("alignment", 80, {"change": an_odd_address}),
    "two programs for one": ("programs", 80, {"grid": 2}),
    "a divergent branch": ("divergence", 80, {"ptx": with_a_branch_of_five_threads}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(modules, fault):
    rule, capability, planted = FAULTS[fault]
    tile = TILES[capability][0]
    ptx, shared = modules[capability, tile]
    changed = planted.get("ptx", lambda text: text)(ptx)
    assert "ptx" not in planted or changed != ptx or (rule == "proxy fence" and LACKS_PROXY_FENCE)
    rest = {name: value for name, value in planted.items() if name != "ptx"}
    assert rule in emulated(changed, shared, tile, **rest)[1]


def test_every_rule_is_broken_by_a_fault():
    assert {rule for rule, *_ in FAULTS.values()} == set(RULES)


def test_what_is_not_emulated_is_named(modules):
    tile = TILES[80][0]
    ptx, shared = modules[80, tile]
    with pytest.raises(NotImplementedError, match=r"named barriers: bar\.sync"):
        emulated(re.sub(r"bar\.sync\s+0;", "bar.sync 1, 128;", ptx), shared, tile)
    with pytest.raises(NotImplementedError, match=r"mbarrier\.init"):
        emulated(ptx.replace("ret;", "mbarrier.init.shared.b64 [%r1], 1;\nret;"), shared, tile)


# A few of emulate.py's cases: the kernels' own PTX.


@pytest.mark.parametrize(
    ("arch", "copies", "case"),
    [
        ("sm_90", "early", "rank 16"),
        ("sm_90", "late", "odd, rank 100"),
        ("sm_80", "early", "rank over two blocks"),
    ],
)
def test_the_compiled_kernels_are_right_and_break_no_rule(arch, copies, case):
    found = emulate.training_step(arch, copies, case, torch.bfloat16, torch.bfloat16)
    assert not found.verdict
    assert len(found.run.configs) >= 4
    assert found.run.programs["input_grads_kernel"] > 2


def test_nf4_as_compiled():
    assert not emulate.quantisation("sm_90", "early", 2049, torch.bfloat16).verdict
