"""One command line for every recipe: LightningCLI with a run folder, layered configs and errors in one line."""

import copy
import inspect
import logging
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import jsonargparse._typehints as _typehints
import lightning as L
import yaml
from huggingface_hub.errors import StrictDataclassError
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from torch.distributed import is_torchelastic_launched
from typing_extensions import override

from common import layers
from common.callbacks import PredictionWriter, RunRecord
from common.checkpoint import AtomicCheckpointIO, read_checkpoint
from common.data import BaseDataModule
from common.errors import InputError, Stopped, closest, nearest
from common.faults import LOST_RANK_EXIT, StopOnSigterm, lost_rank
from common.messages import explain
from common.module import BaseModule
from common.trainer import RecipeTrainer

# A class path in a config runs that class: only these packages, and those in RECIPES_ALLOW, may be named.
ALLOWED = (
    "torch", "lightning", "torchmetrics", "transformers", "kornia", "pytorch_optimizer", "torchjd", "common",
    "recipes",
)  # fmt: skip

# The flags that say where a run is.
WHERE = ("config", "name", "ckpt_path", "trainer.default_root_dir")

# Lightning refuses these flags as long as the config lists such a callback.
SWITCHES = {
    "enable_progress_bar": ProgressBar,
    "enable_checkpointing": Checkpoint,
    "enable_model_summary": ModelSummary,
}

