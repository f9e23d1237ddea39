"""A teacher that is trained first, by the recipe itself, and kept for all later runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from typing_extensions import override

from common.cli import RecipeCLI
from common.data import TrainSampler
from common.errors import InputError, nearest, speaking_of
from common.labelled import fingerprint
from common.text import CACHE

FORMAT = 1  # to be raised when the same settings would train another teacher
COMPARING = ("fit", "validate", "test")  # the commands that ask the teacher
LOADING = ("batch_size", "eval_batch_size", "num_workers")  # of the student's data, no property of it
LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "NODE_RANK", "TORCHELASTIC_", "PL_", "SLURM_")


def train_first(recipe: Path, config: Mapping[str, Any], training: str, fingerprint: str, cache_dir: str) -> Path:
    """The best checkpoint of a teacher, trained in a process of its own unless an earlier run has done so.

    Its settings are the recipe's ``config.yaml``, the student's data, the student's ``model.teacher`` as the net, and
    the layer ``training``, without augmentation where the student has none. It is kept under a hash of them and of the
    samples. The first of several ranks trains, alone, while the others wait. On several nodes ``cache_dir`` has
    to be a folder that they share.

    Args:
        recipe: folder of the recipe.
        config: the student's resolved config.
        training: a YAML file in that folder, or anywhere, that says how the teacher is trained.
        fingerprint: of the samples.
        cache_dir: where teachers are kept, each in the folder of its run.

    Raises:
        InputError: there is no such file, or the training was refused.
    """
    layer = recipe / training
    if not layer.is_file():
        hint = nearest(layer.name, (path.name for path in recipe.glob("*.yaml")))
        raise InputError(f"model.teacher_training {training}: no such file in {recipe.name}{hint}")
    data = {key: value for key, value in config["data"].items() if key not in LOADING}
    base: dict[str, Any] = {"model": {"net": config["model"]["teacher"], "teacher": None}, "data": data}
    if config["model"]["augmentation"] is None:  # as texts must; the layer may have one
        base["model"]["augmentation"] = None
    layers = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (recipe / "config.yaml", layer)]
    facts = json.dumps([FORMAT, layers, base, fingerprint], sort_keys=True)
    folder = Path(cache_dir).expanduser() / "teachers" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            _train(recipe, base, layer, config["trainer"], folder)
    return folder / "checkpoints/best.ckpt"


def _train(recipe: Path, base: Mapping[str, Any], layer: Path, trainer: Mapping[str, Any], folder: Path) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed: the lock is ours
    part.mkdir()
    (part / "base.yaml").write_text(yaml.safe_dump(dict(base)), encoding="utf-8")
    print(f"teacher: trained first, and kept in {folder}", flush=True)
    command = [
        sys.executable, str(recipe / "train.py"), "fit", "--config", str(part / "base.yaml"), "--config", str(layer),
        "--name", "teacher", "--trainer.default_root_dir", str(part), "--trainer.devices", "1",
        "--trainer.accelerator", str(trainer["accelerator"]),
    ]  # fmt: skip
    if trainer["enable_progress_bar"] is False:
        command += ["--trainer.enable_progress_bar", "false"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    env["PYTHONPATH"] = os.pathsep.join([str(recipe.parent.parent), *filter(None, [env.get("PYTHONPATH")])])
    try:
        done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 2 and done.stderr.strip():
            raise InputError(f"model.teacher_training {layer.name}: {done.stderr.strip().splitlines()[-1]}")
        if done.returncode:
            sys.stderr.write(done.stderr)
            done.check_returncode()
        (part / "runs" / recipe.name / "teacher").rename(folder)
    finally:
        shutil.rmtree(part)


class TeacherCLI(RecipeCLI):
    """Trains the teacher first where it has no weights yet: when all settings are checked, and before ranks start."""

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        module: Any = self.model
        make, training = module.make_teacher, module.teacher_training
        if make is None or module.teacher_checkpoint or not training or self.subcommand not in COMPARING:
            return
        with speaking_of("model.teacher", instead_of="model.net"):
            make(module.num_classes)  # a mistake in its arguments shows at once
        data: Any = self.datamodule
        if self.subcommand == "fit":  # nor should too few samples cost the teacher's training
            TrainSampler(len(data.train_positions), data.batch_size, self.trainer)
        found = fingerprint(data.labelled)
        module.teacher_checkpoint = str(train_first(self.recipe_dir, self.resolved, training, found, CACHE))
        # The run's own config names it: a resumed run goes on with this teacher, whatever has been edited since.
        self.resolved["model"]["teacher_checkpoint"] = module.teacher_checkpoint
