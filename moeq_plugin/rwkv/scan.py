"""The recurrences of RWKV-6 and RWKV-7, many tokens at a time.

Both keep a matrix per head that each token decays and adds to. Applied token by token that is a
Python step per token; here tokens are taken in chunks. Inside a chunk everything is a product of
small matrices, for all chunks at once; only the state is handed from chunk to chunk in a loop.
Tensors are ``[batch, heads, tokens, size]`` and computed in the dtype given: float32 or wider, as
products of decays lose their small values in less.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

CHUNK_7 = 32  # a decay is at least exp(-0.61), so its inverse over a chunk stays below exp(20)
CHUNK_6 = 16  # decays of any size: an exponential per pair of tokens and channel
_SMALLEST_LOG_DECAY = -80.0  # exp(-80) is nothing beside a float32; -inf would breed NaN


def rwkv7_scan(
    receptance: torch.Tensor,
    log_decay: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    remove: torch.Tensor,
    replace: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the generalized delta rule of RWKV-7 (arXiv:2503.14456, Section 4).

    ``S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T`` and ``output_t = S_t r_t``. With
    ``P_t`` the product of the chunk's decays up to ``t`` and ``u_t = S_{t-1} a_t``, the state is
    ``S_t = (S_0 + sum_{i<=t} (u_i b_i^T + v_i k_i^T) / P_i) P_t``; inserting it into ``u_t`` gives
    a triangular system for all ``u`` of a chunk.

    Args:
        receptance: ``r``.
        log_decay: ``ln w``, in ``[-exp(-0.5), 0]``.
        key: ``k``.
        value: ``v``.
        remove: ``a``, the direction that is read before the write.
        replace: ``b``, where what was read is added again.
        state: ``[batch, heads, value size, key size]`` before the first token; not modified.

    Returns:
        The outputs, and the state after the last token.
    """
    tokens = receptance.shape[2]
    r, w, k, v, a, b = (
        _in_chunks(x, CHUNK_7) for x in (receptance, log_decay, key, value, remove, replace)
    )
    total = w.cumsum(-2)  # ln P_t
    since = (-total).exp()
    r, a = r * total.exp(), a * (total - w).exp()
    left = torch.cat([a, r], -2) @ torch.cat([k * since, b * since], -2).mT
    a_k, a_b, r_k, r_b = (half for rows in left.chunk(2, -2) for half in rows.chunk(2, -1))
    identity = torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
    read = torch.linalg.solve_triangular(
        identity - a_b.tril(-1),
        torch.cat([a_k.tril(-1) @ v, a], -1),
        upper=False,
        unitriangular=True,
    )
    from_values, from_state = read[..., : v.shape[-1]], read[..., v.shape[-1] :]
    r_b, inner = r_b.tril(), r_k.tril() @ v
    until_end = (total[..., -1:, :] - total).exp()
    k, b, decay = k * until_end, b * until_end, total[..., -1:, :].exp()
    outputs = []
    chunks = _by_chunk(r, r_b, inner, from_values, from_state, v, k, b, decay)
    for r_c, r_b_c, inner_c, values_c, states_c, v_c, k_c, b_c, decay_c in chunks:
        u = values_c + states_c @ state.mT
        outputs.append(r_c @ state.mT + r_b_c @ u + inner_c)
        state = state * decay_c + u.mT @ b_c + v_c.mT @ k_c
    return torch.cat(outputs, 2)[:, :, :tokens], state


def rwkv6_scan(
    receptance: torch.Tensor,
    log_decay: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bonus: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence of RWKV-6 (arXiv:2404.05892, Section 4).

    ``output_t = r_t (S_{t-1} + diag(u) k_t^T v_t)`` and ``S_t = diag(w_t) S_{t-1} + k_t^T v_t``.
    Decays may be as good as zero, so they are never divided by: each pair of tokens of a chunk
    gets the exponential of its own difference.

    Args:
        receptance: ``r``.
        log_decay: ``ln w``, not positive.
        key: ``k``.
        value: ``v``.
        bonus: ``[heads, size]``, ``u``.
        state: ``[batch, heads, key size, value size]`` before the first token; not modified.

    Returns:
        The outputs, and the state after the last token.
    """
    tokens = receptance.shape[2]
    log_decay = log_decay.clamp(min=_SMALLEST_LOG_DECAY)
    r, w, k, v = (_in_chunks(x, CHUNK_6) for x in (receptance, log_decay, key, value))
    total = w.double().cumsum(-2)  # differences of large sums, some of them small
    before = total - w
    between = (before[..., :, None, :] - total[..., None, :, :]).to(w.dtype)
    is_past = torch.ones(w.shape[-2], w.shape[-2], device=w.device).tril(-1).bool()[..., None]
    decay = between.masked_fill(~is_past, -torch.inf).exp()  # [..., to, from, size]
    scores = torch.einsum("...tn,...in,...tin->...ti", r, k, decay)
    own = (r * bonus[:, None, None] * k).sum(-1, keepdim=True)
    inner = scores @ v + own * v
    r = r * before.to(w.dtype).exp()
    k = k * (total[..., -1:, :] - total).to(w.dtype).exp()
    chunk_decay = total[..., -1, :, None].to(w.dtype).exp()
    outputs = []
    for r_c, k_c, v_c, inner_c, decay_c in _by_chunk(r, k, v, inner, chunk_decay):
        outputs.append(r_c @ state + inner_c)
        state = state * decay_c + k_c.mT @ v_c
    return torch.cat(outputs, 2)[:, :, :tokens], state


def _in_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """Return ``[batch, heads, chunks, size, channels]``; zeros at the end change no state."""
    size = min(size, x.shape[2])
    chunks: torch.Tensor = pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))
    return chunks


def _by_chunk(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield one chunk of each tensor; ``unbind``, whose gradient costs one pass for all chunks."""
    return zip(*(x.unbind(2) for x in tensors), strict=True)
