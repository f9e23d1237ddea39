"""A run that is killed and resumed ends with the very weights, optimizer and schedule of one that was not.

In the cells any two of {recipe, strategy, 1 process or 2 ranks, place to stop, 0 or 2 workers} meet, with workers under
DDP; the suite runs every recipe once, ``make test-all`` the rest. tests/test_goes_on.py has the other settings.
"""

import functools
import hashlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from common.checkpoint import read_checkpoint
from tests.support import (
    EXACT,
    RECIPES,
    ROOT,
    covering,
    is_refused,
    logs,
    main_of,
    per_rank,
    run_ranks,
    runs_on,
    text_args,
    under,
)

# Where a run stops: (settings of the run, checkpoint settings, micro-batch after which every rank is killed).
# Both epochs have 12 micro-batches; where they are odd the data has 11, of which the last is half a step and left out.
STOPS: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "mid_epoch": (["--trainer.limit_train_batches", "12"], {"every_n_train_steps": 5}, 7),
    "step_on_last_batch": (["--trainer.limit_train_batches", "12"], {"every_n_train_steps": 12}, 14),
    "per_epoch": (["--trainer.limit_train_batches", "12"], {"every_n_train_steps": None}, 15),
    "odd_accumulation": (
        ["--trainer.limit_train_batches", "1.0", "--trainer.accumulate_grad_batches", "2"],
        {"every_n_train_steps": 3},
        7,
    ),
}
# The suite has every recipe once, some on one process, and DDP with workers.
FAST = [
    ("classification", 2, "odd_accumulation", 2, "ddp"),
    *(
        (recipe, 1 + (under(recipe) != "ddp"), list(STOPS)[i % len(STOPS)], 0, under(recipe))
        for i, recipe in enumerate(RECIPES)
    ),
]


def runs(cell: tuple[Any, ...]) -> bool:
    recipe, world, _, workers, strategy = cell
    return not is_refused(recipe, strategy) and runs_on(strategy, world) and (workers == 0 or strategy == "ddp")


CELLS = dict.fromkeys([*FAST, *covering(RECIPES, (1, 2), STOPS, (0, 2), EXACT, allowed=runs)])


def digest(path: Path) -> str:
    """sha256 over all weights and the state of the optimizer and the schedule."""
    checkpoint = read_checkpoint(path)
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add([checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")])
    return sha.hexdigest()


def killed_main(recipe: str, args: list[str], micro_batch: int) -> None:
    """Train until a micro-batch has been computed, then die without any chance to tidy up."""
    from common.module import BaseModule

    start = BaseModule.on_train_batch_start

    def start_or_die(self: BaseModule, batch: Any, batch_idx: int) -> None:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx + 1 == micro_batch:
            # A rank that still waited for this one would see it die, and end by itself.
            Path(f"reached-{self.global_rank}").touch()
            while not all(Path(f"reached-{rank}").exists() for rank in range(self.trainer.world_size)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        start(self, batch, batch_idx)

    BaseModule.on_train_batch_start = start_or_die  # type: ignore[method-assign]  # in this forked process only
    main_of(recipe)(args)


def write_config(folder: Path, saves: dict[str, Any]) -> Path:
    """A layer that says when ``last.ckpt`` is written, without metrics to make a report of."""
    path = folder / "resume.yaml"
    trainer = {"callbacks": [], "logger": False}
    path.write_text(yaml.safe_dump({"last": saves, "media": {"every_n_validations": 0}, "trainer": trainer}))
    return path


def whole_run(recipe: str, args: list[str], world: int, work: Path, left_out: tuple[str, ...]) -> str:
    """The digest of the run that nothing stops: made once for all places to stop, and kept for all workers."""
    own = [arg for arg in args if arg not in left_out]
    name = hashlib.sha256(repr((recipe, world, own)).encode()).hexdigest()
    kept = Path(os.environ["XDG_CACHE_HOME"]) / f"whole-{name}"
    if not kept.exists():
        codes = run_ranks(main_of(recipe), [*args, "--name", "whole"], world=world, folder=work / "whole")
        assert codes == [0] * world, logs(work / "whole")
        (work / "digest").write_text(digest(work / "runs" / recipe / "whole/checkpoints/last.ckpt"))
        shutil.move(work / "digest", kept)
    return kept.read_text()


@functools.cache
def training_samples(recipe: str, args: tuple[str, ...]) -> int:
    """Size of the data that a recipe trains on."""
    return len(main_of(recipe)(["preflight", *args]).datamodule.train_data)


@pytest.mark.parametrize(
    ("recipe", "world", "stop", "workers", "strategy"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_killed_run_goes_on_to_the_bit(
    recipe: str, world: int, stop: str, workers: int, strategy: str, work: Path, small_text: Path
) -> None:
    settings, saves, micro_batch = STOPS[stop]
    own = text_args(recipe, small_text)
    batch_size = (
        per_rank(training_samples(recipe, tuple(own)) // 11, world, strategy) if stop == "odd_accumulation" else 4
    )
    # A curriculum's batches are halved twice, those of a pipeline have four micro-batches.
    batch_size -= batch_size % 4 if recipe == "curriculum" or strategy == "pipeline" else 0
    args = [
        "fit", "--config", str(write_config(work, saves)), "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"),
        "--data.batch_size", str(batch_size), "--data.num_workers", str(workers), "--trainer.accelerator", "cpu",
        "--trainer.devices", str(world), "--trainer.max_epochs", "2", "--trainer.max_steps", "-1",
        "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "1.0",
        "--trainer.check_val_every_n_epoch", "1", "--trainer.enable_progress_bar", "false", *settings,
    ]  # fmt: skip
    args += own
    if recipe == "lm":
        args += ["--model.config.init_args.attention_dropout", "0.1"]
    main = main_of(recipe)
    cut = [*args, "--name", "cut"]
    # When it saves changes nothing, nor does where each worker keeps the text.
    whole = whole_run(recipe, args, world, work, (str(work / "resume.yaml"), str(small_text)))
    killed = run_ranks(killed_main, recipe, cut, micro_batch, world=world, folder=work / "killed")
    assert killed == [-signal.SIGKILL] * world, logs(work / "killed")
    last = work / "runs" / recipe / "cut/checkpoints/last.ckpt"
    half, geometry = (read_checkpoint(last)[key] for key in ("global_step", "geometry"))
    assert geometry["per_epoch"] == (10 if stop == "odd_accumulation" else 12)
    resumed = run_ranks(main, [*cut, "--ckpt_path", "last"], world=world, folder=work / "resumed")
    assert resumed == [0] * world, logs(work / "resumed")
    assert 0 < half < read_checkpoint(last)["global_step"]
    assert digest(last) == whole
