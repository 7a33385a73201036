#!/usr/bin/env bash
# Runs a config on the GPUs of this machine, in the background, started again if it fails.
#
#   bash launch/gpu_local.sh --name=x --config=configs/star_gsm8k.py --workdir=runs/x
#
#   --name=NAME      of the job (default: gpu)
#   --gpus=0,1       only these (default: all)
#   --foreground     stays; Ctrl-C or SIGTERM saves
#   --list           the jobs of this machine
#   --logs           follows the log of the job
#   --stop           SIGTERM: it saves, and the same command goes on later
#   --dry-run        prints the commands
#
# --config, --workdir, --config.KEY, --task, --device and --profile go to `qstar train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

name=gpu gpus="" foreground=""
check_values "$@"
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
    --gpus=*) gpus=$value ;;
    --foreground) foreground=yes ;;
    *) launcher_argument "$argument" ;;
    esac
done
do=${do:-run}
need_name "$name"
case $gpus in
*[!0-9,]* | ,* | *, | *,,*) fail "--gpus=$gpus must be numbers with commas between them, e.g. 0,1" ;;
esac

case $do in
run)
    need_value --config "$config" "what to run"
    check_files here "$config"
    [ -n "$dry_run" ] || [ "$(detect_device)" = gpu ] || fail "no GPU is here (nvidia-smi -L lists none); launch/local.sh runs on a CPU"
    command=(.venv/bin/python -m qstar train --device=gpu "${rest[@]}")
    [ -z "$gpus" ] || command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}")
    command=(bash launch/babysit.sh -- "${command[@]}")
    run install_qstar cuda
    if [ -n "$foreground" ] || [ -n "$dry_run" ]; then
        run "${command[@]}"
    else
        start_job "$name" "${command[@]}"
    fi
    ;;
list) if [ -n "$dry_run" ]; then quote ls "$jobs_folder"; else list_jobs; fi ;;
logs) if [ -n "$dry_run" ]; then quote tail -n 200 -F "$jobs_folder/$name.log"; else follow_log "$name"; fi ;;
stop) if [ -n "$dry_run" ]; then quote kill -TERM "$(job_id "$name" || echo "$name")"; else stop_job "$name"; fi ;;
esac
