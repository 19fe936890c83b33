"""The README's code runs, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_trainer_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from support.tiny import TinyModule, tiny_llama

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 8
    # The same lines with a shorter run: 45 steps in the place of 1000.
    short = code.replace("end_step=800", "end_step=8").replace("max_steps=1000", "max_steps=45")
    assert short.count("=8)") == short.count("max_steps=45") == 1
    tokens = torch.randint(0, 32, (45, 512), generator=torch.Generator().manual_seed(0))
    module = TinyModule(tiny_llama(max_position_embeddings=512))
    names = {"module": module, "data": torch.utils.data.DataLoader(tokens, batch_size=1)}
    exec(compile(short, "README.md", "exec"), names)
    assert re.search(r"(\d+)% of attention", capsys.readouterr().out)
    assert not names["pruning"].pruner.open_layers


@pytest.mark.parametrize("target", ["quickstart", "test"])
def test_commands_exist(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if target == "test":
        assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_pictures_and_linked_files_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in link:
            assert (ROOT / link).is_file(), link
