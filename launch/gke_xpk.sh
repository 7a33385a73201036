#!/usr/bin/env bash
# One run on TPU slices of a GKE cluster: through XPK, Cluster Toolkit's gcluster, or as a JobSet of its own through kubectl.
#
#   bash launch/gke_xpk.sh --name=x --cluster=C --zone=us-east5-b --project=P --type=v6e-16 --image=IMAGE --config=... --workdir=/runs/x
#   bash launch/gke_xpk.sh --gcluster --name=x --cluster=C --zone=us-east5 --type=v6e-16 --image=IMAGE --claim=CLAIM --config=... --workdir=/runs/x
#   bash launch/gke_xpk.sh --jobset --name=x --accelerator=tpu-v6e-slice --topology=4x4 --image=IMAGE --claim=CLAIM --config=... --workdir=/runs/x
#
#   --name=NAME --image=IMAGE     of the workload; the image holds qstar-jax[tpu]: see launch/Dockerfile
#   --slices=N --restarts=N       (default: 1 and 100)
#   --grace=SECONDS               between SIGTERM and SIGKILL, for saving (default: 300)
#   --spot                        on pre-emptible nodes
#   --env=KEY=VALUE               repeatable. Keys and tokens: --secret
# XPK:
#   --cluster=C --zone=Z --project=P --type=TYPE     (zone, project: else the variables ZONE, PROJECT). Disks: xpk storage attach
# gcluster job submit: --cluster, --zone (or region), --project and --type as XPK, and --topology, --claim, --bucket, --queue
#   and --service-account as a JobSet; --manifest writes the JobSet to NAME.yaml and submits nothing. --spot is a node label.
# JobSet, in the namespace of your kubectl context:
#   --accelerator=LABEL --topology=AxB[xC]           cloud.google.com/gke-tpu-accelerator and -topology
#   --chips=N                     per host (default: 4)
#   --claim=NAME                  PersistentVolumeClaim, mounted at /runs: all hosts see it
#   --bucket=NAME                 instead of a claim: a bucket, mounted at /runs by the Cloud Storage FUSE driver of GKE
#   --secret=NAME                 Kubernetes secret whose entries become environment variables
#   --queue=NAME                  Kueue's LocalQueue
#   --service-account=NAME        Kubernetes service account, which Workload Identity lets read and write the bucket
#   --flex-start                  on nodes of that provisioning model
#   --label=KEY=VALUE             of the JobSet; repeatable
#   --manifest                    prints the JobSet and submits nothing
#
#   --list | --logs | --stop      the workloads | the log of the first host | ends it: SIGTERM saves; the same command goes on
#   --dry-run                     prints the commands
#
# --config, --workdir, --config.KEY, --task, --device and --profile go to `qstar train`.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

via=xpk given="" account="" labels=() selector=() bucket="" image="" slices=1 restarts=100 grace=300 spot="" cluster="" type=""
accelerator="" topology="" chips=4 claim="" secret="" queue=""
# Told to end by the cluster and not by --stop, a run has to count as failed: that is what JobSet starts again.
environment=(QSTAR_STOPPED_CODE=75)
check_values "$@"
for argument in "$@"; do
    value=${argument#*=} given+=" ${argument%%=*} "
    case $argument in
    --jobset) via=kubectl ;;
    --gcluster) via=gcluster ;;
    --manifest) choose "$argument" ;;
    --image=*) image=$value ;;
    --slices=*) slices=$value ;;
    --restarts=*) restarts=$value ;;
    --grace=*) grace=$value ;;
    --spot) selector+=(cloud.google.com/gke-spot) spot=yes ;;
    --flex-start) selector+=(cloud.google.com/gke-flex-start) ;;
    --service-account=*) account=$value ;;
    --label=*) labels+=("$value") ;;
    --env=*) environment+=("$value") ;;
    --cluster=*) cluster=$value ;;
    --zone=*) zone=$value ;;
    --project=*) project=$value ;;
    --type=*) type=$value ;;
    --accelerator=*) accelerator=$value ;;
    --topology=*) topology=$value ;;
    --chips=*) chips=$value ;;
    --claim=*) claim=$value ;;
    --bucket=*) bucket=$value ;;
    --secret=*) secret=$value ;;
    --queue=*) queue=$value ;;
    *) launcher_argument "$argument" ;;
    esac
