"""Training of the teacher: the recipe trains it first, and keeps it for all later runs."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from typing_extensions import override

from common.cache import CACHE, make_cache
from common.data import TrainSampler, end_with_parent
from common.errors import InputError, Stopped, nearest, speaking_of
from common.run.cli import DEFAULTS, RecipeCLI
from common.run.layers import to_yaml
from common.sources.labelled import fingerprint

FORMAT = 4  # bump when equal settings would train a different teacher, or keep it elsewhere
COMPARING = ("fit", "validate", "test")  # the commands that need the teacher
# Settings of the data that are the student's alone; the teacher has its own.
OWN = ("batch_size", "eval_batch_size", "num_workers", "predict_source", "keep", "weights", "init_from")
LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "NODE_RANK", "TORCHELASTIC_", "PL_", "SLURM_")


def train_first(recipe: Path, config: Mapping[str, Any], training: str, fingerprint: str, cache_dir: str) -> Path:
    """The best checkpoint of a teacher, trained in its own process unless an earlier run has done so.

    The teacher's settings are the recipe's ``config.yaml``, the student's data, the student's ``model.teacher`` as the
    net, and the layer ``training``. It has no augmentation if the student has none. It is kept under a hash of these
    settings and the samples. The first of several ranks trains alone; the others wait. Several nodes must share
    ``cache_dir``.

    Args:
        recipe: folder of the recipe.
        config: the student's resolved config.
        training: a YAML file, in that folder or elsewhere, with the settings of the teacher's training.
        fingerprint: fingerprint of the samples.
        cache_dir: folder of kept teachers.

    Raises:
        InputError: there is no such file, or the training was refused.
    """
    layer = recipe / training
    if not layer.is_file():
        hint = nearest(layer.name, (path.name for path in recipe.glob("*.yaml")))
        raise InputError(f"model.teacher_training {training}: no such file in {recipe.name}{hint}")
    data = {key: value for key, value in config["data"].items() if key not in OWN}
    if weights := config["model"].get("weights"):  # whose tokenizer the data have
        its = {"class_path": "common.sources.tokenizers.PretrainedTokenizer", "init_args": {"name": weights}}
        arguments = data["source"]["init_args"]
        data["source"] = data["source"] | {"init_args": {**arguments, "tokenizer": arguments["tokenizer"] or its}}
    base: dict[str, Any] = {"model": {"net": config["model"]["teacher"], "teacher": None}, "data": data}
    if config["model"]["augmentation"] is None:  # as for texts; the layer may have one
        base["model"]["augmentation"] = None
    layers = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (DEFAULTS, recipe / "config.yaml", layer)]
    facts = json.dumps([FORMAT, layers, base, fingerprint, *_stamp(config["model"]["teacher"])], sort_keys=True)
    folder = Path(cache_dir).expanduser() / "teachers" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    make_cache(folder.parent)
    done = folder / "done"  # holds the folder of the finished run; a copy of the recipe has another name
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            folder.mkdir(exist_ok=True)
            try:
                _train(recipe, base, layer, config["trainer"], folder)
            except (InputError, subprocess.CalledProcessError):
                if not any(folder.glob("runs/*/teacher/checkpoints/*.ckpt")):  # else it goes on next time
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            done.write_text(f"runs/{recipe.name}/teacher", encoding="utf-8")
            print("teacher: is trained; the student follows", flush=True)
    return folder / done.read_text(encoding="utf-8") / "checkpoints/best.ckpt"


def _stamp(net: Mapping[str, Any]) -> list[Any]:
    """What changes when the weights do that a net begins with: names, sizes and times of the files of their folder."""
    folder = Path(str(net.get("init_args", {}).get("name"))).expanduser()
    stats = ((path.name, path.stat()) for path in sorted(folder.glob("*")) if path.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _train(recipe: Path, base: Mapping[str, Any], layer: Path, trainer: Mapping[str, Any], folder: Path) -> None:
    config = folder / "base.yaml"
    config.write_text(to_yaml(base), encoding="utf-8")
    print(f"teacher: trained first, and kept in {folder}", flush=True)
    command = [
        sys.executable, str(recipe / "train.py"), "fit", "--config", str(config), "--config", str(layer),
        "--name", "teacher", "--ckpt_path", "auto", "--trainer.default_root_dir", str(folder), "--trainer.devices", "1",
        "--trainer.accelerator", str(trainer["accelerator"]),
    ]  # fmt: skip
    if trainer["enable_progress_bar"] is False:
        command += ["--trainer.enable_progress_bar", "false"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHED)}
    env["PYTHONPATH"] = os.pathsep.join([str(recipe.parent.parent), *filter(None, [env.get("PYTHONPATH")])])
    die = end_with_parent if sys.platform == "linux" else None
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=die)
    try:
        _, stderr = process.communicate()
    except Stopped:
        process.terminate()  # it saves its step
        process.communicate()
        raise
    except BaseException:
        process.kill()
        raise
    if process.returncode == 2 and stderr.strip():
        # The message names the process's own config; its net is the teacher here.
        line = re.sub(rf"^{re.escape(str(config))}:\d+: ", "", stderr.strip().splitlines()[-1])
        line = line.replace(".init_args", "").replace("model.net", "model.teacher")
        line = line.replace(f"{layer}:", f"{layer.name}:")
        where = "model.teacher_training:" if line.startswith(layer.name) else f"model.teacher_training {layer.name}:"
        raise InputError(f"{where} {line}")
    if process.returncode > 128:
        raise Stopped(stderr.strip(), process.returncode)
    if process.returncode:
        sys.stderr.write(stderr)
        raise subprocess.CalledProcessError(process.returncode, command)


class TeacherCLI(RecipeCLI):
    """Trains the teacher first if it has no weights yet, after the check of all settings and before ranks start."""

    @override
    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        module: Any = self.model
        make, training = module.make_teacher, module.teacher_training
        if make is None or module.teacher_checkpoint or self.subcommand not in COMPARING:
            return
        if not training:
            print("teacher: has the weights that model.teacher comes with; there is no model.teacher_checkpoint")
            return
        with speaking_of("model.teacher", instead_of="model.net"):
            make(module.num_classes)  # a mistake in its arguments shows at once
        data: Any = self.datamodule
        if self.subcommand == "fit":  # too few samples show before the teacher is trained
            TrainSampler(len(data.train_positions), data.batch_size, self.trainer)
        found = fingerprint(data.samples.labelled)
        module.teacher_checkpoint = str(train_first(self.recipe_dir, self.resolved, training, found, CACHE))
        # The run's own config names it, so a resumed run keeps this teacher after any edit of the settings.
        self.resolved["model"]["teacher_checkpoint"] = module.teacher_checkpoint
