#!/usr/bin/env bash
# Installs qstar into .venv and runs a config on this machine: the arithmetic STaR job, unless another is named.
#
#   bash launch/local.sh                                                       the default job, into runs/star_arithmetic
#   bash launch/local.sh --config=configs/star_gsm8k.py --workdir=runs/gsm8k   any other
#   bash launch/local.sh --device=cpu                                          cpu, gpu or tpu (default: what is there)
#
# --workdir, --config.KEY, --task and --profile go to `qstar train` (its help: qstar train --help). Run again after an interruption, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

device="" config=star_arithmetic
rest=()
check_values "$@"
for argument in "$@"; do
    case $argument in
    --config=*) config=${argument#--config=} ;;
    --device=*) device=${argument#--device=} ;;
    -h | --help) show_help ;;
    *) train_argument "$argument" ;;
    esac
done
check_files here "$config"
device=${device:-$(detect_device)}
case $device in
cpu) extras="" ;;
gpu) extras=cuda ;;
tpu) extras=tpu ;;
*) fail "--device=$device is not cpu, gpu or tpu" ;;
esac
install_qstar "$extras"
exec .venv/bin/python -m qstar train --config="$config" --device="$device" ${rest[@]+"${rest[@]}"}
