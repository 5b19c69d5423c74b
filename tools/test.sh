#!/usr/bin/env bash
# Run the tests: `bash tools/test.sh [--all] [pytest arguments]`. Creates the environment where there is none.
# Without --all, tests marked slow, gpu, multigpu and sglang are left out; with it, those whose needs are met run too.
set -euo pipefail
cd "$(dirname "$0")/.."
TCOD_EXTRAS=${TCOD_EXTRAS:-dev,alfworld,triton}
source tools/environment.sh
enter_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
arguments=()
if [[ ${1:-} == --all ]]; then
  shift
  arguments+=(-m "")
fi
ruff check .
echo "+ python -m pytest ${arguments[*]} $*"
exec python -m pytest "${arguments[@]}" "$@"
