# "make help" lists the targets. Python 3.11 or newer, git and make are all that is needed.

PYTHON ?= python3
VENV ?= .venv
# Passed to every "pip install", for example
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# The versions of everything but efsgd: "make test-oldest" gives another list.
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
KILL_FLAGS ?=
# A clone of github.com/epfml/powersgd, to measure it as well, and for example
#   make bench-network EPFML=../powersgd BENCH_FLAGS="--rounds 5"
EPFML ?=
# A clone of github.com/microsoft/dion, for "make bench-contract".
DION ?=
BENCH_FLAGS ?=

BIN := $(VENV)/bin
# pip compiles what it has installed on one core. Here it leaves that to the second command, on all.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile $(PIP_FLAGS) --constraint $(CONSTRAINTS)
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # some packages have files for other versions
SPHINX := $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d docs/_build/doctrees

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help: ## print this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(VENV)/.with-examples ## train with several ranks of compression and compare them (the first table within two minutes on two cores)
	$(BIN)/python examples/compare_ranks.py --seeds 1 $(DEMO_FLAGS)
	@echo 'This was one seed of each. "make demo-full" takes three, and has standard deviations (5 minutes).'

.PHONY: demo-full
demo-full: $(VENV)/.with-examples ## the same with three seeds: the tables of the documentation
	$(BIN)/python examples/compare_ranks.py $(DEMO_FLAGS)

.PHONY: demo-adamw
demo-adamw: $(VENV)/.with-examples ## the same for AdamW, on gradients that were compressed and averaged
	$(BIN)/python examples/any_optimizer.py $(DEMO_FLAGS)

.PHONY: quality-adamw
quality-adamw: $(VENV)/.with-examples ## train a small GPT with AdamW in many ways, learning rates tuned (hours; goes on where it was stopped)
	$(BIN)/python examples/adamw_quality.py --resume

.PHONY: demo-compressors
demo-compressors: $(VENV)/.with-examples ## the same for other compressors, at equal numbers of bytes
	$(BIN)/python examples/compare_compressors.py $(DEMO_FLAGS)

.PHONY: demo-adaptive
demo-adaptive: $(VENV)/.with-examples ## fixed ranks beside ranks that change as training goes on
	$(BIN)/python examples/adaptive_rank.py $(DEMO_FLAGS)

.PHONY: demo-privacy
demo-privacy: $(VENV)/.with-examples ## train with differential privacy and compression together (two to three minutes on two cores)
	$(BIN)/python examples/private_training.py $(DEMO_FLAGS)
	@echo 'This was one seed of some rows. "make demo-privacy-full" has all, and standard deviations.'

.PHONY: demo-privacy-full
demo-privacy-full: $(VENV)/.with-examples ## the same with three seeds, and a search for where compression helps (long)
	$(BIN)/python examples/private_training.py --full $(DEMO_FLAGS)

.PHONY: demo-pipeline
demo-pipeline: $(VENV)/.with-examples ## train in pipeline stages with compressed links, in 2 and in 4 processes (three minutes on two cores)
	$(BIN)/python examples/pipeline.py $(DEMO_FLAGS)
	@echo 'This was one seed of some methods. "make demo-pipeline-full" has all, and standard deviations.'

.PHONY: demo-pipeline-full
demo-pipeline-full: $(VENV)/.with-examples ## the same with all methods and three seeds; goes on where it was stopped (an hour)
	$(BIN)/python examples/pipeline.py --all --seeds 3 --resume $(DEMO_FLAGS)

.PHONY: demo-audit
demo-audit: $(VENV)/.with-examples ## attack what is sent, and see what it gives away (half a minute on two cores)
	$(BIN)/python examples/audit.py $(DEMO_FLAGS)
	@echo 'This was one table. "make demo-audit-full" has larger batches, noise, and membership.'

.PHONY: demo-audit-full
demo-audit-full: $(VENV)/.with-examples ## the same with all tables of the documentation (long)
	$(BIN)/python examples/audit.py --full $(DEMO_FLAGS)

.PHONY: test
test: $(VENV)/.with-test $(VENV)/.with-frameworks ## run the tests (about fifteen minutes on two cores)
	$(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS)

