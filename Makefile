# Two commands do all the set-up on a machine with Python 3.11 and make: `make serve` and `make test`.

PYTHON ?= python3.11
PORT ?= 3000
NAME ?= cifar10_cnn
OVERLAY ?= cpu
DATA ?= cifar10
RUN := runs/$(NAME)

VENV := .venv
BIN := $(VENV)/bin
# An own home keeps the models and Bentos of this checkout apart from those of others. Nobody is sent usage statistics.
export BENTOML_HOME ?= $(CURDIR)/.bentoml
export BENTOML_DO_NOT_TRACK := True
export ORT_DISABLE_TELEMETRY := 1
# Images. More of what `docker build` needs on this machine goes into CONTAINERIZE_FLAGS, as `--opt KEY=VALUE`.
export IMAGE_CPU ?= classifier:cpu
IMAGE_GPU ?= classifier:cuda
CONTAINERIZE_FLAGS ?=

.DEFAULT_GOAL := help
.PHONY: help serve test check lock train export evaluate store build image-cpu image-gpu e2e clean \
	k8s-rules k8s-pin k8s-apply check-k8s

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Serving on a CPU needs no torch.
SERVE_REQUIREMENTS := $(if $(wildcard /proc/driver/nvidia/version),requirements-gpu.txt,requirements-serve.txt)

$(VENV)/.serve: $(SERVE_REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r $(SERVE_REQUIREMENTS)
	@touch $@

$(VENV)/.dev: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@ $(VENV)/.serve

serve: $(VENV)/.serve ## set up and serve the shipped model on PORT (default 3000)
	$(BIN)/bentoml serve service:Classifier --port $(PORT) --timeout-graceful-shutdown 30

test: check ## set up, lint, type-check and run the tests
	$(BIN)/python -m pytest

check: $(VENV)/.dev ## lint and types only
	$(BIN)/ruff format --check --diff .
	$(BIN)/ruff check .
	$(BIN)/mypy

train: $(VENV)/.dev ## train NAME on DATA (cifar10, a folder or a tar archive); RESUME=1 goes on from a checkpoint
	$(BIN)/python -m train.fit $(DATA) --name $(NAME) --out $(RUN) $(if $(RESUME),--resume)

export: $(VENV)/.dev ## turn the run of NAME into an artifact in $(RUN)/artifact
	$(BIN)/python -m train.export $(RUN) $(DATA) --out $(RUN)/artifact

evaluate: $(VENV)/.dev ## report on the test images of DATA, and write the figures into the artifact's card
	$(BIN)/python -m train.evaluate $(RUN)/artifact $(DATA)

store: $(VENV)/.serve ## put the artifact of NAME into the model store; MODEL=NAME make serve then serves it
	$(BIN)/python -m model.store import $(RUN)/artifact

build: $(VENV)/.dev ## build a Bento from this checkout
	$(BIN)/bentoml build

image-cpu: $(VENV)/.serve ## build the image IMAGE_CPU (classifier:cpu), which serves on a CPU and has no torch
	$(BIN)/bentoml build -f deploy/bentofile.cpu.yaml
	$(BIN)/bentoml containerize classifier-cpu:latest -t $(IMAGE_CPU) $(CONTAINERIZE_FLAGS)

image-gpu: $(VENV)/.serve ## build the image IMAGE_GPU (classifier:cuda), with the CUDA that torch's wheels bring
	$(BIN)/bentoml build
	$(BIN)/bentoml containerize classifier:latest -t $(IMAGE_GPU) $(CONTAINERIZE_FLAGS)

e2e: $(VENV)/.dev ## run the CPU image, built if missing, and test it from outside
	$(BIN)/python -m pytest tests/e2e

k8s-rules: $(VENV)/.serve ## write deploy/k8s' PrometheusRule from monitoring/prometheus/rules
	$(BIN)/python deploy/k8s/rules.py > deploy/k8s/components/monitoring/prometheus-rule.yaml

k8s-pin: ## make OVERLAY (cpu, gpu, production) of deploy/k8s run IMAGE, NAME@sha256:DIGEST
	$(PYTHON) deploy/k8s/pin.py $(OVERLAY) $(IMAGE)

k8s-apply: ## apply OVERLAY (cpu, gpu) to kubectl's cluster and wait for it
	kubectl apply --kustomize deploy/k8s/overlays/$(OVERLAY)
	kubectl --namespace classifier rollout status deployment/classifier --timeout 10m

SCHEMAS := tests/kubernetes/schemas
$(SCHEMAS)/node_modules: $(SCHEMAS)/package-lock.json
	npm ci --prefix $(SCHEMAS) --no-audit --no-fund
	@touch $@

check-k8s: $(VENV)/.dev $(SCHEMAS)/node_modules ## validate deploy/k8s; needs kubectl, Node.js and promtool (Debian: prometheus)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/kubernetes

lock: $(VENV)/.dev ## pin what pyproject.toml asks for in requirements*.txt
	$(BIN)/uv pip compile -q pyproject.toml -o requirements-serve.txt --no-annotate --custom-compile-command "make lock"
	$(BIN)/uv pip compile -q pyproject.toml --extra gpu -o requirements-gpu.txt --no-annotate --custom-compile-command "make lock"
	$(BIN)/uv pip compile -q pyproject.toml --extra gpu --extra dev -o requirements.txt --no-annotate --custom-compile-command "make lock"

clean: ## remove everything that make made, but neither data nor runs
	rm -rf $(VENV) .bentoml .mypy_cache .ruff_cache .pytest_cache
