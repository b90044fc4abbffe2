PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-distributed test test-all test-long test-oldest fuzz mutants coverage test-fla \
  test-fla-all conformance bench peers lint docs build figures clean

demo: $(VENV)/.installed
	$(BIN)/python -m tops.cpu.kda

demo-distributed: $(VENV)/.installed
	$(BIN)/python examples/distributed.py

# A process a core; what one has compiled the others take from the cache.
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal

# The fast tier; `make test-all` runs every test. What is about neither rounding nor speed is compiled fast.
test: $(VENV)/.installed
	$(PYTEST) -m 'not slow and unoptimized' --unoptimized
	$(PYTEST) -m 'not slow and not unoptimized'

test-all: $(VENV)/.installed
	$(PYTEST) -m 'unoptimized and not long' --unoptimized
	$(PYTEST) -m 'not unoptimized and not long'

# What is too long for every change: the large cases of FLA's own suite, more cases of the kit's own tests.
test-long: $(VENV)/.installed
	$(PYTEST) -m long --unoptimized

# The fast tier on the oldest JAX that pyproject.toml allows.
OLDEST = $(shell sed -n 's/.*"jax>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest:
	$(MAKE) test VENV=.venv-oldest JAX='jax==$(OLDEST) jaxlib==$(OLDEST)'

# make fuzz EXAMPLES=5000, or FOR=3600 for an hour; a failure prints the call that reproduces it.
EXAMPLES ?= 2000
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz.py --examples $(EXAMPLES) $(if $(FOR),--seconds $(FOR))

# Faults put into a copy of the package, one by one: the fast tier must fail for each. TIER=all looks with every test.
TIER ?= fast
mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py --tier $(TIER)

coverage: $(VENV)/.installed
	$(BIN)/python -m coverage run -m pytest -m 'not long'
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

test-fla: $(VENV)-fla/.installed
	$(VENV)-fla/bin/python -m pytest -n auto --dist loadgroup tests/fla -m 'not slow'

test-fla-all: $(VENV)-fla/.installed
	$(VENV)-fla/bin/python -m pytest -n auto --dist loadgroup tests/fla

conformance: $(VENV)/.installed
	for dtype in float32 bfloat16 float16 float64; do \
	  $(BIN)/python -m tops.cpu.kda.testing check tops.cpu.kda:chunk_kda_fwd --dtype $$dtype || exit 1; \
	  $(BIN)/python -m tops.cpu.kda.testing check tops.cpu.kda:chunk_kda --case '*raw*' --dtype $$dtype || exit 1; \
	done

# The kit on KDA of other libraries, in about ten minutes: docs/peers.md. Ends with 1 where something new is flagged.
peers: $(VENV)-bench/.installed $(VENV)-fla/.installed $(VENV)-mlx/.installed
	$(VENV)-bench/bin/python peers/run.py \
	  --bench $(VENV)-bench/bin/python --mlx $(VENV)-mlx/bin/python --fla $(VENV)-fla/bin/python

# The peers need Python >= 3.12 and its JAX; --other and --fla time what the other environments have.
bench: $(VENV)/.installed $(VENV)-bench/.installed
	$(VENV)-bench/bin/python benchmarks/run.py --other $(BIN)/python --fla $(VENV)-fla/bin/python

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(BIN)/python

# The site, in site/. A broken link or a name that is not there fails.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

build: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build
	.ci/test-wheel $(PYTHON) dist/*.whl

figures: $(VENV)/.installed
	$(BIN)/python docs/draw_triangle.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,dev,report]' $(JAX)
	touch $@

# TORCH=torch takes the newest build; the pinned one has a CPU build on the development machines.
TORCH ?= torch==2.13.0
$(VENV)-fla/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-fla
	$(VENV)-fla/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' --editable '.[test,fla]'
	touch $@

$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

NEWEST = $(shell .ci/newest-python)
$(VENV)-bench/.installed: pyproject.toml
	$(or $(NEWEST),$(PYTHON)) -m venv $(VENV)-bench
	$(VENV)-bench/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

$(VENV)-mlx/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-mlx
	$(VENV)-mlx/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[mlx]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-fla $(VENV)-bench $(VENV)-mlx $(VENV)-docs .venv-newest .venv-oldest site dist
