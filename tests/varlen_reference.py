"""torch.nn.attention.varlen.varlen_attn in plain PyTorch: in the tests it stands in for the operator,
which there is only for CUDA in two-byte dtypes.

It refuses what the operator would compute wrongly without a word: a `max_q` or `max_k` below the longest
sequence, lengths that are not int32, keys behind the end of `key`. Queries of no sequence get NaN.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Attention of query [Tq, H, D] over key and value [Tk, Hkv, D], sequence by sequence.

    Sequence i has the queries cu_seq_q[i]:cu_seq_q[i + 1] and the keys cu_seq_k[i]:cu_seq_k[i + 1]; with
    seqused_k only the first seqused_k[i] of those. window_size (-1, -1): each query sees all of them.
    (-1, 0): the last query sees all, the one before it all but the last, and so on.
    """
    check_form(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, seqused_k=seqused_k)
    assert window_size in ((-1, -1), (-1, 0)), window_size
    assert enable_gqa or query.shape[1] == key.shape[1], "grouped heads need enable_gqa=True"
    starts_q = cu_seq_q.tolist()
    starts_k = cu_seq_k.tolist()
    assert starts_k[-1] <= len(key)
    outputs = []
    for i, (start, end) in enumerate(pairwise(starts_q)):
        first, last = starts_k[i], starts_k[i + 1]
        assert end - start <= max_q and last - first <= max_k, "the operator would skip some"
        if seqused_k is not None:
            last = min(last, first + int(seqused_k[i]))
        visible = torch.ones(end - start, last - first, dtype=torch.bool, device=query.device)
        if window_size == (-1, 0):
            visible = visible.tril(last - first - (end - start))
        q, k, v = query[start:end], key[first:last], value[first:last]
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        found = F.scaled_dot_product_attention(*heads, attn_mask=visible, enable_gqa=True)
        outputs.append(found[0].transpose(0, 1))
    unowned = torch.full_like(query[starts_q[-1] :], torch.nan)
    return torch.cat([*outputs, unowned])


def check_form(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    seqused_k: Tensor | None = None,
    **options,
) -> None:
    """What the operator asks of its arguments, as far as it can be seen without their values."""
    for heads in (query, key, value):
        assert heads.ndim == 3 and heads.stride(-1) == 1, "[tokens, heads, head_dim] is needed"
        assert heads.dtype == query.dtype and heads.shape[-1] == query.shape[-1]
    assert key.shape == value.shape and query.shape[1] % key.shape[1] == 0
    assert cu_seq_q.shape == cu_seq_k.shape
    for integers in (cu_seq_q, cu_seq_k, seqused_k):
        assert integers is None or (integers.dtype == torch.int32 and integers.is_contiguous())
    assert type(max_q) is int and type(max_k) is int, "a tensor would wait for the device"
