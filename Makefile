# Everything runs in .venv, which the first command makes. `make help` lists the commands.
PYTHON ?= python3
ARGS ?=
CSV ?= data/synthetic/test.csv
CORPUS ?= corpus
PY := .venv/bin/python

help:        ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 14

train: .venv/runtime        ## train: on data/train.csv and weights/deberta-v3-small if they are there, else on what ships (ARGS=...)
	$(PY) train.py $(ARGS)

predict: .venv/runtime      ## predict the rows of CSV=test.csv with the newest run's model; writes submission.csv
	$(PY) predict.py $(CSV) $(ARGS)

test: .venv/dev             ## the tests, a process for each core up to four
	MINIPREF_REQUIRE=transformers,sentencepiece,sklearn $(PY) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal $(ARGS)

test-slow: .venv/dev        ## the proofs that take longer: full sizes, many kills
	MINIPREF_REQUIRE=transformers,sentencepiece,sklearn $(PY) -m pytest -m slow $(ARGS)

lint: .venv/dev             ## ruff
	$(PY) -m ruff check .

weights: .venv/runtime      ## fetch microsoft/deberta-v3-small into weights/
	$(PY) -m minipref.hub weights $(ARGS)

data: .venv/runtime         ## fetch the competition's labelled rows into data/
	$(PY) -m minipref.hub data $(ARGS)

parity: .venv/dev           ## layer by layer against transformers; writes benchmarks/parity.md
	$(PY) benchmarks/parity.py $(ARGS)

bench: .venv/dev            ## speed and memory beside transformers; writes benchmarks/performance.md and docs/benchmarks.md
	$(PY) benchmarks/bench.py $(ARGS)

same-numbers: .venv/runtime  ## train at an old commit and here; every number has to be the same: ARGS=COMMIT
	$(PY) benchmarks/same_numbers.py $(ARGS)

docs: .venv/dev             ## make every figure, generated table and notebook of README and docs again
	$(PY) docs/build.py $(ARGS)

pretrain: .venv/runtime     ## make the small encoder again from a folder of text: CORPUS=folder
	$(PY) -m minipref.pretrain --corpus $(CORPUS) $(ARGS)

kill: .venv/dev             ## kill a training run hundreds of times and resume it; writes docs/reliability.md
	$(PY) tests/killing.py $(ARGS)

setup: .venv/dev            ## the environment with the test packages, and nothing else

clean:       ## remove runs, caches and the synthetic dataset; weights and your data stay
	rm -rf runs submission.csv data/synthetic .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Where this Python already has every pinned package, the environment takes them from there and needs no network.
.venv/runtime: requirements.txt
	$(PYTHON) -m venv $$($(PYTHON) -m pip install --dry-run --no-index --quiet -r requirements.txt >/dev/null 2>&1 \
		&& echo --system-site-packages) .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

.PHONY: help train predict test test-slow lint weights data parity bench docs pretrain kill same-numbers setup clean
