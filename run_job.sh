#!/usr/bin/env bash
# Every job by name: `bash run_job.sh JOB [ARGUMENTS ...]`; extra arguments go to the job's script.
# Without a job it lists them. Uses .venv, made from requirements.txt when absent or outdated, or $PYTHON when set.
set -euo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

suits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

set_up() {
    if [ -n "${PYTHON:-}" ]; then return; fi
    local wanted fresh=
    wanted=$(cksum <requirements.txt)
    PYTHON=.venv/bin/python
    if [ -x "$PYTHON" ] && [ "$(cat .venv/requirements.cksum 2>/dev/null)" = "$wanted" ]; then return; fi
    suits python3 ||
        { echo "error: needs Python 3.10 to 3.12 as python3, not $(python3 --version 2>&1)" >&2; exit 2; }
    echo "setting up .venv from requirements.txt (once; a few minutes)"
    suits "$PYTHON" || fresh=--clear
    python3 -m venv $fresh .venv
    "$PYTHON" -m pip install --quiet --requirement requirements.txt
    echo "$wanted" >.venv/requirements.cksum
}

jobs() {
    cat <<'END'
Usage: bash run_job.sh JOB [ARGUMENTS ...]

  demo                  train a small robust net on the shipped digits, evaluate it, draw a picture (about 5 minutes)
  test                  run the tests
  falsify PREFIX        try to break proven certificates of a checkpoint: PGD with restarts, steepest slopes
  bench                 time one training step of every recipe beside a plain step
  bench-proof PREFIX    what a proven certificate of a checkpoint costs beside the published protocol
  table                 put the reports below results/JOB/ beside the paper's values, in the README too

  The paper's training runs (checkpoints and logs go to runs/, see --output_dir) and their evaluations (of
  pretrained/..., see --saved_model; reports go to results/JOB/; --certificate estimate is the paper's protocol,
  both takes one attack for it and the proof):

  mnist-4c3f            evaluate-mnist-4c3f            MNIST, 4C3F, GloRo loss, 300 epochs
  cifar10-4c3f          evaluate-cifar10-4c3f          CIFAR-10, 4C3F, BCP loss, 800 epochs
  cifar10-6c2f          evaluate-cifar10-6c2f          CIFAR-10, 6C2F, BCP loss, 800 epochs
  cifar10-6c2f-gloro    evaluate-cifar10-6c2f-gloro    CIFAR-10, 6C2F, GloRo loss, 800 epochs
  cifar10-6c2f-maxmin   evaluate-cifar10-6c2f-maxmin   CIFAR-10, 6C2F with clipped MaxMin, BCP loss, 800 epochs

  Not of the paper, but on the same nets:

  mnist-4c3f-maxmin     evaluate-mnist-4c3f-maxmin     MNIST, 4C3F with clipped MaxMin, GloRo loss, 300 epochs

  tinyimagenet-data     fetch Tiny ImageNet (237 MB), or unpack the archive that is named
  tinyimagenet-8c2f  evaluate-tinyimagenet-8c2f                Tiny ImageNet, 8C2F, BCP loss, 250 epochs
  tinyimagenet-8c2f-maxmin  evaluate-tinyimagenet-8c2f-maxmin  the same with clipped MaxMin

Tiny ImageNet runs in 4 processes, one per GPU: `PROCESSES=2 bash run_job.sh ...` makes that 2.
Extra arguments go to the script behind the job: `bash run_job.sh mnist-4c3f --scale 0.05 --device cpu`.
END
}

