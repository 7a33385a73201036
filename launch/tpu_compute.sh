#!/usr/bin/env bash
# From nothing to a run on every VM of a TPU slice, through Compute Engine: a workload policy, an instance template and a
# managed instance group. Google's way for new work, and the only one beside GKE for TPU7x.
#
#   bash launch/tpu_compute.sh --name=x --machine=ct6e-standard-4t --topology=4x4 --zone=us-east5-b --project=P \
#       --config=configs/star_gsm8k.py --workdir=/mnt/runs/x
#
# makes the slice, copies the files git knows, installs, and starts `qstar train` on all VMs with its flags (--config,
# --workdir, --config.KEY, --task, --device, --profile). Called again it goes on: a slice whose VMs all run is used, another made again.
#
#   --name=NAME --zone=ZONE --project=PROJECT    (zone and project: else ZONE and PROJECT, the variables)
#   --machine=TYPE       ct5p-hightpu-4t (v5p), ct6e-standard-4t (v6e), tpu7x-standard-4t, ...
#   --topology=AxB[xC]   chips of the slice; VMs are as many as chips / chips of the machine type
#   --spot | --reserved=RESERVATION | --flex-start=4h    pre-emptible | from your reservation | for so long a run
#   --network=N --subnetwork=N --internal-ips --service-account=EMAIL --labels=K=V,... --tags=T,...    of the VMs
#   --image-family=F     of ubuntu-os-accelerator-images (default: by machine)
#   --disk=GB            of each VM (default: 200)
#   --iap                connects through Identity-Aware Proxy: VMs without external addresses
#   --setup=COMMAND      on every VM, before the start: mounts the disk that holds the workdir, exports keys, ...
#   --create, --ship     only that: machines | code
#   --wait               stays until the run ends, with its exit code (under launch/babysit.sh: survives pre-emption); a signal
#                        to this script stops the run
#   --list               the groups of the zone
#   --logs[=VM]          follows the log of a VM (a number, default 0)
#   --stop               SIGTERM to the run on all VMs: it saves; the VMs stay (and cost)
#   --delete             gives the VMs back
#   --dry-run            prints the commands
#
# The workdir is a folder that all VMs see (gs://BUCKET/NAME, or a Filestore share that --setup mounts, say): stages meet there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

machine="" topology="" family="" disk=200 capacity=() interface="" address="" more=()
check_values "$@"
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
    --machine=*) machine=$value ;;
    --topology=*) topology=$value ;;
    --spot) capacity+=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
    --reserved=*) capacity+=(--provisioning-model=RESERVATION_BOUND --instance-termination-action=DELETE --reservation-affinity=specific --reservation="$value") ;;
    --flex-start=*) capacity+=(--provisioning-model=FLEX_START --instance-termination-action=DELETE --max-run-duration="$value") ;;
    --network=*) interface+=${interface:+,}network=$value ;;
    --subnetwork=*) interface+=${interface:+,}subnet=$value ;;
    --internal-ips) address=,no-address ;;
    --service-account=* | --labels=* | --tags=*) more+=("$argument") ;;
    --image-family=*) family=$value ;;
    --disk=*) disk=$value ;;
    *) pod_argument "$argument" ;;
    esac
done
check_pod
need_number --disk "$disk" 1
case ${capacity[*]-} in *-model=*-model=*) fail "only one of --spot, --reserved and --flex-start can be given" ;; esac
in_project=("${place[@]:1}")
group=(gcloud compute instance-groups managed)

check_machines() {
    local chips each
    need_value --machine "$machine" "e.g. ct6e-standard-4t"
    need_value --topology "$topology" "e.g. 4x4"
    each=${machine##*-} each=${each%t}
    case $each in "" | 0* | *[!0-9]* | ?????*) fail "--machine=$machine does not end with its number of chips, as ct6e-standard-4t does" ;; esac
    chips=$(chips_of "$topology") || exit 2
    [ $((chips % each)) -eq 0 ] || fail "--topology=$topology has $chips chips, which are no multiple of the $each of --machine=$machine"
    hosts=$((chips / each))
    [ -n "$family" ] || case $machine in
    tpu7x-*) family=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
    *) family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
    esac
}

vms() { # names and states of the VMs of the slice, and what the group is doing to them
    "${group[@]}" list-instances "$name" "${place[@]}" --format="value(instance.basename(),instanceStatus,currentAction)"
}

