"""Memory and time that one decoder layer takes, from its shapes alone: ``docs/scaling.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

_BF16, _FLOAT32 = 2, 4
_BLOCK = 128  # columns that the solver rounds before it updates the rest
_BLOCK_BYTES = 16  # per weight of a block: errors, scales and zero points
_CPU_STACK_BYTES = 1 << 25  # as in integrations/llm_compressor/compression.py
_ACCELERATOR_SHARE = 0.25


@dataclass(frozen=True)
class Attention:
    """Linears of attention, as (columns, rows) of each tensor that some of them share as input."""

    inputs: tuple[tuple[int, int], ...]
    width: int  # numbers per token that queries and values have over all heads


@dataclass(frozen=True)
class Architecture:
    """What the model needs to know of a Mixture-of-Experts model.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width inside an expert.
        experts: routed ones in a layer.
        top_k: of them, for each token.
        shared: experts that see every token, each as wide as a routed one.
        attention: its linears.
        layers: with experts.
        dense_layers: without, and how wide they are inside.
    """

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    attention: Attention
    shared: int = 0
    layers: int = 1
    dense_layers: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Input:
    """Tensors that linears receive; alike ones of a layer (its experts') are one entry.

    Attributes:
        columns: width of the tensor.
        rows: output features of all the linears that share it.
        count: how many there are.
        tokens: that each sees in all.
        batch_tokens: that each sees in one batch.
        mixing: operations per token that follow and are no linear: scores of attention.
        is_solved: whether its linears are quantized.
    """

    columns: int
    rows: int
    count: int
    tokens: float
    batch_tokens: float
    mixing: float = 0.0
    is_solved: bool = True

    @property
    def weights(self) -> int:
        """Return the number of weights of one of them."""
        return self.columns * self.rows


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, with matrices of an input's shape.

    Attributes:
        forward: floating-point operations of a product in the model's dtype.
        moments: operations of accumulating second moments.
        factor: operations of Cholesky factor and triangular inverse.
        update: operations of passing on the errors of a block.
        rounding: weights rounded, block by block, everything else included.
        column: seconds between two columns, below which no stack is faster; on accelerators.
    """

    forward: float
    moments: float
    factor: float
    update: float
    rounding: float
    column: float = 0.0


def gqa(hidden: int, queries: int, keys: int) -> Attention:
    """Return attention with ``queries`` and ``keys`` features over all heads."""
    return Attention(((hidden, queries + 2 * keys), (queries, hidden)), 2 * queries)


def mla(hidden: int, heads: int) -> Attention:
    """Return DeepSeek's multi-head latent attention, ranks and head sizes as in V3."""
    query_rank, key_rank, nope, rope, value = 1536, 512, 128, 64, 128
    inputs = (
        (hidden, query_rank + key_rank + rope),
        (query_rank, heads * (nope + rope)),
        (key_rank, heads * (nope + value)),
        (heads * value, hidden),
    )
    return Attention(inputs, heads * (nope + rope + value))


def layer_inputs(
    of: Architecture, sequences: int, length: int, *, is_dense: bool = False, attention: bool = True
) -> list[Input]:
    """Return all inputs of a layer in the order in which they are observed.

    Args:
        of: the architecture.
        sequences: of calibration data; a batch is one of them, as is the host's default.
        length: of a sequence.
        is_dense: whether it is one of the layers without experts.
        attention: whether attention is quantized.
    """
    tokens = sequences * length
    *first, last = of.attention.inputs
    found = [Input(*shape, 1, tokens, length, is_solved=attention) for shape in first]
    mixing = 2.0 * length * of.attention.width
    found.append(Input(*last, 1, tokens, length, mixing, is_solved=attention))
    share = of.top_k / of.experts
    mlps = [(of.experts, of.intermediate, share), (of.shared, of.intermediate, 1.0)]
    if is_dense:
        mlps = [(1, of.dense_layers[1], 1.0)]
    for count, width, part in mlps:
        if count:
            seen = (count, tokens * part, length * part)
            found += [Input(of.hidden, 2 * width, *seen), Input(width, of.hidden, *seen)]
    return found


def seconds(
    inputs: Iterable[Input], rates_of: Callable[[Input], Rates], stack: Callable[[Input], int]
) -> dict[str, float]:
    """Return what calibrating and solving a layer take.

    Args:
        inputs: of the layer.
        rates_of: what the machine does with an input's shape.
        stack: how many of an input's linears are solved together.
    """
    passes = moments = factor = update = rounding = 0.0
    for of in inputs:
        rates = rates_of(of)
        # the host runs every layer twice: to observe it, and for what it says once quantized
        operations = 2 * of.weights + of.mixing
        passes += 2 * of.count * of.tokens * operations / rates.forward
        if of.is_solved:
            moments += of.count * of.tokens * 2 * of.columns**2 / rates.moments
            factor += of.count * 4 / 3 * of.columns**3 / rates.factor
            update += of.count * of.rows * of.columns**2 / rates.update
            rounding += of.count * of.weights / rates.rounding
            rounding += -(-of.count // stack(of)) * of.columns * rates.column
    return {
        "forward": passes, "moments": moments, "factor": factor, "update": update,
        "rounding": rounding,
    }  # fmt: skip


def memory(
    of: Architecture,
    inputs: list[Input],
    sequences: int,
    length: int,
    accelerator_bytes: int | None = None,
) -> dict[str, float]:
    """Return the bytes that a layer takes, by part, and at most at one time.

    Args:
        of: the architecture.
        inputs: of the layer.
        sequences: of calibration data.
        length: of a sequence.
        accelerator_bytes: memory of the device; ``None`` for a CPU. Only an accelerator keeps
            the activations between layers elsewhere.
    """
    tokens = sequences * length
    weights = sum(of_input.count * of_input.weights * _BF16 for of_input in inputs)
    solved = [of_input for of_input in inputs if of_input.is_solved]
    moments = sum(_moments(of_input) for of_input in solved)
    activations = tokens * of.hidden * _BF16
    sample = min(tokens, max(1024, 2 * of.hidden)) * of.hidden * _BF16
    # of one linear's inputs: in float32, and weighted
    working = max(2 * _FLOAT32 * i.batch_tokens * i.columns for i in solved)
    kept = sample if accelerator_bytes else activations + sample
    # one shape after the other, the last observed first; what is solved is let go of
    shapes = list(dict.fromkeys((i.columns, i.rows) for i in reversed(solved)))
    waiting, solver, peak = moments, 0.0, kept + moments + working
    for shape in shapes:
        alike = [i for i in solved if (i.columns, i.rows) == shape]
        free = accelerator_bytes and accelerator_bytes - weights - kept - waiting
        stack = stack_size(alike[0], free)
        here = _solver(alike[0], min(stack, sum(i.count for i in alike)))
        solver, peak = max(solver, here), max(peak, kept + waiting + here)
        waiting -= sum(_moments(i) for i in alike)
    return {
        "weights": weights, "moments": moments, "solver": solver, "activations": activations,
        "sample": sample, "above_weights": peak, "peak": weights + peak,
    }  # fmt: skip


def stack_size(of: Input, free: float | None = None) -> int:
    """Return how many linears are solved at a time; ``free`` bytes, ``None`` on a CPU."""
    bound = _CPU_STACK_BYTES if free is None else free * _ACCELERATOR_SHARE
    return max(1, int(bound // (_FLOAT32 * of.columns * (2 * of.columns + 4 * of.rows))))


def _moments(of: Input) -> int:
    return of.count * of.columns**2 * _FLOAT32


def _solver(of: Input, stack: int) -> float:
    """Return the most that solving one stack holds beside the second moments."""
    square = _FLOAT32 * of.columns**2
    # two squares each, sorted and as a stack or factorized and inverted, and one on its way
    factorizing = (2 * stack + 1) * square + stack * _BF16 * of.weights
    # the factor; weights given, in float32 and rounded, and one in float32 on its way back
    rounding = stack * square + (8 * stack + 4) * of.weights
    return max(factorizing, rounding + stack * _BLOCK_BYTES * _BLOCK * of.rows)
