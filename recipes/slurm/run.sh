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

# The exit code of a command that ended with CODE: 2 or 3 where a rank left it in the folder, since torchrun turns both
# into 1. They say more than the 75 of the ranks that only lost another.
code_of() { # CODE FOLDER
  local file found
  for found in 2 3; do
    for file in "$2"/*; do
      if [ -e "$file" ] && [ "$(<"$file")" = "$found" ]; then
        echo "$found"
        return
      fi
    done
  done
  echo "$1"
}

# Run COMMAND, which writes OUT. The signal that Slurm sends before the time limit is passed on once: a second one would stop
# the command without saving its state. OUT shows whether it is resumable. A job that stopped without a signal is requeued
# at most twice, so that a permanent failure does not repeat for ever.
work() { # OUT COMMAND...
  local out=$1 code=0 before state
  shift
  before=$(state_of "$out")
  # on a file system that every node sees; without it torchrun's own code counts
  DPOCTL_EXIT_CODES=$(mktemp -d "$PWD/.exit-codes-$SLURM_JOB_ID-XXXXXX") || DPOCTL_EXIT_CODES=
  export DPOCTL_EXIT_CODES
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
  if [ -n "$DPOCTL_EXIT_CODES" ]; then
    [ "$code" -eq 0 ] || code=$(code_of "$code" "$DPOCTL_EXIT_CODES")
    rm -rf "$DPOCTL_EXIT_CODES"
  fi
  state=$(state_of "$out")
  echo "$out: $state (exit $code, requeued ${SLURM_RESTART_COUNT:-0} times before)" >&2
  if [ "$state" = complete ] && [ "$before" != complete ]; then
    return 0
  fi
  # Exit codes 2 and 3 (input, out of memory, numerical failure) would repeat.
  if [ "$state" = resumable ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ]; then
    if [ -n "$signalled" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ]; then
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
    code=75
  fi
  return "$code"
}

# Your own set-up, for example `module load` and the activation of a virtual environment.
if [ -n "${DPOCTL_SETUP:-}" ]; then
  set +u # modules and virtual environments read variables that are not set
  # shellcheck source=/dev/null
  source "$DPOCTL_SETUP"
  set -u
fi

# Since Slurm 22.05 srun does not take --cpus-per-task from sbatch: all ranks of a node would share one core.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
  export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# Less fragmentation where batches differ in length. The variable was called PYTORCH_CUDA_ALLOC_CONF before.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
fi

# The commands, inside a container where DPOCTL_CONTAINER has the words before them: "apptainer exec --nv dpoctl.sif".
# shellcheck disable=SC2206 # split into words on purpose
container=(${DPOCTL_CONTAINER:-})
# shellcheck disable=SC2034 # for the files that source this one
dpoctl=(${container[@]+"${container[@]}"} "${DPOCTL:-dpoctl}") # an empty array is unset to bash before 4.4
# torchrun on one node, started by ranks.sh, which turns the signal into one that every torchrun forwards
# shellcheck disable=SC2034
ranks=(bash "${BASH_SOURCE[0]%/*}/ranks.sh" ${container[@]+"${container[@]}"} "${TORCHRUN:-torchrun}"
  --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}")
