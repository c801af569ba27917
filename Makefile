# Every target does its own set-up, in a virtual environment of the project.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 1

# Who is in the plot of the figures: ours, peers, and the limit.
PLOTTED := "C epoll loop,gunicorn-gevent,gunicorn-gthread,gunicorn-sync,nchan,Node http,better-sse,Starlette,sse-starlette,Flask-SSE"

SECONDS ?= 60
MINUTES ?= 10

.PHONY: example test lint fuzz soak docs bench clean

example: $(VENV)/.example
	@echo "Open http://$(HOST):$(PORT)/ in two tabs. Ctrl-C ends it."
ifdef REDIS
	sh tests/install_system_parts.sh redis
endif
	$(if $(REDIS),sh example_app/with_redis.sh) \
		$(BIN)/gunicorn -k gevent -w $(WORKERS) -b $(HOST):$(PORT) "example_app:create_app()"

test: $(VENV)/.test
	$(BIN)/python -m fuzz --seed 1 --cases 10000 & fuzz=$$!; \
	sh tests/install_system_parts.sh && $(MAKE) lint && wait $$fuzz || { kill $$fuzz; exit 1; }
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m beside > beside.log 2>&1 & beside=$$!; \
	$(BIN)/coverage run -m pytest -m "not beside"; status=$$?; \
	wait $$beside || status=1; cat beside.log; exit $$status
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.test
	$(BIN)/python -m fuzz --seconds $(SECONDS)

soak: $(VENV)/.test
	sh tests/install_system_parts.sh redis
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

docs: $(VENV)/.test
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/parse.py
	$(BIN)/python benchmarks/generator.py
	$(BIN)/python benchmarks/send.py
	$(BIN)/python benchmarks/fanout.py
	$(BIN)/python benchmarks/fanout.py --work steady --sets single --rounds 1 \
		--subscribers 300,1000,3000,10000 --server $(PLOTTED) --svg docs/_static/fanout.svg
	$(BIN)/python benchmarks/redis_broker.py
	$(BIN)/python benchmarks/runs.py
	$(BIN)/python -m benchmarks.shutdown

clean:
	rm -rf $(VENV) beside.log build dist docs/_build instance *.egg-info

# Debian keeps ensurepip in a package of its own, without which venv fails.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); sh tests/install_system_parts.sh venv; $(PYTHON) -m venv $(VENV); }

$(VENV)/.%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
