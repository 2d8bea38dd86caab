"""The definition of decode_attention in plain PyTorch, fp32."""

from __future__ import annotations

import torch

from fastdms.ops.quantise import load_slots


def decode_attention(
    q: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    k_scales: torch.Tensor,
    v_scales: torch.Tensor,
    page_table: torch.Tensor,
    live_len: torch.Tensor,
    sm_scale: float,
) -> torch.Tensor:
    batch, num_heads, head_dim = q.shape
    num_kv_heads, page_size = live_len.shape[1], k_pages.shape[1]
    row = rows.clamp_min(0).long()
    length = torch.where((positions >= 0)[:, None], live_len[row], 0)  # [B, Hkv]
    longest = int(length.max()) if batch else 0
    if longest == 0:
        return q.new_zeros(q.shape)
    token = torch.arange(longest, device=q.device)
    live = token < length[..., None]  # [B, Hkv, N]
    slot = torch.where(live, token, 0)
    page = page_table[row].gather(-1, slot // page_size).long()
    page = torch.where(live, page, 0)
    k = load_slots(k_pages, k_scales, page, slot % page_size)  # [B, Hkv, N, D]
    v = load_slots(v_pages, v_scales, page, slot % page_size)
    v = torch.where(live[..., None], v, 0.0)  # zero times a stale NaN would be NaN
    grouped = q.float().view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (grouped @ k.transpose(-1, -2)) * sm_scale
    scores = scores.masked_fill(~live[:, :, None, :], float("-inf"))
    weights = torch.where((length > 0)[..., None, None], scores.softmax(-1), 0.0)
    return (weights @ v).view(q.shape).to(q.dtype)
