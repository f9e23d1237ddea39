"""The module: regression on the rows of a table, with errors in the target's own units."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from common.errors import InputError, speaking_of
from common.losses import precise
from common.module import BaseModule, EvaluatedRows, Stage
from common.sources.tables import Columns, cardinalities, frame_of, scaled_quantiles

from .baselines import baseline_table
from .data import Batch, RowDataset, rows_to_predict
from .heads import Head, scores
from .pictures import predicted_against_true, residuals


class RegressionModule(BaseModule):
    """A net that maps the columns of a row to its head's outputs, such as a mean or quantiles, for each target.

    Losses are of standardized targets; metrics and predictions are in the targets' own units. Of several targets losses
    and metrics are the mean, and each target has its own metrics too.

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
        self.outcomes: Any = EvaluatedRows()

    @override
    def build_net(self) -> nn.Module:
        try:
            outputs = len(self.columns["targets"]) * self.head.num_outputs
            return self.make_net(outputs, cardinalities(self.columns), self.quantiles)
        except (ValueError, ArithmeticError) as error:
            raise InputError(f"model.net: {str(error).splitlines()[0]}") from error

    def forward(self, batch: Batch) -> Float[Tensor, "batch_targets members outputs"]:
        """Outputs for the head, of each member of an ensemble: those of the first row's targets come first."""
        outputs: Tensor = self.net(batch.numeric, batch.categorical)
        by_target = outputs.unflatten(-1, (len(self.columns["targets"]), -1))
        return by_target.transpose(1, 2).flatten(0, 1)

    def in_units(self, standardized: Float[Tensor, "batch targets values"]) -> Float[Tensor, "batch targets values"]:
        """Targets or predictions in the targets' own units."""
        values = precise(standardized)
        mean, std = (values.new_tensor(self.columns[fact])[:, None] for fact in ("mean", "std"))
        return values * std + mean

    def predictions(
        self, outputs: Float[Tensor, "batch_targets members outputs"]
    ) -> Float[Tensor, "batch targets values"]:
        """The head's predictions in the targets' own units."""
        return self.in_units(self.head.predict(outputs).unflatten(0, (-1, len(self.columns["targets"]))))

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        outputs = self(batch)
        if stage == "train":
            return self.head.loss(outputs, batch.target.flatten()), batch.mask.sum()
        preds = self.head.predict(outputs).unflatten(0, batch.target.shape)
        self.note_losses((preds[..., 0] - batch.target).square().mean(1)[batch.mask])
        values = self.in_units(torch.cat([batch.target[..., None], preds], -1))
        self.outcomes.update(torch.cat([values.flatten(1), batch.mask[:, None]], 1))
        real = batch.mask.repeat_interleave(batch.target.shape[1])
        return self.head.loss(outputs[real], batch.target.flatten()[real]), batch.mask.sum()

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        rows = self.outcomes.compute()
        self.outcomes.reset()
        names = self.columns["targets"]
        real = rows[rows[:, -1] == 1, :-1].double().cpu()
        # Of each target: the true values, the predictions, and the ends of the intervals.
        self._rows = real.unflatten(1, (len(names), -1)).permute(1, 2, 0)
        found = {name: scores(*rows) for name, rows in zip(names, self._rows, strict=True)}
        values = {score: torch.stack([each[score] for each in found.values()]).mean() for score in found[names[0]]}
        if len(names) > 1:
            values |= {f"{score}_{name}": value for name, each in found.items() for score, value in each.items()}
        self.log_dict(
            {f"{stage}/{name}": value.float().to(self.device) for name, value in values.items()}, sync_dist=True
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["hyper_parameters"]["columns"] != self.columns:
            problem = "its columns or their training rows are not those of the checkpoint"
            raise InputError(f"data.source: {problem}; give the same table")

    @override
    def media(self, stage: str) -> dict[str, Any]:
        unit = f" / {self.columns['unit']:,g}" if self.columns["unit"] != 1 else ""
        by_name = {f"{name}{unit}": rows for name, rows in zip(self.columns["targets"], self._rows, strict=True)}
        figures: dict[str, Any] = {"predictions": predicted_against_true(by_name), "residuals": residuals(by_name)}
        if stage == "test" and self.baselines and self.trainer.is_global_zero:
            table, (target, preds) = self.data.table, self._rows[:, :2].unbind(1)
            fit, test = torch.cat([table.parts.train, table.parts.val]), table.parts.test[: target.shape[1]]
            rmse = (preds - target).square().mean(1).sqrt()  # here: several ranks give the rows in another order
            figures["baselines"] = baseline_table(table.frame, table.target, self.columns, fit, test, rmse.tolist())
        return figures

    @override
    def encode(self, samples: Any) -> RowDataset:
        """Rows as a frame of pandas, or what becomes one, with or without the target."""
        with speaking_of("samples", instead_of="data.predict_source"):
            return rows_to_predict(frame_of(samples), self.columns)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        rows = torch.cat([self.in_units(batch.target[..., None]), self.predictions(self(batch))], -1)[batch.mask]
        columns = {}
        for name, values in zip(self.columns["targets"], rows.unbind(1), strict=True):
            of = f"({name})" if len(self.columns["targets"]) > 1 else ""
            target, *predicted = values.T.tolist()
            columns[f"target{of}"] = [None if value != value else value for value in target]
            keys = ("prediction", "lower", "upper")
            columns |= {f"{key}{of}": column for key, column in zip(keys, predicted, strict=False)}
        return {"index": batch.index[batch.mask].tolist(), **columns}
