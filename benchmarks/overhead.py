"""What the recipe adds to a bare training loop: ``python benchmarks/overhead.py --path tinyshakespeare.txt``.

The shakespeare preset's net and batches are trained in turns by a plain PyTorch loop and by the recipe, in one process,
and the medians of their step times compared. Both clip, schedule and read the same windows; only the recipe logs.
"""

import argparse
import contextlib
import io
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from common.run.callbacks import Throughput
from common.sources.text import Windows, prepare
from common.sources.tokenizers import Characters
from recipes.lm.train import main

ROOT = Path(__file__).resolve().parent.parent


def bare(windows: Windows, vocab_size: int, steps: int) -> float:
    """Median step time of a plain loop, in milliseconds."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    net = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randperm(len(windows)).tolist()
    times = []
    for step in range(steps):
        start = time.perf_counter()
        input_ids, target = windows[order[step * 12 : step * 12 + 12]]
        loss = F.cross_entropy(net(input_ids=input_ids, use_cache=False).logits.flatten(0, 1), target.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def recipe(path: str, steps: int) -> float:
    """Median step time of the recipe, in milliseconds."""
    times: list[float] = []
    plain_end = Throughput.on_train_batch_end

    def timed_end(self: Throughput, *args: object) -> None:
        times.append(time.perf_counter())
        plain_end(self, *args)  # type: ignore[arg-type]

    Throughput.on_train_batch_end = timed_end  # type: ignore[method-assign,assignment]
    with contextlib.redirect_stdout(io.StringIO()):
        main([
            "fit", "--config", str(ROOT / "recipes/lm/shakespeare.yaml"), "--data.path", path,
            "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0", "--model.sample_tokens", "0",
            "--trainer.accelerator", "cpu", "--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "4.0e-3",
            "--model.optimizer.betas", "[0.9, 0.99]", "--model.optimizer.weight_decay", "0.1",
        ])  # fmt: skip
    Throughput.on_train_batch_end = plain_end  # type: ignore[method-assign]
    return statistics.median(after - before for before, after in itertools.pairwise(times)) * 1e3


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True, help="a text file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    path = str(Path(options.path).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        corpus = prepare(path, Characters(), cache_dir=Path(folder))
        windows = Windows(corpus.train, 64, keep_partial=False)
        rounds = [
            (bare(windows, corpus.vocab_size, options.steps), recipe(path, options.steps))
            for _ in range(options.rounds)
        ]
    plain, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"| bare loop | recipe | ratio |\n|---|---|---|\n| {plain:.1f} ms | {ours:.1f} ms | {ours / plain:.3f} |")
