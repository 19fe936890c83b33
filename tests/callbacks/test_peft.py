"""Adapters of PEFT: trained under pruning, exported merged."""

import pytest
import torch
from transformers import DynamicCache

from sparse_prune.attention import attach
from sparse_prune.cache import PatternCache
from sparse_prune.callbacks import KernelSwap, restore_patterns
from sparse_prune.export import load, save_pretrained
from support.tiny import TinyModule, batches, pruning, tiny_llama, trainer

peft = pytest.importorskip("peft")

TOKENS = next(iter(batches()))


def adapted():
    """Adapters that change the model from the start, the same ones at every call."""
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_llama(), settings)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pruned module of adapters, its pruner, its checkpoint, and its weights before training."""
    folder, module, callback = tmp_path_factory.mktemp("peft"), TinyModule(adapted()), pruning()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit = trainer(folder, [callback, KernelSwap("gather")])
    fit.fit(module, batches())
    fit.save_checkpoint(folder / "a.ckpt")
    return module, callback.pruner, folder / "a.ckpt", before


def test_adapters_alone_are_trained_and_every_layer_is_swapped(trained):
    module, pruner, _, before = trained
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert [state.layer.mode for state in pruner.layers.values()] == ["sparse", "sparse"]
    assert list(pruner.layers) == [f"model.base_model.model.model.layers.{i}.self_attn" for i in (0, 1)]


def test_layers_that_were_taken_over_before_stay_taken_over(tmp_path):
    model, callback = tiny_llama(), pruning()
    handles = attach(model)
    module = TinyModule(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))
    trainer(tmp_path, [callback], steps=2).fit(module, batches())
    assert [state.layer for state in callback.pruner.layers.values()] == handles


def test_a_checkpoint_gives_the_pruned_adapters(trained):
    module, _, path, _ = trained
    again = TinyModule.load_from_checkpoint(path, model=adapted(), weights_only=False)
    assert not torch.equal(logits(again.model), logits(module.model))
    restore_patterns(again, path)
    assert torch.equal(logits(again.model), logits(module.model))


def test_generation_with_a_small_cache_gives_the_same_text(trained):
    model = trained[0].model.eval()
    small, whole = (
        model.generate(input_ids=TOKENS, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
        for cache in (PatternCache(model), DynamicCache(config=model.config))
    )
    assert torch.equal(small, whole)


def test_adapters_must_be_merged_before_an_export(trained, tmp_path):
    module, pruner, path, _ = trained
    model = TinyModule.load_from_checkpoint(path, model=adapted(), weights_only=False).model
    restore_patterns(TinyModule(model), path)
    with pytest.raises(ValueError, match="class of transformers.*`model = model.merge_and_unload"):
        save_pretrained(model, tmp_path / "export")
    with pytest.raises(ValueError, match=r"none for .*q_proj.weight.*base_layer.*Merge adapters"):
        save_pretrained(model.get_base_model(), tmp_path / "export")
    merged = model.merge_and_unload()
    loaded = load(save_pretrained(merged, tmp_path / "export", pruner=pruner))
    assert torch.equal(logits(loaded), logits(merged))
    torch.testing.assert_close(logits(loaded), logits(module.model))
