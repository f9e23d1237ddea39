"""One command line for every recipe: LightningCLI with a run folder, layered configs and errors in one line."""

import copy
import errno
import inspect
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Any

import jsonargparse
import jsonargparse._typehints as _typehints
import lightning as L
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.distributed import is_torchelastic_launched
from typing_extensions import override

from common.checkpoint import AtomicCheckpointIO, read_checkpoint
from common.data import BaseDataModule
from common.errors import LOST_RANK_EXIT, InputError, Stopped, nearest, short_path, speaking_of
from common.module import BaseModule
from common.parts import facts_of
from common.run import layers
from common.run.callbacks import BestCheckpoint, LastCheckpoint
from common.run.faults import Endings, lost_rank
from common.run.folder import RunFolder, make
from common.run.loggers import Wandb
from common.run.loop import EpochLoop, FitLoop
from common.run.media import Media
from common.run.messages import LIBRARIES, explain
from common.run.output import lasting_output, spare
from common.run.parser import TRAINER_HELP, RecipeParser
from common.run.predictions import PredictionWriter
from common.run.record import RunRecord, RunReport, source_of
from common.run.results import keeping_results
from common.run.signals import listening
from common.run.trainer import RecipeTrainer

# What every recipe repeats.
DEFAULTS = Path(__file__).resolve().parents[2] / "configs/defaults.yaml"

# The callbacks that every run has, whatever a layer lists, by the key of their settings.
CALLBACKS: dict[str, type[Callback]] = {"best": BestCheckpoint, "last": LastCheckpoint, "media": Media}

# What loggers are asked to do.
LOGGING = ("log_metrics", "log_hyperparams", "log_graph", "log_image", "save", "finalize", "after_save_checkpoint")

# The commands that are about a run.
OF_RUN = ("validate", "test", "predict", "export")

# Errors of a disk.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}

# The flags that say where a run is.
WHERE = ("config", "name", "ckpt_path", "trainer.default_root_dir")

# Lightning refuses these flags as long as the config lists such a callback.
SWITCHES = {
    "enable_progress_bar": ProgressBar,
    "enable_checkpointing": Checkpoint,
    "enable_model_summary": ModelSummary,
}

# Lightning's callbacks that would do something else than they say.
_MAKES_NET = "looks for the net before it is made"
MISFITS = {
    "StochasticWeightAveraging": f"{_MAKES_NET} and averages nothing; remove it",
    "WeightAveraging": f"{_MAKES_NET} and averages nothing; remove it",
    "EMAWeightAveraging": f"{_MAKES_NET} and averages nothing; remove it",
    "ModelPruning": f"{_MAKES_NET} and prunes nothing; remove it",
    "GradientAccumulationScheduler": "changes how many steps a run has, which schedules and a resume count ahead; "
    "remove it and set trainer.accumulate_grad_batches",
    "LearningRateFinder": "trains before the first step; remove it and set model.optimizer.lr",
    "BatchSizeFinder": "changes the batch size after samples are shared out; remove it and set data.batch_size",
}

# Lightning's warnings about what is right here: a run goes on in its own folder, the loader's position is derived from
# the trainer's counters, arrays in memory need no reading processes, predictions know their own order, a frozen body
# stays in eval mode, DeepSpeed clips and goes backward by itself, fp16 on a CPU is refused, FSDP on one rank has
# nothing to shard and leaves batch norm in fp32. A picture shows a box for a character that its font does not have. A
# run may go on with another metric for its best.
NO_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "The '.*_dataloader' does not have many workers",
    "Couldn't infer the batch indices fetched from your dataloader",
    "Found .* module\\(s\\) in eval mode at the start of training",
    "The number of training batches .* is smaller than the logging interval",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "`torch.distributed.\\w+` is deprecated",
    "Since DeepSpeed handles gradient clipping internally",
    "You have overridden the `LightningModule.backward` hook but it will be ignored since DeepSpeed",
    "You passed .* AMP with fp16 is not supported on CPU",
    "torch.cuda.amp.GradScaler is enabled, but CUDA is not available",
    "FSDP with `.*-true` enables computation in lower precision",
    "FSDP is switching to use `NO_SHARD`",
    "Glyph \\d+ .* missing from",
    "Both mixed precision and an auto_wrap_policy were specified to FSDP",
    "When using ``NO_SHARD`` for ``ShardingStrategy``",
    "Be aware that when using `ckpt_path`, callbacks .*: \\[.BestCheckpoint",
    "FSDP.state_dict_type\\(\\) and FSDP.set_state_dict_type\\(\\) are being deprecated",
)


