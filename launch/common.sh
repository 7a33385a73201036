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

bring_python() { # for the images of clouds: those of TPU VMs come with Python 3.10
    PYTHON=$(find_python 2>/dev/null) || {
        python3 -m pip install -q --user uv
        python3 -m uv python install -q 3.12
        PYTHON=$(python3 -m uv python find 3.12)
    }
    export PYTHON
}

detect_device() { # cpu, gpu or tpu, by what is there
    if [ -e /dev/accel0 ] || [ -n "${TPU_NAME:-}" ]; then
        echo tpu
    elif [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then # not through grep -q, which ends a long list by SIGPIPE
        echo gpu
    elif compgen -G "/dev/vfio/[0-9]*" >/dev/null; then # TPUs from v5p on; behind GPUs, which a host may keep there for its guests
        echo tpu
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
    # A folder may be of an installation that was cut off before pip came, or of uv, which brings none: what is there is kept.
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
    # shellcheck disable=SC2086
    .venv/bin/python -m pip install -q --disable-pip-version-check "$@" -e ".${extras:+[$extras]}"
    echo "$stamp" >.venv/.qstar-installed
}

# --------------------------------------------------------------------- for the launchers of pods, clusters and GPUs

me="launch/$(basename "$0")"
dry_run=${dry_run:-}
do="" name="" zone=${ZONE:-} project=${PROJECT:-} config="" workdir="" setup="" wait="" worker=0 through=() rest=() # what flags set
HOME=${HOME:-~} # some containers and services have none

fail() { # one line, exit code 2: something the user can mend
    echo "$me: $*" >&2
    exit 2
}

give_up() { # one line, exit code 1: something that another try may find mended
    echo "$me: $*" >&2
    exit 1
}

show_help() { # the comment at the head of the script
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$(dirname "${BASH_SOURCE[0]}")/$(basename "$0")"
    exit 0
}

quote() { # quote WORD ...: one line that any POSIX shell splits into these very words again
    local word line="" escaped="'\\''"
    for word in "$@"; do
        case $word in
        "" | *[!A-Za-z0-9_./:=,@%+-]*) word=\'${word//\'/"$escaped"}\' ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

run() { # runs a command, or prints it under --dry-run
    if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

need_program() { # need_program NAME HOW_TO_GET_IT
    [ -n "$dry_run" ] || command -v "$1" >/dev/null 2>&1 || fail "$1 is not installed; $2"
}

need_value() { # need_value --flag VALUE WHAT
    [ -n "$2" ] || fail "$1=... is missing ($3)"
}

need_name() { # names of jobs become names of files and of cloud resources
    case $1 in
    "" | *[!a-z0-9-]* | [!a-z]* | *-) fail "--name=$1 must be of a-z, 0-9 and -, begin with a letter and not end with -" ;;
    esac
}

need_number() { # need_number --flag VALUE [LEAST]
    case $2 in
    # Bash reads 08 as octal, and more than 18 digits as anything.
    "" | *[!0-9]* | 0?* | ??????????*) fail "$1=$2 is not a whole number below 10^9 (without zeros in front)" ;;
    esac
    [ "$2" -ge "${3:-0}" ] || fail "$1=$2 must be at least $3"
}

check_values() { # check_values ARGUMENT ...: an unset variable leaves a flag without a value; texts of a config may be empty
    local argument
    for argument in "$@"; do
        case $argument in
        --config.* | [!-]*) ;;
        "${argument%%=*}=") fail "$argument has no value; give one, or leave the flag out" ;;
        esac
    done
}

choose() { # choose --ACTION: sets do, what is done instead of the whole
    [ -z "$do" ] || [ "--$do" = "$1" ] || fail "--$do and $1 exclude each other"
    do=${1#--}
}

launcher_argument() { # launcher_argument WORD: a flag that all launchers of pods, clusters and GPUs know, or one of `qstar train`
    case $1 in
    --name=*) name=${1#*=} ;;
    --list | --logs | --stop) choose "$1" ;;
    --dry-run) dry_run=yes ;;
    -h | --help) show_help ;;
    --config=*) config=${1#*=} rest+=("$1") ;;
    --workdir=*) workdir=${1#*=} rest+=("$1") ;;
    *) train_argument "$1" ;;
    esac
}

