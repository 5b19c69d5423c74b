# Sourced by quickstart.sh and test.sh: a virtual environment with the project in it, in $TCOD_VENV (default .venv).
# $TCOD_EXTRAS names the extras of setup.py that the caller needs. PYTHON chooses the interpreter. Torch is pinned: an unpinned one would pull gigabytes of CUDA packages on some hosts.

TCOD_VENV=${TCOD_VENV:-.venv}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 found; install one or set PYTHON to its path" >&2
  return 1
}

enter_environment() {
  local python wanted stamp
  if [[ ! -x $TCOD_VENV/bin/python ]]; then
    python=$(find_python)
    echo "creating $TCOD_VENV with $python"
    "$python" -m venv "$TCOD_VENV"
  fi
  # shellcheck disable=SC1091
  source "$TCOD_VENV/bin/activate"
  wanted=$({ cat setup.py pyproject.toml; find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; echo "${TCOD_CUDA:-auto}"; } | cksum)
  stamp=$TCOD_VENV/.megatron_tcod-$TCOD_EXTRAS
  if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
    echo "installing packages into $TCOD_VENV (once)"
    pip install --quiet --disable-pip-version-check "torch==${TCOD_TORCH_VERSION:-2.13.0}"
    pip install --quiet --disable-pip-version-check --editable ".[$TCOD_EXTRAS]"
    echo "$wanted" > "$stamp"
  fi
}