def _forget_init_args(parser: Any, previous: Any, value: Any) -> None:
    """Drop every argument of the class that a config named before, when another class takes its place.

    jsonargparse keeps those that the new class accepts as well: SGD would get AdamW's weight decay (jsonargparse#460).
    """
    if previous and previous.get("init_args") and previous["class_path"] != value["class_path"]:
        for key in list(previous["init_args"].keys()):
            previous["init_args"].pop(key)


_typehints.discard_init_args_on_class_path_change = _forget_init_args

_forget_nested = _typehints.ActionTypeHint.discard_init_args_on_class_path_change


def _forget_nested_init_args(parser_or_action: Any, prev_cfg: Any, cfg: Any) -> None:
    """The same for classes among the arguments; jsonargparse stumbles if the new class has been given no argument."""
    if cfg is not None:
        _forget_nested(parser_or_action, prev_cfg, cfg)


_typehints.ActionTypeHint.discard_init_args_on_class_path_change = staticmethod(_forget_nested_init_args)


_HOME = ContextVar("package of the recipe that runs", default="")
_all_subclasses = _typehints.get_all_subclass_paths


def _subclasses(*args: Any, **settings: Any) -> list[str]:
    """Paths of a class's subclasses; the recipe's own stand for those of a copy that this process knows as well."""
    paths, home = _all_subclasses(*args, **settings), f"{_HOME.get()}."
    own = {path.removeprefix(home) for path in paths if path.startswith(home)}
    return [path for path in paths if path.startswith(home) or ".".join(path.split(".")[-2:]) not in own]


_typehints.get_all_subclass_paths = _subclasses


