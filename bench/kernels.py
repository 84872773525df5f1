"""Microseconds of each kernel, and its bandwidth against the bytes it must move.

    python bench/kernels.py [--only attend place_heads]

Needs a CUDA device. Every kernel runs in a CUDA graph over inputs that together
exceed the L2 cache, beside what it replaces: attention as it is chosen for a step
beside each backend that works there, with keys and values in 8 bits as well, the
fused operations beside their torch twins, the matmuls of a layer and of the head,
with norms and all but attention, beside the dense library's; the same with matrices
of 8 and of 4 bits, beside bitsandbytes' operations where it is installed. Sizes are
Llama-3-8B's; attention is measured with Qwen3-0.6B's heads and matmuls with its sizes
as well. Prints a table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from tokenloom.worker.attention import Attention, Pages, Scales, Spans, choose_attention
from tokenloom.worker.errors import LoadError
from tokenloom.worker.fp8 import CODE_DTYPE, to_codes
from tokenloom.worker.kernels import Operations, Residual
from tokenloom.worker.kernels.fused import FusedOperations
from tokenloom.worker.kernels.twin import TorchOperations
from tokenloom.worker.options import ATTENTION_NAMES
from tokenloom.worker.weights.linears import (
    DenseLinear,
    EightBitLinear,
    FourBitLinear,
    Linear,
    codebook,
)

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
HIDDEN_SIZE, INTERMEDIATE_SIZE = 4096, 14336
BLOCK_SIZE = 128
DECODES = (
    (1, 1024),
    (1, 16384),
    (1, 32768),
    (8, 1024),
    (8, 32768),
    (32, 1024),
    (64, 2048),
    (256, 1024),
)
"""(batch, context)"""
MIXED = ((64, 1024), (256, 2048))
"""(requests that decode at a context of 1,024, tokens of one prompt)"""
NUM_TOKENS = (1, 32, 256, 8192)
NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
NUM_QUANTIZED_ROWS = (*NUM_ROWS, 256, 512, 2048, 8192)
FOUR_BIT_BLOCK = 64
FRESH_BYTES = 256 * 1024**2
"""Of inputs in turn: several times the L2 cache."""
NUM_REPLAYS = 7


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement."""

    kernel: str
    shape: str
    backend: str
    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        """A line of the table."""
        rate = self.num_bytes / self.seconds / 1e12
        return (
            f"{self.kernel:12} {self.shape:28} {self.backend:8} {self.seconds * 1e6:9.1f}"
            f" {rate:8.2f}"
        )