# What goes on to `qstar train` is looked at here, before anything is created, shipped or installed.

train_argument() { # train_argument WORD: adds it to rest, if `qstar train` knows such a flag
    case $1 in
    --config=* | --workdir=* | --device=* | --profile=* | --memory=* | --task=* | --task-options=* | --config.?*) ;;
    --*) fail "${1%%=*} is unknown; --help lists the flags, and qstar train has --config.KEY=VALUE, --task, --device and --profile" ;;
    *)
        case ${rest[*]: -1} in
        --config.*=*) fail "'$1' is no flag; flags are written --name=value" ;;
        --config.*) ;; # --config.KEY VALUE, which may be negative
        *) fail "'$1' is no flag; flags are written --name=value" ;;
        esac
        ;;
    esac
    rest+=("$1")
}

check_path() { # check_path here | shipped | image ARGUMENT PATH folder | file ...: whether what an argument names is there
    local where=$1 path=$3 full=${3/#\~/$HOME} found=""
    case $4 in
    folder) [ ! -d "$full" ] || found=yes ;;
    file) [ ! -f "$full" ] || found=yes ;;
    *) [ ! -e "$full" ] || found=yes ;;
    esac
    case $path in
    /* | \~*) # a disk of the machines that run it; here it can be looked for only where they share it
        [ "$where" != here ] || [ -n "$dry_run$found" ] || fail "$2: no such $4"
        ;;
    *)
        [ -n "$found" ] || fail "$2: no such $4 in $PWD; name the full path of one that every machine sees"
        [ "$where" != shipped ] || [ -n "$(git --literal-pathspecs ls-files --cached --others --exclude-standard -- "$path" 2>/dev/null)" ] ||
            fail "$2: git ignores that $4, so it is not shipped; name the full path of one that all workers see"
        ;;
    esac
}

on_hub() { # on_hub NAME: owner/name[:config] or owner/name[@revision], which every host downloads
    local name='[A-Za-z0-9_-][A-Za-z0-9_.-]*'
    case $1 in *.jsonl | *.json | *.parquet | *.csv | *.tsv | *.txt | *.gz | *.zst | *.zip | *.arrow) return 1 ;; esac
    [ ! -e "$1" ] && [[ $1 =~ ^$name/$name([:@].+)?$ ]]
}

check_files() { # check_files here | shipped | image CONFIG: whether the config and the files that it names are there
    local where=$1 config=$2 file=${2%%:*} part last="" value kind parts=()
    [ -f "configs/$file.py" ] || check_path "$where" "--config=$file" "$file" file
    case $config in *:*) IFS=, read -ra parts <<<"${config#*:}" ;; esac
    for part in ${parts[@]+"${parts[@]}"} ${rest[@]+"${rest[@]}"}; do
        [ "$last" != --config.model.path ] || part=$last=$part
        last=$part value=${part#*=}
        case $part in
        *= | *=*://*) continue ;;
        model=* | small=* | large=* | teacher=* | --config.model.path=*)
            if [ "$value" = random-tiny ] || on_hub "$value"; then continue; fi
            kind=folder
            ;;
        prompts=*) kind=folder ;;
        data=* | train=* | test=*)
            if [[ $value == built-in:* ]] || on_hub "$value"; then continue; fi
            kind="file or folder"
            ;;
        --task=*.py:*) value=${value%%:*} kind="file" ;;
        *) continue ;;
        esac
        check_path "$where" "$part" "$value" "$kind"
    done
}

check_workdir() { # check_workdir WORKDIR HOW_IT_IS_MOUNTED: of machines that have no disk in common by themselves
    need_value --workdir "$1" "a folder that all workers see"
    case $1 in
    gs://?* | /* | \~/*) ;;
    *://*) fail "--workdir=$1 is no folder; name one in a bucket (gs://...) or on a disk that all workers mount ($2)" ;;
    *) fail "--workdir=$1 is a folder of each worker alone; name the full path of a disk that all of them see ($2)" ;;
    esac
}

pack_code() { # pack_code FILE: a tar of what git knows and what it does not ignore: code, and no keys, weights or runs
    local file
    git rev-parse --is-inside-work-tree >/dev/null 2>&1 || fail "$PWD is no git checkout: what is to be shipped is what git knows"
    [ -z "$dry_run" ] || return 0
    git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -e "$file" ] || printf '%s\0' "$file"
    done | tar --null -czf "$1" -T -
}

# For the launchers of pods, which define parts (names of what ssh reaches: nodes or VMs), reach PART COMMAND, copy_code FILE,
# check_machines, create, delete, list and logs:

pod_argument() { # pod_argument WORD
    case $1 in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --iap) through+=(--tunnel-through-iap) ;;
    --setup=*) setup=${1#*=} ;;
    --wait) wait="wait" ;;
    --create | --ship | --delete) choose "$1" ;;
    --logs=*)
        choose --logs
        worker=${1#*=}
        ;;
    *) launcher_argument "$1" ;;
    esac
}

check_pod() { # what was given; sets place
    do=${do:-all}
    need_value --zone "$zone" "e.g. us-east5-b, or the variable ZONE"
    [ "$do" = list ] || need_name "$name"
    need_number --logs "$worker"
    case $do in create | ship) [ -z "$setup$wait" ] || fail "--setup and --wait are of a run, which --$do does not start" ;; esac
    need_program gcloud "https://cloud.google.com/sdk/docs/install says how"
    place=(--zone="$zone")
    [ -z "$project" ] || place+=(--project="$project")
}

there() { # there COMMAND ...: what it says of a resource, and whether there is one; a dry run finds none
    local said
    [ -z "$dry_run" ] || return 1
    { said=$("$@" 2>&1 >&3) && return; } 3>&1
    # An expired login must not be taken for a resource that is not there.
    case $said in *"not found"* | *NOT_FOUND*) return 1 ;; esac
    give_up "$said"
}

act() { # a line each: bash would not end at an error inside A && B
    case $do in
    all)
        need_value --config "$config" "what to run"
        check_workdir "$workdir" "--setup=COMMAND mounts it"
        check_files shipped "$config"
        check_machines
        create
        ship
        start
        ;;
    create)
        check_machines
        create
        ;;
    ship) ship ;;
    list) list ;;
    logs) logs ;;
    stop) on_workers "bash ~/qstar/launch/worker.sh stop $name" ;;
    delete) delete ;;
    esac
}

broken="" # set by a trap

await() { # await PID: its exit code; a signal breaks the wait, not the process
    local code=0 again
    wait "$1" || code=$?
    while [ -n "$broken" ]; do
        broken="" again=0
        wait "$1" || again=$?
        [ "$again" -eq 127 ] || code=$again
    done
    return "$code"
}

on_workers() { # on_workers COMMAND: in the shell of every worker at once; the exit code is the first that is not 0
    local part all jobs=() job code=0 found
    all=$(parts) || exit 1 # $(parts) does not end at an error by itself
    for part in $all; do
        reach "$part" "$1" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do await "$job" || { found=$?; [ "$code" -ne 0 ] || code=$found; }; done
    return "$code"
}

ship() {
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    pack_code "$packed/qstar.tgz"
    copy_code "$packed/qstar.tgz"
    # The scripts alone: install looks whether a run is there before it puts the rest in its place.
    on_workers "mkdir -p ~/qstar && tar -xzf ~/qstar.tgz -C ~/qstar launch && bash ~/qstar/launch/worker.sh install $name${wait:+ $wait}"
}

stop_workers() { # a second signal ends this script alone
    trap - TERM INT
    (on_workers "bash ~/qstar/launch/worker.sh stop $name") || true
    broken=yes
}

start() { # the words pass two shells: that of each worker reads one line
    local before=""
    # In lines of its own, --setup may end in a comment or a semicolon.
    [ -z "$setup" ] || before="{ $setup"$'\n'"} && "
    [ -z "$wait" ] || trap stop_workers TERM INT # the run would go on, and cost
    on_workers "${before}bash ~/qstar/launch/worker.sh $(quote "${wait:-start}" "$name" "${rest[@]}")"
}

chips_of() { # chips_of TOPOLOGY: 4x4 -> 16
    local all=1 side
    case $1 in
    "" | *[!0-9x]* | x* | *x | *xx* | 0* | *x0* | *x*x*x* | *[0-9][0-9][0-9][0-9][0-9]*) fail "--topology=$1 must be like 4x4 or 2x2x4" ;;
    esac
    for side in ${1//x/ }; do all=$((all * side)); done
    echo "$all"
}

# Jobs of this machine: a process group each, with a log and the id of its leader in one folder.

jobs_folder=${QSTAR_JOBS:-$HOME/.qstar/jobs}

began() { # began PID: when that process began; nothing if it has ended
    local line fields
    if [ ! -e /proc/self/stat ]; then
        ps -o lstart= -p "$1" || true
    elif line=$(cat "/proc/$1/stat" 2>/dev/null); then
        read -ra fields <<<"${line##*) }" # the name before may hold spaces and brackets
        [ "${fields[0]}" = Z ] || echo "${fields[19]}"
    fi
}

note_job() { # note_job NAME PID
    echo "$2 $(began "$2")" >"$jobs_folder/$1.pid"
}

job_id() { # job_id NAME: of its process, if that runs
    local id since
    { read -r id since <"$jobs_folder/$1.pid"; } 2>/dev/null || return 1
    # Numbers of processes that ended are given to others.
    if [ -n "$since" ] && [ "$(began "$id")" = "$since" ]; then
        echo "$id"
    else
        rm -f "$jobs_folder/$1.pid"
        return 1
    fi
}

need_idle() { # need_idle NAME
    ! job_id "$1" >/dev/null || fail "job $1 runs already (log: $jobs_folder/$1.log); --stop it first"
}

start_job() { # start_job NAME COMMAND ...: in the background; it outlives the terminal
    local name=$1
    shift
    need_idle "$name"
    mkdir -p "$jobs_folder"
    nohup "$@" >>"$jobs_folder/$name.log" 2>&1 </dev/null &
    note_job "$name" $!
    echo "job $name runs, log: $jobs_folder/$name.log"
}

stop_job() { # stop_job NAME: SIGTERM, which saves; waits for the end
    local id left=${QSTAR_STOP_SECONDS:-240}
    need_number QSTAR_STOP_SECONDS "$left"
    left=$((left + 30))
    id=$(job_id "$1") || { echo "job $1 does not run"; return; }
    kill -TERM "$id" 2>/dev/null || true # it may end this very moment
    while job_id "$1" >/dev/null; do
        [ "$left" -gt 0 ] || give_up "job $1 (process $id) has not ended; kill -9 $id ends it without saving"
        left=$((left - 1))
        sleep 1
    done
    echo "job $1 stopped"
}

list_jobs() {
    local file name state
    for file in "$jobs_folder"/*.log; do
        [ -e "$file" ] || continue
        name=$(basename "$file" .log)
        if job_id "$name" >/dev/null; then state=running; else state=ended; fi
        printf '%-8s %s %s\n' "$state" "$name" "$file"
    done
}

follow_log() { # follow_log NAME
    [ -e "$jobs_folder/$1.log" ] || fail "there is no log of job $1 in $jobs_folder; --list shows the jobs"
    exec tail -n 200 -F "$jobs_folder/$1.log"
}
