#!/bin/bash
# One job on several nodes, requeued until the run is complete.
#   sbatch configs/cluster/slurm.sh lm my_run --config configs/strategy/fsdp2.yaml --config configs/precision/bf16-mixed.yaml
# Slurm starts one process per GPU; Lightning reads ranks and addresses from Slurm's variables. Five minutes before the
# time limit every process gets SIGTERM: the ranks agree on a step, write last.ckpt and end with 143, and the job is
# requeued. When a rank is lost, it is requeued too, at most five times without a new checkpoint in between. ROOT, the
# folder that runs/ is in, and the data must be on a file system that all nodes share.
#SBATCH --job-name=recipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
recipe=$1 name=$2 root=${ROOT:-.}
shift 2
run="$root/runs/$recipe/$name" failures="$root/runs/$recipe/.$name.failures"

began=$(mktemp)
mkdir -p "$root/runs/$recipe"
if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then rm -f "$failures"; fi
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python "recipes/$recipe/train.py" fit --name "$name" --ckpt_path auto "$@" --trainer.default_root_dir "$root" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
code=$?
# A checkpoint shows that the job gets on: SIGTERM came from the time limit or a preemption, or a rank was lost later.
# Otherwise a rank was lost, NCCL aborted, or a bug ended one rank, which looks the same to the others: hence the limit.
if [[ $code =~ ^(3|129|134|137|138|143)$ ]]; then
  if [ "$run/checkpoints/last.ckpt" -nt "$began" ]; then rm -f "$failures"; else echo $code >> "$failures"; fi
  if [ ! -e "$failures" ] || [ "$(wc -l < "$failures")" -le 5 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit $code
