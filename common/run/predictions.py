"""The table of predictions."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from typing_extensions import override

from common.data import data_ranks
from common.errors import InputError


def _readable(values: Sequence[Any]) -> list[Any]:
    """Numbers of fp32 without the digits that they do not have, and lists as JSON."""
    texts = [json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for value in values]
    return [f"{value:.7g}" if isinstance(value, float) else value for value in texts]


class PredictionWriter(BasePredictionWriter):
    """Collects what ``predict_step`` returns, a column name to values mapping, in one table ``predictions.csv``.

    Args:
        folder: where the table is written.
    """

    def __init__(self, folder: Path):
        super().__init__(write_interval="epoch")
        self.folder = folder

    @override
    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Sequence[Any]]],
        batch_indices: Sequence[Any],
    ) -> None:
        everyone: list[Any] = [list(predictions)]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, list(predictions))
            everyone = everyone[:: trainer.world_size // data_ranks(trainer)[0]]  # one of each group
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "predictions.csv"
        earlier = ", in place of the earlier ones" if path.exists() else ""
        kept = trainer.datamodule.kept  # type: ignore[attr-defined]
        if twice := kept.keys() & everyone[0][0].keys():
            raise InputError(f"data.keep: {min(twice)!r} is also a column of the predictions; rename it in the data")
        for batches in everyone if kept else ():
            for number, batch in enumerate(batches):
                # Numbers as they are, in all their digits.
                cells = {name: [column[i] for i in batch["index"]] for name, column in kept.items()}
                beside = {k: [repr(v) if isinstance(v, float) else v for v in values] for k, values in cells.items()}
                batches[number] = {"index": batch["index"], **beside, **batch}
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(everyone[0][0])
            for batches in zip(*everyone, strict=True):
                # Ranks took every world-th sample, so the rows interleave; zip stops where padding was masked out.
                rows = [list(zip(*map(_readable, batch.values()), strict=True)) for batch in batches]
                for position in range(len(rows[0])):
                    table.writerows(rank[position] for rank in rows if position < len(rank))
        Console().print(f"predictions: {path}{earlier}", soft_wrap=True, markup=False, highlight=False)
