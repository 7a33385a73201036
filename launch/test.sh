#!/usr/bin/env bash
# Installs what the tests need and runs all of them: those of 8 simulated devices in a process of their own.
#
#   bash launch/test.sh                  everything
#   bash launch/test.sh --fast           unit tests of all packages alone, without those that train or compile whole models
#   bash launch/test.sh -k name --lf     arguments go to pytest, but not to that of the 8 devices
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

fast=""
case ${1:-} in
-h | --help) show_help ;;
--fast)
    fast=yes
    shift
    set -- -m "not slow" "$@"
    ;;
esac
# torch is pinned to a release whose CPU build is easy to come by; it is the reference of the tests, nothing else.
python=$(find_python)
torch=$("$python" -c 'import sys; print("torch==2.13.0" if sys.version_info < (3, 12) else "torch")')
install_qstar "test,notebooks" "$torch"
export JAX_PLATFORMS=cpu TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
code=0
.venv/bin/python -m pytest --ignore=tests/multi_device -n 2 --dist loadfile --no-loadscope-reorder "$@" || code=$?  # two workers, file by file
[ -z "$fast" ] || exit $code
# Sums over devices are compared to 1e-5, so these programs are compiled with optimisation (tests/conftest.py turns it off elsewhere).
XLA_FLAGS="--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1" .venv/bin/python -m pytest tests/multi_device -n 2 --dist loadfile || code=$?
exit $code
