# shellcheck shell=bash
# What the batch files here share: run a command, stop it in time, and ask for a requeue while its work is resumable.
# Sourced from the folder beside the one that was submitted from (recipes/TASK), or from $DPOCTL_SLURM.

# complete: its manifest is there; resumable: begun, and the same command continues; absent: nothing is there to continue.
state_of() { # OUT
  local manifest=$1/manifest.json plan=$1/.plan.json
  case $1 in *.jsonl | *.jsonl.gz) manifest=$1.manifest.json plan=$1.plan.json ;; esac
  if [ -e "$manifest" ]; then
    echo complete
  elif [ -e "$plan" ]; then
    echo resumable
  else
    echo absent
  fi
}

# Run COMMAND, which makes OUT. The signal that Slurm sends ahead of the time limit goes on to it, once: a second one
# would end it without its state saved. Whether it can go on is read from OUT: torchrun makes 1 of every exit code. What
# stopped without a signal is requeued twice at most, so that a fault that returns each time does not run for ever.
work() { # OUT COMMAND...
  local out=$1 code=0 before state
  shift
  before=$(state_of "$out")
  signalled=
  "$@" &
  child=$!
  trap '[ -n "$signalled" ] || kill -USR1 "$child" || :; signalled=yes' USR1 TERM
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a wait ends with the trap, the child a little later
    code=0
    wait "$child" || code=$?
  done
  trap - USR1 TERM
  state=$(state_of "$out")
  echo "$out: $state (exit $code, requeued ${SLURM_RESTART_COUNT:-0} times before)" >&2
  if [ "$state" = complete ] && [ "$before" != complete ]; then
    return 0
  fi
  # 2 and 3, where they arrive as they are: the input and the numbers are no better the next time
  if [ "$state" = resumable ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ]; then
    if [ -n "$signalled" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
    code=75
  fi
  return "$code"
}

# torchrun on one node. It is told to forward the signal, and to leave its ranks the time to save their state: by itself
# it forwards no SIGUSR1 and kills after 30 s.
# shellcheck disable=SC2034 # for the files that source this one
ranks=("${TORCHRUN:-torchrun}" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}"
  --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 100)
