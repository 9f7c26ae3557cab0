# Python >= 3.11 and make are all that a fresh machine needs; every target installs what it uses into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
SINGLE := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false

.PHONY: install demo gpu test test-long test-templates test-trackers test-faults test-trl-matrix test-vllm test-wheel lint docs bench reproduce clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## align a small model in a few minutes and check it against the exact optimum
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## one thread per process: results repeat bit for bit; whole files, so that a file's fixtures are made once
	$(SINGLE) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not long"

test-long: $(STAMP)  ## tests that train until a figure is reached, and longer comparisons with TRL
	$(SINGLE) $(BIN)/python -m pytest -n 2 --dist load -m "long and not slow"

test-templates: $(STAMP)  ## every chat template in TRL's package: the same ids and masks as TRL, or a listed reason
	$(SINGLE) $(BIN)/python -m pytest -m slow tests/data/test_template_parity.py

test-trackers: $(STAMP)  ## runs that report to tensorboard and wandb, read back; installed here alone, since they slow down every import
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trackers]'
	$(SINGLE) $(BIN)/python -m pytest -rs tests/runs/test_trackers.py

test-faults: $(STAMP)  ## 50 runs killed at random moments, each taken up again and compared bit by bit
	$(SINGLE) ALIGNKIT_KILLS=50 $(BIN)/python -m pytest -s tests/faults

test-trl-matrix: $(STAMP)  ## the contract tests against the supported releases of TRL
	@$(SINGLE) $(BIN)/python tests/integrations/trl_matrix.py

test-vllm: $(STAMP)  ## the vLLM sampler against a real vLLM on this machine's CPU, in .venv-vllm (gigabytes the first time)
	@$(BIN)/python tests/rollout/vllm_env.py
	$(SINGLE) $(BIN)/python -m pytest -rs tests/rollout/test_real_vllm.py tests/rollout/test_vllm_episodes.py tests/rollout/test_real_transfer.py

gpu: $(STAMP)  ## what alignkit does on this machine's GPU, in at most 8 minutes: docs/results/gpu.md (tests/gpu/run.sh where there is no .venv)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/gpu/measure.py

test-wheel: $(STAMP)  ## the built wheel, installed away from this checkout
	$(SINGLE) $(BIN)/python -m pytest -m slow tests/test_wheel.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/style.py

docs: $(STAMP)  ## the documentation as a web site in site/; a broken link or an undocumented public name fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)  ## speed and memory beside TRL, as Markdown tables
	@set -e; for script in tests/benchmarks/bench_*.py; do echo "# $$script"; $(BIN)/python $$script; done

reproduce: $(STAMP)  ## the tables and figures of docs/results
	@set -e; for script in docs/results/make_*.py; do echo "# $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv .venv-vllm site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