class RecipeCLI(LightningCLI):
    """The command line of a recipe.

    ``configs/defaults.yaml`` and then ``config.yaml`` beside the module's file are loaded by default. What a run writes
    lies in its :class:`RunFolder`; relative ``save_dir`` of loggers and ``dirpath`` of checkpoints are in there.
    ``--ckpt_path last`` and ``best`` look in there too, and start from the config that the run was made with; flags
    given now win over it.

    Args:
        module_class: the recipe's LightningModule.
        datamodule_class: the recipe's DataModule.
        links: facts of the built DataModule that become arguments of the module, by their full keys; or an argument of
            the module that becomes one of the DataModule.
        args: command-line arguments; None for the process's own.

    Raises:
        InputError: a mistake in ``args``, or in what they name. In the process's own arguments it ends the process.
    """

    def __init__(
        self,
        module_class: type[BaseModule],
        datamodule_class: type[BaseDataModule],
        links: Mapping[str, str],
        args: list[str] | None = None,
    ):
        argv = list(sys.argv[1:] if args is None else args)
        self.ends_process, debug = args is None, "--debug" in argv
        self.argv = [arg for arg in argv if arg != "--debug"]
        self.links = links
        self.command = next((arg for arg in self.argv if arg in self.subcommands()), "")
        self.package = module_class.__module__.rpartition(".")[0]
        _HOME.set(self.package)
        self.taken: layers.Taken | None = None  # from the checkpoint's run
        self.began_with: str | None = None  # the weights with which the run has begun
        self.began_with_facts: dict[str, str | None] = {}  # its own ``data.facts_of``, if it was given one
        self.recipe_dir = Path(inspect.getfile(module_class)).resolve().parent
        self.defaults = [DEFAULTS, self.recipe_dir / "config.yaml"]
        default = {"default_config_files": [str(path) for path in self.defaults], "exit_on_error": False}
        with lasting_output(), one_line_errors(self, debug), listening() as self.signals:
            _quiet_stderr()
            if args is None:
                logging.captureWarnings(True)
            for arg in self.argv:
                if not arg.isascii() and arg != arg.encode(errors="replace").decode():
                    problem = "is not UTF-8; set PYTHONUTF8=1, or take another name"
                    raise InputError(f"command line: {arg!r} {problem}")
            if not all(part.isidentifier() for part in self.package.split(".")):
                problem = "cannot be the name of a Python package; take letters, digits and underscores"
                raise InputError(f"{self.recipe_dir}: {self.recipe_dir.name!r} {problem}")
            allowed = [*_packages(), "recipes", self.package]
            jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)
            super().__init__(
                module_class,
                datamodule_class,
                trainer_class=RecipeTrainer,
                save_config_callback=None,
                seed_everything_default=1,
                parser_class=RecipeParser,
                # A mistyped flag must not pass as the short form of another.
                parser_kwargs={"allow_abbrev": False, **{name: dict(default) for name in self.subcommands()}},
                trainer_defaults={"use_distributed_sampler": False},  # the samplers of common.data know their rank
                auto_configure_optimizers=False,
                args=self.argv,
            )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # Checkpoints are always loaded with weights only.
        own = {"preflight": {"model", "datamodule"}, "export": {"model", "datamodule"}}
        return {name: skip | {"weights_only"} for name, skip in LightningCLI.subcommands().items()} | own

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # Reading all signatures takes a tenth of a second for each command: only those of the one that is given.
        if subcommand != self.command:
            return self.init_parser(**kwargs)
        self.command_parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.command_parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="default", help="Name of the run, its folder in runs/<recipe>/."
        )
        for key, kind in CALLBACKS.items():
            parser.add_class_arguments(kind, key, skip={"monitor"})
        parser.add_argument("--best.monitor", "--monitor", type=str, default="val/loss")
        parser.add_argument(TRAINER_HELP, action="help")
        if self.command == "fit":
            help = "A checkpoint, the name of a run or the folder of an export, whose weights the net starts with."
            parser.add_argument("--init_from", type=str | None, default=None, help=help)
        for source, target in self.links.items():
            if source == "init_from" and self.command != "fit":
                continue  # no other command begins a run
            of_built = source.startswith("data.")
            parser.link_arguments(source, target, apply_on="instantiate" if of_built else "parse")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        layers.check(self.argv)
        self.subcommand = self.command
        where = self.argv.index(self.subcommand) + 1 if self.subcommand else 0
        head, flags = self.argv[:where], self.argv[where:]
        given = [flag for flag, _ in layers.flags(flags)]
        # Flags may be for a class that only the config of the checkpoint's run names, which has to be found first.
        finds_run = (self.subcommand in OF_RUN or "ckpt_path" in given) and not {"h", "help"} & set(given)
        place = [f"--{flag}={value}" for flag, value in layers.flags(flags) if flag in WHERE] if finds_run else flags
        self.config = parser.parse_args([*head, *place])
        self._set_folder()
        checkpoint = self._checkpoint(self.config[self.subcommand].get("ckpt_path"), "ckpt_path" in given)
        if checkpoint is not None:
            self._parse_after(checkpoint, head, flags)
        elif finds_run:
            self.config = parser.parse_args(self.argv)
        if checkpoint is None and "ckpt_path" in self.config[self.subcommand]:
            self.config[self.subcommand].ckpt_path = None  # auto, of a first start
        if start := self.config[self.subcommand].get("init_from"):
            self._start_from(start, checkpoint)
        self._check(self.config[self.subcommand])

    @override
    def _parse_ckpt_path(self) -> None:
        """Done in ``parse_arguments``; Lightning's lets a checkpoint's hyper-parameters win over the user's flags."""

    def _set_folder(self) -> None:
        config = self.config[self.subcommand]
        self.run = RunFolder(self.recipe_dir.name, config.name, config.trainer.default_root_dir)

    def _checkpoint(self, name: str | None, given: bool) -> Path | None:
        """The checkpoint of this command: the one that is named, or of a command about a run its best."""
        if self.subcommand in OF_RUN:
            if not name and not given:
                self._check_trained()
                name = "best"
            if not rank_zero_only.rank:
                print(f"{self.subcommand}: {name or 'no'} checkpoint of {self.run.path}", flush=True)
        if name == "auto" and self.subcommand == "fit":
            found = self.run.newest()
            if not rank_zero_only.rank:
                start = "begins anew: it has no checkpoint" if self.run.path.exists() else "is new"
                print(f"fit: {f'goes on from {found}' if found else f'{self.run.path} {start}'}", flush=True)
            return found
        return self.run.find(str(name)) if name else None

    def _check_trained(self) -> None:
        """Refuse a run without a checkpoint, unless a flag is no key: it may be a mistyped --ckpt_path or --name."""
        try:
            self.run.check_trained()
        except InputError:
            try:
                self.parser.parse_args(self.argv)
            except jsonargparse.ArgumentError as error:
                if "unrecognized arguments" in str(error):
                    raise
            raise

    def _parse_after(self, checkpoint: Path, head: list[str], flags: list[str]) -> None:
        """Parse with the config of the checkpoint's run first, so that whatever is given now wins over it."""
        before = _at_home(self._config_of(checkpoint), self.package)
        self.began_with = before.pop("init_from", None)
        self.began_with_facts = {k: v for k, v in before.get("data", {}).items() if k == "facts_of"}
        before.get("data", {}).pop("facts_of", None)
        # A logger or callback that is given again takes the place of the run's own.
        for key, again in layers.classes(flags).items():
            items = before.get("trainer", {}).get(key)
            if isinstance(items, list):
                kept = [item for item in items if _name(item) not in again]
                if len(kept) < len(items) and not rank_zero_only.rank:
                    gone = ", ".join(sorted({_name(item) for item in items} & again))
                    print(f"{self.command}: {gone} of the run gives way to what is given now", flush=True)
                before["trainer"][key] = kept
        layered = [*head, "--config", layers.to_yaml(before)]
        try:
            self.config = self.parser.parse_args([*layered, *flags])
        except jsonargparse.ArgumentError:
            try:
                self.parser.parse_args(layered)
            except jsonargparse.ArgumentError as error:
                reason = explain(error, [], self.defaults, {}, self.taken)
                problem = f"its config is not one of {self.recipe_dir.name} ({reason}); mend the config.yaml of its run"
                raise InputError(f"--ckpt_path: {problem}") from error
            raise  # the mistake is in what is given now
        self.config[self.subcommand].ckpt_path = str(checkpoint)
        best, was = self.config[self.subcommand].best, before.get("best", {})
        if best.monitor != was.get("monitor", best.monitor) and "best.mode" not in layers.keys(flags):
            best.mode = None  # that of the run is of another metric
        if "facts_of" in self.config[self.subcommand].data:
            if self.config[self.subcommand].data.facts_of is not None:
                raise InputError("data.facts_of: the checkpoint of --ckpt_path has facts of its own; give one of them")
            self.config[self.subcommand].data.facts_of = str(checkpoint)
        self._set_folder()
        for key in ("optimizer", "lr_scheduler") if self.subcommand == "fit" else ():
            was, now = (_name(model.get(key)) for model in (before.get("model", {}), self.config.fit.model.as_dict()))
            if was != now:
                problem = f"{was or 'none'} has a state in the checkpoint, which {now or 'none'} cannot go on from"
                raise InputError(f"model.{key}: {problem}; take {was or 'null'}, or fit without --ckpt_path")
        trained = (self.run.path / "checkpoints").exists()  # else it is of earlier commands about such a checkpoint
        if self.subcommand != "fit" and trained and not self.run.holds(checkpoint):
            problem = f"is not of the run {self.run.path}; give --name another name"
            raise InputError(f"--ckpt_path {checkpoint}: {problem}")

    def _start_from(self, name: str, checkpoint: Path | None) -> None:
        """Find what ``--init_from`` names, and let the facts of its data hold."""
        config = self.config.fit
        if checkpoint is not None:  # a run that goes on may say what it has begun with
            if self.began_with is None or Path(self.began_with) not in self.run.starts(name):
                began = f"has begun with {short_path(self.began_with) if self.began_with else 'no such weights'}"
                problem = f"the run of --ckpt_path {began}; leave it out, or begin another --name"
                raise InputError(f"--init_from {name}: {problem}")
            config.init_from = None
            if "init_from" in config.data:
                config.data.init_from = None
            return
        self.began_with = config.init_from = str(self.run.weights(name))
        own = "data.facts_of" in layers.keys(self.argv)
        self.began_with_facts = {"facts_of": config.data.facts_of} if own else {}
        if not Path(config.init_from).is_dir() and "facts_of" in config.data and not own:
            config.data.facts_of = config.init_from
        if not rank_zero_only.rank:
            print(f"fit: starts with the weights of {config.init_from}", flush=True)

    def _config_of(self, checkpoint: Path) -> dict[str, Any]:
        """The config that a checkpoint was trained with: its run's own, or else the hyper-parameters in it."""
        beside = checkpoint.parent.parent / "config.yaml"
        if beside.is_file():
            try:
                config = yaml.safe_load(beside.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                config = None
            if not isinstance(config, dict):
                problem = "is no config: damaged, or cut short when the run was killed"
                raise InputError(f"--ckpt_path {checkpoint}: {beside} {problem}; mend or remove it")
            self.taken = layers.Taken(beside, layers.from_here(beside))
            return config
        state = read_checkpoint(checkpoint)
        linked = {target.removeprefix("model.") for target in self.links.values()}
        kept = {"model": state.get("hyper_parameters", {}), "data": state.get("datamodule_hyper_parameters", {})}
        config = {
            group: {key: value for key, value in values.items() if key[0] != "_" and key not in linked}
            for group, values in kept.items()
        }
        self.taken = layers.Taken(layers.to_yaml(config), f"--ckpt_path {short_path(checkpoint)}")
        return config

    def _check(self, config: Any) -> None:
        given = layers.keys(self.argv)
        for source, target in self.links.items():
            if target in given:
                raise InputError(f"{target} is taken from {source} and cannot be set; remove it")
        if not config.get("ckpt_path") and (facts_of := config.data.get("facts_of")) and Path(facts_of).exists():
            read_checkpoint(facts_of, hint="name another with --data.facts_of")  # the whole file, with its checksums
        for key in ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch", "val_check_interval"):
            if isinstance(value := config.trainer[key], int | float) and value <= 0:
                raise InputError(f"trainer.{key} must be above 0, got {value}")
        if self.subcommand == "fit" and not isinstance(config.trainer.val_check_interval, int | float | None):
            problem = "by time, a resumed run would validate at other steps; give micro-batches or a share of an epoch"
            raise InputError(f"trainer.val_check_interval: {problem}")
        if not 0 <= config.seed_everything < 2**32:
            raise InputError(f"seed_everything must be in [0, 2**32), got {config.seed_everything}")
        if config.trainer.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler must be false: the loaders share the data out themselves")
        if "://" in str(config.trainer.default_root_dir):
            problem = "is no folder of this machine; give one, and copy runs/ afterwards"
            raise InputError(f"trainer.default_root_dir: {config.trainer.default_root_dir} {problem}")
        if config.trainer.overfit_batches:
            raise InputError("trainer.overfit_batches is not supported; use trainer.limit_train_batches")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for item in _as_list(config.trainer.callbacks):
            name = item.class_path.rpartition(".")[2]
            if name in MISFITS:
                raise InputError(f"trainer.callbacks: {name} {MISFITS[name]}")
            if name == "EarlyStopping" and item.init_args.get("check_on_train_epoch_end") is None:
                # After each validation: at an epoch's end a resumed run might not have validated yet.
                item.init_args["check_on_train_epoch_end"] = False
        for item in (*_as_list(config.trainer.callbacks), *_as_list(config.trainer.logger)):
            for key, value in item.get("init_args", {}).items():
                if isinstance(value, str) and isinstance(value, Enum):  # as Timer has, for which YAML has no word
                    item.init_args[key] = value.value
        resolved = yaml.safe_load(self.command_parser.dump(config, skip_unset=False, format="yaml"))
        self.resolved = {key: resolved[key] for key in ("seed_everything", "name", *layers.GROUPS)}
        if config.get("ckpt_path") or config.get("init_from"):  # those of this command, and not of another
            self.resolved["data"].pop("facts_of", None)
            self.resolved["data"] |= self.began_with_facts
        if self.began_with and self.subcommand == "fit":
            self.resolved["init_from"] = self.began_with
        # Lightning would dump the same config once more, at 70 ms of every start, for the module's hyperparameters.
        self.config_dump = copy.deepcopy(self.resolved)
        self.run.start_from(config.get("ckpt_path"))
        checkpoint = Path(config.get("ckpt_path") or "null").stem
        keeps_apart = self.subcommand in ("validate", "test", "predict") and checkpoint != "best"
        command = f"{self.subcommand}-{checkpoint}" if keeps_apart else self.subcommand
        self.folder = self.run.starting if self.subcommand == "fit" else self.run.path / command
        config.trainer.default_root_dir = str(self.run.path)
        if self.subcommand == "test":
            config.verbose = False  # RunRecord prints a shorter table
        for item in _as_list(config.trainer.logger):
            if item.class_path.endswith("TensorBoardLogger") and self.run.goes_on:
                # Its page hides the earlier events of steps that are made again.
                step = read_checkpoint(config.ckpt_path, mmap=True)["global_step"]
                item.dict_kwargs = {"purge_step": step, **dict(item.get("dict_kwargs") or {})}
        for item in [*_as_list(config.trainer.logger), *_as_list(config.trainer.callbacks)]:
            for key, base in (("save_dir", self.folder), ("dirpath", self.run.path)):
                if (path := item.get("init_args", {}).get(key)) is not None:
                    item.init_args[key] = str(base / path)

    def before_fit(self) -> None:
        """Take the run's name, when everything is built."""
        checkpoint, steps = self.config.fit.ckpt_path, self.trainer.max_steps
        if checkpoint:
            state = read_checkpoint(checkpoint, mmap=True)
            self.run.first_step = state["global_step"]
            if "losses" not in state:
                problem = "was written by an older version and does not say where to go on"
                raise InputError(f"--ckpt_path {checkpoint}: {problem}; fit without it")
        if -1 < steps < self.run.first_step:
            raise InputError(f"trainer.max_steps: {steps} is below the {self.run.first_step} of --ckpt_path; raise it")
        if not (self.config.fit.trainer.fast_dev_run or self.trainer.global_rank):
            self.run.begin()

    def before_validate(self) -> None:
        """Make the command's folder, when its checkpoint has been found readable."""
        if checkpoint := self.config[self.subcommand].ckpt_path:
            self.run.first_step = read_checkpoint(checkpoint, mmap=True)["global_step"]
        make(self.folder)

    before_test = before_predict = before_validate

    @override
    def instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        with self._advising():
            try:
                super().instantiate_classes()
            except ValueError as error:
                # jsonargparse wraps what a constructor raises where several types are accepted, as for callbacks.
                if isinstance(error.__cause__, InputError | MisconfigurationException | StrictDataclassError):
                    raise error.__cause__ from error
                if refused := re.search(r"^  - (trainer\.strategy: .*)$", str(error), re.MULTILINE):
                    raise InputError(refused[1]) from error  # of this one it keeps the text only
                raise
        self.model.of_checkpoint, self.model.init_from = config.get("ckpt_path"), config.get("init_from")

    def _advising(self) -> AbstractContextManager[None]:
        """To start with weights, other samples than theirs are no mistake, but a choice."""
        starts = self.config[self.subcommand].get("init_from")
        return speaking_of("give --data.facts_of null" if starts else "begin a new run", instead_of="begin a new run")

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with self._keeping_results(), self._advising():
                super()._run_subcommand(subcommand)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # as which Lightning ends
                raise KeyboardInterrupt from error
            raise
        except Exception as error:
            if mistake := self._mistake(error) or self._refusal(error):
                raise mistake from error
            raise
        finally:
            self.run.end()

    def _keeping_results(self) -> AbstractContextManager[None]:
        """Let a command that measures keep earlier results, see :func:`keeping_results`."""
        config, measures = self.config[self.subcommand], self.subcommand in ("validate", "test")
        if not measures or config.trainer.fast_dev_run or self.trainer.global_rank:
            return nullcontext()
        source = source_of(self.resolved["data"], "test" if self.subcommand == "test" else "val")
        return keeping_results(self.subcommand, self.folder, source, config.ckpt_path)

    def _refusal(self, error: Exception) -> InputError | None:
        """What Lightning refuses before the first step, and no code of ours or of a recipe has caused."""
        if not isinstance(error, ValueError | RuntimeError) or self.subcommand != "fit":
            return None
        if self.trainer.global_step > self.run.first_step:
            return None
        libraries = Path(L.__file__).parents[1]
        frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        inside = frames[next((i for i, path in enumerate(frames) if libraries in path.parents), len(frames)) :]
        if not inside or not all(libraries in path.parents for path in inside):
            return None
        if Path(L.__file__).parent not in inside[-1].parents:  # torch raises again what reading processes raise
            return None
        return InputError(f"{self.subcommand}: {' '.join(str(error).split())}")

    def _mistake(self, error: Exception) -> InputError | Stopped | None:
        """What a library's exception says about the config, the checkpoint or the other ranks; None if nothing."""
        if isinstance(error, OSError):
            where = Path(os.fsdecode(error.filename or self.run.path))
            if error.errno in NO_ROOM or (error.errno in NO_RIGHT and self.run.path.parent in where.parents):
                return InputError(f"{where}: cannot be written ({error.strerror}); what was written before is intact")
        if isinstance(error, RuntimeError) and re.search("EADDRINUSE|[Aa]ddress already in use", str(error)):
            port = os.environ.get("MASTER_PORT", "the port")
            return InputError(f"MASTER_PORT: {port} is in use; set another, or none and a free one is found")
        message, net = str(error), type(getattr(self.model, "net", None)).__name__
        if isinstance(error, InputError) and message.startswith("Caught "):
            # torch raises what a reading process has raised, with its traceback in the text.
            return InputError(message.rpartition("InputError: ")[2].strip())
        alien = re.match(rf"{net}\.forward\(\) got an unexpected keyword argument '(\w+)'", message)
        if isinstance(error, TypeError) and alien:
            return InputError(f"model.net: {net} takes no {alien[1]!r}, which the data has; name another")
        if isinstance(error, IndexError) and self.datamodule.facts.get("tokenizer") and _is_unknown_token(error):
            problem = f"{net} knows fewer tokens than the tokenizer of the data"
            return InputError(f"model.net: {problem}; set its vocab_size, or take the tokenizer that it was made with")
        if isinstance(error, TypeError) and "should be an instance of class `PreTrainedConfig`" in message:
            problem = "a net of transformers is made from its config"
            return InputError(f"model.net: {problem}; take common.nets.ImageClassifier with --model.net.config CLASS")
        misfit = re.search(r"in loading state_dict for \w+:\s*(.*)|loaded state dict (.*)", message)
        if isinstance(error, RuntimeError | ValueError) and misfit and self.config[self.subcommand].get("ckpt_path"):
            return InputError(f"--ckpt_path: does not fit this model or optimizer: {misfit[1] or misfit[2]}")
        if isinstance(error, RuntimeError | ValueError) and (cause := lost_rank(error)):
            problem = f"rank {self.trainer.global_rank}: another rank has ended ({cause})"
            trained = self.trainer.global_step > self.run.first_step
            goes_on = "; --ckpt_path last goes on from the last checkpoint" if trained else ""
            return Stopped(problem + goes_on, LOST_RANK_EXIT)
        return None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        built = self.config_init[self.subcommand]
        settings = built["trainer"]
        best, last, media = (built[key] for key in CALLBACKS)
        own = [media, Endings(self.signals), RunReport()]
        if self.subcommand == "predict":
            own.append(PredictionWriter(self.folder))
        off = tuple(kind for flag, kind in SWITCHES.items() if settings[flag] is False)
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        record = RunRecord(self.resolved, self.folder, self.run, checkpoint, [sys.argv[0], *self.argv])
        given = _as_list(settings.get("callbacks"))
        callbacks = [each for each in (record, best, *given, last, *own) if not isinstance(each, off)]
        plugins = [*_as_list(settings.get("plugins")), AtomicCheckpointIO()]
        loggers = self._loggers(settings["logger"])
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, logger=loggers, **kwargs)
        except (ValueError, TypeError) as error:
            raise InputError(_trainer_mistake(str(error))) from error
        steps = EpochLoop(trainer, trainer.min_steps, trainer.max_steps)
        trainer.fit_loop = FitLoop(trainer, trainer.min_epochs, trainer.max_epochs)
        trainer.fit_loop.epoch_loop = steps
        if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
            problem = f"{type(trainer.strategy).__name__} forks ranks here, which a command line cannot end"
            raise InputError(f"trainer.strategy: {problem}; take ddp, or one device in a notebook")
        _check_trainer(trainer, settings)
        return trainer

    def _loggers(self, given: Any) -> list[Any]:
        """The loggers that are given, and the CSV file that reports are made of; none if ``logger`` is false."""
        loggers = _as_list(given)
        for each in loggers:
            if isinstance(each, Wandb) and self.subcommand == "fit":
                each.starting = self.folder
            if not isinstance(each, CSVLogger):  # whose metrics.csv is work
                spare(each, LOGGING, type(each).__name__)
        if given is False or any(isinstance(each, CSVLogger) and Path(each.log_dir) == self.folder for each in loggers):
            return loggers
        return [CSVLogger(str(self.folder), name="", version="", flush_logs_every_n_steps=1), *loggers]


