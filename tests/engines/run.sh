#!/usr/bin/env bash
# Run NeMo AutoModel's recipe through brokers and compare it with its co-located run; train with
# speculators from our workers; serve a target inside vLLM; train a draft for a real model; then load an exported draft in speculators and in vLLM on CPU, and compare with draftmq eval.
# Usage: run.sh [DRAFT]   (default: the newest draft of runs/demo*; without one, a demo is run first)
set -euo pipefail
cd "$(dirname "$0")/../.."

engines=build/engines-venv
if ! [ -e "$engines/.ready" ] || [ tests/engines/requirements.txt -nt "$engines/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$engines"
    deploy/install-torch.sh "$engines/bin/python" torch==2.13.0
    # the list is complete, and the packages' own bounds contradict each other
    "$engines/bin/python" -m pip install --quiet --no-deps -r tests/engines/requirements.txt
    touch "$engines/.ready"
fi

nemo=build/engines/nemo
if ! [ -e "$nemo/.ready" ] || [ tests/engines/nemo/requirements.txt -nt "$nemo/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$nemo"
    deploy/install-torch.sh "$nemo/bin/python" torch==2.13.0
    "$nemo/bin/python" -m pip install --quiet --no-deps -r tests/engines/nemo/requirements.txt
    touch "$nemo/.ready"
fi
.venv/bin/python -m tests.engines.nemo

.venv/bin/python -m tests.engines.speculators_training --python "$engines/bin/python"
.venv/bin/python -m tests.engines.vllm_workers --python "$engines/bin/python"
.venv/bin/python -m tests.engines.real_model --python "$engines/bin/python" --topics 6

draft=${1:-$(find runs -path 'runs/demo*/draft/config.json' -printf '%T@ %h\n' 2>/dev/null |
    sort -n | tail -n 1 | cut -d' ' -f2-)}
if [ -z "$draft" ]; then
    .venv/bin/draftmq demo --output build/engines-demo
    draft=build/engines-demo/draft
fi
exec .venv/bin/python -m tests.engines.check --draft "$draft" --python "$engines/bin/python"
