#!/bin/sh
# runs tests/comfyui with a ComfyUI's own interpreter; without one it says so, and with --required fails
set -eu

case "${1:-}" in
    "") required=0 ;;
    --required) required=1 ;;
    *) echo "run_comfyui.sh: expected --required or nothing, got '$1'" >&2; exit 2 ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "ComfyUI suite: $1" >&2
    exit 1
}

not_run() {
    [ "$required" = 0 ] || fail "$1"
    echo "not run: tests/comfyui ($1)"
    exit 0
}

is_comfyui() {
    [ -f "$1/main.py" ] && [ -d "$1/comfy" ]
}

find_comfyui() {
    parent=$(dirname "$root")
    if [ -n "${COMFYUI_PATH:-}" ]; then
        is_comfyui "$COMFYUI_PATH" || fail "COMFYUI_PATH=$COMFYUI_PATH has no main.py and comfy/ in it; set it to ComfyUI's folder"
        comfy=$COMFYUI_PATH
    elif [ "$(basename "$parent")" = custom_nodes ] && is_comfyui "$(dirname "$parent")"; then
        comfy=$(dirname "$parent")
    elif is_comfyui "${HOME:-}/comfy/ComfyUI"; then
        comfy=$HOME/comfy/ComfyUI
    else
        not_run "no ComfyUI found; set COMFYUI_PATH to its folder"
    fi
    comfy=$(cd "$comfy" && pwd)
}

find_python() {
    if [ -n "${COMFYUI_PYTHON:-}" ]; then
        command -v "$COMFYUI_PYTHON" >/dev/null || fail "COMFYUI_PYTHON=$COMFYUI_PYTHON cannot be run; set it to the interpreter that runs ComfyUI"
        python=$COMFYUI_PYTHON
    elif [ -x "$comfy/.venv/bin/python" ]; then
        python=$comfy/.venv/bin/python
    elif [ -x "$comfy/venv/bin/python" ]; then
        python=$comfy/venv/bin/python
    else
        not_run "$comfy has neither .venv nor venv; set COMFYUI_PYTHON to the interpreter that runs it"
    fi
    "$python" -c 'import pytest' 2>/dev/null ||
        not_run "pytest is not installed there; run: $python -m pip install pytest"
}

find_comfyui
find_python
cd "$root"
echo "ComfyUI suite: $comfy with $python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export PYTHONPATH="$comfy${PYTHONPATH:+:$PYTHONPATH}"
# `python -m pytest` would put the pack's root first on sys.path, where nodes/ hides ComfyUI's nodes.py
run_pytest() {
    "$python" -c 'import sys; sys.path[:] = filter(None, sys.path); import pytest; sys.exit(pytest.main(sys.argv[1:]))' \
        -q -rs -p no:cacheprovider --import-mode=importlib "$@"
}

# the matrix in a process of its own, on the second core
matrix=tests/comfyui/test_matrix.py
log=$(mktemp)
run_pytest "$matrix" >"$log" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || :; rm -f "$log"' EXIT
status=0
run_pytest --ignore="$matrix" tests/comfyui || status=$?
wait "$beside" || status=$?
cat "$log"
exit "$status"
