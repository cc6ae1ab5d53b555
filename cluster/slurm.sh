#!/bin/bash
# A job on Slurm: a Ray head on the first node, a worker on every other, and the run beside the head.
#   sbatch cluster/slurm.sh jobs/qwen3-32b.yaml --set store.url=/shared/team/qwen3-32b
# Arguments are those of persona-ray run. The environment with this package is the one that is active when sbatch is called.
# When its time is up the run finishes what is under way, and the job queues itself again, until nothing is missing.
#SBATCH --job-name=persona-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=persona-ray-%j.log
set -euo pipefail

[ $# -ge 1 ] || { echo "cluster/slurm.sh: which job? sbatch cluster/slurm.sh jobs/NAME.yaml" >&2; exit 2; }

# sed reads to the end: what writes to a head that has gone is ended by a signal, and this script with it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | tr ' ' '\n' | grep -v : | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 10000))
# The token is this job's own; srun hands it to the other nodes with the environment.
RAY_AUTH_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer takes it over from sbatch
# Of this job alone: other users of a node have a /tmp/ray, too.
ray_start=(ray start --block --disable-usage-stats --num-cpus "$SLURM_CPUS_PER_TASK" --temp-dir "/tmp/ray-$SLURM_JOB_ID")

srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" \
  "${ray_start[@]}" --head --node-ip-address "$ip" --port "$port" --dashboard-host 127.0.0.1 &
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  # A worker that is too early tries again; one that is lost costs its units under way, and not the job.
  srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$first" --kill-on-bad-exit=0 \
    bash -c 'for _ in 1 2 3 4 5; do "$@" && break; sleep 10; done' worker "${ray_start[@]}" --address "$ip:$port" &
fi

# A run looks at the cluster as it is when it begins, so all nodes should be there.
deadline=$((SECONDS + 600))
export RAY_ADDRESS="$ip:$port"
until [ "$(ray list nodes --filter state=ALIVE --format json 2>/dev/null | grep -o '"node_id"' | wc -l)" = "$SLURM_JOB_NUM_NODES" ]; do
  [ $SECONDS -lt $deadline ] || { echo "cluster/slurm.sh: not all $SLURM_JOB_NUM_NODES nodes have joined within 10 minutes" >&2; exit 1; }
  sleep 2
done

persona-ray run "$@" --address "$ip:$port" &
run=$!
trap 'kill -TERM $run' TERM

code=0
wait $run || code=$?
# wait also ends when the signal comes, and the run is not over then.
while kill -0 $run 2>/dev/null; do
  code=0
  wait $run || code=$?
done
# 130: interrupted, and the same command resumes.
if [ $code -eq 130 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
