# shellcheck shell=bash disable=SC2154  # the head sets what is not set here
# The body of every job: `megatsp launch slurm` puts it below the head that it makes of the configuration.
#
# The head sets name, folder, run, nodes, nproc, tasks, mesh, preflight, port, restarts, backoff_s, requeues,
# own_limit, device, python, and the arrays container and command. Bash does what takes Slurm's commands; what
# follows an attempt, `python -m megatsp.jobs.attempt` decides (megatsp/jobs/judge.py).
set -uo pipefail
export PYTHONUNBUFFERED=1 MEGATSP_NPROC=$nproc

job=$folder/job_$SLURM_JOB_ID
# As Slurm's commands take it: the plain number of an array's last task means the whole array to them. The variables
# may be those of a job that submitted this one.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
[[ $id ]] && scontrol show job "$id" --oneliner 2>/dev/null | grep -q "JobId=$SLURM_JOB_ID " || id=$SLURM_JOB_ID
first_port=$((port ? port : 15000 + SLURM_JOB_ID * 30 % 15000))
asked= # the signal by which Slurm asked the job to end
step=  # the process of the step that runs

say() { echo "megatsp: $(date +%H:%M:%S): $*"; }
inside() { "${container[@]}" "$python" -m "$@"; }
word() { grep -o " $1=[^ ]*" | cut -d= -f2- | head -n 1; } # of a line of scontrol's
state() { # while a job ends, Slurm says so, and of a time limit alone why; or that it requeued the job itself
    local said restarts state
    said=$(scontrol show job "$id" --oneliner)
    restarts=$(word Restarts <<<"$said")
    state=$(word JobState <<<"$said")
    if ((${restarts:-0} > ${SLURM_RESTART_COUNT:-0})); then
        echo REQUEUED
    elif [[ $state != COMPLETING ]]; then
        echo "$state"
    elif [[ $(word Reason <<<"$said") == TimeLimit ]]; then
        echo TIMEOUT
    else
        echo CANCELLED
    fi
}
allocated() { # by now: Slurm takes lost nodes away from a job with --no-kill
    local found
    found=$(scontrol show job "$id" --oneliner | word NodeList)
    scontrol show hostnames "${found:-$SLURM_JOB_NODELIST}" | tr '\n' ' '
}
address() {
    local found
    found=$(scontrol show node "$1" --oneliner | word NodeAddr)
    echo "${found:-$1}"
}
down() {
    sinfo --noheader --all --Node --nodes="$SLURM_JOB_NODELIST" --states=down,fail --format=%N | sort -u | tr '\n' ' '
}

heed() { # passes a signal on to the ranks, as a request to save and to end
    heard=yes
    asked=${asked:-$1} # the first one says why
    [[ -n $step ]] || return
    if [[ $1 == TERM && $(state) == TIMEOUT ]]; then # they were not done in time: Slurm kills them, and this script
        kill -KILL "$step" 2>/dev/null
    else
        kill -USR1 "$step" 2>/dev/null
    fi
}
trap 'heed USR1' USR1 # so long before the time limit: launch.slurm.signal_s
trap 'heed TERM' TERM # preemption

# Runs a step, and heeds signals meanwhile; srun.log is what the last one said.
run() {
    local status copy said
    exec {said}> >(trap '' TERM USR1 && exec tee "$attempt/srun.log" >&2)
    copy=$!
    "$@" 2>&"$said" {said}>&- &
    step=$!
    exec {said}>&-
    [[ ! $asked ]] || kill -USR1 "$step" 2>/dev/null # it came while the step was made
    ended "$step"
    status=$?
    step=
    ended "$copy"
    # Where Slurm ends the job, it ends its steps too, and leaves little time.
    [[ $asked ]] || ((status <= 128)) || end_steps
    return "$status"
}

# Ends what srun, which was killed itself, has left on the nodes.
end_steps() {
    local left
    for _ in {1..30}; do
        left=$(squeue --noheader --steps --jobs="$id" --format=%i | grep '\.[0-9]*$') || return 0
        # shellcheck disable=SC2086  # several steps
        scancel $left
        sleep 1
    done
}

# Waits for a process, also where a signal is heard meanwhile; returns its status.
ended() {
    local status
    while :; do
        heard=
        wait "$1"
        status=$?
        [[ $heard ]] || return "$status"
    done
}

# Cores that every node has for the job: Slurm lists them as 8(x2),4.
cores() {
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
        echo $((SLURM_CPUS_PER_TASK * nproc))
    else
        sed 's/([^)]*)//g; s/,/\n/g' <<<"$SLURM_JOB_CPUS_PER_NODE" | sort -n | head -n 1
    fi
}

# Runs a command on the nodes that a file lists, in so many tasks each. The first that fails ends all others,
# unless they are to wait for it.
on_nodes() { # FILE TASKS [--wait=SECONDS] COMMAND...
    local file=$1 tasks=$2 together=(--kill-on-bad-exit=1)
    shift 2
    [[ $1 != --wait=* ]] || { together=(--kill-on-bad-exit=0 "$1") && shift; }
    local cores
    cores=$(($(cores) / tasks))
    run srun --nodes="$(wc -l <"$file")" --nodelist="$(paste -sd, "$file")" --ntasks-per-node="$tasks" \
        --ntasks=$(($(wc -l <"$file") * tasks)) --cpus-per-task=$((cores ? cores : 1)) \
        --distribution=block:block "${together[@]}" --no-kill=off --export=ALL "${container[@]}" "$python" -m "$@"
}

