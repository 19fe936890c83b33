import pytest
import torch
from torch import nn

from sparse_prune.attention import attach, detach, find_layers, handle_of, list_layers
from support.families import make, tokens
from support.nano import CausalSelfAttention


class VisionAttention(nn.Module):
    """As timm writes it."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, True
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(self.head_dim), nn.LayerNorm(self.head_dim)

    def forward(self, x, attn_mask=None):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=0.0)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mixed(nn.Module):
    """All kinds in one model."""

    def __init__(self):
        super().__init__()
        self.text = make("llama").model
        self.hand = CausalSelfAttention(32, 4)
        self.vision = VisionAttention(32, 8)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 32, batch_first=True), 1)

    def forward(self, tokens):
        return self.encoder(self.vision(self.hand(self.text(tokens)[0])))


def test_all_kinds_are_found_attached_and_detached():
    model = Mixed().eval()
    with torch.no_grad():
        expected = model(tokens())
        found = [(layer.name, layer.kind, layer.num_heads, layer.causal) for layer in list_layers(model)]
        assert found == [
            ("text.layers.0.self_attn", "transformers", 4, True),
            ("text.layers.1.self_attn", "transformers", 4, True),
            ("hand", "sdpa", 4, True),
            ("vision", "sdpa", 8, False),
            ("encoder.layers.0.self_attn", "mha", 2, False),
        ]
        handles = attach(model)
        assert [handle.name for handle in handles] == [name for name, *_ in found] == list(find_layers(model))
        assert attach(model) == handles
        for handle in handles:
            handle.probe_block_size = (8, 8)
        torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-4)
        assert all(handle.statistics is not None for handle in handles)
        detach(model)
        assert torch.equal(model(tokens()), expected)
    assert all(handle_of(module) is None for module in model.modules())


def test_layers_that_stay_dense_are_logged(caplog):
    attach(nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 32), 1))
    assert "'layers.0.multihead_attn': cross-attention" in caplog.text


class SoftmaxAttention(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-2, -1)).softmax(-1) @ x


def test_attention_in_its_own_code_is_listed_as_out_of_reach():
    (layer,) = list_layers(nn.Sequential(SoftmaxAttention()))
    assert (layer.name, layer.kind) == ("0", "unknown")
    with pytest.raises(ValueError, match="'0': computes attention in its own code"):
        attach(nn.Sequential(SoftmaxAttention()))
