.PHONY: setup serve test check docs

FILE ?= deployments/omni.yaml
BIN := .venv/bin

setup:          # .venv with every package at its pinned version; does nothing when that is there
	@scripts/setup

serve: setup    # serve a YAML file; another one: make serve FILE=deployments/other.yaml
	$(BIN)/omni-ray serve $(FILE)

test: setup     # all tests; some of them: make test ARGS="tests/unit -k router"
	@scripts/servers
	$(BIN)/pytest $(ARGS)

check: setup    # style, types, import rules, shape
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q tests/unit/test_shape.py

docs: setup     # docs/configuration.md and the chart's schema from the spec, docs/metrics.md from the table of metrics
	$(BIN)/python -m omni_ray.config.docs > docs/configuration.md
	$(BIN)/python -m omni_ray.metrics > docs/metrics.md
	$(BIN)/python -m omni_ray.config.chart > helm/omni-ray/values.schema.json
