"""Small random models of transformers."""

import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaModel,
)

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}


MODERN_BERT = BERT | {"cls_token_id": 1, "sep_token_id": 2}


GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.5}


LENGTH, BLOCK = 24, 8


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(sliding_window=6, **SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertModel(BertConfig(**BERT)),
    "roberta": lambda: RobertaModel(RobertaConfig(**BERT)),
    "modernbert, global and local": lambda: ModernBertModel(ModernBertConfig(local_attention=12, **MODERN_BERT)),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def tokens():
    return torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