# The promises on few examples, the floors, the laws for four compressors, and two real processes.
QUICK := tests/promises tests/test_floors.py \
	tests/compressors/test_contract_suite.py::test_the_laws_hold_without_error_feedback \
	"tests/wire/test_processes.py::test_processes_compute_what_lockstep_computes[2 workers]"

.PHONY: test-quick
test-quick: $(VENV)/.with-test ## run the tests of the promises, on few examples (a minute and a half)
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_FLAGS) $(QUICK)

.PHONY: test-long
test-long: $(VENV)/.with-test ## do everything to optimizers, in 10,000 orders (an hour or more)
	FIELD_RUNS=10000 FIELD_RULES=50 $(BIN)/python -m pytest --timeout 0 $(PYTEST_FLAGS) tests/field/test_machine.py

# The oldest torch is the one that setup.cfg asks for. Without frameworks: their tests are skipped.
OLDEST_VENV := .venv-oldest
OLDEST_CONSTRAINTS := $(OLDEST_VENV)/constraints.txt

.PHONY: test-oldest
test-oldest: $(OLDEST_CONSTRAINTS) ## run the tests with the oldest torch (on Linux without PIP_FLAGS it downloads several gigabytes)
	$(MAKE) VENV=$(OLDEST_VENV) CONSTRAINTS=$(OLDEST_CONSTRAINTS) $(OLDEST_VENV)/.with-test
	$(OLDEST_VENV)/bin/python -m pytest -n $(JOBS) $(PYTEST_FLAGS)

$(OLDEST_CONSTRAINTS): constraints.txt setup.cfg
	@mkdir -p $(OLDEST_VENV)
	sed "s/^torch==.*/torch==$$(sed -n 's/^ *torch>=//p' setup.cfg)/" constraints.txt > $@

.PHONY: test-slow
test-slow: $(VENV)/.with-test ## run the tests that "make test" leaves out, since they take long (minutes)
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(PYTEST_FLAGS)

.PHONY: test-kill
test-kill: $(VENV)/.with-test ## kill workers at random points; what resumes must end the same (minutes)
	$(BIN)/python -m tests.checkpoint.kill_and_resume $(KILL_FLAGS)

.PHONY: lint
lint: $(VENV)/.with-test ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.with-test ## rewrite the sources in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The first command reads everything anew, so that a warning is reported until its cause is gone;
# the second runs the examples of what the first has read.
.PHONY: docs
docs: $(VENV)/.with-docs ## build the documentation in docs/_build/html and run its examples
	$(SPHINX) --fresh-env --builder html docs docs/_build/html
	$(SPHINX) --builder doctest docs docs/_build/doctest

# Each measurement is a file in docs/benchmarks, from which "make bench-docs" makes the page. Those of
# GPT-2 are few: a step of SGD takes seconds at 1 Gbit/s.
BENCH := $(BIN)/python -m benchmarks
BENCH_OPTIONS = $(if $(EPFML),--epfml $(EPFML)) $(BENCH_FLAGS)
RESULTS := docs/benchmarks
WORKLOADS := resnet18 lstm gpt2
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296

.PHONY: bench
bench: bench-network bench-local bench-memory bench-growth bench-kernels bench-docs ## measure and show all of what follows (Linux, root; takes long)

.PHONY: bench-network
bench-network: $(VENV)/.with-examples ## measure a step of two workers on slow networks (Linux, root)
	@set -ex; for workload in resnet18 lstm; do for rate in 100mbit 1gbit unlimited; do \
		$(BENCH).network --workload $$workload --rate $$rate --compiled $(BENCH_OPTIONS) \
			--output $(RESULTS)/network-$$workload-$$rate.json; \
	done; done
	@set -ex; for workload in resnet18 lstm; do \
		$(BENCH).network --workload $$workload --rate 1gbit --workers 4 --ranks 4 --compiled \
			$(BENCH_OPTIONS) --output $(RESULTS)/network-$$workload-1gbit-4-workers.json; \
	done
	$(BENCH).network --workload gpt2 --rate 1gbit --ranks 4 --rounds 7 --compiled $(BENCH_OPTIONS) \
		--output $(RESULTS)/network-gpt2-1gbit.json