def _check_trainer(trainer: L.Trainer, settings: Any) -> None:
    """Refuse settings that the trainer accepts and then ignores or changes."""
    world = trainer.num_devices * trainer.num_nodes
    started = world
    if is_torchelastic_launched():
        started = int(os.environ["WORLD_SIZE"])
    elif SLURMEnvironment.detect():  # in a batch script too, where srun has not started anything
        started = int(os.environ.get("SLURM_STEP_NUM_TASKS", world))
    if started != world:  # each process might train a net of its own
        problem = f"{started} processes were started, and this config trains with {world}"
        fix = "give --config configs/strategy/ddp.yaml, --trainer.devices and --trainer.num_nodes"
        raise InputError(f"trainer.devices: {problem}; {fix}")
    if str(settings["precision"]).startswith("16") and isinstance(trainer.accelerator, CPUAccelerator):
        problem = "needs a GPU, and Lightning would run another on a CPU"
        raise InputError(f"trainer.precision: {settings['precision']} {problem}; take bf16-mixed")
    if settings["sync_batchnorm"] and not facts_of(trainer.strategy).syncs_batch_norm:
        problem = f"{type(trainer.strategy).__name__} does not support it"
        raise InputError(f"trainer.sync_batchnorm: {problem}; take false, or configs/strategy/ddp.yaml")