done
do=${do:-create}
[ "$do" = list ] || need_name "$name"
need_number --slices "$slices" 1
need_number --restarts "$restarts"
need_number --grace "$grace"
need_number --chips "$chips" 1
[ -z "$claim" ] || [ -z "$bucket" ] || fail "--claim and --bucket exclude each other: both are mounted at /runs"
[ ${#selector[@]} -le 1 ] || fail "--spot and --flex-start exclude each other"
[ "$do$via" != manifestxpk ] || via=kubectl # XPK submits what it makes
for pair in "${environment[@]/#/--env=}" ${labels[@]+"${labels[@]/#/--label=}"}; do
    [[ $pair =~ ^--[a-z]+=[A-Za-z_][A-Za-z0-9_./-]*= ]] || fail "$pair is not of the form ${pair%%=*}=KEY=VALUE"
done
case $via in
xpk) foreign="--accelerator --topology --chips --claim --bucket --secret --queue --service-account --flex-start --label" ;;
gcluster) foreign="--accelerator --chips --secret --label" ;;
kubectl) foreign="--cluster --zone --project --type" ;;
esac
for flag in $foreign; do
    case $given in *" $flag "*) fail "$flag has no effect through $via; --help says which flags are whose" ;; esac
done
command=(python -m qstar train --device=tpu ${rest[@]+"${rest[@]}"})
case $do in
create | manifest)
    need_value --image "$image" "a container image that holds qstar"
    need_value --config "$config" "what to run"
    [[ $workdir != \~* ]] || fail "--workdir=$workdir is in the home of each pod alone; name a folder of a disk that all of them see"
    check_workdir "$workdir" "/runs of a --claim or a --bucket, or what XPK attaches"
    (cd "$(dirname "${BASH_SOURCE[0]}")/.." && check_files image "$config") || exit 2
    ;;
esac
if [ "$via" != kubectl ]; then
    need_value --cluster "$cluster" "the GKE cluster that XPK or gcluster made; --jobset goes through kubectl"
    need_value --zone "$zone" "of the cluster, or the variable ZONE"
    place=(--cluster="$cluster" --zone="$zone")
    [ "$via" = xpk ] || place=(--cluster="$cluster" --location="$zone")
    [ -z "$project" ] || place+=(--project="$project")
    case $via in
    xpk) need_program xpk "pip install xpk, or use --jobset" ;;
    gcluster) need_program gcluster "it comes with Google's Cluster Toolkit; or use --jobset" ;;
    esac
else
    [ "$do" = manifest ] || need_program kubectl "https://kubernetes.io/docs/tasks/tools says how"
fi

