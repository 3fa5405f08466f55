#!/usr/bin/env bash
# A real Slurm on this machine: one controller and as many nodes as you like, for tests and trials.
#
#   bash scripts/slurm_cluster.sh start FOLDER [NODES] [CPUS]   NODES n0, n1, ... (default 4) of CPUS each (default 8)
#   source FOLDER/env                                           sbatch, srun and the others now mean this cluster
#   bash scripts/slurm_cluster.sh stop FOLDER                   stops what `start` started, by process id
#
# Needs root on Debian or Ubuntu, where it installs slurm-wlm and munge if they are missing. Nodes are processes
# of this host: CPUS may exceed its own, their 8 GPUs are a number only, and memory is not counted. Partitions: all,
# and short (at most 1 minute).
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
fail() { echo "slurm_cluster: $*" >&2; exit 1; }

install() {
    command -v slurmctld slurmd munged sbatch >/dev/null && return
    command -v apt-get >/dev/null || fail "no Slurm here, and no apt-get: install slurmctld, slurmd and munge"
    echo "slurm_cluster: installing slurm-wlm and munge" >&2
    # A package's own service would take its default ports: none is started.
    local policy=/usr/sbin/policy-rc.d made=
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made=yes; }
    local log
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge; } \
        >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "the packages could not be installed"; }
    rm -f "$log" ${made:+"$policy"}
}

# So many free TCP ports in a row; prints the first.
free_ports() {
    python3 - "$1" <<'PY'
import random, socket, sys

wanted = int(sys.argv[1])
for _ in range(200):
    first = random.randrange(10000, 15000 - wanted)  # jobs have those above, the kernel gives away higher ones
    held = []
    try:
        for port in range(first, first + wanted):
            held.append(socket.socket())
            held[-1].bind(("", port))
    except OSError:
        continue
    finally:
        for one in held:
            one.close()
    print(first)
    break
else:
    sys.exit("no free ports")
PY
}

# Starts a daemon that puts itself into the background and writes its process id to a file.
started() { # PIDFILE COMMAND...
    local file=$1
    shift
    "$@" || fail "$1 did not start: see $folder"
    for _ in {1..100}; do
        [[ -s $file ]] && return
        sleep 0.1
    done
    fail "$1 wrote no $file"
}

start() {
    [[ $EUID == 0 ]] || fail "Slurm's daemons are started by root"
    install
    mkdir -p "$folder"/{spool,state,run}
    folder=$(cd "$folder" && pwd)
    [[ ! -e $folder/slurm.conf ]] || fail "$folder holds a cluster already: stop it, or give another folder"
    local controller first host
    controller=$(free_ports $((nodes + 1)))
    first=$((controller + 1))
    host=$(hostname)
    # munged insists on folders that nobody else can write to.
    chmod 755 "$folder" "$folder/run"
    head -c 1024 /dev/urandom >"$folder/munge.key"
    chmod 600 "$folder/munge.key"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=megatsp
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$controller
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket
CredType=cred/munge
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
JobRequeue=1
# Ports of jobs are made of their numbers: not the same ones in two clusters of this host.
FirstJobId=$((RANDOM % 500 + 1))
EnforcePartLimits=ALL
# A host that plays many nodes may take a minute to answer for one of them.
MessageTimeout=60
# Enough to see a dead node within seconds, where there are few, and a job killed soon.
SlurmdTimeout=$((nodes > 32 ? 120 : 6))
KillWait=5
MinJobAge=3600
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2,requeue_delay=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MaxTasksPerNode=512
TreeWidth=65533
PartitionName=DEFAULT Nodes=n[0-$((nodes - 1))] State=UP DefMemPerCPU=0
PartitionName=all Default=YES MaxTime=1-00:00:00 DefaultTime=60
PartitionName=short MaxTime=1 DefaultTime=1
NodeName=n[0-$((nodes - 1))] NodeAddr=127.0.0.1 NodeHostname=$host Port=[$first-$((first + nodes - 1))] CPUs=$cpus Gres=gpu:8 State=UNKNOWN
CONF
    touch "$folder"/gpu{0..7} # Slurm counts files, and asks no more of a GPU
    echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
    echo "export SLURM_CONF='$folder/slurm.conf'" >"$folder/env"
    export SLURM_CONF="$folder/slurm.conf"
    trap 'stop' ERR
    started "$folder/run/munged.pid" munged --force --num-threads=4 --key-file="$folder/munge.key" \
        --socket="$folder/run/munge.socket" --pid-file="$folder/run/munged.pid" \
        --seed-file="$folder/run/munge.seed" --log-file="$folder/munged.log"
    started "$folder/run/slurmctld.pid" slurmctld -c
    for ((i = 0; i < nodes; i++)); do
        slurmd -N "n$i" || fail "slurmd of n$i did not start: see $folder/n$i.log"
    done
    local up=0
    for _ in {1..300}; do
        up=$(sinfo --noheader --Node --partition=all --states=idle --format=%N 2>/dev/null | wc -l)
        ((up == nodes)) && break
        sleep 0.2
    done
    ((up == nodes)) || fail "only $up of $nodes nodes came up: see the logs in $folder"
    trap - ERR
    echo "slurm_cluster: $nodes nodes are up; source $folder/env"
}

# Process ids of the cluster: its daemons, and of its jobs whatever inherited its configuration from them.
of_cluster() {
    cat "$folder"/run/*.pid 2>/dev/null || true
    local ours=" " process=$$
    while ((process > 1)); do # this script and who called it, which may have the variable too
        ours+="$process "
        process=$(awk '/^PPid:/ { print $2 }' "/proc/$process/status")
    done
    local file
    for file in $(grep -lazFx "SLURM_CONF=$folder/slurm.conf" /proc/[0-9]*/environ 2>/dev/null || true); do
        process=${file#/proc/}
        process=${process%/environ}
        [[ $ours == *" $process "* ]] || echo "$process"
    done
}

stop() {
    [[ -d $folder ]] || fail "no folder $folder"
    folder=$(cd "$folder" && pwd)
    local pids
    mapfile -t pids < <(of_cluster)
    if ((${#pids[@]})); then
        kill "${pids[@]}" 2>/dev/null || true
        for _ in {1..50}; do
            kill -0 "${pids[@]}" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    rm -f "$folder"/run/*.pid "$folder/slurm.conf" "$folder/env"
}

folder=${2:-}
nodes=${3:-4}
cpus=${4:-8}
case ${1:-} in
start | stop)
    [[ -n $folder ]] || { usage; fail "$1 needs a folder"; }
    [[ $nodes =~ ^[1-9][0-9]*$ && $nodes -le 128 ]] || fail "NODES $nodes: give 1 to 128"
    [[ $cpus =~ ^[1-9][0-9]*$ ]] || fail "CPUS $cpus: give a number"
    "$1"
    ;;
*)
    usage
    [[ ${1:-} == --help ]] || exit 2
    ;;
esac
