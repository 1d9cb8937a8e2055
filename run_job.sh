#!/usr/bin/env bash
# Every job by name: `bash run_job.sh JOB [ARGUMENTS ...]`; extra arguments go to the job's script.
# Without a job it lists them. Uses .venv, made from requirements.txt when absent or outdated, or $PYTHON when set.
set -euo pipefail
if [[ ${PYTHON:-} = '~/'* ]]; then PYTHON=$HOME${PYTHON:1}; fi
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# set_up [FOLDER REQUIREMENTS]: PYTHON is that of an environment with these packages; one that is named already stays.
set_up() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || { echo "error: PYTHON=$PYTHON is no program" >&2; exit 2; }
        return
    fi
    local folder=${1:-.venv} requirements=${2:-requirements.txt} wanted fresh=
    wanted=$(cksum <"$requirements")
    PYTHON=$folder/bin/python
    if [ -x "$PYTHON" ] && [ "$(cat "$folder/requirements.cksum" 2>/dev/null)" = "$wanted" ]; then return; fi
    suits python3 ||
        { echo "error: needs Python 3.10 to 3.12 as python3, not $(python3 --version 2>&1)" >&2; exit 2; }
    echo "setting up $folder from $requirements (once; a few minutes)"
    suits "$PYTHON" || fresh=--clear
    python3 -m venv $fresh "$folder"
    "$PYTHON" -m pip install --quiet --requirement "$requirements"
    echo "$wanted" >"$folder/requirements.cksum"
}

list_jobs() {
    cat <<END
Usage: bash run_job.sh JOB [ARGUMENTS ...]

  demo                  train a small robust net on the shipped digits, evaluate it, draw pictures (5 to 7 minutes)
  reproduce JOB         a row of the table from end to end; --minutes N shortens it to what fits that time here
  test                  run the tests
  test-oldest           the same with the oldest supported packages, in an environment of their own
  falsify PREFIX        try to break proven certificates of a checkpoint: many attacks on margins and slopes
  bench                 time one training step of every recipe beside a plain step
  bench-proof [PREFIX]  what a proof of a checkpoint, or of all committed ones, costs beside the published protocol
  bench-rivals          the dual beside CROWN and alpha-CROWN on a plainly trained network, in an environment of its own
  table                 put the reports below results/JOB/ beside the paper's values, in the README too
  tinyimagenet-data     fetch Tiny ImageNet (237 MB), or unpack the archive that is named

  Training runs, the paper's first (checkpoints and logs go to runs/, see --output_dir), and their evaluations
  (of pretrained/..., see --saved_model; reports go to results/JOB/; --certificate estimate is the paper's protocol,
  both takes one attack for it and the proof):

$(recipes)

Tiny ImageNet runs in 4 processes, one per GPU: \`PROCESSES=2 bash run_job.sh ...\` makes that 2.
Extra arguments go to the script behind the job: \`bash run_job.sh mnist-4c3f --scale 0.05 --device cpu\`.
END
}

need_prefix() { [[ ${1:--} != -* ]] || { echo "error: '$job' needs the prefix of a checkpoint" >&2; exit 2; }; }

# A run is a record in runs.py, which needs no packages: any python3 reads it, before there is a .venv.
recipes() { "$(command -v python3 || echo "${PYTHON:-python3}")" runs.py "$@"; }

run_recipe() {
    local line
    line=$(recipes command "$job" "$@")
    set_up
    eval "exec \"\$PYTHON\" $line"
}

demo() {
    local run=results/demo
    "$PYTHON" train_mnist.py --data digits --width 0.25 --gloro --epsilon 0.5 --epsilon_train 0.6 --epochs 24 \
        --rampup 10 --batch_size 128 --sniter 2 --lr 3e-3 --val_split 500 --output_dir "$run" --prefix digits --overwrite
    "$PYTHON" evaluate.py --data digits --width 0.25 --epsilon 0.5 --saved_model "$run/digits" --out "$run" --overwrite
}

[ $# -gt 0 ] || { list_jobs; exit 0; }
job=$1
shift
case $job in
    demo)
        [ $# -eq 0 ] || { echo "error: the demo takes no arguments; train_mnist.py and evaluate.py do" >&2; exit 2; }
        set_up; demo ;;
    test) set_up; exec "$PYTHON" -m pytest "$@" ;;
    test-oldest) unset PYTHON; set_up .venv-oldest requirements-oldest.txt; exec "$PYTHON" -m pytest "$@" ;;
    falsify) need_prefix "$@"; set_up; exec "$PYTHON" falsify.py --out results/falsify --saved_model "$@" ;;
    reproduce) set_up; exec "$PYTHON" reproduce.py "$@" ;;
    bench) set_up; exec "$PYTHON" benchmarks/training_step.py "$@" ;;
    bench-proof)
        set_up
        if [[ ${1:--} != -* ]]; then set -- --saved_model "$@"; fi
        exec "$PYTHON" benchmarks/certification.py "$@" ;;
    bench-rivals)
        if [ -z "${PYTHON:-}" ]; then
            set_up .venv-rivals benchmarks/requirements-rivals.txt
            "$PYTHON" -m pip install --quiet --no-deps auto_LiRPA==0.3
        fi
        exec "$PYTHON" benchmarks/rivals.py "$@" ;;
    table) set_up; exec "$PYTHON" table.py "$@" ;;
    tinyimagenet-data) fetch=$PWD/TinyImagenet/data/tinyimagenet.sh; cd "$called_from"; bash "$fetch" "$@" ;;
    help | -h | --help) list_jobs ;;
    *) run_recipe "$@" ;;
esac
