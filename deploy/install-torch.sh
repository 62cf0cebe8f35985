#!/bin/sh
# Install torch where none is: PYTHON's, of the version that REQUIREMENT names. Without an NVIDIA
# driver it takes the CPU build, which is 200 MB where the CUDA build takes gigabytes.
set -eu
python=$1
requirement=$2
"$python" -c 'import torch' 2>/dev/null && exit 0
if command -v nvidia-smi >/dev/null 2>&1; then
    exec "$python" -m pip install --quiet "$requirement"
fi
# an index or a folder of wheels that pip knows may have the CPU build; uv knows where it is kept
"$python" -m pip install --quiet "$requirement+cpu" 2>/dev/null && exit 0
"$python" -m pip install --quiet uv
exec "$python" -m uv pip install --quiet --python "$python" --torch-backend cpu "$requirement"