# shellcheck disable=SC2016  # nothing is to be expanded here
json() { # json TEXT: as a string of JSON, which is one of YAML, too
    local text=$1 slash="\\\\" quote='\"' line='\n' tab='\t' dollar='$$('
    text=${text//\\/"$slash"}
    text=${text//\"/"$quote"}
    text=${text//$'\n'/"$line"}
    text=${text//$'\t'/"$tab"}
    text=${text//'$('/"$dollar"} # Kubernetes replaces $(NAME) in commands and values
    printf '"%s"' "$text"
}

hosts() { # of a slice: chips of the topology / chips per host
    local all
    all=$(chips_of "$topology") || exit 2
    [ $((all % chips)) -eq 0 ] || fail "--topology=$topology has $all chips, which are no multiple of --chips=$chips"
    echo $((all / chips))
}

jobset() {
    local n word pair
    need_value --accelerator "$accelerator" "e.g. tpu-v6e-slice"
    n=$(hosts) || exit 2
    cat <<EOY
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(json "$name")
EOY
    [ -z "$queue" ] || labels+=("kueue.x-k8s.io/queue-name=$queue")
    [ ${#labels[@]} -eq 0 ] || printf '  labels:\n'
    for pair in ${labels[@]+"${labels[@]}"}; do printf '    %s: %s\n' "$(json "${pair%%=*}")" "$(json "${pair#*=}")"; done
    cat <<EOY
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        parallelism: $n
        completions: $n
        backoffLimit: 0
        template:
$([ -z "$bucket" ] || printf '          metadata:\n            annotations:\n              gke-gcsfuse/volumes: "true"')
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$accelerator")
              cloud.google.com/gke-tpu-topology: $(json "$topology")
EOY
    for word in ${selector[@]+"${selector[@]}"}; do printf '              %s: "true"\n' "$word"; done
    [ -z "$account" ] || printf '            serviceAccountName: %s\n' "$(json "$account")"
    if [ -n "$spot" ]; then
        cat <<'EOY'
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
EOY
    fi
    [ -z "$claim" ] || printf '            volumes:\n            - name: runs\n              persistentVolumeClaim:\n                claimName: %s\n' "$(json "$claim")"
    [ -z "$bucket" ] || printf '            volumes:\n            - name: runs\n              csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: {bucketName: %s, mountOptions: implicit-dirs}}\n' "$(json "$bucket")"
    printf '            containers:\n            - name: qstar\n              image: %s\n              command:\n' "$(json "$image")"
    for word in "${command[@]}"; do printf '              - %s\n' "$(json "$word")"; done
    if [ ${#environment[@]} -gt 0 ]; then
        printf '              env:\n'
        for pair in "${environment[@]}"; do
            printf '              - name: %s\n                value: %s\n' "$(json "${pair%%=*}")" "$(json "${pair#*=}")"
        done
    fi
    [ -z "$secret" ] || printf '              envFrom:\n              - secretRef:\n                  name: %s\n' "$(json "$secret")"
    [ -z "$claim$bucket" ] || printf '              volumeMounts:\n              - name: runs\n                mountPath: /runs\n'
    cat <<EOY
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits:
                  google.com/tpu: $chips
EOY
}

create_workload() {
    local call=(xpk workload create "${place[@]}" --workload="$name" --tpu-type="$type" --num-slices="$slices")
    local pair
    need_value --type "$type" "e.g. v6e-16"
    call+=(--docker-image="$image" --max-restarts="$restarts" --termination-grace-period-seconds="$grace")
    # By itself XPK restarts after exit codes 42 and 127 to 255. 75: told to end by the cluster; 1: lost another process.
    call+=(--restart-on-exit-codes="75,1")
    [ -z "$spot" ] || call+=(--spot)
    for pair in ${environment[@]+"${environment[@]}"}; do call+=(--env "$pair"); done
    run "${call[@]}" --command="$(quote "${command[@]}")" # one shell in the container splits it again
}

submit_gcluster() {
    local call=(gcluster job submit "${place[@]}" --name="$name" --compute-type="$type" --num-slices="$slices" --image="$image")
    local pair
    need_value --type "$type" "e.g. v6e-16"
    # 75: told to end by the cluster; 1: lost another process; from 128 on: ended by a signal, as 137 after the grace, or for memory.
    # Given codes are the only ones.
    call+=(--restarts="$restarts" --grace-period="${grace}s" --restart-on-exit-codes="75,1,134,137,139,143")
    [ -z "$topology" ] || call+=(--topology="$topology")
    [ -z "$queue" ] || call+=(--queue="$queue")
    [ -z "$account" ] || call+=(--service-account="$account")
    [ -z "$claim$bucket" ] || call+=(--mount="${claim:-gs://$bucket}:/runs:rw")
    for pair in ${selector[@]+"${selector[@]}"}; do call+=(--node-constraint="$pair=true"); done
    for pair in "${environment[@]}"; do call+=(--env="$pair"); done
    [ "$do" != manifest ] || call+=(--dry-run-out="$name.yaml")
    run "${call[@]}" --command="$(quote "${command[@]}")"
}

pods="jobset.sigs.k8s.io/jobset-name=$name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
case $via-$do in
kubectl-manifest) jobset ;;
gcluster-create | gcluster-manifest) submit_gcluster ;;
gcluster-list) run gcluster job list "${place[@]}" ;;
gcluster-logs) run gcluster job logs "$name" "${place[@]}" --follow ;;
gcluster-stop) run gcluster job cancel "$name" "${place[@]}" ;;
xpk-create) create_workload ;;
xpk-list) run xpk workload list "${place[@]}" ;;
xpk-stop) run xpk workload delete "${place[@]}" --workload="$name" --force ;;
kubectl-create)
    manifest=$(jobset) || exit 2
    if [ -n "$dry_run" ]; then
        printf '%s\n' "kubectl create -f - <<'END'" "$manifest" END
    else
        # One that has ended would be left as it is. One that runs is an error of create, not "unchanged".
        ended=$(kubectl get jobset "$name" --ignore-not-found --output=jsonpath='{.status.conditions[?(@.status=="True")].type}')
        case " $ended " in *" Completed "* | *" Failed "*) kubectl delete jobset "$name" --cascade=foreground ;; esac
        kubectl create -f - <<<"$manifest"
    fi
    ;;
kubectl-list) run kubectl get jobsets ;;
kubectl-stop) run kubectl delete jobset "$name" ;;
*-logs)
    need_program kubectl "https://kubernetes.io/docs/tasks/tools says how"
    run kubectl logs --follow --tail=200 --selector="$pods"
    ;;
esac
