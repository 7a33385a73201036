#!/usr/bin/env bash
# Submits launch/slurm.sbatch: a run over several GPU nodes.
#
#   bash launch/slurm.sh --install                                             once: .venv, on a disk that all nodes see
#   bash launch/slurm.sh --name=x --nodes=4 --gpus=8 --config=configs/star_gsm8k.py --workdir=/shared/runs/x
#
#   --name=NAME       of the job (default: qstar)
#   --nodes=N         (default: 2)       --gpus=N   per node, with a process each (default: 8)
#   --time=LIMIT      e.g. 24:00:00; it is queued again until the run has ended
#   --partition=P     --account=A
#   --container=IMAGE image with qstar (launch/Dockerfile, EXTRAS=cuda), run by the pyxis plugin; else .venv of the shared disk
#   --mounts=A:B,...  into the container, beside this folder (the workdir, weights)
#   --sbatch=OPTION   any other option of sbatch, e.g. --sbatch=--exclusive; repeatable
#   --list            your jobs
#   --logs            follows the newest log of the jobs of that name
#   --stop            SIGTERM to its processes: they save and end; the same command goes on later
#   --dry-run         prints the commands
#
# --config, --workdir, --config.KEY, --task, --device and --profile go to `qstar train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

name=qstar nodes=2 gpus=8 time="" container="" mounts="" more=()
check_values "$@"
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
    --nodes=*) nodes=$value ;;
    --gpus=*) gpus=$value ;;
    --time=*) time=$value ;;
    --partition=* | --account=*) more+=("$argument") ;;
    --container=*) container=$value ;;
    --mounts=*) mounts=$value ;;
    --sbatch=*) more+=("$value") ;;
    --install) choose "$argument" ;;
    *) launcher_argument "$argument" ;;
    esac
done
do=${do:-submit}
need_name "$name"
need_number --nodes "$nodes" 1
need_number --gpus "$gpus" 1
[ -z "$mounts" ] || [ -n "$container" ] || fail "--mounts=$mounts is of a --container; without one the nodes' own folders are seen"
[ "$do" = install ] || need_program sbatch "call this where jobs are submitted"
user=${USER:-$(id -un)}

case $do in
install) run install_qstar cuda ;;
submit)
    need_value --config "$config" "what to run"
    need_value --workdir "$workdir" "a folder that all nodes see"
    check_files here "$config"
    command=(sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus")
    [ -z "$time" ] || command+=(--time="$time")
    # The batch script reads them from its environment.
    [ -z "$container" ] || command=(env QSTAR_CONTAINER="$container" QSTAR_MOUNTS="$mounts" "${command[@]}" --export=ALL)
    run "${command[@]}" ${more[@]+"${more[@]}"} launch/slurm.sbatch "${rest[@]}"
    ;;
list) run squeue --user="$user" --format="%.12i %.24j %.4t %.12M %.5D %R" ;;
logs) # of a job that failed, too, which squeue does not know
    log=$name-JOB.log
    [ -n "$dry_run" ] || log=$(find . -maxdepth 1 -regex "\./$name-[0-9]+\.log" -printf '%T@ %f\n' | sort -rn | sed -n '1s/^[^ ]* //p')
    [ -n "$log" ] || fail "there is no log of a job $name in $PWD; --list shows your jobs"
    run tail -n 200 -F "$log"
    ;;
stop)
    id=JOB
    [ -n "$dry_run" ] || id=$(squeue --noheader --user="$user" --name="$name" --format=%i --sort=-i | sed -n 1p)
    [ -n "$id" ] || fail "no job of the name $name is queued or runs; --list shows your jobs"
    run scancel --signal=TERM "$id"
    ;;
esac
