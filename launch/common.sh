# Sourced by the other scripts: finds a Python, makes .venv once, installs the package with the extras asked for.

find_python() {
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "qstar needs Python 3.11 or newer, and none was found; set PYTHON=/path/to/python3" >&2
    return 2
}

detect_device() { # cpu, gpu or tpu, by what is there
    if [ -e /dev/accel0 ] || [ -n "${TPU_NAME:-}" ]; then
        echo tpu
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo gpu
    else
        echo cpu
    fi
}

install_qstar() { # install_qstar EXTRAS [PACKAGE ...]: into .venv, skipped when nothing has changed since
    local extras=$1 python stamp
    shift
    python=$(find_python) || return 2
    stamp="$(cksum <setup.py) $extras $*"
    if [ "$(cat .venv/.qstar-installed 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    echo "installing qstar${extras:+[$extras]} into .venv ..."
    [ -d .venv ] || "$python" -m venv .venv
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install -q --disable-pip-version-check "$@" -e ".${extras:+[$extras]}"
    echo "$stamp" >.venv/.qstar-installed
}