# Asks the nodes that a file lists whether they are there and fit; writes roll_call.json and, of enough nodes,
# nodes.txt.
roll_call() { # FILE
    local needed=(--nodes "$nodes" --ranks-per-node "$nproc" --mesh "$mesh" --folder "$attempt")
    [[ $device == cpu ]] || needed+=(--devices)
    meet_at "$1" 0
    on_nodes "$1" "$nproc" --wait=420 megatsp.preflight.roll_call --timeout 300 \
        --address "$MASTER_ADDR:$MASTER_PORT" "${needed[@]}"
}

# Chooses the nodes of an attempt; nodes.txt lists them.
choose_nodes() {
    if [[ $preflight == none ]]; then
        head -n "$nodes" "$attempt/live.txt" >"$attempt/nodes.txt"
        return
    fi
    local found=0
    roll_call "$attempt/live.txt" || found=$?
    if [[ ! -e $attempt/roll_call.json && ! $asked ]] && ((found != 2 && $(wc -l <"$attempt/live.txt") > 1)); then
        # Nobody called the roll: the first node did not, and is refused if the next one can.
        tail -n +2 "$attempt/live.txt" >"$attempt/others.txt"
        say "no roll call from $(head -n 1 "$attempt/live.txt"): once more without it"
        roll_call "$attempt/others.txt" || found=$?
    fi
    # What it wrote counts, and not what became of the tasks of bad nodes.
    [[ -s $attempt/nodes.txt ]] || return "$((found ? found : 1))"
    if [[ $preflight == full && ! $asked ]]; then
        local same=("${command[@]:1}")
        [[ ${command[0]} != sft ]] || same+=(--sft)
        meet_at "$attempt/present.txt" 1
        on_nodes "$attempt/present.txt" "$nproc" megatsp preflight --folder "$attempt" "${same[@]}" || return
    fi
}

# The first of the nodes that a file lists is where ranks meet, at a port where nobody else answers.
meet_at() { # FILE 0-2
    MASTER_ADDR=$(address "$(head -n 1 "$1")")
    local tried
    for tried in {0..9}; do
        MASTER_PORT=$((first_port + 3 * ((number + tried) % 10) + $2))
        timeout 2 bash -c ": >/dev/tcp/$MASTER_ADDR/$MASTER_PORT" 2>/dev/null || break
    done
    export MASTER_ADDR MASTER_PORT
}

# Trains on the chosen nodes, once.
train() {
    meet_at "$attempt/nodes.txt" 2
    case $tasks in
    node) MEGATSP_ATTEMPT_FOLDER=$attempt on_nodes "$attempt/nodes.txt" 1 megatsp.jobs.node "${command[@]}" ;;
    gpu) MEGATSP_ATTEMPT_FOLDER=$attempt on_nodes "$attempt/nodes.txt" "$nproc" megatsp "${command[@]}" ;;
    esac
}

# Puts the job back into the queue, which ends this script.
requeue() { # NODES to keep off, or -
    trap '' TERM USR1
    local off
    off=$(scontrol show job "$id" --oneliner | word ExcNodeList)
    off=$(printf '%s\n' "${off#(null)}" "${1#-}" | grep . | paste -sd,)
    [[ ! -e $job/cancel ]] || exit 130
    scontrol requeue "$id" || { say "Slurm did not requeue the job: start it again yourself"; exit 75; }
    # While Slurm clears up after a lost node it takes no changes: the next start looks at its nodes itself.
    [[ ${1#-} == '' ]] || timeout 5 scontrol update JobId="$id" ExcNodeList="$off"
    exit 75
}

say "job $SLURM_JOB_ID ($name), start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST"
known=(--job "$job" --number "$SLURM_JOB_ID" --run "$run" --nodes "$nodes" --restarts "$restarts"
    --backoff-s "$backoff_s" --requeues "$requeues" --restart "${SLURM_RESTART_COUNT:-0}"
    ${own_limit:+--has-own-limit})
while :; do
    read -r action answer < <(
        inside megatsp.jobs.attempt begin "${known[@]}" --down "$(down)" --allocated "$(allocated)"
    )
    if [[ $action == go ]]; then
        attempt=$answer
        number=${attempt##*_}
        status=0
        [[ $asked ]] || choose_nodes || status=$?
        ran=
        if [[ ! $asked && $status == 0 ]]; then
            ran=--ran
            if [[ ${command[0]} == preflight ]]; then
                touch "$attempt/done"
            else
                train || status=$?
            fi
        fi
        read -r action answer < <(
            inside megatsp.jobs.attempt end "${known[@]}" --down "$(down)" --state "$(state)" \
                --attempt "$number" --status "$status" --asked "$asked" ${ran:+"$ran"}
        )
    fi
    case ${action:-} in
    done | lost) exit 0 ;;
    again)
        sleep "$answer" &
        wait $! # a signal ends it
        ;;
    requeue) requeue "$answer" ;;
    stop) exit "$answer" ;;
    *)
        say "nobody could say what comes next: it stops here"
        exit 1
        ;;
    esac
done