policy=(gcloud compute resource-policies)
policy_place=(--region="${zone%-*}" ${in_project[@]+"${in_project[@]}"})
template=(gcloud compute instance-templates)

delete() {
    run "${group[@]}" delete "$name" "${place[@]}" --quiet
    delete_rest
}

delete_rest() { # what may be there without a group; a slice of one VM has no policy
    if [ -n "$dry_run" ] || there "${template[@]}" describe "$name" ${in_project[@]+"${in_project[@]}"} >/dev/null; then
        run "${template[@]}" delete "$name" ${in_project[@]+"${in_project[@]}"} --quiet
    fi
    if [ -n "$dry_run" ] || there "${policy[@]}" describe "$name" "${policy_place[@]}" >/dev/null; then
        run "${policy[@]}" delete "$name" "${policy_place[@]}" --quiet
    fi
}

create_template() {
    local call=("${template[@]}" create "$name" ${in_project[@]+"${in_project[@]}"} --machine-type="$machine")
    call+=(--image-family="$family" --image-project=ubuntu-os-accelerator-images --boot-disk-size="${disk}GB")
    # TPU VMs cannot be moved while they run; the scope is for buckets that --setup mounts.
    call+=(--maintenance-policy=TERMINATE --scopes=cloud-platform)
    [ -z "$interface$address" ] || call+=(--network-interface="${interface:-network=default}$address")
    run "${call[@]}" ${capacity[@]+"${capacity[@]}"} ${more[@]+"${more[@]}"}
}

create() {
    local made="" found slice=()
    if there "${group[@]}" describe "$name" "${place[@]}" >/dev/null; then
        made=yes found=$(vms)
        [ "$(grep -c RUNNING <<<"$found")" -ne "$hosts" ] || return 0
        # Pre-empted: a slice is whole or useless. VMs that are being made have no state or an early one, and an action.
        if grep -qE $'\t(PENDING_STOP|STOP|TERM|SUSPEND|DEPROV|\tNONE)' <<<"$found" || ! grep -qv RUNNING <<<"$found"; then
            echo "$name has lost VMs: making the slice again"
            "${group[@]}" delete "$name" "${place[@]}" --quiet
            made=""
        fi
    fi
    if [ -z "$made" ]; then
        # Left by a try that failed, they may be of other flags.
        [ -n "$dry_run" ] || delete_rest
        if [ "$hosts" -gt 1 ]; then
            slice=(--workload-policy="${project:+projects/$project/regions/${zone%-*}/resourcePolicies/}$name")
            run "${policy[@]}" create workload-policy "$name" "${policy_place[@]}" --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
        fi
        create_template
        # A VM repaired alone would not be part of the slice's topology.
        run "${group[@]}" create "$name" "${place[@]}" --template="$name" --size="$hosts" ${slice[@]+"${slice[@]}"} --default-action-on-vm-failure=do-nothing
    fi
    run "${group[@]}" wait-until "$name" "${place[@]}" --stable --timeout="${QSTAR_PATIENCE:-86400}"
}

reach() { run gcloud compute ssh "$1" "${place[@]}" ${through[@]+"${through[@]}"} --quiet --command="$2"; }

parts() { # the VMs, in their order; a dry run does not know them
    local found
    if [ -n "$dry_run" ]; then
        printf 'VM\n%.0s' $(seq 0 "$worker")
        return
    fi
    found=$(vms) || exit 1
    [ -n "$found" ] || give_up "$name has no VMs; --list shows the groups"
    cut -f1 <<<"$found"
}

copy_code() {
    local vm all
    all=$(parts)
    for vm in $all; do run gcloud compute scp "$1" "$vm:qstar.tgz" "${place[@]}" ${through[@]+"${through[@]}"}; done
}

list() { run "${group[@]}" list --zones="$zone" ${in_project[@]+"${in_project[@]}"}; }

logs() {
    local found vm
    found=$(parts)
    vm=$(sed -n "$((worker + 1))p" <<<"$found")
    [ -n "$vm" ] || fail "--logs=$worker: the last VM of $name is $(($(wc -l <<<"$found") - 1))"
    run gcloud compute ssh "$vm" "${place[@]}" ${through[@]+"${through[@]}"} --command="bash ~/qstar/launch/worker.sh logs $name"
}

act