.PHONY: bench-local
bench-local: $(VENV)/.with-examples ## measure a step of one worker, where nothing is sent
	@set -ex; for workload in $(WORKLOADS); do \
		$(BENCH).local --workload $$workload $(BENCH_OPTIONS) \
			--output $(RESULTS)/local-$$workload.json; \
	done
	THP_MEM_ALLOC_ENABLE=1 $(BENCH).local --workload resnet18 --ranks 4 $(BENCH_OPTIONS) \
		--output $(RESULTS)/local-resnet18-large-pages.json
	$(KEEP_MEMORY) $(BENCH).local --workload lstm $(BENCH_OPTIONS) \
		--output $(RESULTS)/local-lstm-memory-kept.json

.PHONY: bench-memory
bench-memory: $(VENV)/.with-examples ## measure the memory that a step takes
	@set -ex; for workload in $(WORKLOADS); do \
		$(BENCH).memory --workload $$workload $(if $(EPFML),--epfml $(EPFML)) \
			--output $(RESULTS)/memory-$$workload.json; \
	done

.PHONY: bench-growth
bench-growth: $(VENV)/.with-examples ## measure growth with the workers (Linux, root) and with the rank
	$(BENCH).growth workers $(BENCH_FLAGS) --output $(RESULTS)/growth-workers.json
	@set -ex; for workload in resnet18 lstm; do \
		$(BENCH).growth ranks --workload $$workload $(BENCH_FLAGS) \
			--output $(RESULTS)/growth-ranks-$$workload.json; \
	done

.PHONY: bench-kernels
bench-kernels: $(VENV)/.with-examples ## measure single operations of a step, every way they could be done
	$(BENCH).kernels --output $(RESULTS)/kernels.json

.PHONY: bench-rank
bench-rank: $(VENV)/.with-examples ## measure what it costs to observe steps, to decide on ranks, and to change them
	@set -ex; for workload in resnet18 lstm; do \
		$(BENCH).rank --workload $$workload $(BENCH_FLAGS); \
	done

.PHONY: bench-contract
bench-contract: $(VENV)/.with-examples ## ask efsgd and its peers what a swap-in for SGD has to do
	$(BENCH).contract $(if $(EPFML),--epfml $(EPFML)) $(if $(DION),--dion $(DION)) \
		--output $(RESULTS)/contract.json
	$(BENCH).contract.page

.PHONY: bench-whole-steps
bench-whole-steps: $(VENV)/.with-examples ## measure whole steps of the examples' models on slow networks (Linux, root)
	@set -ex; for rate in 10mbit 100mbit; do $(BENCH).whole_steps --rate $$rate $(BENCH_FLAGS); done

.PHONY: bench-adamw
bench-adamw: $(VENV)/.with-examples ## measure whole steps with AdamW, in DDP's backward pass and before the step (Linux, root)
	@set -ex; for rate in 100mbit 1gbit; do $(BENCH).adamw_steps --rate $$rate $(BENCH_FLAGS); done

.PHONY: bench-planning
bench-planning: $(VENV)/.with-examples ## hold the planner's predictions against whole steps on slow networks (Linux, root)
	$(BENCH).planning check $(BENCH_FLAGS) --output $(RESULTS)/planning.json
	$(BENCH).planning tables --output docs/planning-tables.md

.PHONY: planning-tables
planning-tables: $(VENV)/.with-examples ## compute the planner's tables of the documentation
	$(BENCH).planning tables --output docs/planning-tables.md

.PHONY: bench-training
bench-training: $(VENV)/.with-examples ## train whole models on slow networks, to a quality that all reach (Linux, root; hours, goes on where it was stopped)
	@set -ex; for task in digits lstm gpt; do for rate in 100mbit 1gbit; do \
		$(BENCH).training --task $$task --rate $$rate --resume $(BENCH_OPTIONS) \
			--output $(RESULTS)/training-$$task-$$rate.json; \
	done; done

