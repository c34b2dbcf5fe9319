#!/usr/bin/env bash
# Runs torchrun on one node and turns the first SIGUSR1 or SIGTERM into SIGTERM, once. torchrun forwards SIGTERM to its
# ranks, which save their state. It would die of SIGUSR1, which some batch systems send to every process of a job: it
# starts with that signal ignored. srun forwards SIGUSR1, but answers SIGTERM with SIGKILL.
#   srun bash ranks.sh torchrun --nproc-per-node 8 ... -m -- dpoctl ...
set -euo pipefail

# The seconds that ranks have to save their state; torchrun's default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
# CPU threads of a rank: torchrun sets 1, with which loading and saving large models takes minutes longer.
gpus=${SLURM_GPUS_ON_NODE:-1} cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > gpus ? cpus / gpus : 1))}

signalled='' code=0
(
  trap '' USR1 # ranks set a handler of their own
  exec "$@"
) &
child=$!
trap '[ -n "$signalled" ] || kill -TERM "$child" || :; signalled=yes' USR1 TERM
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do # the trap interrupts wait before torchrun has ended
  code=0
  wait "$child" || code=$?
done
exit "$code"
