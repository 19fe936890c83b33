"""Text as sequences of one length, with held-out documents."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor
from typing_extensions import override

from sparse_prune.ranges import check_range
from sparse_prune.recipes.base.loader import SplitDataModule
from sparse_prune.recipes.base.pretrained import load_tokenizer
from sparse_prune.recipes.causal_lm.documents import split_text
from sparse_prune.recipes.causal_lm.questions import with_questions
from sparse_prune.recipes.causal_lm.sequences import Sequences, end_of_text, make_sequences
from sparse_prune.retrieval import repeat_passages

log = logging.getLogger(__name__)


class TextDataModule(SplitDataModule):
    """Documents, split by name into training, validation and test, joined by the end-of-text token and cut, or packed.

    Whole documents are held out, so no sequence of one split continues a document of another; only where they are too
    few, the end of each is held out. Of chats, the answers are to be predicted.

    Args:
        tokenizer: A model, as `load_tokenizer` takes it.
        text: "stdlib" (the sources of the Python standard library), text files, folders or globs, or
            `NAME[:CONFIG[:COLUMN...]]` for a table or the training split of a data set (`document_rows`), whose columns
            hold text, chats, or prompts and their answers. Of these only as many rows are read as are needed, from the
            first on.
        context_length: Tokens per sequence, at least 2.
        batch_size: Sequences per batch.
        train_sequences: Sequences to train on per epoch.
        val_sequences: Sequences of the validation documents.
        test_sequences: Sequences of the test documents.
        held_out_share: Share of documents in validation and in test, each, in (0, 0.5).
        seed: Order of the documents; the rows of a data set keep their own.
        question_share: Share of the training sequences, in [0, 1), that hide facts and end with questions on them
            (`with_questions`), so that what looks things up is trained and kept (docs/retrieval.md).
        repeat_every: Let every n-th training sequence repeat passages (`repeat_passages`), so that pruning sees which
            heads look things up. 0: none.
        pack: Pack whole documents into sequences, in which attention stays inside of each, rather than join and cut
            them (`make_sequences`). The model has to take position ids.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If a number is out of range, nothing is found, it is no text, or too short.
    """

    def __init__(
        self,
        tokenizer: str,
        text: str | list[str] = "stdlib",
        context_length: int = 2048,
        batch_size: int = 1,
        train_sequences: int = 1000,
        val_sequences: int = 4,
        test_sequences: int = 8,
        held_out_share: float = 0.1,
        seed: int = 0,
        question_share: float = 0.0,
        repeat_every: int = 0,
        pack: bool = False,
    ) -> None:
        super().__init__(batch_size)
        check_range("[2, inf)", "It is a token and the next one.", context_length=context_length)
        counts = {"train_sequences": train_sequences, "val_sequences": val_sequences, "test_sequences": test_sequences}
        check_range("[1, inf)", **counts)
        check_range("(0, 0.5)", held_out_share=held_out_share)
        check_range("[0, 1)", "0.25: every fourth sequence.", question_share=question_share)
        check_range("[0, inf)", "3: every third sequence.", repeat_every=repeat_every)
        for name, value in (("question_share", question_share), ("repeat_every", repeat_every)):
            if value and pack:
                raise ValueError(
                    f"`{name}` must be 0 with `pack`, whose documents stay apart, got {value}. Leave one out."
                )
        self.tokenizer_name, self.text, self.pack = tokenizer, text, pack
        self.context_length = context_length
        self.wanted = {"train": train_sequences, "val": val_sequences, "test": test_sequences}
        self.held_out_share, self.seed = held_out_share, seed
        self.question_share, self.repeat_every = question_share, repeat_every
        self.examples: dict[str, Sequences] = {}
        """Split -> what a model takes."""

    @property
    def sequences(self) -> dict[str, Tensor]:
        """Split -> tokens, int64, (sequences, context_length)."""
        return {split: examples.input_ids for split, examples in self.examples.items()}

    @override
    def setup(self, stage: str) -> None:
        if self.examples:
            return
        tokenizer = load_tokenizer(self.tokenizer_name)
        if not end_of_text(tokenizer):
            log.info("The tokenizer has no end-of-text token: nothing stands between documents.")
        splits = split_text(self.text, self.held_out_share, self.seed)
        for split, count in self.wanted.items():
            sizes = (self.context_length, count, f"for the {split} split", "context_length")
            self.examples[split] = make_sequences(tokenizer, splits[split], *sizes, pack=self.pack)
        if self.repeat_every:
            self.examples["train"] = self._repeated(self.examples["train"])
        if self.question_share:
            self.examples["train"] = with_questions(
                self.examples["train"], tokenizer, self.question_share, seed=self.seed
            )

    def _repeated(self, examples: Sequences) -> Sequences:
        if not examples.labels.equal(examples.input_ids):
            raise ValueError(f"`repeat_every` must be 0 for chats, got {self.repeat_every}. Leave it out.")
        repeated = repeat_passages(examples.input_ids, self.repeat_every, self.seed)
        return replace(examples, input_ids=repeated, labels=repeated)

    @override
    def examples_of(self, split: str) -> Sequences:
        return self.examples[split]
