# make demo: set up and run the main job on real files.  make test: set up and run the tests.
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENGINE := build/transformer_engine
SHARDS := build/sample_data
SAMPLE := examples/sample_data
SOURCES := pyproject.toml setup.py requirements.txt requirements-dev.txt $(wildcard csrc/*/*)

.PHONY: setup demo test test-gpu test-layouts test-slurm test-power lint clean

setup: $(INSTALLED) $(ENGINE)/.installed $(SHARDS)/train.json $(SHARDS)/heldout.json

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/demo.sh

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

# Every layout of 2, 4 and 8 ranks with one kind of model each, or with KINDS=all (40 minutes on 2 cores).
KINDS ?= each
test-layouts: setup
	MEGATRON_MM_KINDS=$(KINDS) $(BIN)/python -m pytest tests/ranks/test_all_layouts.py

# Jobs on a virtual SLURM cluster that are killed in every way: root and slurm-wlm, munge, iproute2; half an hour.
test-slurm: setup
	$(BIN)/python -m pytest tests/slurm

# Power cuts on an ext4 in an image: root, /dev/loop and mkfs.ext4; a minute.
test-power: setup
	$(BIN)/python -m pytest tests/power

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

# Its Python part alone, beside the environment and not in it: tests/engine.py says what for.
$(ENGINE)/.installed: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(ENGINE) transformer_engine==2.20.2
	@touch $@

$(SHARDS)/%.json: $(INSTALLED) $(shell find $(SAMPLE) -type f | sed 's/ /\\ /g')
	$(BIN)/python tools/preprocess_data.py --input $(SAMPLE)/$* --output-prefix $(SHARDS)/$* --tokenizer $(SAMPLE)/tokenizer.json --workers 2
