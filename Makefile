# Every command runs in .venv, which the first one creates. `make help` lists the commands.
PYTHON ?= python3
ARGS ?=
CSV ?= data/synthetic/test.csv
CORPUS ?= corpus
PY := .venv/bin/python

help:        ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

train: .venv/runtime        ## train: data/train.csv and weights/deberta-v3-small, or else synthetic rows and the bundled encoder (ARGS=...)
	$(PY) train.py $(ARGS)

predict: .venv/runtime      ## predict the rows of CSV=test.csv with the newest run's model; writes submission.csv
	$(PY) predict.py $(CSV) $(ARGS)

demo: .venv/runtime         ## serve the live page: type a pair, and see the attention of each head
	$(PY) -m minipref.explain --serve $(ARGS)

test: .venv/dev             ## run the tests, one process per core, at most four
	MINIPREF_REQUIRE=transformers,sentencepiece,sklearn $(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: .venv/dev        ## run the slow tests: full-size models, hundreds of kills
	MINIPREF_REQUIRE=transformers,sentencepiece,sklearn $(PY) -m pytest -m slow -n auto --maxprocesses 2 --dist worksteal $(ARGS)

lint: .venv/dev             ## run ruff
	$(PY) -m ruff check .

weights: .venv/runtime      ## fetch microsoft/deberta-v3-small into weights/
	$(PY) -m minipref.hub weights $(ARGS)

data: .venv/runtime         ## fetch the competition's labelled rows into data/
	$(PY) -m minipref.hub data $(ARGS)

parity: .venv/dev           ## compare every layer with transformers; writes benchmarks/parity.md
	$(PY) benchmarks/parity.py $(ARGS)

bench: .venv/dev            ## compare speed with transformers, BERT, ONNX Runtime and OpenVINO; writes docs/benchmarks.md
	$(PY) benchmarks/bench.py $(ARGS)
	$(PY) benchmarks/peers.py
	$(PY) docs/build.py

same-numbers: .venv/runtime  ## train at an older commit and here, and compare every number: ARGS=COMMIT
	$(PY) benchmarks/same_numbers.py $(ARGS)

docs: .venv/dev             ## rebuild the figures, generated tables and notebooks of README and docs
	$(PY) docs/build.py --screenshot $(ARGS)

pretrain: .venv/runtime     ## pretrain a small encoder on a folder of text: CORPUS=folder
	$(PY) -m minipref.pretrain --corpus $(CORPUS) $(ARGS)

kill: .venv/dev             ## kill a training run hundreds of times and resume it; writes docs/reliability.md
	$(PY) tests/killing.py $(ARGS)

setup: .venv/dev            ## create the environment, with the test packages

clean:       ## remove runs, caches and the synthetic dataset; weights and your data stay
	rm -rf runs data/synthetic .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# If this Python already has every pinned package, .venv uses those and needs no network.
.venv/runtime: requirements.txt
	$(PYTHON) -m venv $$($(PYTHON) -m pip install --dry-run --no-index --quiet -r requirements.txt >/dev/null 2>&1 \
		&& echo --system-site-packages) .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: help train predict test test-slow lint weights data parity bench docs pretrain kill same-numbers setup clean
