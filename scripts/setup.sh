#!/usr/bin/env bash
# Installs megatsp, editable and with its development tools, into the checkout's .venv.
# A second run is instant unless pyproject.toml, this script or TORCH has changed.
#
#   PYTHON  interpreter to make .venv with (default python3; 3.11 or later)
#   TORCH   pip arguments that choose the torch build, for example
#           TORCH="torch==2.11.0 --index-url https://download.pytorch.org/whl/<rocm or cuda version>"
#           Default: the CPU build without a GPU, the default index's build with an NVIDIA one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
stamp=.venv/megatsp-setup.stamp
state=$(cat pyproject.toml scripts/setup.sh - <<<"$PWD ${TORCH:-}" | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$state" ]]; then
    exit 0
fi

fail() { echo "setup: $*" >&2; exit 1; }
install() { .venv/bin/python -m pip install -qq "$@"; } # prints errors only

if [[ ! -x .venv/bin/python ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is not Python 3.11 or later; name one: PYTHON=python3.11 bash scripts/setup.sh"
    echo "setup: creating .venv with $("$python" --version)"
    "$python" -m venv .venv || fail "no venv; on Debian: apt-get install python3-venv"
fi
rm -f "$stamp"

if [[ -n ${TORCH:-} ]]; then
    echo "setup: installing $TORCH"
    # shellcheck disable=SC2086  # several pip arguments on purpose
    install $TORCH
elif command -v nvidia-smi >/dev/null; then
    echo "setup: NVIDIA GPU tools found, installing torch from the default index"
    install "torch>=2.11,<2.14"
elif command -v rocminfo >/dev/null; then
    # PyPI's torch is built for CUDA, and the right ROCm index depends on the driver.
    fail "ROCm found: choose torch's ROCm build, for example" \
        'TORCH="torch --index-url https://download.pytorch.org/whl/rocm7.1"'
else
    echo "setup: no GPU found, installing torch's CPU build"
    # First from where pip looks anyway (a mirror or a folder of wheels), then from PyTorch's index.
    install "torch==2.13.0+cpu" 2>/dev/null ||
        install --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
fi

echo "setup: installing megatsp and its development tools"
install --editable ".[dev]"
echo "$state" >"$stamp"
echo "setup: done; 'source .venv/bin/activate' puts megatsp on the PATH"