need_prefix() { [ $# -gt 0 ] || { echo "error: '$job' needs the prefix of a checkpoint" >&2; exit 2; }; }

train() { "$PYTHON" "train_$1.py" "${@:2}"; }

launch() { "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="${PROCESSES:-4}" "$@"; }

train_tinyimagenet() {
    launch TinyImagenet/train_tinyimagenet.py --warmup 0 --batch_size 32 --rampup 125 --epochs 250 --sparse 0.01 \
        --indices 0,6,12,14,17 --data tinyimagenet --test_batch_size 32 --epsilon_train 0.16 --lr_scheduler exp "$@"
}

# evaluate JOB DATA MODEL PREFIX [ARGUMENTS ...]; each certificate has a report of its own
evaluate() {
    local certificate=proven batch=256 start=("$PYTHON" evaluate.py)
    if [ "$2" = tinyimagenet ]; then batch=32 start=(launch TinyImagenet/evaluate_tinyimagenet.py); fi
    if [[ " ${*:5} " == *" --certificate"[\ =]"estimate "* ]]; then certificate=estimate; fi
    if [[ " ${*:5} " == *" --certificate"[\ =]"both "* ]]; then certificate=; fi
    "${start[@]}" --data "$2" --model "$3" --test_batch_size "$batch" --test_sniter 2000 \
        --saved_model "pretrained/$4" --out "results/$1/$certificate" "${@:5}"
}

demo() {
    local run=results/demo
    "$PYTHON" train_mnist.py --data digits --width 0.25 --gloro --epsilon 0.5 --epsilon_train 0.6 --epochs 24 \
        --rampup 10 --batch_size 128 --sniter 2 --lr 3e-3 --val_split 500 --output_dir "$run" --prefix digits --overwrite
    "$PYTHON" evaluate.py --data digits --width 0.25 --epsilon 0.5 --saved_model "$run/digits" --out "$run" --overwrite
}

[ $# -gt 0 ] || { jobs; exit 0; }
job=$1
shift
case $job in
    demo)
        [ $# -eq 0 ] || { echo "error: the demo takes no arguments; train_mnist.py and evaluate.py do" >&2; exit 2; }
        set_up; demo ;;
    test) set_up; "$PYTHON" -m pytest "$@" ;;
    falsify) need_prefix "$@"; set_up; "$PYTHON" falsify.py --out results/falsify --saved_model "$@" ;;
    bench) set_up; "$PYTHON" benchmarks/training_step.py "$@" ;;
    bench-proof) need_prefix "$@"; set_up; "$PYTHON" benchmarks/certification.py --saved_model "$@" ;;
    table) set_up; "$PYTHON" -m locallip.evaluation.table "$@" ;;

    # The 4C3F nets start with thresholds at 1, as in the authors' runs, whose code ignored --init (README, deviation 7).
    mnist-4c3f) set_up; train mnist --model relux --sniter 5 --init 1.0 --epsilon_train 1.75 --gloro --no_augmentation \
        --opt_iter 10 --prefix relu/mnist_4C3F "$@" ;;
    mnist-4c3f-maxmin) set_up; train mnist --model c4f3_clmaxmin --orthogonal --global_epochs 300 --sniter 2 --batch_size 64 \
        --epsilon_train 1.75 --gloro --no_augmentation --prefix maxmin/mnist_4C3F_maxmin "$@" ;;
    cifar10-4c3f) set_up; train cifar10 --model relux --sniter 2 --init 1.0 --end_lr 1e-6 --prefix relu/cifar_4C3F "$@" ;;
    cifar10-6c2f) set_up; train cifar10 --model c6f2_relux --sniter 2 --init 2.0 --end_lr 1e-6 \
        --prefix relu/cifar_6C2F "$@" ;;
    cifar10-6c2f-gloro) set_up; train cifar10 --model c6f2_relux --sniter 2 --init 2.0 --end_lr 1e-6 --gloro \
        --prefix relu/cifar_6C2F_gloro "$@" ;;
    cifar10-6c2f-maxmin) set_up; train cifar10 --model c6f2_clmaxmin --sniter 2 --end_lr 1e-6 \
        --prefix maxmin/cifar_6C2F_maxmin "$@" ;;
    tinyimagenet-data) fetch=$PWD/TinyImagenet/data/tinyimagenet.sh; cd "$called_from"; bash "$fetch" "$@" ;;
    tinyimagenet-8c2f) set_up; train_tinyimagenet --model tinyimagenet_relux --sniter 1 --init 1.0 --lr 2.5e-4 \
        --prefix relu/tiny_8C2F "$@" ;;
    tinyimagenet-8c2f-maxmin) set_up; train_tinyimagenet --model tiny_clmaxmin --sniter 3 --lr 1e-4 \
        --prefix maxmin/tiny_8C2F_maxmin "$@" ;;

    evaluate-mnist-4c3f) set_up; evaluate mnist-4c3f mnist relux relu/mnist_4C3F "$@" ;;
    evaluate-mnist-4c3f-maxmin) set_up; evaluate mnist-4c3f-maxmin mnist c4f3_clmaxmin maxmin/mnist_4C3F_maxmin "$@" ;;
    evaluate-cifar10-4c3f) set_up; evaluate cifar10-4c3f cifar10 relux relu/cifar_4C3F "$@" ;;
    evaluate-cifar10-6c2f) set_up; evaluate cifar10-6c2f cifar10 c6f2_relux relu/cifar_6C2F "$@" ;;
    evaluate-cifar10-6c2f-gloro) set_up; evaluate cifar10-6c2f-gloro cifar10 c6f2_relux relu/cifar_6C2F_gloro "$@" ;;
    evaluate-cifar10-6c2f-maxmin) set_up; evaluate cifar10-6c2f-maxmin cifar10 c6f2_clmaxmin \
        maxmin/cifar_6C2F_maxmin "$@" ;;
    evaluate-tinyimagenet-8c2f) set_up; evaluate tinyimagenet-8c2f tinyimagenet tinyimagenet_relux \
        relu/tiny_8C2F "$@" ;;
    evaluate-tinyimagenet-8c2f-maxmin) set_up; evaluate tinyimagenet-8c2f-maxmin tinyimagenet tiny_clmaxmin \
        maxmin/tiny_8C2F_maxmin "$@" ;;

    help | -h | --help) jobs ;;
    *) echo "error: unknown job '$job'; 'bash run_job.sh' lists them" >&2; exit 2 ;;
esac
