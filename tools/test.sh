#!/usr/bin/env bash
# Run the tests: `bash tools/test.sh [--all] [pytest arguments]`. Creates the environment where there is none.
# Without --all, tests marked slow, gpu, multigpu and sglang are left out; with it, those whose needs are met run too.
# TCOD_TEST_WORKERS files run side by side, 2 by default; 0 runs all in one process, which a debugger wants.
set -euo pipefail
cd "$(dirname "$0")/.."
TCOD_EXTRAS=${TCOD_EXTRAS:-dev,alfworld,scienceworld,triton}
source tools/environment.sh
enter_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
arguments=(-n "${TCOD_TEST_WORKERS:-2}" --dist loadfile)
if [[ ${1:-} == --all ]]; then
  shift
  arguments+=(-m "")
fi
ruff check .
echo "+ python -m pytest ${arguments[*]} $*"
exec python -m pytest "${arguments[@]}" "$@"
