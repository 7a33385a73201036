#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on every worker of a pod, in the shipped copy of the code.
#
#   bash launch/worker.sh install NAME [wait]      the code of ~/qstar.tgz, unless NAME runs (wait: ends it), Python 3.11 or newer
#                                                  where there is none, and qstar-jax[tpu] into .venv
#   bash launch/worker.sh start NAME ARGUMENT ...  `qstar train ARGUMENT ...` in the background, started again if it fails
#   bash launch/worker.sh wait NAME ARGUMENT ...   the same in the foreground, once; the exit code is the run's
#   bash launch/worker.sh logs NAME | stop NAME
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

end_left_behind() { # the run whose connection broke
    local id
    id=$(job_id "$name") || return 0
    (stop_job "$name") || {
        echo "killing it" >&2
        pkill -KILL -P "$id" || true # under babysit.sh it is a child
        kill -KILL "$id" || true
    }
}

do=${1:-}
case $do in
install | start | wait | logs | stop)
    need_name "${2:-}"
    name=$2
    shift 2
    ;;
-h | --help) show_help ;;
*) fail "'$do' is none of install, start, wait, logs, stop" ;;
esac
case $do in
install)
    if [ "${1:-}" = wait ]; then end_left_behind; else need_idle "$name"; fi
    tar -xzf ~/qstar.tgz
    bring_python
    install_qstar tpu
    ;;
start) start_job "$name" bash launch/babysit.sh -- .venv/bin/python -m qstar train "$@" ;;
wait)
    mkdir -p "$jobs_folder"
    end_left_behind
    rm -f "$jobs_folder/$name.stopped"
    # Told to end because the machine goes, the run is not done (75); told by --stop, it is. What looks on has to know.
    # -p: tee goes on when the connection is gone, and so does the run, until it is told to save.
    QSTAR_STOPPED_CODE=75 .venv/bin/python -m qstar train "$@" > >(tee -p -a "$jobs_folder/$name.log") 2>&1 &
    note_job "$name" $!
    code=0
    wait $! || code=$?
    [ "$code" -ne 75 ] || [ ! -e "$jobs_folder/$name.stopped" ] || code=0
    exit "$code"
    ;;
logs) follow_log "$name" ;;
stop)
    mkdir -p "$jobs_folder"
    touch "$jobs_folder/$name.stopped"
    stop_job "$name"
    ;;
esac
