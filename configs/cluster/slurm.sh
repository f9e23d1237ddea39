#!/bin/bash
# One job on several nodes, requeued until the run is complete.
#   sbatch configs/cluster/slurm.sh lm my_run --config configs/strategy/fsdp2.yaml --config configs/precision/bf16-mixed.yaml
# Slurm starts one process per GPU; Lightning reads ranks and addresses from Slurm's variables. Two minutes before the
# time limit every process gets SIGTERM: the ranks agree on a step, write last.ckpt and end with 143, and the job is
# requeued. So it is, five times at most, when a rank is lost; the run then goes on from the last periodic checkpoint.
#SBATCH --job-name=recipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
recipe=$1 name=$2
shift 2

resume=()
if [ -e "runs/$recipe/$name/checkpoints/last.ckpt" ]; then resume=(--ckpt_path last); fi

srun --kill-on-bad-exit=1 python "recipes/$recipe/train.py" fit --name "$name" "${resume[@]}" "$@" \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
code=$?
case $code in
  143) scontrol requeue "$SLURM_JOB_ID" ;; # SIGTERM: the time limit, or a preemption
  # A lost rank, an abort of NCCL, a kill. A bug of one rank looks the same to the others, hence the limit.
  3 | 134 | 137) if [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then scontrol requeue "$SLURM_JOB_ID"; fi ;;
esac
exit $code
