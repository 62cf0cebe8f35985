#!/usr/bin/env bash
# All that wants a GPU, in at most 6 minutes: tests/gpu/run.sh OUT [PART...]
# Parts: tests ends compiled channel supply step. What may share the GPU runs together; what is timed
# runs alone. OUT gets at most 8 small files. `python -m tests.gpu.record OUT` puts their figures into
# docs/gpu.json and docs/gpu.md.
#
# A bare machine with torch and transformers is enough: what else is missing is installed from the
# wheels in $WHEELS (default: build/wheels), which are made where there is a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d build/wheels \
#       pyzmq msgpack xxhash click rich waitress prometheus-client
# Without a GPU the programs run tiny shapes, to see that they run; the tests are skipped.
set -u
cd "$(dirname "$0")/../.."
out=$1
shift
parts=" ${*:-tests ends compiled channel supply step} "
python=${PYTHON:-python3}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$python" -c 'import zmq, msgpack, xxhash, click, rich, waitress, prometheus_client' 2>"$logs/import" ||
    "$python" -m pip install --quiet --no-index --find-links "${WHEELS:-build/wheels}" \
        pyzmq msgpack xxhash click rich waitress prometheus-client || exit 1

failed=0
part() { # NAME LIMIT_S MODULE ARGUMENT...
    local name=$1 limit=$2 began=$SECONDS code=0
    shift 2
    [[ $parts == *" $name "* ]] || return 0
    timeout --kill-after=5 "$limit" "$python" -m "$@" >"$logs/$name.log" 2>&1 || code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s" | tee -a "$logs/parts.log"
    tail -c 1800 "$logs/$name.log" | cut -c1-1500
    return "$code"
}

part tests 100 pytest -q -p no:cacheprovider tests/gpu --junitxml="$out/tests.xml" & tests=$!
part ends 100 tests.gpu.ends "$out/ends.json" & ends=$!
part compiled 100 tests.gpu.compiled "$out/compiled.json" & compiled=$!
for each in $tests $ends $compiled; do wait "$each" || failed=1; done
part channel 60 tests.gpu.channel "$out/channel.json" || failed=1
part supply 105 tests.gpu.supply "$out/supply.json" || failed=1
part step 90 tests.gpu.step "$out/step.json" || failed=1
tar -czf "$out/logs.tgz" -C "$logs" .
echo "all: $SECONDS s"
exit "$failed"
