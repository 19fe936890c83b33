"""The first half hour on a GPU: six stages that check, then measure, each with its own limit.

    python benchmarks/gpu/campaign.py --output gpu_results              # all, or what is missing in the folder
    python benchmarks/gpu/campaign.py --output gpu_results --stage a b  # these
    python benchmarks/gpu/campaign.py --output /tmp/rehearsal --rehearse  # tiny, on a CPU, kernels interpreted

Needs torch, Triton, transformers and pytorch-lightning, nothing of the network; installs the package first where it is
not. A stage writes JSON as it goes, what it prints stands in campaign.log, and a later command goes on where a stage
was broken off. One line is printed per failure, and a summary at the end. Exit status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@dataclass(frozen=True)
class Stage:
    """One command of the campaign."""

    about: str
    minutes: float
    """After which it is ended."""
    script: str
    full: str = ""
    """Arguments on a GPU."""
    rehearsed: str = ""
    """Arguments of a rehearsal."""
    shows: str = "summary: "
    """Lines with this are part of the campaign's summary."""


STAGES = {
    "a": Stage(
        "every kernel once against float64, probe, decode, synchronisations", 4, "gpu/kernels_once.py",
        rehearsed="--length 70 --blocks 32",
    ),
    "b": Stage(
        "random cases, output and gradients", 5, "gpu/random_cases.py",
        "--seconds 240", "--seconds 1 --longest 70",
    ),
    "c": Stage("a whole run: prune, swap, resume, export, cache", 4, "gpu/whole_run.py", rehearsed="--rehearse"),
    "d": Stage(
        "tuning, then speed at 8K and 32K against dense SDPA and FlexAttention", 8, "attention.py",
        "--tune --lengths 8192 32768 --sparsities 0.8 0.9",
        "--lengths 64 --sparsities 0.3 --head-dims 16 --groups 2 --heads 2 --block 16", "of ideal",
    ),
    "e": Stage("step before and after the swap, host, memory, probe", 5, "gpu/steps.py", rehearsed="--rehearse"),
    "f": Stage(
        "SmolLM2-135M at 8K, dense and pruned", 8, "gpu/steps.py",
        "--size smollm2 --dense", "--rehearse --size smollm2 --dense",
    ),
}  # fmt: skip


REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
"""Environment that has the kernels interpreted; Triton reads it when it is imported."""


def run(command: list[str], log: Path, seconds: float, rehearse: bool = False) -> tuple[int | None, str]:
    """Exit status, None past the limit, and what was printed, which the log keeps as it comes."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    environment |= REHEARSAL if rehearse else {}
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a") as file:
        try:
            status: int | None = subprocess.run(
                command, cwd=REPOSITORY, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    return status, log.read_bytes()[begin:].decode(errors="replace")


def install(log: Path) -> bool:
    """Whether the package can be imported, after an installation without network where it could not."""
    here = [sys.executable, "-c", "import sparse_prune.callbacks"]
    if run(here, Path(os.devnull), 120)[0] == 0:
        return True
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", str(REPOSITORY)]
    run(command, log, 180)
    status, printed = run(here, log, 120)
    if status != 0:
        print(f"install: failed: {(printed.strip().splitlines() or ['no output'])[-1]}. See {log}.", flush=True)
    return status == 0


def perform(name: str, folder: Path, rehearse: bool) -> str:
    """Run a stage; prints a line per failure.

    Returns:
        Its part of the summary, figures first; it ends in "ok" or says how the stage ended.
    """
    stage, output, log = STAGES[name], folder / f"{name}.json", folder / "campaign.log"
    command = [sys.executable, str(HERE.parent / stage.script), "--output", str(output)]
    command += (stage.rehearsed if rehearse else stage.full).split()
    start = time.monotonic()
    status, printed = run(command, log, 60 * stage.minutes, rehearse)
    failures = [line for line in printed.splitlines() if ": failed: " in line]
    for line in failures[:20]:
        print(f"{name}: {line}", flush=True)
    if len(failures) > 20:
        print(f"{name}: {len(failures) - 20} more in {log}", flush=True)
    if status and not failures:
        print(f"{name}: failed: {printed.strip().splitlines()[-1]}. See {log}.", flush=True)
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    end = "ok" if status == 0 else f"past its {stage.minutes} minutes" if status is None else "FAILED"
    seconds = time.monotonic() - start
    shown = [f"  {line.partition('summary: ')[2] or line}" for line in printed.splitlines() if stage.shows in line]
    return "\n".join(
        [*shown, f"{name} {stage.about}: {len(rows)} rows, {len(failures)} failures, {seconds:.0f} s: {end}"]
    )


def main() -> None:
    """Install, run the stages, sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--stage", nargs="+", choices=sorted(STAGES), default=sorted(STAGES))
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    folder = arguments.output.resolve()
    if not install(folder / "campaign.log"):
        raise SystemExit(1)
    summary = [perform(name, folder, arguments.rehearse) for name in arguments.stage]
    print("\n".join(summary))
    raise SystemExit(any(not line.endswith(": ok") for line in summary))


if __name__ == "__main__":
    main()
