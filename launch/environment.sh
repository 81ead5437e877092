# Sourced by the entry points: makes .venv at the root of the repository and installs autopar into it, once.
#
#   ensure_environment EXTRAS    EXTRAS is "" or a list such as "[test]"; sets PYTHON to the environment's interpreter.
#
# .venv/installed remembers what was installed: the checksum of the files that decide it, the repository's path (an
# editable install points there), and the extras. While it holds nothing is run; a change of setup.py installs anew.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "autopar needs Python 3.11 or newer with the venv module; none of python3, python3.11 to python3.13 is" >&2
    return 1
}

# Without a GPU the CUDA build of torch is gigabytes for nothing: look at what pip would fetch before it does.
refuse_cuda_build_without_gpu() {
    command -v nvidia-smi >/dev/null && return
    if "$PYTHON" -m pip install --quiet --dry-run --report - --constraint "$ROOT/constraints.txt" torch |
        grep -Eq '"name": "nvidia-'; then
        echo "No NVIDIA GPU was found, yet pip would install the CUDA build of torch. Set PIP_EXTRA_INDEX_URL to the index" >&2
        echo "of CPU builds that https://pytorch.org/get-started/locally names, and run this again." >&2
        return 1
    fi
}

ensure_environment() {
    local extras="$1" stamp="$ROOT/.venv/installed" source
    source="$(cat "$ROOT/setup.py" "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum) $ROOT"
    if [ ! -x "$PYTHON" ]; then
        echo "making $ROOT/.venv"
        local base
        base="$(find_python)" || return 1
        "$base" -m venv "$ROOT/.venv" || return 1
    fi
    if [ -f "$stamp" ] && grep -qxF "$source autopar$extras" "$stamp"; then
        return
    fi
    echo "installing autopar$extras into $ROOT/.venv"
    refuse_cuda_build_without_gpu || return 1
    # torch first: everything after it then finds the build that was chosen. setuptools for the editable install.
    "$PYTHON" -m pip install --quiet --constraint "$ROOT/constraints.txt" torch setuptools || return 1
    "$PYTHON" -m pip install --quiet --constraint "$ROOT/constraints.txt" --no-build-isolation --editable "$ROOT$extras" ||
        return 1
    { grep -F "$source autopar" "$stamp" 2>/dev/null || true; echo "$source autopar"; echo "$source autopar$extras"; } |
        sort -u >"$stamp.new"
    mv "$stamp.new" "$stamp"
}
