"""Bytes that two ranks send for each optimizer step under each data-parallel strategy: ``python benchmarks/wire.py``.

Both ranks are on this machine and talk over its loopback interface, whose own counter of bytes is read before and after
a short run and a longer one; the difference is what further steps send. Linux only, and nothing else may talk there:
``unshare --net`` has an interface of its own.
Steps are those after the ones that a strategy starts with. It writes ``benchmarks/results/wire.json`` and prints the
table of ``docs/scaling.md``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.progress import track

from benchmarks.pool import ROOT

RESULTS = ROOT / "benchmarks/results/wire.json"
NET = "--model.config.init_args"
SHORT, LONG = 40, 140
RUNS: dict[str, tuple[str, list[str]]] = {
    "ddp": ("ddp", []),
    "ring_allreduce": ("ring_allreduce", []),
    "fsdp2": ("fsdp2", []),
    "ddp_powersgd": ("ddp_powersgd", ["--trainer.strategy.start_step", "10"]),
    "parameter_server": ("parameter_server", []),
    "local_sgd, sync_every 8": ("local_sgd", []),
    "diloco, sync_every 20": ("diloco", ["--trainer.strategy.sync_every", "20"]),
}


def sent() -> int:
    """Bytes that have gone over the loopback interface since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (counters,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith("lo:"))
    return int(counters[8])


def run(strategy: str, flags: list[str], steps: int) -> int:
    """Bytes of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "recipes/lm/train.py"), "fit",
            "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), *flags,
            f"{NET}.hidden_size", "128", f"{NET}.intermediate_size", "256", f"{NET}.num_hidden_layers", "2",
            "--data.batch_size", "2", "--data.context", "32", "--trainer.accelerator", "cpu", "--trainer.devices", "2",
            "--trainer.max_steps", str(steps), "--trainer.gradient_clip_val", "null", "--trainer.logger", "false",
            "--trainer.log_every_n_steps", "100000", "--trainer.limit_val_batches", "0", "--trainer.callbacks", "null",
            "--trainer.enable_checkpointing", "false", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", "--trainer.default_root_dir", folder,
        ]  # fmt: skip
        before = sent()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
        return sent() - before


def main() -> None:
    """Measure all, and print the table."""
    results = {}
    for name, (strategy, flags) in track(RUNS.items(), "runs", total=len(RUNS)):
        short, long = (run(strategy, flags, steps) for steps in (SHORT, LONG))
        results[name] = (long - short) / (LONG - SHORT)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("| layer | bytes of a step, both ranks | beside `ddp` |\n|---|---|---|")
    for name, size in results.items():
        print(f"| {name} | {size / 1e6:.2f} MB | {size / results['ddp']:.2f} |")


if __name__ == "__main__":
    main()
