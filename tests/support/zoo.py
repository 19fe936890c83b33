"""Transformers' families at tiny sizes, made from their configs' own fields, and a reference written by hand."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LENGTH, BATCH, VOCABULARY = 24, 2, 64
TOO_LARGE = 3_000_000
"""Parameters of a model whose config has sizes under names that are not known here."""

_NAMES = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input text_vocab_size",
    32: """hidden_size d_model dim n_embd embed_dim embedding_size emb_dim word_embed_proj_dim attention_hidden_size
        d_embedding cross_attention_hidden_size image_size""",
    48: """intermediate_size ffn_dim hidden_dim n_inner d_ff ffn_hidden_size d_inner encoder_ffn_dim decoder_ffn_dim
        block_ff_dim intermediate_size_mlp""",
    2: """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers encoder_num_hidden_layers
        decoder_num_hidden_layers num_decoder_layers num_key_value_heads num_kv_heads encoder_num_key_value_heads
        num_experts_per_tok moe_topk linear_num_key_heads moe_k num_experts_per_token type_vocab_size mamba_expand
        eos_token_id sep_token_id num_feat_extract_layers num_conv_pos_embedding_groups""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads
        encoder_num_attention_heads decoder_num_attention_heads num_experts num_local_experts n_routed_experts
        moe_num_experts linear_num_value_heads""",
    8: """head_dim global_head_dim kv_channels d_kv v_head_dim hidden_size_per_layer_input qk_rope_head_dim
        qk_nope_head_dim rotary_dim query_pre_attn_scalar linear_key_head_dim linear_value_head_dim mamba_d_state
        state_size ssm_state_size mamba_d_head attention_chunk_size patch_size mamba_n_heads num_conv_pos_embeddings""",
    16: """q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size classifier_proj_size
        moe_shared_expert_intermediate_size shared_intermediate_size time_step_rank""",
    1: """n_group topk_group n_shared_experts mamba_n_groups num_codebooks bos_token_id decoder_start_token_id
        cls_token_id""",
    128: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions",
    6: "sliding_window",
    12: "local_attention",
    3: "num_channels",
    0: "pad_token_id",
    0.1: "initializer_range init_std",
    0.5: "partial_rotary_factor",
}
SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
SIZES |= {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4)}
SIZES |= {"tie_word_embeddings": False, "apply_spec_augment": False}
"""What configs call their sizes."""
QUIET = ("dropout", "pdrop", "layerdrop", "jitter", "drop_path", "drop_rate")
"""Words in names of shares that would make a forward pass random."""
LATENT = {"head_dim": None, "partial_rotary_factor": None, "num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    **dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid"), LINEAR),
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 8},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "swin": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "swinv2": {"embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""Family -> what its config wants beside or in place of these sizes; None takes a size out."""


@dataclass(frozen=True)
class Case:
    """A family, as a test runs it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Any]]
    kind: str


KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "text tower": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}


def cases() -> list[Case]:
    """Every family of these kinds, whether it can be made small or not, each once."""
    found: dict[str, Case] = {}
    for kind, mapping in KINDS.items():
        for name, classes in getattr(modeling_auto, mapping).items():
            kind_of_class = classes if isinstance(classes, str) else classes[0]
            found.setdefault(name, Case(name, lambda n=name, c=kind_of_class: _make(n, c), INPUTS[kind], kind))
    return [found[name] for name in sorted(found)]


def _make(name: str, model_class: str) -> nn.Module:
    config = small_config(name)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in getattr(transformers, model_class)(config).parameters())
    if size > TOO_LARGE:
        raise MemoryError(f"{size} parameters")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(small_config(name))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif "norm" not in key.lower():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def small_config(name: str) -> Any:
    """The family's config, with every size that it has under a name that is known."""
    kind = CONFIG_MAPPING[name]
    own = {field.name for field in fields(kind)}
    # What a config calls by two names is given under its own one.
    alias = {other: mine for other, mine in kind.attribute_map.items() if mine in SIZES}
    sizes = {key: SIZES[key] for key in (own | set(kind.attribute_map)) - set(alias) if key in SIZES}
    quiet = {key for key in own if any(word in key for word in QUIET) and isinstance(getattr(kind, key, None), float)}
    sizes |= dict.fromkeys(quiet, 0.0) | OWN.get(name, {})
    return kind(**{key: value for key, value in sizes.items() if value is not None})


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding(left: bool) -> torch.Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    return mask if left else mask.flip(1)


def _causal(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": padding(left=True)}


def _encoder(model: nn.Module) -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": padding(left=False)}


def _pair(model: nn.Module) -> dict[str, Any]:
    return {**_encoder(model), "decoder_input_ids": _ids(2)}


def _image(model: nn.Module) -> dict[str, Any]:
    config = model.config
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    pixels = torch.randn(2, getattr(config, "num_channels", 3), side, side, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": pixels}


def _sound(model: nn.Module) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 400, generator=torch.Generator().manual_seed(4))}


INPUTS = {
    "causal": _causal, "encoder": _encoder, "encoder-decoder": _pair, "text tower": _encoder, "vision": _image,
    "audio": _sound,
}  # fmt: skip
