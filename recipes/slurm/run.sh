# shellcheck shell=bash
# Shared by the batch files: run a command, stop it in time, and requeue the job while its output is resumable.
# Sourced from the folder `slurm` beside the one of submission (recipes/TASK), or from $DPOCTL_SLURM.

# complete: the manifest exists; resumable: started, and rerunning the command resumes; absent: nothing was started.
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

# Run COMMAND, which writes OUT. The signal that Slurm sends before the time limit is passed on once: a second one would stop
# the command without saving its state. OUT shows whether it is resumable, since torchrun turns every nonzero exit code into
# 1. A job that stopped without a signal is requeued at most twice, so that a permanent failure does not repeat for ever.
work() { # OUT COMMAND...
  local out=$1 code=0 before state
  shift
  before=$(state_of "$out")
  signalled=
  "$@" &
  child=$!
  trap '[ -n "$signalled" ] || kill -USR1 "$child" || :; signalled=yes' USR1 TERM
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # the trap interrupts wait before the child has ended
    code=0
    wait "$child" || code=$?
  done
  trap - USR1 TERM
  state=$(state_of "$out")
  echo "$out: $state (exit $code, requeued ${SLURM_RESTART_COUNT:-0} times before)" >&2
  if [ "$state" = complete ] && [ "$before" != complete ]; then
    return 0
  fi
  # Exit codes 2 and 3 (input, numerical failure), where no torchrun hides them, would repeat.
  if [ "$state" = resumable ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ]; then
    if [ -n "$signalled" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
    code=75
  fi
  return "$code"
}

# torchrun on one node, which forwards SIGUSR1 and gives the ranks time to save their state. By default it does not forward
# that signal, and kills after 30 s.
# shellcheck disable=SC2034 # for the files that source this one
ranks=("${TORCHRUN:-torchrun}" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}"
  --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 100)
