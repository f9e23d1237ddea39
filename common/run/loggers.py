"""TensorBoard in a run's folder, and Weights & Biases with one W&B run for it."""

import os
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import loggers
from typing_extensions import override

from common.errors import InputError
from common.run.environment import describe_environment


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's, except that a ``$`` in the folder's path stands for itself."""

    @property
    @override
    def log_dir(self) -> str:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self.root_dir, version, str(self.sub_dir or ""))


class Wandb(loggers.WandbLogger):
    """Logs from rank 0 to Weights & Biases; a run resumed or tested goes on in its folder's W&B run.

    The environment decides the rest: ``WANDB_API_KEY`` logs in, ``WANDB_MODE=offline`` needs no network, and
    what is not given here comes from ``WANDB_PROJECT``, ``WANDB_NAME``, ``WANDB_ENTITY``, ``WANDB_RUN_ID``.

    Args:
        dirpath: the run's folder; project and name of the W&B run are called after the recipe and the run.
        project: another project.
        name: another name.
        entity: user or team that owns the project.
        group: name that runs to be shown together share.
        tags: labels to find the run by.
        notes: what is special about the run.
        log_model: upload ``best.ckpt``, at the end or, with ``all``, each time it is written.
    """

    def __init__(
        self,
        dirpath: str,
        project: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        log_model: Literal["all"] | bool = False,
    ):
        self.folder = self.starting = Path(dirpath)  # a fit begins to write elsewhere
        super().__init__(
            name=name or os.environ.get("WANDB_NAME", self.folder.name),
            project=project or os.environ.get("WANDB_PROJECT", self.folder.parent.name),
            save_dir=dirpath, entity=entity, group=group, tags=tags, notes=notes, log_model=log_model,
        )  # fmt: skip
        del self._wandb_init["anonymous"]  # W&B warns of it whatever its value

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started when first asked for.

        Raises:
            InputError: W&B knows no valid key or does not answer.
        """
        if self._experiment is not None:
            return self._experiment
        import wandb

        earlier = max(self.folder.glob("wandb/*run-*/run-*.wandb"), key=os.path.getmtime, default=None)
        if earlier is not None and "WANDB_RUN_ID" not in os.environ:
            self._wandb_init["id"] = earlier.stem.removeprefix("run-")
        # W&B writes its news to stderr. It would also keep the remote's URL, which can hold a token.
        commit = describe_environment()["commit"]
        self._wandb_init["dir"] = str(self.starting)
        self._wandb_init["settings"] = {"silent": True, "disable_git": True, "git_commit": commit}
        wandb.setup(wandb.Settings(silent=True))
        try:
            run: Any = super().experiment
        except wandb.Error as error:
            problem = str(error).partition("\n")[0].rstrip(".")[:90]
            hint = "set WANDB_API_KEY, or WANDB_MODE=offline"
            raise InputError(f"trainer.logger: W&B: {problem}; {hint}") from error
        sync = str(Path(run.dir).parent).replace(str(self.starting), str(self.folder))
        where = f"wandb sync {sync}" if run.offline else run.url
        print(f"W&B: {where or 'disabled'}", flush=True)
        return run

    @override
    def finalize(self, status: str) -> None:
        super().finalize(status)
        # Without this a second run of the same process would go on in the first one's.
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status != "success"))
            self._experiment = None
