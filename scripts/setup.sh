#!/bin/sh
# Make .venv with all that running and testing need. Idempotent. Versions are those of requirements.lock.
# PyTorch: the CPU build where there is no NVIDIA GPU, so that no gigabytes of CUDA come by accident.
set -eu

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "OpenQwen needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON=python3.11, say." >&2
    exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=".venv/bin/python -m pip --disable-pip-version-check --quiet"

torch=$(sed -n 's/^torch==//p' requirements.lock)
if .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    echo "PyTorch $torch is there."
elif [ "$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then
    echo "Installing PyTorch $torch, CPU build ..."
    # "+cpu" names a build that the default index does not carry, so a CUDA build can never be taken for it.
    $pip install --no-deps "torch==$torch+cpu" 2>/dev/null ||
        $pip install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
else
    echo "Installing PyTorch $torch ..."
    $pip install "torch==$torch"
fi
echo "Installing what requirements.lock lists ..."
grep -v -e '^torch==' -e '^ray==' requirements.lock >.venv/requirements-without-torch.txt
$pip install --no-deps -r .venv/requirements-without-torch.txt
# Optional: Ray, for work over several machines. Not every machine has a build; its tests are skipped there.
ray=$(sed -n 's/^ray==//p' requirements.lock)
.venv/bin/python -c "import ray, sys; sys.exit(ray.__version__ != '$ray')" 2>/dev/null ||
    $pip install --no-deps "ray==$ray" || echo "Ray $ray is left out: there is no build for this machine."
$pip install --no-deps --no-build-isolation --editable .
# Optional: compiled parts, which are built on first use where this is left out. Without a compiler plain Python works.
.venv/bin/python -c 'from openqwen.tokenizer import fast
from openqwen.model import kernels
print("The tokenizer is compiled." if fast.library() else "The tokenizer runs in plain Python.")
print("The network has compiled kernels." if kernels.library() else "The network runs in plain PyTorch.")'
echo "Ready: .venv/bin/openqwen --help"
