"""Baselines for a net: linear regression and gradient-boosted trees on the same rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from common.sources.tables import Columns, DataFrame, cardinalities, encode, raw_numbers


def baseline_table(
    frame: DataFrame,
    target: Float[np.ndarray, "rows targets"],
    columns: Columns,
    fit: Int64[Tensor, " fit"],
    test: Int64[Tensor, " test"],
    rmse: Sequence[float],
) -> str:
    """Errors of linear regression, of gradient-boosted trees with scikit-learn's default settings, and of a net.

    Trees get unscaled numbers and the net's class numbers. Linear regression gets medians for gaps, and one-hot
    categories.

    Args:
        frame: all rows.
        target: their targets.
        columns: the result of :func:`fit_columns`.
        fit: positions of the rows that the baselines are fitted on.
        test: positions of the rows to predict.
        rmse: the net's root-mean-square error on these rows, for each target.

    Returns:
        One line for each with its root-mean-square error in the target's units; of several targets a line for each.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import LinearRegression

    raw, codes, sizes = raw_numbers(frame, columns), encode(frame, columns)[1], cardinalities(columns)
    one_hot = [torch.nn.functional.one_hot(codes[:, n], size).numpy() for n, size in enumerate(sizes)]
    medians = [each["median"] for each in columns["numeric"].values()]
    plain = np.hstack([np.where(np.isnan(raw), medians, raw), *one_hot])
    # Trees handle gaps themselves. They split up to 255 categories as sets, more by the order of the class numbers.
    own = codes[:, : len(columns["categorical"])].numpy()
    as_sets = [raw.shape[1] + n for n in range(own.shape[1]) if sizes[n] <= 255]
    mixed = np.hstack([raw, own])
    rows, asked = fit.numpy(), test.numpy()
    settings: Any = {"categorical_features": as_sets, "random_state": 0}
    lines = ["RMSE on the test rows"]
    for name, values, error in zip(columns["targets"], target.T, rmse, strict=True):
        trees = HistGradientBoostingRegressor(**settings).fit(mixed[rows], values[rows])
        linear = LinearRegression().fit(plain[rows], values[rows])
        found = {"linear regression": linear.predict(plain[asked]), "gradient boosting": trees.predict(mixed[asked])}
        errors = {method: np.sqrt(np.mean((each - values[asked]) ** 2)) for method, each in found.items()}
        errors["this net"] = error
        lines += [f"\n{name}"] * (len(rmse) > 1)
        lines += [f"{method:<20}{error:.4g}" for method, error in errors.items()]
    return "\n".join(lines)
