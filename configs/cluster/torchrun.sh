#!/bin/bash
# The same command on every node; torchrun starts one process per device and starts all again when one fails.
#   HOST=node0:29500 NODES=2 DEVICES=8 configs/cluster/torchrun.sh lm my_run --config configs/strategy/fsdp2.yaml
# After a restart the run goes on from its last checkpoint; a mistake in the input is restarted as well, three times in
# all. On one node, all three variables may be left out. ROOT, the folder that runs/ is in, and the data must be on a file
# system that all nodes share.
recipe=$1 name=$2
shift 2
nodes=${NODES:-1} devices=${DEVICES:-1} root=${ROOT:-.}

exec torchrun --nnodes "$nodes" --nproc_per_node "$devices" --rdzv_backend c10d --rdzv_endpoint "${HOST:-localhost:0}" \
  --max_restarts 3 "recipes/$recipe/train.py" fit --name "$name" --ckpt_path auto "$@" --trainer.default_root_dir "$root" \
  --trainer.num_nodes "$nodes" --trainer.devices "$devices"
