"""What the peers' documentation says, on dense tensors: the law the compat tests hold the kernels to."""

import torch


def attention(q, k, v, seen, scale=None):
    """softmax over the keys `seen` [..., s_q, s_k] of q (b s_q n d), k and v (b s_k m d); 0 where nothing is seen."""
    share = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(share, 2), v.double().repeat_interleave(share, 2)
    score = torch.einsum("bqnd,bknd->bnqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    score = score.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bnqk,bknd->bqnd", score.softmax(-1).nan_to_num(0.0), v)
    return out, score.logsumexp(-1)


def band(s_q, s_k, causal=False, window=(-1, -1), bottom_right=True):
    """bool [s_q, s_k]: flash-attn's rule for a window and causality."""
    place = torch.arange(s_q)[:, None] + (s_k - s_q if bottom_right else 0)
    key = torch.arange(s_k)[None]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(s_q, s_k, dtype=torch.bool)
    if left >= 0:
        seen &= key >= place - left
    if right >= 0:
        seen &= key <= place + right
    return seen
