#!/usr/bin/env bash
# Compares jaxid with PyTorch on one GPU of 80 GB or more, in less than eight minutes beside the installation:
#
#     bash benchmarks/gpu.sh [OUT]
#
# SKIP_INSTALL=1 uses the environment as it is. Results: OUT/gpu.md (table), OUT/gpu.json, OUT/gpu.jsonl.
set -euo pipefail
PACKAGES=("jax[cuda12]" torch transformers einops jaxtyping)
OPTIONAL=(nnsight)
here=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${SKIP_INSTALL:-}" ]; then
    python -m pip install --quiet "${PACKAGES[@]}" "$here"
    python -m pip install --quiet "${OPTIONAL[@]}" || echo "nnsight is not measured"
fi
exec timeout 480 python "$here/benchmarks/gpu.py" --out "${1:-$here/results/gpu}" --seconds 460
