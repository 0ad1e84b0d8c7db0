"""An emulator of the PTX that Triton emits for sm_80 and sm_90: compiled kernels, run without a GPU.

    program.py   PTX text -> instructions
    memory.py    global and shared memory, and the rules of who may touch a byte when
    machine.py   thread blocks in lockstep: registers and control flow
    scalar.py    the instructions of a single thread
    matrix.py    the instructions of a warp or warp group: ldmatrix, mma.sync, wgmma, cp.async
    launch.py    lets this project's launchers run their kernels in the emulator

tests/emulate.py has the cases, and is the command that runs them.

Beside computing, it reports what PTX leaves undefined, so that a result which is right by luck of
timing counts as wrong: `RULES` lists the rules, and tests/test_ptx.py breaks each of them on purpose.

Source: the PTX ISA, on the memory consistency model, cp.async, asynchronous products of warp groups
(wgmma), and the fragments of mma.

Limits: control flow must be uniform within a thread block; TMA, mbarriers, named barriers, clusters
and atomics are not emulated and raise NotImplementedError. ptxas and the hardware are trusted.
"""

RULES = {
    "race": "bytes of shared memory used by two threads, one of which writes, with no barrier between",
    "in flight": "shared memory that a cp.async or a wgmma may still use, touched before its wait",
    "registers": "registers that a wgmma may still use, read or written before its wait",
    "wgmma fence": "registers written before a wgmma uses them, with no wgmma.fence between",
    "proxy fence": "shared memory written by st or cp.async, then read by wgmma with no proxy fence",
    "uninitialised": "memory that is read before anything has written it",
    "bounds": "an address outside of every tensor, or outside of shared memory",
    "alignment": "an address that is not a multiple of the access's size",
    "programs": "bytes of global memory that two thread blocks use, one of which writes",
    "divergence": "a branch that only some threads of a block take",
}
