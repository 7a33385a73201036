#!/usr/bin/env bash
# From nothing to a run on every worker of a TPU slice (or of several), through Cloud TPU queued resources.
#
#   bash launch/tpu_pod.sh --name=x --type=v6e-16 --zone=us-east5-b --project=P --config=configs/star_gsm8k.py --workdir=/mnt/runs/x
#
# asks for the machines and waits for them, copies the files git knows, installs, and starts `qstar train` on all workers with
# its flags (--config, --workdir, --config.KEY, --task, --device, --profile). Called again it goes on: machines that are there are
# used, those that were pre-empted made again.
#
#   --name=NAME --zone=ZONE --project=PROJECT    of the queued resource (zone and project: else ZONE and PROJECT, the variables)
#   --type=TYPE          accelerator type: v4-8, v5litepod-16, v5p-32, v6e-16, ...
#   --slices=N           more than one: multislice (default 1); --ship, --logs and --stop have to know it, too
#   --spot | --reserved | --flex-start=4h    cheaper and pre-emptible | from your reservation | queued for so long a run
#   --network=N --subnetwork=N --internal-ips --service-account=EMAIL --labels=K=V,... --tags=T,...    of the machines
#   --runtime=VERSION    image of the TPU VMs (default: by type)
#   --iap                connects through Identity-Aware Proxy: TPU VMs of --internal-ips, from outside of their network
#   --setup=COMMAND      on every worker, before the start: mounts the disk that holds the workdir, exports keys, ...
#   --create, --ship     only that: machines | code
#   --wait               stays until the run ends, with its exit code (under launch/babysit.sh: survives pre-emption); a signal
#                        to this script stops the run
#   --list               the queued resources of the zone
#   --logs[=WORKER]      follows the log of a worker (default 0)
#   --stop               SIGTERM to the run on all workers: it saves; the machines stay (and cost)
#   --delete             gives the machines back
#   --dry-run            prints the commands
#
# To copy to several workers gcloud wants its key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
# The workdir is a folder that all workers see (gs://BUCKET/NAME, or a Filestore share that --setup mounts, say): stages meet there.
# Google has ended the development of this API: for TPU7x, and by its advice for new work, see launch/tpu_compute.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

type="" runtime="" capacity=() slices=1 flex="" more=()
check_values "$@"
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
    --type=*) type=$value ;;
    --runtime=*) runtime=$value ;;
    --slices=*) slices=$value ;;
    --spot | --reserved) capacity+=("$argument") ;;
    --flex-start=*) flex=$value capacity+=("$argument") ;;
    --network=* | --subnetwork=* | --internal-ips | --service-account=* | --labels=* | --tags=*) more+=("$argument") ;;
    *) pod_argument "$argument" ;;
    esac
done
check_pod
need_number --slices "$slices" 1
[ ${#capacity[@]} -le 1 ] || fail "only one of --spot, --reserved and --flex-start can be given"
queued=(gcloud compute tpus queued-resources)
# Not ssh and scp of queued-resources: these exit with 0 where a node is gone, and take the workers in batches of 64, the second
# when the first has ended. Those of tpu-vm take all at once; the alpha command alone goes through IAP (its --batch-size is all).
tpu_vm=(gcloud ${through[@]+alpha} compute tpus tpu-vm)

check_machines() {
    need_value --type "$type" "e.g. v6e-16"
    [ -n "$runtime" ] || case $type in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) fail "--runtime=... is missing: no image is known for --type=$type" ;;
    esac
}

parts() { # the nodes: one per slice
    if [ "$slices" -eq 1 ]; then echo "$name"; else seq -f "$name-%.0f" 0 $((slices - 1)); fi
}

reach() { run "${tpu_vm[@]}" ssh "$1" "${place[@]}" ${through[@]+"${through[@]}"} --worker="${3:-all}" --command="$2"; }

state() { # of the queued resource; nothing if there is none
    there "${queued[@]}" describe "$name" "${place[@]}" --format="value(state.state)" || true
}

delete() { run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet; }

create() {
    local now command left=${QSTAR_PATIENCE:-86400} pause=${QSTAR_POLL_SECONDS:-30}
    need_number QSTAR_PATIENCE "$left"
    need_number QSTAR_POLL_SECONDS "$pause"
    # Flex-start is of the alpha command alone.
    command=(gcloud ${flex:+alpha} "${queued[@]:1}" create "$name" "${place[@]}" --accelerator-type="$type" --runtime-version="$runtime")
    if [ "$slices" -gt 1 ]; then
        command+=(--node-count="$slices" --node-prefix="$name")
    else
        command+=(--node-id="$name")
    fi
    [ -z "$flex" ] || capacity=(--provisioning-model=flex-start --max-run-duration="$flex")
    command+=(${capacity[@]+"${capacity[@]}"} ${more[@]+"${more[@]}"})
    if [ -n "$dry_run" ]; then
        quote "${command[@]}"
        return
    fi
    now=$(state) || exit 1
    case $now in
    FAILED | SUSPENDING | SUSPENDED | DELETING) # pre-empted, or never granted: its machines are gone for good
        echo "$name is $now: asking for new machines"
        delete
        now=""
        ;;
    esac
    [ -n "$now" ] || "${command[@]}"
    while :; do
        now=$(state) || exit 1
        case $now in
        ACTIVE) return ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING | "") give_up "$name is ${now:-gone}; call again to ask for new machines" ;;
        esac
        [ "$left" -gt 0 ] || give_up "$name is still $now; call again to go on waiting, or --delete it"
        echo "$name is $now; looking again in $pause s"
        sleep "$pause"
        left=$((left - pause))
    done
}

copy_code() { # a node after the other: the first call may have to make the key of ssh
    local node
    for node in $(parts); do run "${tpu_vm[@]}" scp "$1" "$node:qstar.tgz" "${place[@]}" ${through[@]+"${through[@]}"} --worker=all; done
}

list() { run "${queued[@]}" list "${place[@]}"; }

logs() {
    local nodes
    nodes=$(parts)
    reach "${nodes%%$'\n'*}" "bash ~/qstar/launch/worker.sh logs $name" "$worker"
}

act
