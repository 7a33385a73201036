#!/usr/bin/env bash
# Runs a command, and runs it again whenever it fails: `qstar train` goes on where it stopped.
#
#   bash launch/babysit.sh -- .venv/bin/python -m qstar train --config=configs/star_gsm8k.py --workdir=runs/x
#   bash launch/babysit.sh -- bash launch/tpu_pod.sh --name=x ... --wait     a pod that is pre-empted is made again
#
#   --failures=5    gives up after so many failures in a row that came
#   --quick=60      within so many seconds of the start
#   --pause=5       seconds before the first restart; doubled after every quick failure, at most 300
#   --dry-run       prints the command
#
# Exit code: the command's. Ends after exit code 0 (done), 2 (a mistake to mend) and 130 (Ctrl-C). SIGTERM and SIGINT to this
# script go on to the command, and nothing is started again after them: 0 if it saved. A run that somebody else told to end
# says so by exit code 75 (QSTAR_STOPPED_CODE), and is started again.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

failures=5 quick=60 pause=5
while [ $# -gt 0 ]; do
    case $1 in
    --failures=*) failures=${1#*=} ;;
    --quick=*) quick=${1#*=} ;;
    --pause=*) pause=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    -h | --help) show_help ;;
    --)
        shift
        break
        ;;
    *) fail "$1 is unknown; the command stands after -- (--help says more)" ;;
    esac
    shift
done
need_number --failures "$failures"
need_number --quick "$quick"
need_number --pause "$pause"
[ "$failures" -ge 1 ] || fail "--failures=$failures must be at least 1"
[ $# -gt 0 ] || fail "no command after --"
if [ -n "$dry_run" ]; then
    run "$@"
    exit 0
fi

export QSTAR_STOPPED_CODE=75
child="" asked=""
pass_on() { # the signal goes to the child, whose end is waited for below
    asked=yes broken=yes
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT # SIGINT too goes on as SIGTERM: what a script starts in the background ignores SIGINT

bad=0
while :; do
    began=$SECONDS code=0 broken=""
    "$@" &
    child=$!
    await "$child" || code=$?
    child=""
    case $code in
    0 | 2 | 130) exit "$code" ;;
    esac
    [ -z "$asked" ] || exit $((code == 75 ? 0 : code))
    if [ $((SECONDS - began)) -lt "$quick" ]; then bad=$((bad + 1)); else bad=0; fi
    if [ "$bad" -ge "$failures" ]; then
        echo "$me: $bad failures in a row within $quick s each, the last with exit code $code: giving up on $(quote "$@")" >&2
        exit "$code"
    fi
    nap=$((bad > 6 ? 300 : pause * (1 << (bad > 0 ? bad - 1 : 0))))
    [ "$nap" -le 300 ] || nap=300
    echo "$me: exit code $code after $((SECONDS - began)) s; starting again in $nap s" >&2
    sleep "$nap" &
    wait $! || true
    [ -z "$asked" ] || exit 143
done
