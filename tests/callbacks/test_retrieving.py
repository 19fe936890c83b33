"""A fit asks its questions once, keeps what they look at, and changes nothing else."""

import time

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from sparse_prune import AttentionPruner, ConstantSchedule, Constraints
from sparse_prune.callbacks import AttentionPruning, KernelSwap, Retrieval
from sparse_prune.callbacks.retrieving import questions_of
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.retrieval import AskedModel, RetrievalProbe, retrieval_probes
from sparse_prune.scores import BlockStatistics, Influence
from support.nano import NanoGPT
from support.tiny import TinyModule, pruning, tiny_llama, trainer

TOKENS = torch.randint(0, 32, (16, 128), generator=torch.Generator().manual_seed(1))
LAYER = "model.model.layers.0.self_attn"


def fit(tmp_path, module=None, steps=4, ckpt_path=None, **changes):
    callback = pruning(**{"retrieval": Retrieval(heads=0.25, probes=2), "block_size": 16, **changes})
    module = TinyModule() if module is None else module
    run = trainer(tmp_path, [callback, KernelSwap("gather")], steps=steps)
    run.fit(module, DataLoader(TOKENS, batch_size=2), ckpt_path=ckpt_path, weights_only=False)
    return callback, module, run


def test_heads_are_found_once_kept_whole_and_told(tmp_path, caplog):
    with caplog.at_level("INFO", "sparse_prune"):
        callback, module, _ = fit(tmp_path, steps=8)
    found = callback.pruner.constraints.protected_heads
    assert sum(map(len, found.values())) == 2  # of 8
    assert caplog.messages.count("2 of 8 heads are kept whole for retrieval (`retrieval`).") == 1
    for name, pattern in callback.pruner.patterns.items():
        whole = (pattern.keep == pattern.possible).all((1, 2))
        assert whole.nonzero().flatten().tolist() == list(found.get(name, ()))
    # The search changes nothing else: a run that is given the heads is the same.
    given, other, _ = fit(
        tmp_path,
        steps=8,
        retrieval=Retrieval(probes=2),
        constraints=Constraints(hysteresis=0.2, protected_heads=found),
    )
    assert other.losses == module.losses
    for name, pattern in callback.pruner.patterns.items():
        assert torch.equal(given.pruner.patterns[name].keep, pattern.keep)


def test_blocks_that_questions_look_at_stay(tmp_path, monkeypatch):
    """Here they look at one block of each head, at which training hardly looks."""
    asked = []

    def look(model, call, layers, sequences, block_size, kind):
        asked.append(len(sequences))
        call(sequences[0][None])  # it can be called
        sums = torch.zeros(1, 4, 8, 8).double()
        sums[:, :, 6, 2] = 1.0
        return {layer.name: BlockStatistics(sums, torch.ones(2, 1, 8, 1).double(), (kind,)) for layer in layers}

    alone, _, _ = fit(tmp_path, retrieval=None, steps=8)
    monkeypatch.setattr("sparse_prune.retrieval.watching.look_at", look)
    callback, _, run = fit(tmp_path, retrieval=Retrieval(probes=2), steps=8)
    assert asked == [2, 2]  # questions, then passages that repeat
    kept = torch.stack([pattern.keep[:, 6, 2] for pattern in callback.pruner.patterns.values()])
    unasked = torch.stack([pattern.keep[:, 6, 2] for pattern in alone.pruner.patterns.values()])
    assert kept.all()
    assert not unasked.all()
    assert callback.pruner.constraints.protected_heads is None
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, _, _ = fit(tmp_path, retrieval=Retrieval(probes=2), steps=10, ckpt_path=tmp_path / "a.ckpt")
    assert len(asked) == 2  # a resumed run asks nothing
    for name, state in again.pruner.layers.items():
        for topic, average in state.asked.items():
            assert torch.equal(average.value(), callback.pruner.layers[name].asked[topic].value())