.PHONY: bench-pipeline
bench-pipeline: $(VENV)/.with-examples ## measure a step of a pipeline on slow networks (Linux, root)
	@set -ex; for rate in 100mbit 1gbit; do $(BENCH).pipeline --rate $$rate $(BENCH_FLAGS); done
	$(BENCH).pipeline --stages 4 $(BENCH_FLAGS)
	$(BENCH).pipeline --microbatches 16 $(BENCH_FLAGS)

.PHONY: bench-privacy
bench-privacy: $(VENV)/.with-examples ## measure a private step beside one of Opacus
	$(BENCH).privacy $(BENCH_FLAGS)

# Beside breaching, which needs an environment of its own: benchmarks/audit_peers.py says how.
.PHONY: bench-audit
bench-audit: $(VENV)/.with-examples ## ask with shadow models who was trained on
	$(BENCH).audit_lira $(BENCH_FLAGS)

.PHONY: bench-docs
bench-docs: $(VENV)/.with-examples ## make docs/benchmarks.md and its plots of what was measured
	$(BENCH).report

# By setuptools itself: no other package is needed then.
NATIVE := efsgd/algorithms/low_rank/native

.PHONY: wheel
wheel: $(VENV)/.with-test ## build the source distribution and the wheel in dist/
	rm -rf build dist
	$(BIN)/python -c 'import setuptools.build_meta as b; b.build_sdist("dist"); b.build_wheel("dist")'

.PHONY: wheel-native
wheel-native: $(VENV)/.with-test ## build a wheel for this platform, which carries the native passes ready-made
	rm -rf build dist
	$(BIN)/python -c 'from $(subst /,.,$(NATIVE)) import build as b; \
		[b.make(rank, b.compiler_at_hand(), b.ready_made(rank)) for rank in range(1, 9)]'
	$(BIN)/python -c 'import setuptools.build_meta as b, sysconfig as s; \
		b.build_wheel("dist", {"--build-option": "--plat-name=" + s.get_platform().replace("-", "_")})'; \
		status=$$?; rm -f $(NATIVE)/*.so; exit $$status

# What was installed, and the tests without the sources.
CHECK := build/check
CHECKED := tests/promises/test_transaction.py tests/algorithms/test_native.py

.PHONY: check-wheel
check-wheel: wheel ## install the wheel by itself, and run some tests on it (half a minute)
	mkdir -p $(CHECK)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-index --target $(CHECK)/installed dist/*.whl
	cp -r tests setup.cfg $(CHECK)
	cd $(CHECK) && export PYTHONPATH=$$PWD/installed HYPOTHESIS_PROFILE=quick && \
		$(abspath $(BIN))/python -c 'import efsgd, pathlib; assert "installed" in pathlib.Path(efsgd.__file__).parts' && \
		$(abspath $(BIN))/python -m pytest -q $(PYTEST_FLAGS) $(CHECKED)

.PHONY: venv
venv: $(VENV)/.with-all ## make the virtual environment with everything that the other targets use

.PHONY: clean
clean: ## remove what the other targets made, except the virtual environment
	rm -rf build dist efsgd.egg-info docs/_build
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find efsgd tests examples benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A file .with-NAME in the virtual environment says that the extra NAME of setup.cfg is installed
# there. torch comes first and by itself: every later installation finds it in place.

$(VENV)/.with-%: $(VENV)/.with-torch setup.cfg pyproject.toml
	$(INSTALL) --editable ".[$*]"
	$(COMPILE)
	@touch $@

# Each call of pip finds versions and builds efsgd anew: one call is much faster than four.
$(VENV)/.with-all: $(VENV)/.with-torch setup.cfg pyproject.toml
	$(INSTALL) --editable ".[docs,examples,frameworks,test]"
	$(COMPILE)
	@touch $(addprefix $(VENV)/.with-,docs examples frameworks test) $@

$(VENV)/.with-torch: $(VENV)/.with-python $(CONSTRAINTS)
	$(INSTALL) torch
	@touch $@

$(VENV)/.with-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'efsgd needs Python 3.11 or newer, and "$(PYTHON)" is not one.' >&2; \
		echo 'Choose another interpreter: make <target> PYTHON=/path/to/python3.11' >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@
