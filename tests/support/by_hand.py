"""Attention written by hand, in a few lines of torch: what transformers' families are held against."""

import copy

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

HIDDEN = -1e4


def attention(
    module, query, key, value, attention_mask=None, scaling=None, softcap=None, is_causal=None, s_aux=None, **kwargs
):
    """As the AttentionInterface wants it; a module's `_keep(q_len, kv_len)`, if it has one, hides what is pruned."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q_len, kv_len = query.shape[2], key.shape[2]
    logits = query @ key.mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    shown = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool)
    if attention_mask is not None:
        mask = attention_mask[..., :kv_len]
        shown = shown & (mask if mask.dtype == torch.bool else mask > HIDDEN)
        if mask.dtype != torch.bool:
            logits = logits + mask.masked_fill(mask <= HIDDEN, 0.0)
    elif q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        shown = shown.tril(kv_len - q_len)
    if hasattr(module, "_keep"):
        shown = shown & module._keep(q_len, kv_len)
    logits = logits.masked_fill(~shown, -torch.inf)
    if s_aux is not None:  # a learned sink, a key without a value
        logits = torch.cat([logits, s_aux.reshape(1, -1, 1, 1).expand(len(query), -1, q_len, 1)], -1)
    weights = logits.softmax(-1).nan_to_num(0.0)[..., :kv_len]
    return (weights @ value).transpose(1, 2).contiguous(), weights


def by_hand(model: nn.Module) -> nn.Module:
    """A copy of a model that computes its attention so."""
    AttentionInterface.register("by_hand", attention)
    AttentionMaskInterface.register("by_hand", eager_mask)
    model = copy.deepcopy(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = "by_hand"
    return model
