"""What a training step needs on 8 and 64 GPUs, of memory and of the links: a model, not measured.

All by arithmetic from shapes: L layers, hidden size h, n rows of q, k and v, intermediate size i,
vocabulary V, T tokens, factors of rank r in fp32 on all four projections, each part of a fused one with
its own A.

    a layer's weights   h·n + h·h + 2·h·i + i·h + 2·h           (qkv, o, gate_up, down, two norms)
    a layer's factors   r·(3h + n) + r·2h + r·(2h + 2i) + r·(i + h) = r·(8h + n + 3i)
    of which tensor parallelism keeps whole    7·r·h            (A of qkv and gate_up, B of o and down)

A tp group has t GPUs of a node of 8, the most that divide the key-value heads: 8 for mini, 2 for the
others, which have 10. Layers are dealt over the group; embeddings and lm_head are not.

Memory of a GPU, N of them, in bytes, W the weights of all layers, R the rest, F all factors:

    base            2·(W + R); fsdp2 over N; tp 2·(W/t + R)
    gathered        fsdp2 alone: two layers, that in use and the next, and the rest: 2·(2W/L + R)
    factors         4·F; fsdp2 over N; tp 4·F_tp with F_tp = L·r·(7h + (h + n + 3i)/t)
    gradients       as the factors; ddp twice, as its buckets are a copy
    moments         AdamW's two, 8 bytes where the factors have 4
    inputs          2·T·h a layer, which checkpointing keeps
    working set     the larger of one layer's and the logits', which are not there at the same time:
                    2·T·(8h + 2n + 7i), tp 2·T·(7h + (h + 2n + 7i)/t), and 10·T·V
                    (bf16 outputs with both norms in fp32 and the MLP's gradients; logits in bf16, their
                    logarithms and gradients in fp32). This line is an estimate.

Bytes that a GPU sends in a step (a ring: an all-reduce of P bytes among m sends 2·(m-1)/m·P, an
all-gather or a reduce-scatter half of it). All GPUs together do N·T tokens, so a tp group does its t·T
in t micro-batches of T. A layer all-reduces its activations twice in forward, twice in backward, and
with checkpointing once more, for the backward of the MLP:

    ddp      all-reduce of 4·F among N
    fsdp2    all-gathers: two of 2·W + 4·F, one of 2·R; reduce-scatter of 4·F; among N
    tp       t micro-batches of L·(5·2·T·h + 4·7·r·h) all-reduced in the group;
             4·F_tp all-reduced among the N/t GPUs that hold the same part, once

In a ring over several nodes one GPU of each node sends to the next node. The k GPUs that a node has in
it share that by k rings, so each sends a k-th of its bytes between nodes. Both links work at once: the
time of a collective is the slower one's, and a step's the sum over its collectives, as if none
overlapped with computation. Left out: latencies, computation, what framework and allocator hold.

    python benchmarks/scaling_plan.py       print both tables, in Markdown
"""

import dataclasses
import math

