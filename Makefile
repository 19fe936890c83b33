PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint types docs installed

# The pinned torch first, alone: pip must not pick another build for a later requirement.
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

quickstart: .venv/done
	$(BIN)/python -m sparse_prune.recipes.causal_lm fit --config quickstart

# Two processes of one thread each: much of the time they wait for processes and servers of their own.
test: .venv/done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/done types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Neither mypy nor mkdocstrings can follow an editable install of mapped packages: they read an installed copy.
installed: .venv/done
	rm -rf .typed build
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --target .typed .

types: installed
	cd .typed && ../$(BIN)/mypy --config-file ../pyproject.toml -p sparse_prune

docs: installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