def _is_unknown_token(error: IndexError) -> bool:
    """Whether an embedding was asked for the batch's tokens, and has too few rows."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked, rows = frames[-1].get("input"), frames[-1].get("weight")  # of torch.nn.functional.embedding
    tokens = [ids for frame in frames if isinstance(ids := frame.get("input_ids"), Tensor)]
    if not (isinstance(asked, Tensor) and isinstance(rows, Tensor) and any(torch.equal(asked, ids) for ids in tokens)):
        return False
    return int(asked.max()) >= len(rows)


def _name(item: Any) -> str:
    """The name of a class that a config lists, without its package; nothing for none."""
    return str(item.get("class_path", "") if isinstance(item, dict) else item or "").rpartition(".")[2]


def _at_home(config: Any, package: str) -> Any:
    """A config with the classes of this recipe in the place of those of the recipe that it was copied from, or to.

    They are known by their file and their name, which a copy keeps.
    """
    if isinstance(config, list):
        return [_at_home(item, package) for item in config]
    if not isinstance(config, dict):
        return config
    path = config.get("class_path")
    others = [name for name in _packages() if not f"{package}.".startswith(f"{name}.")]
    if isinstance(path, str) and path.count(".") > 1 and not path.startswith(tuple(f"{name}." for name in others)):
        file, name = path.split(".")[-2:]
        if hasattr(sys.modules.get(f"{package}.{file}"), name):
            config = {**config, "class_path": f"{package}.{file}.{name}"}
    return {key: _at_home(value, package) for key, value in config.items()}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, True, False) else [value]


def _packages() -> list[str]:
    """Packages other than recipes whose classes a config may name."""
    own = [name.strip() for name in os.environ.get("RECIPES_ALLOW", "").split(",") if name.strip()]
    for name in own:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"RECIPES_ALLOW: {name!r} is no name of a package; separate several by commas")
    return [*LIBRARIES, *own]


def _trainer_mistake(message: str) -> str:
    """Lightning's refusal of a trainer argument, with the key and the nearest name."""
    if m := re.search(r"`(strategy|accelerator)='([^']+)'`", message):
        names = [*StrategyRegistry.available_strategies(), *AcceleratorRegistry.available_accelerators(), "auto", "gpu"]
        layer = Path(f"configs/{m[1]}/{m[2]}.yaml")
        found = (DEFAULTS.parent.parent / layer).is_file()
        hint = f"; take --config {layer}" if found else nearest(m[2], names)
        return f"trainer.{m[1]}: no {m[1]} is named {m[2]!r}{hint}"
    if m := re.search(r"precision='([\w-]+)'.*(?:one of|among): (.*)", message):
        names = re.findall(r"\w+-(?:true|mixed)", m[2])
        return f"trainer.precision: {m[1]} does not go with this strategy; take one of {', '.join(names)}"
    return f"trainer.{m[1]}: {message}" if (m := re.search(r"`(\w+)`", message)) else f"trainer: {message}"