NODE = 8  # GPUs
NVLINK, NETWORK = 450e9, 50e9  # assumed: bytes a second that a GPU sends in a node, between nodes
R, TOKENS = 16, 8192
GPUS = (8, 64)
ENGINES = ("ddp", "fsdp2", "tp")
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "tp": "TP"}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of a Phi-3 model whose embeddings are not tied."""

    name: str
    layers: int
    hidden: int
    qkv: int
    intermediate: int
    vocabulary: int
    key_value_heads: int

    @property
    def group(self) -> int:
        """GPUs of a tensor-parallel group."""
        return math.gcd(NODE, self.key_value_heads)

    @property
    def layer(self) -> int:
        """Numbers in the weights of a layer."""
        h, i = self.hidden, self.intermediate
        return h * self.qkv + h * h + 3 * h * i + 2 * h

    @property
    def rest(self) -> int:
        """Numbers in embeddings, lm_head and the last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.rest

    def factors(self, r: int = R, parts: int = 1) -> int:
        """Numbers in all factors that a GPU holds, one of `parts` under tensor parallelism."""
        h, dealt = self.hidden, self.hidden + self.qkv + 3 * self.intermediate
        return self.layers * r * (7 * h + dealt // parts)


MODELS = (
    Shapes("Phi-3-mini", 32, 3072, 9216, 8192, 32064, 32),
    Shapes("Phi-3-medium", 40, 5120, 7680, 17920, 32064, 10),
    Shapes("Phi-4", 40, 5120, 7680, 17920, 100352, 10),
)


def memory(m: Shapes, engine: str, gpus: int, tokens: int = TOKENS, r: int = R) -> dict[str, int]:
    """Bytes of a GPU, by part."""
    h, n, i, tp = m.hidden, m.qkv, m.intermediate, engine == "tp"
    parts = m.group if tp else 1
    share = gpus if engine == "fsdp2" else 1
    factors = 4 * m.factors(r, parts) // share
    layer = 2 * tokens * (7 * h + (h + 2 * n + 7 * i) // parts)
    return {
        "base": 2 * (m.layers * m.layer // parts + m.rest) // share,
        "gathered": 2 * (2 * m.layer + m.rest) if engine == "fsdp2" else 0,
        "factors": factors,
        "gradients": factors * (2 if engine == "ddp" else 1),
        "moments": 2 * factors,
        "inputs": 2 * tokens * h * m.layers,
        "working set": max(layer, 10 * tokens * m.vocabulary),
    }


@dataclasses.dataclass(frozen=True)
class Collective:
    """A ring among GPUs, a few of them in each node; payload is the bytes of the whole tensors."""

    payload: int
    passes: int  # 2 for an all-reduce: a reduce-scatter and an all-gather
    among: int
    of_a_node: int

    def sent(self) -> tuple[float, float]:
        """Bytes that a GPU sends inside its node and between nodes."""
        total = self.passes * (self.among - 1) / self.among * self.payload
        across = total / self.of_a_node if self.among > self.of_a_node else 0.0
        return total - across, across


def collectives(
    m: Shapes, engine: str, gpus: int, tokens: int = TOKENS, r: int = R
) -> list[Collective]:
    """What a step sends, of each kind as if it were one call."""
    factors = 4 * m.factors(r)
    if engine == "ddp":
        return [Collective(factors, 2, gpus, NODE)]
    if engine == "fsdp2":
        gathered = 2 * (2 * m.layers * m.layer + factors) + 2 * m.rest
        return [Collective(gathered, 1, gpus, NODE), Collective(factors, 1, gpus, NODE)]
    t = m.group
    activations = m.layers * (5 * 2 * tokens * m.hidden + 4 * 7 * r * m.hidden)
    reduced = Collective(4 * m.factors(r, t), 2, gpus // t, NODE // t)
    return [Collective(t * activations, 2, t, t), reduced]


def milliseconds(steps: list[tuple[float, float]]) -> float:
    return 1e3 * sum(max(inside / NVLINK, across / NETWORK) for inside, across in steps)


def plan() -> str:
    """Two tables in Markdown: memory of a GPU by part, bytes by link with their times."""
    parts = list(memory(MODELS[0], "ddp", NODE))
    by_part = [
        f"| GB of a GPU | GPUs | engine | {' | '.join(parts)} | **all** |",
        "|---" * (4 + len(parts)) + "|",
    ]
    by_link = [
        "| GB that a GPU sends in a step | GPUs | engine | inside a node | between nodes | ms |",
        "|---|---|---|---|---|---|",
    ]
    for m in MODELS:
        for gpus in GPUS:
            for engine in ENGINES:
                size = f" of {m.group}" if engine == "tp" else ""
                head = f"| {m.name} | {gpus} | {NAMES[engine]}{size} |"
                held = memory(m, engine, gpus)
                cells = " | ".join(f"{held[part] / 1e9:.2f}" for part in parts)
                by_part.append(f"{head} {cells} | **{sum(held.values()) / 1e9:.1f}** |")
                steps = [each.sent() for each in collectives(m, engine, gpus)]
                inside, across = (sum(step[link] for step in steps) / 1e9 for link in (0, 1))
                time = milliseconds(steps)
                by_link.append(f"{head} {inside:.3f} | {across:.3f} | {time:.2f} |")
    note = (
        f"**A model, not measured.** r = {R} on all four projections, {TOKENS} tokens a GPU, "
        f"checkpointed, bf16 base, fp32 factors. Assumed: {NVLINK / 1e9:.0f} GB/s that a GPU sends "
        f"inside a node of {NODE}, {NETWORK / 1e9:.0f} GB/s between nodes; no overlap, no latencies. "
        "The formulas are in `benchmarks/scaling_plan.py`, which prints these tables."
    )
    return "\n".join([note, "", *by_part, "", *by_link])


if __name__ == "__main__":
    print(plan())
