#!/usr/bin/env bash
# Measures this machine's GPU and prints one table (sized for ten minutes, never timed on one): MFU of a 1B update at 2,048 tokens, decoding at
# batches of 128 and 256 as a share of the bandwidth, a Quiet-STaR update as a share of its needed FLOPs, and how far
# attention by cuDNN and by tiles is from XLA's. Beside transformers, where PyTorch finds the GPU.
#
#   bash launch/gpu_check.sh
#
#   --quick          toy sizes: whether it runs
#   --python=PYTHON  an interpreter that has jax and the other packages, instead of .venv (a machine without network)
#   --dry-run        prints the commands
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

python="" quick=()
check_values "$@"
for argument in "$@"; do
    case $argument in
    --quick) quick=(--quick) ;;
    --python=*) python=${argument#*=} ;;
    --dry-run) dry_run=yes ;;
    -h | --help) show_help ;;
    *) fail "$argument is unknown; see --help" ;;
    esac
done
[ -n "$dry_run" ] || [ "$(detect_device)" = gpu ] || fail "no GPU is here (nvidia-smi -L lists none)"
if [ -z "$python" ]; then
    run install_qstar cuda
    python=.venv/bin/python
fi
run env "PYTHONPATH=$PWD" "$python" -m qstar bench accelerator --device=gpu ${quick[@]+"${quick[@]}"}
