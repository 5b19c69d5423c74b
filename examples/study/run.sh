#!/usr/bin/env bash
# The study from a clean clone: `bash examples/study/run.sh --quick|--full|--grid FILE [...]`, run.py's arguments.
# Creates the environment where there is none; PYTHON and TCOD_VENV as in tools/environment.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
TCOD_EXTRAS=${TCOD_EXTRAS:-dev,alfworld,triton}
source tools/environment.sh
enter_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}
exec python examples/study/run.py "$@"
