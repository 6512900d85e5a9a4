# make demo: set up and run the main job on real files.  make test: set up and run the tests.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHARDS := build/sample_data
SAMPLE := examples/sample_data
SOURCES := pyproject.toml setup.py requirements.txt requirements-dev.txt $(wildcard csrc/*/*)

.PHONY: setup demo test test-gpu lint clean

setup: $(INSTALLED) $(SHARDS)/train.json $(SHARDS)/heldout.json

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/pretrain_tiny.sh

test: setup lint
	$(BIN)/python -m pytest

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build runs $(VENV) megatron_mm/*/*.so *.egg-info

# Anew only when what it depends on has changed; a failed install leaves no stamp and is tried again.
$(INSTALLED): $(SOURCES)
	@command -v $(PYTHON) >/dev/null || { echo "megatron_mm needs Python 3.12, and there is no $(PYTHON): install it, or name it with make PYTHON=/path/to/python3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { echo "megatron_mm needs Python 3.12, and $(PYTHON) is $$($(PYTHON) --version 2>&1): name another with make PYTHON=/path/to/python3.12." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

$(SHARDS)/%.json: $(INSTALLED) $(shell find $(SAMPLE) -type f | sed 's/ /\\ /g')
	$(BIN)/python tools/preprocess_data.py --input $(SAMPLE)/$* --output-prefix $(SHARDS)/$* --tokenizer $(SAMPLE)/tokenizer.json --workers 2
