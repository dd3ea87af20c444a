#!/usr/bin/env bash
# One session on a machine with a GPU, in at most nine minutes and without a network:
#
#     bash benchmarks/gpu_session.sh OUT [WHEELS]           writes OUT/gpu.md, OUT/speed.json and OUT/speed.md
#     bash benchmarks/gpu_session.sh OUT "" --small         the same on a CPU, in small
#
# PYTHON (default: python3) needs torch, transformers and minipref's own packages. WHEELS is a folder with wheels of
# FlashDeBERTa and disentangled-flash, whose kernels are then timed as well.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
python=${PYTHON:-python3}
small=()
[ "${3:-}" = "--small" ] && small=(--device cpu --small)
limit=$([ "${3:-}" = "--small" ] && echo 600 || echo 200)      # seconds; a busy CPU is no GPU
if [ -n "${2:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/packages" "$2"/*.whl &&
        export PYTHONPATH="$out/packages"
fi
# Speed first: its figures are written one by one, so that a session that ends early has lost none.
timeout 330 "$python" benchmarks/gpu_speed.py --output "$out/speed.json" --seconds 240 "${small[@]}" || failed=1
timeout "$limit" "$python" benchmarks/gpu_check.py --output "$out/gpu.md" "${small[@]}" || failed=1
rm -rf "$out/packages"
exit "${failed:-0}"