@contextmanager
def one_line_errors(cli: RecipeCLI, debug: bool) -> Iterator[None]:
    """Turn an anticipated mistake into one line on stderr and exit code 2; ``--debug`` keeps its traceback.

    Where Python has given the arguments, the mistake is raised with that line, and Ctrl-C as KeyboardInterrupt: in
    training once the step is saved. Any other exception passes: people edit recipes, and their own bugs need a
    traceback.
    """
    try:
        yield
    except (InputError, MisconfigurationException, StrictDataclassError, jsonargparse.ArgumentError) as error:
        if debug:
            raise
        parser = getattr(cli, "command_parser", None)
        actions = {action.dest: action for action in parser._actions} if parser else {}
        known = {k: v for k, v in actions.items() if k not in cli.links.values() and not k.endswith("help")}
        launcher = cli.trainer.strategy.launcher if hasattr(cli, "trainer") else None
        if os.environ.get("LOCAL_RANK", "0") != "0" and not is_torchelastic_launched():
            # Lightning's first rank has started this one, has mostly found the same, and then ends it.
            time.sleep(5.0)
        line = explain(error, cli.argv, cli.defaults, known, cli.taken)
        if cli.ends_process:
            print(line, file=sys.stderr)
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        raise (SystemExit(2) if cli.ends_process else InputError(line)) from None
    except Stopped as error:
        if debug:
            traceback.print_exc()
        print(error, file=sys.stderr, flush=True)
        launcher = cli.trainer.strategy.launcher if hasattr(cli, "trainer") else None
        for process in getattr(launcher, "procs", ()):  # ranks that Lightning has started; most end by themselves
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        if error.code == 128 + signal.SIGINT and not cli.ends_process:
            raise KeyboardInterrupt from None
        raise SystemExit(error.code) from None
    except KeyboardInterrupt:
        if not cli.ends_process:
            raise
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None


def _quiet_stderr() -> None:
    """What libraries log or warn is progress, not an error: stderr is for the one line that matters."""
    for name in ("lightning.pytorch", "lightning.fabric", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers = [logging.StreamHandler(sys.stdout)]
        logger.propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search("litlogger|already configured with model summary", record.getMessage())
    )
    for message in NO_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