# Lightning's warnings about what is right here: a run goes on in its own folder, the loader's position is derived from
# the trainer's counters, arrays in memory need no reading processes, predictions know their own order, a frozen body
# stays in eval mode, DeepSpeed clips and goes backward by itself, fp16 on a CPU is refused, FSDP on one rank has
# nothing to shard and leaves batch norm in fp32.
NO_WARNINGS = (
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "The '.*_dataloader' does not have many workers",
    "Couldn't infer the batch indices fetched from your dataloader",
    "The dirpath has changed from",
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
    "Both mixed precision and an auto_wrap_policy were specified to FSDP",
    "When using ``NO_SHARD`` for ``ShardingStrategy``",
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


class RecipeParser(LightningArgumentParser):
    """A parser that raises instead of printing its usage."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise jsonargparse.ArgumentError(None, message) from ex


class RecipeCLI(LightningCLI):
    """The command line of a recipe.

    ``config.yaml`` beside the module's file is loaded by default. What a run writes lies in
    ``runs/<recipe>/<name>/`` under the current directory (or ``trainer.default_root_dir``); relative ``save_dir`` of
    loggers and ``dirpath`` of checkpoints are in there. ``--ckpt_path last`` and ``best`` look in there too, and start
    from the config that the run was made with; flags given now win over it.

    Args:
        module_class: the recipe's LightningModule.
        datamodule_class: the recipe's DataModule.
        links: facts of the built DataModule that become arguments of the module, by their full keys.
        args: command-line arguments; None for the process's own.
    """

    def __init__(
        self,
        module_class: type[BaseModule],
        datamodule_class: type[BaseDataModule],
        links: Mapping[str, str],
        args: list[str] | None = None,
    ):
        _quiet_stderr()
        if args is None:
            logging.captureWarnings(True)
        argv = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in argv
        self.argv = [arg for arg in argv if arg != "--debug"]
        self.links = links
        # What fit has done to an earlier run of this name: where it, or its metrics, lay and lies, and its record.
        self.aside: tuple[Path, Path] | None = None
        self.record: dict[Path, bytes] = {}
        self.first_step = 0
        self.recipe_dir = Path(inspect.getfile(module_class)).resolve().parent
        default = {"default_config_files": [str(self.recipe_dir / "config.yaml")], "exit_on_error": False}
        with one_line_errors(self, debug):
            jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=_allowed())
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
        given = subcommand in self.argv
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs) if given else self.init_parser(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="default", help="Name of the run, its folder in runs/<recipe>/."
        )
        for source, target in self.links.items():
            parser.link_arguments(source, target, apply_on="instantiate")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        layers.check(self.argv)
        self.subcommand = next((arg for arg in self.argv if arg in self.subcommands()), "")
        where = self.argv.index(self.subcommand) + 1 if self.subcommand else 0
        head, flags = self.argv[:where], self.argv[where:]
        of_run = self.subcommand in ("validate", "test", "predict", "export")
        # Flags may be for a class that only the config of the checkpoint's run names, which has to be found first.
        if (of_run or any(flag.startswith("--ckpt_path") for flag in flags)) and not {"-h", "--help"} & set(flags):
            flags = [f"--{flag}={value}" for flag, value in layers.flags(flags) if flag in WHERE]
        self.config = parser.parse_args([*head, *flags])
        config = self.config[self.subcommand]
        self._set_run_dir(config)
        name = config.get("ckpt_path")
        if of_run and not name:
            untrained = any(flag.startswith("--ckpt_path") for flag in flags)  # which null asks for
            name = "best" if not untrained and any(self.run_dir.glob("checkpoints/*.ckpt")) else None
            trained = sorted({path.parent.parent.name for path in self.run_dir.parent.glob("*/checkpoints/*.ckpt")})
            if name is None and trained and not untrained:
                hint = nearest(config.name, trained) or f"; there are {', '.join(trained)}"
                problem = "no run of this name has a checkpoint (--ckpt_path null takes the net as it is made)"
                raise InputError(f"--name {config.name}: {problem}{hint}")
            if not _get_rank():
                print(f"{self.subcommand}: {name or 'no'} checkpoint of {self.run_dir}", flush=True)
        if not name and flags != self.argv[where:]:
            self.config = parser.parse_args(self.argv)
        elif name:
            checkpoint = self._find_checkpoint(str(name))
            # The config of the checkpoint's run comes first, so whatever is given now wins over it.
            before = self._config_of(checkpoint)
            layered = [*head, "--config", before]
            try:
                self.config = parser.parse_args([*layered, *self.argv[where:]])
            except jsonargparse.ArgumentError:
                with _foreign(f"--ckpt_path {checkpoint}: its config is not one of {self.recipe_dir.name}"):
                    parser.parse_args(layered)
                raise  # the mistake is in what is given now
            config = self.config[self.subcommand]
            config.ckpt_path = str(checkpoint)
            for key, items in yaml.safe_load(before).get("trainer", {}).items():
                if key in ("logger", "callbacks"):
                    config.trainer[key] = _without_repeats(config.trainer[key], items)
            self._set_run_dir(self.config[self.subcommand])
            if self.subcommand != "fit" and not self._is_of_this_run(checkpoint) and self.run_dir.exists():
                raise InputError(
                    f"--ckpt_path {checkpoint}: is not of the run {self.run_dir}; give --name another name"
                )
        self._check(self.config[self.subcommand])

    @override
    def _parse_ckpt_path(self) -> None:
        """Done in ``parse_arguments``; Lightning's lets a checkpoint's hyper-parameters win over the user's flags."""

    def _set_run_dir(self, config: Any) -> None:
        if Path(config.name).name != config.name or config.name in ("", ".", ".."):
            raise InputError(f"--name {config.name!r} must be a plain folder name")
        root = Path(config.trainer.default_root_dir or ".").resolve()
        self.run_dir = root / "runs" / self.recipe_dir.name / config.name

    def _is_of_this_run(self, checkpoint: str | Path | None) -> bool:
        return checkpoint is not None and self.run_dir in Path(checkpoint).parents

    def _find_checkpoint(self, name: str) -> Path:
        if name not in ("last", "best"):
            if not Path(name).exists():
                raise InputError(f"--ckpt_path {name}: no such file; give last, best or the path of a checkpoint")
            return Path(name).resolve()
        path = self.run_dir / "checkpoints" / f"{name}.ckpt"
        if not path.exists():
            others = sorted(path.parent.glob("*.ckpt"), key=lambda p: p.stem not in ("last", "best"))
            found = ", ".join(p.stem for p in others) or "none"
            runs = sorted(p.parent.parent.name for p in self.run_dir.parent.glob(f"*/checkpoints/{name}.ckpt"))
            near = runs and (closest(self.run_dir.name, runs) or runs[-1])
            hint = f"give --name {near}" if near else "run fit first or give --name"
            if others:
                hint = f"give --ckpt_path {others[0].stem if others[0].stem in ('last', 'best') else others[0]}"
            raise InputError(f"--ckpt_path {name}: {path} does not exist (found: {found}); {hint}")
        return path

    def _config_of(self, checkpoint: Path) -> str:
        """The config that a checkpoint was trained with: its run's own, or else the hyper-parameters in it."""
        beside = checkpoint.parent.parent / "config.yaml"
        if beside.is_file():
            return beside.read_text()
        state = read_checkpoint(checkpoint)
        targets = {target.removeprefix("model.") for target in self.links.values()}
        model = {
            k: v for k, v in state.get("hyper_parameters", {}).items() if k not in targets and k != "_instantiator"
        }
        data = {k: v for k, v in state.get("datamodule_hyper_parameters", {}).items() if k != "_instantiator"}
        return yaml.safe_dump({"model": model, "data": data})

    def _check(self, config: Any) -> None:
        for source, target in self.links.items():
            if config.get(target) is not None:
                raise InputError(f"{target} is taken from {source} and cannot be set; remove it")
        for key in ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch", "val_check_interval"):
            if isinstance(value := config.trainer[key], int | float) and value <= 0:
                raise InputError(f"trainer.{key} must be above 0, got {value}")
        if not 0 <= config.seed_everything < 2**32:
            raise InputError(f"seed_everything must be in [0, 2**32), got {config.seed_everything}")
        if config.trainer.use_distributed_sampler:
            raise InputError("trainer.use_distributed_sampler must be false: the loaders share the data out themselves")
        if config.trainer.overfit_batches:
            raise InputError("trainer.overfit_batches is not supported; use trainer.limit_train_batches")

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        keep = ("seed_everything", "name", "trainer", "model", "data")
        resolved = yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False, format="yaml"))
        self.resolved = {key: resolved[key] for key in keep}
        # Lightning would dump the same config once more, at 70 ms of every start, for the module's hyperparameters.
        self.config_dump = copy.deepcopy(self.resolved)
        self.folder = self.run_dir if self.subcommand == "fit" else self.run_dir / self.subcommand
        config.trainer.default_root_dir = str(self.run_dir)
        for item in [*_as_list(config.trainer.logger), *_as_list(config.trainer.callbacks)]:
            for key, base in (("save_dir", self.folder), ("dirpath", self.run_dir)):
                if (path := item.get("init_args", {}).get(key)) is not None:
                    item.init_args[key] = str(base / path)

    def before_fit(self) -> None:
        """Move an earlier run of the same name aside, or keep its metrics when it goes on, as the logger starts anew.

        Called when everything is built, so that a mistake found until then leaves the earlier run where it is; one that
        shows before the first step puts it back.
        """
        checkpoint, steps = self.config.fit.ckpt_path, self.trainer.max_steps
        self.first_step = read_checkpoint(checkpoint, mmap=True)["global_step"] if checkpoint else 0
        if -1 < steps < self.first_step:
            raise InputError(f"trainer.max_steps: {steps} is below the {self.first_step} of --ckpt_path; raise it")
        if self.config.fit.trainer.fast_dev_run or self.trainer.global_rank:
            return
        if self._is_of_this_run(checkpoint):
            kept = (self.run_dir / name for name in ("config.yaml", "hparams.yaml", "environment.json"))
            self.record = {path: path.read_bytes() for path in kept if path.exists()}
            metrics = self.run_dir / "metrics.csv"
            segment, number = metrics.with_name(f"metrics.until-step-{self.first_step}.csv"), 1
            while segment.exists():
                segment, number = metrics.with_name(f"metrics.until-step-{self.first_step}.{number}.csv"), number + 1
            if metrics.exists():
                self.aside = metrics, metrics.rename(segment)
        elif self.run_dir.exists():
            numbers = [
                int(p.suffix[1:]) for p in self.run_dir.parent.glob(f"{self.run_dir.name}.*") if p.suffix[1:].isdigit()
            ]
            moved = self.run_dir.with_name(f"{self.run_dir.name}.{max(numbers, default=0) + 1}")
            self.aside = self.run_dir, self.run_dir.rename(moved)
        self._make_folder()

    def _put_back(self) -> None:
        """Undo ``before_fit`` when no step was made after it."""
        if self.trainer.global_step > self.first_step:
            return
        for path, content in self.record.items():
            path.write_bytes(content)
        if self.aside is not None:
            before, now = self.aside
            shutil.rmtree(before, ignore_errors=True)  # it may not even have been made
            now.replace(before)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot make the run's folder ({error.strerror}: {self.folder})"
            raise InputError(f"trainer.default_root_dir: {problem}") from error

    before_validate = before_test = before_predict = _make_folder

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raises where several types are accepted, as for callbacks.
            if isinstance(error.__cause__, InputError | MisconfigurationException):
                raise error.__cause__ from error
            if refused := re.search(r"^  - (trainer\.strategy: .*)$", str(error), re.MULTILINE):
                raise InputError(refused[1]) from error  # of this one it keeps the text only
            raise

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (InputError, MisconfigurationException):
            self._put_back()
            raise
        except TypeError as error:
            net = type(getattr(self.model, "net", None)).__name__
            if alien := re.match(rf"{net}\.forward\(\) got an unexpected keyword argument '(\w+)'", str(error)):
                self._put_back()
                raise InputError(f"model.net: {net} takes no {alien[1]!r}, which the data has; name another") from error
            raise
        except (RuntimeError, ValueError) as error:
            misfit = re.search(r"in loading state_dict for \w+:\s*(.*)|loaded state dict (.*)", str(error))
            if misfit and self.config[subcommand].get("ckpt_path"):
                self._put_back()
                raise InputError(
                    f"--ckpt_path: does not fit this model or optimizer: {misfit[1] or misfit[2]}"
                ) from error
            if cause := lost_rank(error):
                problem = f"rank {self.trainer.global_rank}: another rank has ended ({cause})"
                goes_on = "; --ckpt_path last goes on from the last checkpoint" if subcommand == "fit" else ""
                raise Stopped(problem + goes_on, LOST_RANK_EXIT) from error
            raise

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if subcommand == "test" else kwargs  # RunRecord prints a shorter table

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self._get(self.config_init, "trainer")
        off = tuple(kind for flag, kind in SWITCHES.items() if settings[flag] is False)
        callbacks = [callback for callback in _as_list(settings.get("callbacks")) if not isinstance(callback, off)]
        callbacks += [RunRecord(self.resolved, self.folder), StopOnSigterm()]
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(self.folder))
        plugins = [*_as_list(settings.get("plugins")), AtomicCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        except (ValueError, TypeError) as error:
            raise InputError(_trainer_mistake(str(error))) from error
        # Lightning's handlers lock ranks up. `StopOnSigterm` listens in fit; elsewhere SIGTERM may end all at once.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
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
        return trainer


@contextmanager
def _foreign(message: str) -> Iterator[None]:
    """What cannot be parsed here was written by something else."""
    try:
        yield
    except jsonargparse.ArgumentError as error:
        raise InputError(message) from error


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value in (None, True, False) else [value]


def _without_repeats(items: Any, before: Any) -> Any:
    """The loggers or callbacks of a resumed run when a layer that it had is given again, maybe with other settings.

    Args:
        items: of the run's config and then of what is given now.
        before: of the run's config.
    """
    if not isinstance(items, list) or not isinstance(before, list):
        return items

    def purpose(item: Any) -> tuple[Any, ...]:
        settings = item.get("init_args") or {}
        return item["class_path"], *(settings.get(key) for key in ("save_dir", "dirpath", "filename", "monitor"))

    known = Counter(purpose(item) for item in before)
    kept: list[Any] = []
    for item in reversed(items):  # of a kind that the run had the last ones, as many as it had
        had = known[purpose(item)]
        if not had or sum(purpose(other) == purpose(item) for other in kept) < had:
            kept.insert(0, item)
    return kept


def _allowed() -> list[str]:
    """Packages whose classes a config may name."""
    own = [name.strip() for name in os.environ.get("RECIPES_ALLOW", "").split(",") if name.strip()]
    for name in own:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(f"RECIPES_ALLOW: {name!r} is no name of a package; separate several by commas")
    return [*ALLOWED, *own]


def _trainer_mistake(message: str) -> str:
    """Lightning's refusal of a trainer argument, with the key and the nearest name."""
    if m := re.search(r"`(strategy|accelerator)='([^']+)'`", message):
        names = [*StrategyRegistry.available_strategies(), *AcceleratorRegistry.available_accelerators(), "auto", "gpu"]
        layer = Path(f"configs/{m[1]}/{m[2]}.yaml")
        found = (Path(__file__).parent.parent / layer).is_file()
        hint = f"; take --config {layer}" if found else nearest(m[2], names)
        return f"trainer.{m[1]}: no {m[1]} is named {m[2]!r}{hint}"
    if m := re.search(r"precision='([\w-]+)'.*(?:one of|among): (.*)", message):
        names = re.findall(r"\w+-(?:true|mixed)", m[2])
        return f"trainer.precision: {m[1]} does not go with this strategy; take one of {', '.join(names)}"
    return f"trainer.{m[1]}: {message}" if (m := re.search(r"`(\w+)`", message)) else f"trainer: {message}"


@contextmanager
def one_line_errors(cli: RecipeCLI, debug: bool) -> Iterator[None]:
    """Turn an anticipated mistake into one line on stderr and exit code 2; ``--debug`` keeps its traceback.

    Any other exception passes: people edit recipes, and their own bugs need a traceback.
    """
    try:
        yield
    except (InputError, MisconfigurationException, StrictDataclassError, jsonargparse.ArgumentError) as error:
        if debug:
            raise
        parsers = getattr(cli, "_subcommand_parsers", {})
        actions = {action.dest: action for parser in parsers.values() for action in parser._actions}
        known = {k: v for k, v in actions.items() if k not in cli.links.values() and not k.endswith("help")}
        launcher = cli.trainer.strategy.launcher if hasattr(cli, "trainer") else None
        if os.environ.get("LOCAL_RANK", "0") != "0" and not is_torchelastic_launched():
            # Lightning's first rank has started this one, has mostly found the same, and then ends it.
            time.sleep(5.0)
        print(explain(error, cli.argv, cli.recipe_dir / "config.yaml", known), file=sys.stderr)
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        raise SystemExit(2) from None
    except Stopped as error:
        if debug:
            traceback.print_exc()
        print(error, file=sys.stderr, flush=True)
        raise SystemExit(error.code) from None


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
