#!/bin/sh
# Check and measure this machine's GPU in at most 8 minutes: a table, and gpu_check.json in OUT (default: runs/gpu).
# PYTHON names the Python that has PyTorch with CUDA; without it .venv's is taken, else python3.
# Arguments are passed on: names of phases, --seconds, --list.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-}"
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python; } || python=python3
PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 exec "$python" benchmarks/gpu_check.py "$@"
