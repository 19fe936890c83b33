"""kvpress serves heads that this library wrote, as docs/serving.md shows it; for an environment that has kvpress.

    python tests/scenarios/kvpress_run.py FOLDER    # with kvpress.json and a Llama in it

prints the largest difference between its logits and those of eager attention under a mask that is made here.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

PROMPT, MORE = 40, 4


def documented_press(folder):
    """An instance of the class that the documentation shows."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    names = {}
    exec(re.search(r"```py\n((?:(?!```).)*DuoAttentionPress.*?)```", text, re.DOTALL)[1], names)
    return names["PrunedHeads"](path=str(folder / "kvpress.json"))


@torch.no_grad()
def pressed(folder, ids):
    """Logits of what follows the prompt."""
    model, cache = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval(), DynamicCache()
    with documented_press(folder)(model):
        model(ids[:, :PROMPT], past_key_values=cache)
    return torch.cat([model(ids[:, [at]], past_key_values=cache).logits for at in range(PROMPT, PROMPT + MORE)], dim=1)


@torch.no_grad()
def masked(folder, ids, hide=True):
    """The same by a mask: what follows the prompt sees, in streaming heads, its sinks and the recent ones only."""
    held = json.loads((folder / "kvpress.json").read_text())
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    place = torch.arange(PROMPT + MORE)
    causal = place[:, None] >= place
    hidden = (place[:, None] >= PROMPT) & (place >= held["sink_size"]) & (place < PROMPT - held["recent_size"])
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for row, layer in zip(held["streaming_mask"], model.model.layers, strict=True):
        seen = torch.stack([causal & ~hidden if streaming and hide else causal for streaming in np.repeat(row, group)])
        bias = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]

        def put(module, args, kwargs, bias=bias):
            return args, kwargs | {"attention_mask": bias}

        layer.self_attn.register_forward_pre_hook(put, with_kwargs=True)
    return model(ids, use_cache=False).logits[:, PROMPT:]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ids = torch.randint(3, 50, (2, PROMPT + MORE), generator=torch.Generator().manual_seed(1))
    own, theirs = masked(folder, ids), pressed(folder, ids)
    print(
        f"{float((own - theirs).abs().max()):.1e} of {float((own - masked(folder, ids, hide=False)).abs().max()):.1e}"
    )
