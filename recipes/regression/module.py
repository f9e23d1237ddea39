"""The module: regression on the rows of a table, with errors in the target's own units."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import CatMetric
from typing_extensions import override

from common.errors import InputError, speaking_of
from common.module import BaseModule, Stage
from common.sources.tables import Columns, cardinalities, scaled_quantiles

from .baselines import baseline_table
from .data import Batch, RowDataset, rows_to_predict
from .heads import Head, scores
from .pictures import predicted_against_true, residuals


class RegressionModule(BaseModule):
    """A net that maps the columns of a row to its head's outputs, such as a mean or quantiles.

    Losses are of standardized targets; metrics and predictions are in the target's own units.

    Args:
        net: the net by class path, one of ``common.nets.tables``; its first three arguments come from the data.
        head: meaning and loss of the outputs, by name: ``Mean``, ``Gaussian`` or ``Quantiles``.
        columns: facts of the columns in the training rows; comes from the data.
        baselines: compare with linear regression and gradient-boosted trees after ``test``.
        kwargs: of :class:`common.module.BaseModule`.
    """

    def __init__(
        self,
        net: Callable[[int, list[int], Tensor], nn.Module],
        head: Head,
        columns: Columns,
        baselines: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.make_net, self.head, self.columns, self.baselines = net, head, columns, baselines
        self.quantiles = scaled_quantiles(columns)
        # Of every row of an evaluation: target, prediction, interval, and whether the row is real.
        self.outcomes: Any = CatMetric(nan_strategy="disable")

    @override
    def build_net(self) -> nn.Module:
        try:
            return self.make_net(self.head.num_outputs, cardinalities(self.columns), self.quantiles)
        except (ValueError, ArithmeticError) as error:
            raise InputError(f"model.net: {str(error).splitlines()[0]}") from error

    def forward(self, batch: Batch) -> Float[Tensor, "batch members outputs"]:
        """Outputs for the head, of each member of an ensemble."""
        return self.net(batch.numeric, batch.categorical)

    def in_units(self, standardized: Tensor) -> Tensor:
        """Targets or predictions in the target's own units."""
        return standardized.to(self.outcomes.dtype) * self.columns["std"] + self.columns["mean"]

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        outputs = self(batch)
        if stage == "train":
            return self.head.loss(outputs, batch.target), batch.mask.sum()
        values = torch.cat([batch.target[:, None], self.head.predict(outputs)], 1)
        self.note_losses((values[:, 1] - values[:, 0])[batch.mask].square())
        self.outcomes.update(torch.cat([self.in_units(values), batch.mask[:, None]], 1))
        return self.head.loss(outputs[batch.mask], batch.target[batch.mask]), batch.mask.sum()

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        rows = self.outcomes.compute()
        self.outcomes.reset()
        self._rows = rows[rows[:, -1] == 1, :-1].double().cpu()
        values = {f"{stage}/{name}": value.float().to(self.device) for name, value in scores(*self._rows.T).items()}
        self.log_dict(values, sync_dist=True)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["hyper_parameters"]["columns"] != self.columns:
            problem = "its columns or their training rows are not those of the checkpoint"
            raise InputError(f"data.source: {problem}; give the same table")

    @override
    def media(self, stage: str) -> dict[str, Any]:
        target, preds, *interval = self._rows.T
        name = self.columns["target"] + (f" / {self.columns['unit']:,g}" if self.columns["unit"] != 1 else "")
        figures: dict[str, Any] = {
            "predictions": predicted_against_true(target, preds, interval, name),
            "residuals": residuals(target, preds, name),
        }
        if stage == "test" and self.baselines and self.trainer.is_global_zero:
            table = self.data.table
            fit, test = torch.cat([table.parts.train, table.parts.val]), table.parts.test[: len(target)]
            rmse = (preds - target).square().mean().sqrt().item()  # here: several ranks give the rows in another order
            figures["baselines"] = baseline_table(table.frame, table.target, self.columns, fit, test, rmse)
        return figures

    @override
    def encode(self, samples: Any) -> RowDataset:
        """Rows as a frame of pandas, or what becomes one, with or without the target."""
        from pandas import DataFrame

        try:
            frame = DataFrame(samples)
        except (ValueError, TypeError) as error:
            raise InputError(f"samples: no rows of a table ({error}); give a frame of pandas") from error
        if not len(frame):
            raise InputError("samples: there are none to predict")
        with speaking_of("samples", instead_of="data.predict_source"):
            return rows_to_predict(frame, self.columns)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        names = ["prediction", "lower", "upper"]
        values = self.in_units(self.head.predict(self(batch))[batch.mask]).T.tolist()
        target = self.in_units(batch.target[batch.mask]).tolist()
        known = [None if value != value else value for value in target]
        columns = dict(zip(names, values, strict=False))
        return {"index": batch.index[batch.mask].tolist(), "target": known, **columns}