class Asking(TinyModule):
    """It asks questions of its own."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def retrieval_probes(self, tokens, count, seed):
        self.asked.append((tokens, count, seed))
        return retrieval_probes(tokens, count, seed)


def test_decisions_ask_about_the_texts_before_them_until_there_were_enough(tmp_path):
    settings = {"retrieval": Retrieval(probes=5), "every_n_steps": 2}
    _, module, run = fit(tmp_path, Asking(), steps=8, **settings)
    texts, counts, seeds = zip(*module.asked, strict=True)
    assert counts == (2, 3)  # decisions after steps 1, 3, 5 and 7
    assert seeds == (0, 2)
    assert torch.equal(texts[0], TOKENS[:2])
    assert torch.equal(texts[1], TOKENS[2:5])
    # A resumed run asks what is left.
    early, _, run = fit(tmp_path, Asking(), steps=1, **settings)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again, module, _ = fit(tmp_path, Asking(), steps=8, ckpt_path=tmp_path / "a.ckpt", **settings)
    assert [count for _, count, _ in module.asked] == [3]
    for name, state in again.pruner.layers.items():
        for topic, average in state.asked.items():
            assert average.shape == early.pruner.layers[name].asked[topic].shape
            assert not torch.equal(average.value(), early.pruner.layers[name].asked[topic].value())


def test_ranks_ask_what_one_process_would(monkeypatch):
    model, seen = tiny_llama(), []
    pruner = AttentionPruner(ConstantSchedule(final=0.5), block_size=16)
    pruner.attach(model)

    def spied(module, call, layers, questions, repeats, *rest):
        seen.append(([question.tokens for question in questions], list(repeats)))
        return iter(())

    def numbered(texts, count, seed):
        return [RetrievalProbe("", text + 100 * (seed + index), torch.tensor([1])) for index, text in enumerate(texts)]

    def asked(texts, *rank):
        monkeypatch.setattr("sparse_prune.retrieval.asked_model.rank", lambda: rank)
        asking = AskedModel(model, pruner, Retrieval(), numbered)
        model(input_ids=texts)
        asking.ask(len(texts), before=3)
        asking.remove()
        return seen.pop()

    monkeypatch.setattr("sparse_prune.retrieval.asked_model.look_back", spied)
    alone, parts = asked(TOKENS[:4], 0, 1), [asked(TOKENS[place:4:2], place, 2) for place in (0, 1)]
    for kind in (0, 1):
        for index, sequence in enumerate(alone[kind]):
            assert torch.equal(parts[index % 2][kind][index // 2], sequence)


def test_by_default_a_model_is_asked_and_one_that_fails_is_left_in_peace(tmp_path):
    callback, module, _ = fit(tmp_path, retrieval="auto", steps=1)
    assert AttentionPruning(ConstantSchedule(final=0.5)).retrieval == "auto"
    assert all([*state.asked] == ["questions", "repeats"] for state in callback.pruner.layers.values())
    assert callback.pruner.constraints.protected_heads is None

    class Failing(TinyModule):
        def retrieval_probes(self, tokens, count, seed):
            raise RuntimeError("the tokenizer is not there")

    callback, other, _ = fit(tmp_path, Failing(), retrieval="auto", steps=1)
    assert all(not state.asked for state in callback.pruner.layers.values())
    assert other.losses == module.losses
    with pytest.raises(RuntimeError, match="the tokenizer is not there"):
        fit(tmp_path, Failing(), steps=1)


def test_the_time_of_questions_is_no_part_of_a_step(tmp_path, monkeypatch):
    seen, look = [], AskedModel.ask

    def slow(self, *args):
        time.sleep(0.5)
        return look(self, *args)

    def stop(self, device, tokens, apart=0.0):
        seen.append(apart)

    monkeypatch.setattr(AskedModel, "ask", slow)
    monkeypatch.setattr("sparse_prune.callbacks.step_clock.StepClock.stop", stop)
    fit(tmp_path, retrieval=Retrieval(probes=2), steps=2)
    assert seen[0] >= 0.5
    assert seen[1] == 0.0


def test_questions_compile_nothing(tmp_path, monkeypatch):
    module, compiled, counts = TinyModule(), [], []
    module.model.compile(backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    ask = AskedModel.ask

    def counted(self, *args):
        before = len(compiled)
        found = ask(self, *args)
        counts.append((before, len(compiled)))
        return found

    monkeypatch.setattr(AskedModel, "ask", counted)
    fit(tmp_path, module, retrieval=Retrieval(heads=0.25, probes=2), steps=1)
    ((before, after),) = counts
    assert before == after > 0


def test_questions_change_no_random_number_and_no_statistic_of_training(tmp_path):
    callback, module, _ = fit(tmp_path, retrieval=Retrieval(probes=2), steps=1)
    alone, other, _ = fit(tmp_path, retrieval=None, steps=1)
    assert module.losses == other.losses
    for name, state in callback.pruner.layers.items():
        assert torch.equal(state.scores.value(), alone.pruner.layers[name].scores.value())
        for average in state.asked.values():
            scores = average.value()[:, state.layer.pattern.possible]
            assert average.shape == state.scores.shape
            assert scores.max() > 0.5
            assert scores.isfinite().all()


def test_scores_of_the_backward_pass_are_told_that_no_block_is_asked_for(tmp_path, caplog):
    callback, _, _ = fit(tmp_path, retrieval=Retrieval(heads=0.25, probes=2), score=Influence(), steps=1)
    assert sum("keeps whole heads and scores no block by its questions" in text for text in caplog.messages) == 1
    assert all(not state.asked for state in callback.pruner.layers.values())
    assert callback.pruner.constraints.protected_heads
    with pytest.raises(ValueError, match="Questions cannot score blocks by Influence"):
        callback.pruner.ask({})
    with pytest.raises(ValueError, match=r"the pruner's score is Influence\(\), .*Retrieval\(heads=0.05\)"):
        fit(tmp_path, retrieval=Retrieval(), score=Influence(), steps=1)
    (tmp_path / "auto").mkdir()
    for settings, told in (("auto", "was not asked"), (None, "Retrieval(heads=0.05)` keeps whole heads")):
        caplog.clear()
        with caplog.at_level("INFO", "sparse_prune"):
            fit(tmp_path / "auto", retrieval=settings, score=Influence(), steps=1)
        assert sum("Retrieval: " in text and told in text for text in caplog.messages) == 1


def test_a_resumed_run_has_the_same_heads_and_another_run_finds_its_own(tmp_path, monkeypatch):
    callback, module, run = fit(tmp_path)
    found = callback.pruner.constraints.protected_heads
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = pruning(retrieval=Retrieval(heads=0.25, probes=2), block_size=16)
    monkeypatch.setattr("sparse_prune.retrieval.asked_model.far_field_influence", None)  # it would fail
    more = trainer(tmp_path, [again, KernelSwap("gather")], steps=6)
    more.fit(TinyModule(), DataLoader(TOKENS, batch_size=2), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert again.pruner.constraints.protected_heads == found
    monkeypatch.undo()
    other = TinyModule(tiny_llama(num_hidden_layers=1))
    trainer(tmp_path, [callback], steps=1).fit(other, DataLoader(TOKENS, batch_size=2))
    assert set(callback.pruner.constraints.protected_heads or {}) <= {LAYER}


def test_heads_of_the_user_stay_protected_and_groups_go_together(tmp_path, monkeypatch):
    influence = {LAYER: torch.tensor([1.0, 0.0, 0.0, 0.0]), LAYER.replace("0", "1"): torch.tensor([0.3, 0.4, 0.6, 0.9])}
    monkeypatch.setattr("sparse_prune.retrieval.asked_model.far_field_influence", lambda *args: influence)
    constraints = Constraints(protected_heads={LAYER: (3,)}, share_kv_groups=True)
    callback, _, _ = fit(tmp_path, constraints=constraints, steps=1)
    assert callback.pruner.constraints.protected_heads == {LAYER: (3,), LAYER.replace("0", "1"): (2, 3)}


class Nano(TinyModule):
    """A hand-written model, called with tokens alone, that returns logits alone."""

    def __init__(self):
        super().__init__(NanoGPT(length=128))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    @torch.no_grad()
    def retrieval_probes(self, tokens, count, seed):
        """What it says itself."""
        asked = tokens[0].clone()
        asked[-1] = self.model(asked[None])[0, -2].argmax()
        return [RetrievalProbe("own", asked, torch.tensor([len(asked) - 1]))]


def test_a_model_of_another_kind_that_takes_tokens_is_served(tmp_path):
    callback, _, _ = fit(tmp_path, Nano(), steps=1)
    assert callback.pruner.constraints.protected_heads


def test_a_model_that_answers_nothing_is_told_of(tmp_path, caplog, monkeypatch):
    nothing = {name: torch.zeros(4) for name in (LAYER, LAYER.replace("0", "1"))}
    monkeypatch.setattr("sparse_prune.retrieval.asked_model.far_field_influence", lambda *args: nothing)
    callback, _, _ = fit(tmp_path, steps=1)
    assert callback.pruner.constraints.protected_heads is None
    assert sum("`retrieval` keeps no head whole" in text for text in caplog.messages) == 1


def test_a_module_may_ask_its_own_questions(tmp_path):
    module = Asking()
    fit(tmp_path, module, steps=1, retrieval=Retrieval(heads=0.25, probes=3, length=128, seed=4))
    assert [(tokens.shape, count, seed) for tokens, count, seed in module.asked] == [((2, 128), 2, 4), ((2, 128), 3, 4)]


def test_a_tokenizer_of_the_module_or_the_data_asks_in_words(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    module, run = Asking(), pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    module.tokenizer = tokenizer
    assert questions_of(run, module) == module.retrieval_probes
    plain = TinyModule()
    assert questions_of(run, plain) is retrieval_probes
    plain.tokenizer = str.split  # not one of transformers
    assert questions_of(run, plain) is retrieval_probes
    plain.tokenizer = tokenizer
    text = torch.full((1, 256), tokenizer("and")["input_ids"][0])
    (probe,) = questions_of(run, plain)(text, 1, 0)
    assert probe.kind == "mixed"
    data = pl.LightningDataModule()
    data.tokenizer, run.datamodule = tokenizer, data
    assert questions_of(run, TinyModule())(text, 1, 0)[0].kind == "mixed"


class Vectors(TinyModule):
    """Its model sees no tokens."""

    def training_step(self, batch, batch_idx):
        vectors = self.model.get_input_embeddings()(batch)
        return self.model(inputs_embeds=vectors, labels=batch, use_cache=False).loss


class Two(TinyModule):
    """Two models, of which none holds all layers."""

    def __init__(self):
        super().__init__()
        self.other = nn.ModuleList([tiny_llama()])


def test_modules_without_tokens_or_without_one_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`retrieval` needs a language model that training calls with tokens"):
        fit(tmp_path, Vectors())
    with pytest.raises(ValueError, match="`Retrieval.module` must be given for Two"):
        fit(tmp_path, Two())
    with pytest.raises(ValueError, match="or has `logits`, got BaseModelOutputWithPast"):
        fit(tmp_path, retrieval=Retrieval(module="model.model"))
    with pytest.raises(ValueError, match="`Retrieval.module` must name a module of TinyModule, got 'head'"):
        fit(tmp_path, retrieval=Retrieval(module="head"))
    with pytest.raises(TypeError, match=r"`retrieval` must be a Retrieval or None, got 0.2. Write Retrieval"):
        pruning(retrieval=0.2)
