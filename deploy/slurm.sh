#!/usr/bin/env bash
# A run under Slurm, one Ray node a machine. Submit it from the root of the repository, on storage they all share:
#   sbatch deploy/slurm.sh                                          # the quickstart
#   sbatch deploy/slurm.sh --config my.yaml output.dir=/shared/runs # the train command's own arguments
#   scancel --batch --signal=TERM JOB                               # saves, then ends; plain scancel does not save
#
# Before the time limit the run saves and the job goes back into the queue, where the same command goes on. So it is
# after a machine has failed or the job was pre-empted, from the newest checkpoint.
#SBATCH --job-name=vlskv-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=0
#SBATCH --time=04:00:00
# The machines are this job's alone: `ray symmetric-run` ends with `ray stop`, which ends every Ray process of the user
# on them, and gloo's ports know no token.
#SBATCH --exclusive
# USR1 to this script alone, not to Ray: 300 seconds for the step, the save and Ray's end.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ $# -eq 0 ]]; then
    set -- --config configs/quickstart.yaml output.dir=runs
fi
# Slurm runs a copy of this script elsewhere, in the folder that it was submitted from.
export PATH="$PWD/.venv/bin:$PATH"

# A cluster without a token takes orders from whoever reaches it. The file must be the same on all machines: the home
# folder is shared nearly everywhere; else let RAY_AUTH_TOKEN_PATH name one that is.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [[ ! -s "$RAY_AUTH_TOKEN_PATH" ]]; then
    (
        umask 077
        mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
        python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID"
        # a link is made whole or not at all, and never over the token of a job that was quicker
        ln "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID" "$RAY_AUTH_TOKEN_PATH" || true
        rm "$RAY_AUTH_TOKEN_PATH.$SLURM_JOB_ID"
    )
fi

# This script runs on the first machine, which becomes the head. Its address and not its name, which may mean loopback;
# set HEAD_IP where the first address is not the one of the fast network.
HEAD_IP="${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}"
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds; the default of 30 is short for a cold file system

# The driver's number, by which it alone can be told to save: a signal to the whole step would end Ray under it.
PID_FILE="$(mktemp)"
export PID_FILE
trap 'rm -f "$PID_FILE"' EXIT

requeue="" step=""
# shellcheck disable=SC2329 # the traps call it
save() {
    if [[ -s "$PID_FILE" ]]; then
        kill -TERM "$(< "$PID_FILE")" || true
    else
        kill -TERM "$step" || true # nothing has begun that could be saved
    fi
}
trap 'requeue=yes; save' USR1
trap save TERM

# Options of `ray start` stand before the `--`, the command, which runs on the head only, after it. The GCS port lies
# outside 10002 to 19999, which are the workers'. The dashboard is on loopback unless told otherwise.
# shellcheck disable=SC2016 # $$ is the inner shell's, which becomes the driver
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    ray symmetric-run --address "$HEAD_IP:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus="$SLURM_CPUS_PER_TASK" -- \
    bash -c 'echo $$ > "$PID_FILE"; exec python -m vlskv_ray.train "$@"' train "$@" &
step=$!

# A signal ends `wait` but not the step: it is waited for until it has ended.
status=0
while true; do
    wait "$step" && status=0 || status=$?
    kill -0 "$step" 2> /dev/null || break
done

if [[ -n "$requeue" && $status -ne 0 ]]; then
    echo "stopped before the time limit; the job goes back into the queue and goes on there"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
