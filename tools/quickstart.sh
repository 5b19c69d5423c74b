#!/usr/bin/env bash
# The main job on a CPU, from nothing to a report: `bash tools/quickstart.sh [--engine embedded|sglang]`.
#
# Makes an environment, a tokenizer and two small Qwen3 configurations; trains a teacher by SFT on the household expert;
# warm-starts a student; trains it with vanilla OPD, F2B and, on demonstrations that it collects from the teacher, B2F,
# all under tensor parallelism; evaluates all on held-out tasks; writes one report.html. Interrupted, it goes on where it was.
#
# With --engine sglang a real SGLang server plays the three runs and the teacher's demonstrations, into runs/quickstart/sglang.
#
#   QUICKSTART_STEPS    optimizer steps of each of the three runs (default: the TOML's)
#   PYTHON, TCOD_VENV   see tools/environment.sh
set -euo pipefail
cd "$(dirname "$0")/.."
engine=embedded
[[ ${1:-} != --engine ]] || { engine=${2:-}; shift $(($# > 1 ? 2 : 1)); }
[[ $# -eq 0 && $engine =~ ^(embedded|sglang)$ ]] || {
  echo "error: expected nothing, --engine embedded or --engine sglang; got --engine '$engine' $*" >&2
  exit 2
}
TCOD_EXTRAS=${TCOD_EXTRAS:-dev}
source tools/environment.sh
enter_environment
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONWARNINGS=${PYTHONWARNINGS:-ignore}

run=runs/quickstart out=runs/quickstart settings=()
if [[ $engine == sglang ]]; then
  bash tools/sglang_cpu_env.sh
  out=$run/sglang settings=(--config examples/quickstart/sglang_cpu.toml)
fi
examples=examples/quickstart
started=$SECONDS

say() { printf '\n== %s (%d s)\n' "$*" "$((SECONDS - started))"; }

launch() { # entry point, arguments: two processes on this machine; a finished run has nothing left to do
  echo "+ torchrun --standalone --nproc-per-node 2 -m $*"
  torchrun --standalone --nproc-per-node 2 -m "$@"
}

newest() { # the newest checkpoint of a run
  echo "$1/checkpoints/$(cat "$1/checkpoints/latest")"
}

keep() { # from, to: a finished model under a name that does not change
  [[ -d $2 ]] || { rm -rf "$2.partial" && cp -r "$(newest "$1")" "$2.partial" && mv "$2.partial" "$2"; }
}

[[ -d $run/models/student && -d $run/models/teacher ]] || {
  say "tokenizer and model configurations"
  python $examples/prepare.py --output $run/models
}

[[ -d $run/teacher-final ]] || {
  say "teacher: SFT on the expert"
  launch megatron_tcod.train --config $examples/teacher.toml
  keep $run/teacher $run/teacher-final
}

[[ -d $run/start ]] || {
  say "student: warm start by SFT on the expert"
  launch megatron_tcod.train --config $examples/warmstart.toml
  keep $run/warmstart $run/start
}

distil() { # curriculum, further arguments
  local curriculum=$1
  shift
  say "student: on-policy distillation, curriculum $curriculum"
  launch megatron_tcod.train --config $examples/distill.toml "${settings[@]}" --curriculum "$curriculum" --save "$out/$curriculum" \
    ${QUICKSTART_STEPS:+--train-iters "$QUICKSTART_STEPS"} "$@"
}

distil full
distil f2b

[[ -f $out/demonstrations.jsonl ]] || {
  say "demonstrations: the teacher's own successes"
  launch megatron_tcod.demonstrate --config $examples/distill.toml "${settings[@]}" --save $out/demonstrate \
    --demonstrations $out/demonstrations.jsonl
}

distil b2f --demonstrations $out/demonstrations.jsonl

evaluate() { # configuration, model: those that were trained by SFT
  [[ -f $run/$2.json ]] || launch megatron_tcod.evaluate --config "$examples/$1.toml" --student "$run/$2" --output "$run/$2.json"
}

say "evaluation of the teacher and of the start"
evaluate teacher teacher-final
evaluate warmstart start

say "report"
python -m megatron_tcod.report $out/full $out/f2b $out/b2f --output $out/report.html \
  --title "TCOD quickstart: one student, three curricula"
python -m megatron_tcod.evaluate --compare $run/teacher-final.json $run/start.json \
  "$(ls $out/full/evaluation/*.json | tail -1)" "$(ls $out/f2b/evaluation/*.json | tail -1)" \
  "$(ls $out/b2f/evaluation/*.json | tail -1)"
say "done: open $out/report.html"