def num_turns(num_bytes: int) -> int:
    """Returns how many sets of inputs there are to be, for kernels that move so many bytes."""
    return min(max(2, FRESH_BYTES // num_bytes), 64)


def seconds_each(call: Callable[[int], object], turns: int) -> float:
    """Returns the median seconds of call(0) … call(turns - 1) in a graph, each."""
    for turn in range(min(turns, 2)):  # compiles, and allocates what stays
        call(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            call(turn)
    graph.replay()
    times: list[float] = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / turns)
    return statistics.median(times)


def normal(*shape: int) -> Tensor:
    """Returns random numbers, since zeros run faster than what a model computes."""
    return torch.randn(shape, dtype=DTYPE, device=DEVICE)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a model's layers."""

    name: str
    num_layers: int
    """Whose matrices together exceed the cache"""
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    head_dim: int = HEAD_DIM


MODELS = (
    Model(
        name="llama-3-8b",
        num_layers=4,
        hidden_size=HIDDEN_SIZE,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        intermediate_size=INTERMEDIATE_SIZE,
        vocab_size=128256,
    ),
    Model(
        name="qwen3-0.6b",
        num_layers=20,
        hidden_size=1024,
        num_heads=16,
        num_kv_heads=8,
        intermediate_size=3072,
        vocab_size=151936,
    ),
)


@dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """A step's attention over as many layers as there are sets of inputs."""

    pages: Pages
    queries: Tensor
    spans: Spans
    turns: int
    num_bytes: int
    """Keys and values that a layer must read"""

    def row(self, shape: str, backend: str, attention: Attention) -> Row:
        """Measures a backend."""
        seconds = seconds_each(
            lambda layer: attention.attend(self.pages, layer, self.queries, self.spans, None),
            self.turns,
        )
        return Row(
            kernel="attend",
            shape=shape,
            backend=backend,
            seconds=seconds,
            num_bytes=self.num_bytes,
        )


def attention_work(
    model: Model, steps: Sequence[tuple[int, int]], block_size: int, *, coded: bool = False
) -> AttentionWork:
    """Returns random inputs for spans of (start, length), decodes first; `coded`: in 8 bits."""
    starts, lengths = np.array(steps).T
    ends = starts + lengths
    num_blocks = -(-ends // block_size)
    head_bytes = model.head_dim + 4 if coded else model.head_dim * DTYPE.itemsize
    row_bytes = model.num_kv_heads * head_bytes
    num_bytes = 2 * int(ends.sum()) * row_bytes
    turns = num_turns(num_bytes)
    shape = (turns, int(num_blocks.sum()), block_size, model.num_kv_heads, model.head_dim)
    blocks = np.random.default_rng(0).permutation(shape[1])
    tables = np.zeros((len(steps), num_blocks.max()), dtype=np.int32)
    for table, own in zip(tables, np.split(blocks, np.cumsum(num_blocks[:-1])), strict=True):
        table[: len(own)] = own
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return AttentionWork(
        pages=coded_pages(shape) if coded else Pages(keys=normal(*shape), values=normal(*shape)),
        queries=normal(int(lengths.sum()), model.num_heads, model.head_dim),
        spans=Spans(
            offsets=torch.tensor(offsets, dtype=torch.int32, device=DEVICE),
            kv_lengths=torch.tensor(ends, dtype=torch.int32, device=DEVICE),
            block_tables=torch.from_numpy(tables).to(DEVICE),
            places=torch.zeros(int(lengths.sum()), dtype=torch.int64, device=DEVICE),
            num_decodes=int((lengths == 1).sum()),
            max_length=int(lengths.max()),
            max_kv_length=int(ends.max()),
        ),
        turns=turns,
        num_bytes=num_bytes,
    )


def coded_pages(shape: Sequence[int]) -> Pages:
    """Returns random pages in 8 bits; `shape` is that of the keys."""
    num_layers, num_blocks, block_size, num_kv_heads, _ = shape
    keys, values = (torch.empty(shape, dtype=CODE_DTYPE, device=DEVICE) for _ in range(2))
    rows = (num_layers, num_blocks, num_kv_heads, block_size)
    key_scales, value_scales = (torch.empty(rows, device=DEVICE) for _ in range(2))
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        for layer in range(num_layers):  # at once they would not fit
            coded, own = to_codes(normal(*shape[1:]))
            codes[layer].copy_(coded)
            scales[layer].copy_(own.transpose(1, 2))
    return Pages(keys=keys, values=values, scales=Scales(keys=key_scales, values=value_scales))


def attention_rows() -> Iterator[Row]:
    """Yields decodes and mixed steps: what `auto` chooses, and what is there beside it."""
    for model in MODELS:
        attentions = {
            name: choose_attention(name, head_dim=model.head_dim, dtype=DTYPE, device=DEVICE)
            for name in ("auto", *possible(model.head_dim))
        }
        steps = {f"{batch} x {context}": decodes(batch, context) for batch, context in DECODES}
        steps |= {
            f"{batch} x 1024 + {chunk}": [*decodes(batch, 1024), (0, chunk)]
            for batch, chunk in MIXED
        }
        for shape, spans in steps.items():
            for name, attention in attentions.items():
                work = attention_work(model, spans, attention.block_size)
                yield work.row(f"{model.name} {shape}", name, attention)
            in_8_bits = choose_attention(
                "auto", head_dim=model.head_dim, dtype=DTYPE, device=DEVICE, num_widened=40960
            )
            work = attention_work(model, spans, in_8_bits.block_size, coded=True)
            yield work.row(f"{model.name} {shape}", "auto fp8", in_8_bits)


def decodes(batch: int, context: int) -> list[tuple[int, int]]:
    """Returns spans of one token at the end of so long a context."""
    return [(context - 1, 1)] * batch


def possible(head_dim: int) -> Iterator[str]:
    """Yields the backends that work here, but for the one in plain torch."""
    for name in ATTENTION_NAMES:
        if name in {"auto", "torch"}:
            continue
        try:
            choose_attention(name, head_dim=head_dim, dtype=DTYPE, device=DEVICE)
        except LoadError:
            continue
        yield name


def operation_rows(only: Sequence[str]) -> Iterator[Row]:
    """Yields the fused operations and their twins."""
    backends: tuple[Operations, ...] = (FusedOperations(), TorchOperations())
    for num_tokens in NUM_TOKENS:
        for name, make in OPERATIONS.items():
            if name not in only:
                continue
            for operations in backends:
                call, turns, num_bytes = make(operations, num_tokens)
                yield Row(
                    kernel=name,
                    shape=f"{num_tokens} tokens",
                    backend=operations.name,
                    seconds=seconds_each(call, turns),
                    num_bytes=num_bytes,
                )


Work = tuple[Callable[[int], object], int, int]
"""A call on a set of inputs, how many sets there are, and the bytes a call must move."""


def add_norm(operations: Operations, num_tokens: int) -> Work:
    """Reads hidden and update, writes hidden and its norm."""
    num_bytes = 4 * num_tokens * HIDDEN_SIZE * DTYPE.itemsize
    turns = num_turns(num_bytes)
    hidden, update = (normal(turns, num_tokens, HIDDEN_SIZE) for _ in range(2))
    weight = normal(HIDDEN_SIZE)
    return (
        lambda turn: operations.add_norm(hidden[turn], update[turn], weight, 1e-5),
        turns,
        num_bytes,
    )


def place_heads(operations: Operations, num_tokens: int) -> Work:
    """Reads qkv, writes as much: queries, and keys and values to the pool."""
    num_all = NUM_HEADS + 2 * NUM_KV_HEADS
    num_bytes = 2 * num_tokens * num_all * HEAD_DIM * DTYPE.itemsize
    turns = num_turns(num_bytes)
    qkv = normal(turns, num_tokens, num_all * HEAD_DIM)
    angles = normal(num_tokens, 2, HEAD_DIM // 2)
    num_blocks = num_tokens // BLOCK_SIZE + 1
    shape = (turns, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    pages = Pages(keys=normal(*shape), values=normal(*shape))
    places = torch.randperm(num_blocks * BLOCK_SIZE, device=DEVICE)[:num_tokens]
    return (
        lambda turn: operations.place_heads(qkv[turn], angles, places, pages, turn, None, 1e-5),
        turns,
        num_bytes,
    )


def silu_mul(operations: Operations, num_tokens: int) -> Work:
    """Reads gate and up, writes their product."""
    num_bytes = 3 * num_tokens * INTERMEDIATE_SIZE * DTYPE.itemsize
    turns = num_turns(num_bytes)
    gate_up = normal(turns, num_tokens, 2 * INTERMEDIATE_SIZE)
    return lambda turn: operations.silu_mul(gate_up[turn]), turns, num_bytes


OPERATIONS: dict[str, Callable[[Operations, int], Work]] = {
    "add_norm": add_norm,
    "place_heads": place_heads,
    "silu_mul": silu_mul,
}


class LibraryOperations(FusedOperations):
    """The fused operations, with all matmuls left to the dense library."""

    name = "library"
    norm_linear = Operations.norm_linear
    norm_gate_up = Operations.norm_gate_up
    add_linear = Operations.add_linear


def linear(num_outputs: int, num_inputs: int) -> DenseLinear:
    """Returns a matrix that leaves the size of numbers as it is."""
    weight = normal(num_outputs, num_inputs).mul_(num_inputs**-0.5)
    return DenseLinear(weight=weight, bias=None)


def layer_matrices(model: Model) -> list[tuple[DenseLinear, ...]]:
    """Returns qkv, output, gate and up, down of each layer."""
    num_q, hidden_size = model.num_heads * model.head_dim, model.hidden_size
    return [
        (
            linear(num_q + 2 * model.num_kv_heads * model.head_dim, hidden_size),
            linear(hidden_size, num_q),
            linear(2 * model.intermediate_size, hidden_size),
            linear(hidden_size, model.intermediate_size),
        )
        for _ in range(model.num_layers)
    ]


def linear_rows() -> Iterator[Row]:
    """Yields a layer's matmuls and the head's, ours and the library's."""
    for model in MODELS:
        layers, hidden_size = layer_matrices(model), model.hidden_size
        head = linear(model.vocab_size, hidden_size)
        for num_rows in NUM_ROWS:
            for operations in (FusedOperations(), LibraryOperations()):
                seconds = seconds_each(layers_call(operations, layers, num_rows), 1)
                yield Row(
                    kernel=f"{model.name} layer",
                    shape=f"{num_rows} rows",
                    backend=operations.name,
                    seconds=seconds / model.num_layers,
                    num_bytes=sum(each.weight.nbytes for each in layers[0]),
                )
                yield Row(
                    kernel=f"{model.name} head",
                    shape=f"{num_rows} rows",
                    backend=operations.name,
                    seconds=seconds_each(head_call(operations, head, num_rows), 2),
                    num_bytes=head.weight.nbytes,
                )


def eight_bit(dense: DenseLinear) -> EightBitLinear:
    """Returns the matrix with each output's weights rounded to -127 … 127 of the largest."""
    scales = dense.weight.abs().amax(1).float() / 127
    codes = (dense.weight / scales[:, None]).round().to(torch.int8)
    return EightBitLinear(codes=codes, scales=scales, bias=None)


def four_bit(dense: DenseLinear) -> FourBitLinear:
    """Returns random codes of the matrix's size, which take as long as its own."""
    num_outputs, num_inputs = dense.shape
    shape = (num_outputs, num_inputs // 2)
    spread = 0.5 + torch.rand(num_outputs, num_inputs // FOUR_BIT_BLOCK, device=DEVICE)
    return FourBitLinear(
        codes=torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE),
        absmax=2 * num_inputs**-0.5 * spread,
        codebook=codebook("nf4", DEVICE),
        bias=None,
    )


class TheirEightBits(EightBitLinear):
    """A matrix that bitsandbytes' operation multiplies with."""

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [num_rows, num_outputs]."""
        assert out is None
        ops, scales = torch.ops.bitsandbytes, self.scales * 127
        codes, largest, _ = ops.int8_vectorwise_quant(rows.half(), 0.0)
        product: Tensor = ops.int8_scaled_mm(codes, self.codes, largest, scales, dtype=DTYPE)
        return product


class TheirFourBits(FourBitLinear):
    """A matrix that bitsandbytes' operation multiplies with."""

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [num_rows, num_outputs]."""
        assert out is None
        codes, absmax = self.codes.view(-1, 1), self.absmax.view(-1)
        multiply = torch.ops.bitsandbytes.gemm_4bit
        product: Tensor = multiply(rows, codes, list(self.shape), absmax, FOUR_BIT_BLOCK, "nf4")
        return product


def quantized_rows(num_bits: int) -> Iterator[Row]:
    """Yields a layer's matmuls: dense as they are done, quantized ours and bitsandbytes'."""
    four = num_bits == 4
    quantize, their_linear = (four_bit, TheirFourBits) if four else (eight_bit, TheirEightBits)
    for model in MODELS:
        dense = layer_matrices(model)
        narrow: list[tuple[Linear, ...]] = [tuple(map(quantize, layer)) for layer in dense]
        backends: list[tuple[str, Operations, Sequence[tuple[Linear, ...]]]] = [
            ("dense", FusedOperations(), dense),
            ("ours", FusedOperations(), narrow),
        ]
        if find_spec("bitsandbytes"):
            import_module("bitsandbytes")
            theirs = [tuple(their_linear(**vars(each)) for each in layer) for layer in narrow]
            backends.append(("bnb", LibraryOperations(), theirs))
        for num_rows in NUM_QUANTIZED_ROWS:
            for name, operations, layers in backends:
                yield Row(
                    kernel=f"{model.name} {num_bits} bits",
                    shape=f"{num_rows} rows",
                    backend=name,
                    seconds=seconds_each(layers_call(operations, layers, num_rows), 1)
                    / model.num_layers,
                    num_bytes=sum(each.num_bytes for each in layers[0]),
                )


def layers_call(
    operations: Operations, layers: Sequence[tuple[Linear, ...]], num_rows: int
) -> Callable[[int], object]:
    """Returns a call that runs layers whose attention returns the first of its inputs."""
    hidden_size = layers[0][0].shape[1]
    hidden, gain = normal(num_rows, hidden_size), normal(hidden_size)

    def call(_: int) -> Tensor:
        residual = Residual(hidden)
        for qkv, output, gate_up, down in layers:
            heads = operations.norm_linear(residual, gain, 1e-5, qkv)
            num_q = output.shape[1]
            mixed = heads.view(-1)[: num_rows * num_q].view(num_rows, num_q)
            operations.add_linear(residual, mixed, output)
            activated = operations.norm_gate_up(residual, gain, 1e-5, gate_up)
            operations.add_linear(residual, activated, down)
        return residual.sum()

    return call


def head_call(operations: Operations, head: DenseLinear, num_rows: int) -> Callable[[int], object]:
    """Returns a call that computes logits."""
    hidden, update = (normal(num_rows, head.weight.shape[1]) for _ in range(2))
    gain, out = normal(head.weight.shape[1]), normal(num_rows, len(head.weight))
    return lambda _: operations.norm_linear(Residual(hidden, update), gain, 1e-5, head, out)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Bandwidth of the worker's kernels.")
    names = ("attend", *OPERATIONS, "linear", "eight_bit", "four_bit")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {DTYPE}")
    print(f"{'kernel':12} {'shape':28} {'backend':8} {'us':>9} {'TB/s':>8}")
    with torch.inference_mode():
        if "attend" in args.only:
            for row in attention_rows():
                print(row, flush=True)
        for row in operation_rows(args.only):
            print(row, flush=True)
        if "linear" in args.only:
            for row in linear_rows():
                print(row, flush=True)
        for name, num_bits in (("eight_bit", 8), ("four_bit", 4)):
            if name in args.only:
                for row in quantized_rows(num_bits):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
