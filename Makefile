PYTHON ?= python3
# Flower's line, docs/flower.md: grpc (1.31), or http (the newest) with an environment of its own.
FLOWER ?= grpc
$(if $(filter grpc http,$(FLOWER)),,$(error FLOWER=$(FLOWER): expected grpc or http))
VENV := $(if $(filter http,$(FLOWER)),.venv-http,.venv)
export CONSTRAINTS := $(if $(filter http,$(FLOWER)),constraints-http.txt,constraints.txt)
OTHER := $(if $(filter http,$(FLOWER)),grpc,http)
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: demo deploy-demo docker-demo docker-test docs-test federation-test package-test test soak bench docs clean

demo: $(VENV)/ready  ## set up, then simulate a federation; for another one: make demo ARGS="--nodes 4 data=folder:images"
	$(BIN)/fedclip run $(ARGS)

deploy-demo: $(VENV)/ready  ## set up, then the same with TLS, node keys and SuperNodes, compared with a simulation: two minutes
	$(BIN)/python -m deploy.demo $(ARGS)

docker-demo:  ## the same in containers, with a network for each site: minutes the first time; needs Docker, and no set-up
	$(PYTHON) docker/demo.py $(ARGS)

test: $(VENV)/tools  ## set up, then check style and types and run the tests, but those of the other targets: four minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --exclude '_$(OTHER)\.py$$'
	$(PYTEST) -n 3 $(ARGS)

federation-test: $(VENV)/tools  ## set up, then run the tests with further real federations, over Ray and over the network: some minutes
	$(PYTEST) -n 3 -m 'federation and not soak' $(ARGS)

docker-test: $(VENV)/all  ## set up, then run the tests with containers; needs Docker
	$(BIN)/pytest -m docker $(ARGS)

package-test: $(VENV)/all  ## set up, then build wheel and sdist and use them with the oldest and newest dependencies: minutes
	$(BIN)/pytest -m package --durations=0 $(ARGS)

docs-test: $(VENV)/all  ## set up, then build the documentation's site, follow its links, and run the commands of its pages
	$(PYTEST) -n 3 -m documentation $(ARGS)

soak: $(VENV)/all  ## set up, then all tests twice in random order, those that the others leave out, and faults: docs/reliability.md
	$(PYTEST) -n 3 --shuffle 1
	$(PYTEST) -n 3 --shuffle 2
	$(BIN)/python -m tests.mutation
	$(BIN)/pytest -m soak
	$(BIN)/python -m reliability $(ARGS)

bench: $(VENV)/all  ## set up, then measure times, bytes and memory, and write docs/benchmarks.md: a quarter of an hour
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/all  ## set up, then make the documentation's site, its notebook run: build/docs/index.html; two minutes
	$(BIN)/python docs/reference.py
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"fedclip-flwr needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: run make PYTHON=python3.12 (or wherever a newer one is)")'
	@echo 'setting up $(VENV), once: 2 to 3 minutes'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[simulation]'
	@touch $@

$(VENV)/tools: $(VENV)/ready
	@echo 'adding what tests need, once: half a minute'
	@$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	@touch $@

$(VENV)/all: $(VENV)/tools
	@echo 'adding all extras and what documentation and benchmarks need, once: a minute or two'
	@$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

clean:  ## forget the environments
	rm -rf .venv .venv-http
