"""The Lightning module: a causal language model and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from typing_extensions import override

from sparse_prune.evaluation import TASKS, measure_task
from sparse_prune.evaluation.tasks import build
from sparse_prune.recipes.base.held_out import HeldOutBatch
from sparse_prune.recipes.base.module import FineTuneModule
from sparse_prune.recipes.base.pretrained import check_length, load_tokenizer
from sparse_prune.recipes.causal_lm.chats import IGNORED
from sparse_prune.recipes.causal_lm.pretrained import check_packing, load_model
from sparse_prune.retrieval import RetrievalProbe, text_probes


class CausalLMModule(FineTuneModule):
    """Fine-tunes a causal language model by next-token prediction.

    Logs train/loss, val/loss and test/loss (nats per token), and val/passkey_accuracy if asked for.

    Args:
        model: As `locate` takes it (sparse_prune.recipes.base.pretrained).
        learning_rate: Peak of AdamW's rate; warmed up linearly, then constant.
        warmup_steps: Optimizer steps of warm-up.
        weight_decay: AdamW's decay.
        train_only: Regular expression; parameters whose name it does not match are frozen. None trains all.
        gradient_checkpointing: Recompute activations in the backward pass.
        passkey_prompts: Passkey prompts per validation, each as long as a validation sequence. 0: none.
        packed: Whether the data packs documents, which the model is tried on; `data.pack` on the command line.
        compile: Compile the model with torch.compile; the graph breaks at attention until a layer is swapped to Triton.

    Raises:
        ValueError: If a value is out of range, `train_only` matches nothing, or packed documents see each other.
    """

    def __init__(
        self,
        model: str,
        learning_rate: float = 1e-4,
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        train_only: str | None = None,
        gradient_checkpointing: bool = False,
        passkey_prompts: int = 0,
        packed: bool = False,
        compile: bool = False,
    ) -> None:
        if passkey_prompts < 0:
            raise ValueError(f"`passkey_prompts` must be at least 0, got {passkey_prompts}.")
        super().__init__(load_model(model).train(), learning_rate, warmup_steps, weight_decay, train_only)
        self.save_hyperparameters()
        if packed:
            check_packing(self.model)
        self.tokenizer = load_tokenizer(model) if passkey_prompts else None
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def retrieval_probes(self, tokens: Tensor, count: int, seed: int) -> list[RetrievalProbe]:
        """Questions for `AttentionPruning(retrieval=...)`, in words."""
        return text_probes(load_tokenizer(self.hparams["model"]), tokens, count, seed)

    @override
    def configure_model(self) -> None:
        """Under `ModelParallelStrategy`, shard every layer, then the rest (FSDP2); compile what is then there."""
        mesh = self.device_mesh["data_parallel"] if self.device_mesh is not None else None
        if mesh is not None and not isinstance(self.model, FSDPModule):
            kinds = set(getattr(self.model, "_no_split_modules", None) or ())
            for layer in [module for module in self.model.modules() if type(module).__name__ in kinds]:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        if self.hparams["compile"] and self.model._compiled_call_impl is None:
            self.model.compile()

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        check_length(self.model, batch["input_ids"].shape[1], "context_length")
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def _watch(self, split: Literal["val", "test"], batch: HeldOutBatch) -> None:
        """Every token that is predicted counts as much as any other, in whatever sequence it stands."""
        predicted = int((batch.examples["labels"][:, 1:] != IGNORED).sum()) if batch.counted else 0
        self.log_held_out(split, self._loss(batch.examples), predicted, prog_bar=split == "val")

    @override
    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        self._watch("val", batch)
        prompts: int = self.hparams["passkey_prompts"]
        if batch_idx == 0 and prompts:
            accuracy = self._passkeys(batch.examples["input_ids"], prompts)
            self.log("val/passkey_accuracy", accuracy, sync_dist=True, batch_size=1)

    def check_passkeys(self, length: int) -> None:
        """Refuse sequences that are too short for the passkey prompts of a validation.

        Args:
            length: Tokens per sequence.

        Raises:
            ValueError: If a prompt does not fit.
        """
        for seed in range(self.hparams["passkey_prompts"]):
            try:
                build(TASKS["passkey"], self.tokenizer, [0], length, 0.5, seed)
            except ValueError as error:
                raise ValueError(
                    f"`data.context_length` must hold a passkey prompt, got {length}: {error} Or set "
                    "`model.passkey_prompts` to 0."
                ) from error

    def _passkeys(self, text: Tensor, prompts: int) -> float:
        """Share of the passkeys that are found in a text as long as a sequence, at evenly spread depths."""
        depths = [(index + 0.5) / prompts for index in range(prompts)]
        task = TASKS["passkey"]
        found = measure_task(
            self.model, self.tokenizer, task, text[0].tolist(), text.shape[1], prompts=prompts, depths=depths
        )
        return found.accuracy

    @override
    def test_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        self._watch("test", batch)
