"""Nets for tables from their authors' libraries, with one signature.

The head and the data give the first three arguments: the number of outputs, the number of classes of each categorical
column, and evenly spaced quantiles of the scaled numeric columns. Outputs have an ensemble axis, of size 1 for a single
net.
"""

from collections.abc import Sequence

import rtdl_num_embeddings
import rtdl_revisiting_models as rtdl
import tabm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from common.errors import InputError


def _check(**sizes: int) -> None:
    """Refuse sizes below 1; the nets' libraries ignore them, or fail far from the cause."""
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"model.net.{name} must be above 0, got {value}")


def _check_hidden(name: str, multiplier: float, d_block: int) -> None:
    if not 1 <= multiplier * d_block < float("inf"):
        problem = f"must leave a width of at least 1 with d_block {d_block}, got {multiplier:g}"
        raise InputError(f"model.net.{name} {problem}")


class _OneHot(nn.Module):
    """A net that reads numbers, and categories as one-hot vectors."""

    def __init__(self, cardinalities: Sequence[int], net: nn.Module):
        super().__init__()
        self.cardinalities, self.net = cardinalities, net

    def forward(
        self, numeric: Float[Tensor, "batch numeric"], categorical: Int64[Tensor, "batch categorical"]
    ) -> Float[Tensor, "batch 1 outputs"]:
        """Outputs of a batch of rows."""
        one_hot = [F.one_hot(categorical[:, n], size) for n, size in enumerate(self.cardinalities)]
        return self.net(torch.cat([numeric, *(each.to(numeric.dtype) for each in one_hot)], 1))[:, None]


class MLP(_OneHot):
    """A multilayer perceptron (Gorishniy et al., https://arxiv.org/abs/2106.11959).

    Args:
        num_outputs: width of the output.
        cardinalities: classes of each categorical column.
        quantiles: of the numeric columns.
        n_blocks: hidden layers.
        d_block: their width.
        dropout: probability after each of them.

    Raises:
        InputError: a size is not above 0.
    """

    def __init__(
        self,
        num_outputs: int,
        cardinalities: Sequence[int],
        quantiles: Float[Tensor, "quantiles numeric"],
        n_blocks: int = 3,
        d_block: int = 256,
        dropout: float = 0.0,
    ):
        _check(n_blocks=n_blocks, d_block=d_block)
        d_in = quantiles.shape[1] + sum(cardinalities)
        net = rtdl.MLP(d_in=d_in, d_out=num_outputs, n_blocks=n_blocks, d_block=d_block, dropout=dropout)
        super().__init__(cardinalities, net)


class ResNet(_OneHot):
    """Residual blocks of two linear layers with batch norm (Gorishniy et al., https://arxiv.org/abs/2106.11959).

    Args:
        num_outputs: width of the output.
        cardinalities: classes of each categorical column.
        quantiles: of the numeric columns.
        n_blocks: residual blocks.
        d_block: width between the blocks.
        d_hidden_multiplier: width inside a block as a multiple of ``d_block``.
        dropout1: probability inside a block.
        dropout2: probability at the end of a block.

    Raises:
        InputError: a size is not above 0, or leaves a block without width.
    """

    def __init__(
        self,
        num_outputs: int,
        cardinalities: Sequence[int],
        quantiles: Float[Tensor, "quantiles numeric"],
        n_blocks: int = 2,
        d_block: int = 192,
        d_hidden_multiplier: float = 2.0,
        dropout1: float = 0.15,
        dropout2: float = 0.0,
    ):
        _check(n_blocks=n_blocks, d_block=d_block)
        _check_hidden("d_hidden_multiplier", d_hidden_multiplier, d_block)
        net = rtdl.ResNet(
            d_in=quantiles.shape[1] + sum(cardinalities),
            d_out=num_outputs,
            n_blocks=n_blocks,
            d_block=d_block,
            d_hidden_multiplier=d_hidden_multiplier,
            dropout1=dropout1,
            dropout2=dropout2,
        )
        super().__init__(cardinalities, net)


class FTTransformer(nn.Module):
    """A transformer over one token per column (Gorishniy et al., https://arxiv.org/abs/2106.11959).

    Args:
        num_outputs: width of the output.
        cardinalities: classes of each categorical column.
        quantiles: of the numeric columns.
        n_blocks: transformer blocks.
        d_block: width of a token, a multiple of the number of heads.
        attention_n_heads: attention heads.
        attention_dropout: probability on the attention weights.
        ffn_d_hidden_multiplier: width inside the feed-forward part as a multiple of ``d_block``.
        ffn_dropout: probability inside the feed-forward part.
        residual_dropout: probability at the end of each residual branch.

    Raises:
        InputError: a size is not above 0, or leaves a block without width, or the width is no multiple of the heads.
    """

    def __init__(
        self,
        num_outputs: int,
        cardinalities: Sequence[int],
        quantiles: Float[Tensor, "quantiles numeric"],
        n_blocks: int = 2,
        d_block: int = 64,
        attention_n_heads: int = 4,
        attention_dropout: float = 0.1,
        ffn_d_hidden_multiplier: float = 4 / 3,
        ffn_dropout: float = 0.1,
        residual_dropout: float = 0.0,
    ):
        super().__init__()
        _check(n_blocks=n_blocks, d_block=d_block, attention_n_heads=attention_n_heads)
        _check_hidden("ffn_d_hidden_multiplier", ffn_d_hidden_multiplier, d_block)
        if d_block % attention_n_heads:
            raise InputError(f"model.net.d_block must be a multiple of {attention_n_heads} heads, got {d_block}")
        self.net = rtdl.FTTransformer(
            n_cont_features=quantiles.shape[1],
            cat_cardinalities=list(cardinalities),
            d_out=num_outputs,
            n_blocks=n_blocks,
            d_block=d_block,
            attention_n_heads=attention_n_heads,
            attention_dropout=attention_dropout,
            ffn_d_hidden_multiplier=ffn_d_hidden_multiplier,
            ffn_dropout=ffn_dropout,
            residual_dropout=residual_dropout,
        )

    def forward(
        self, numeric: Float[Tensor, "batch numeric"], categorical: Int64[Tensor, "batch categorical"]
    ) -> Float[Tensor, "batch 1 outputs"]:
        """Outputs of a batch of rows."""
        return self.net(_or_none(numeric), _or_none(categorical))[:, None]


class TabM(nn.Module):
    """Many multilayer perceptrons that share most weights (Gorishniy et al., https://arxiv.org/abs/2410.24210).

    Numbers go through piecewise-linear embeddings (https://arxiv.org/abs/2203.05556) whose bins are quantiles of the
    training rows.

    Args:
        num_outputs: width of the output.
        cardinalities: classes of each categorical column.
        quantiles: of the numeric columns.
        k: members of the ensemble.
        n_blocks: hidden layers.
        d_block: their width.
        dropout: probability after each of them.
        n_bins: bins of each numeric column.
        d_embedding: width of a numeric column's embedding.

    Raises:
        InputError: a size is not above 0, or there are more bins than quantiles.
    """

    def __init__(
        self,
        num_outputs: int,
        cardinalities: Sequence[int],
        quantiles: Float[Tensor, "quantiles numeric"],
        k: int = 32,
        n_blocks: int = 2,
        d_block: int = 512,
        dropout: float = 0.1,
        n_bins: int = 48,
        d_embedding: int = 16,
    ):
        super().__init__()
        _check(k=k, n_blocks=n_blocks, d_block=d_block, d_embedding=d_embedding)
        embeddings = None
        if quantiles.shape[1]:
            if not 1 < n_bins < len(quantiles):
                problem = f"must be from 2 to {len(quantiles) - 1} for so many training rows, got {n_bins}"
                raise InputError(f"model.net.n_bins {problem}")
            # Preflight makes nets without values; bins need values.
            with unset_fake_temporarily(), torch.device("cpu"):
                embeddings = rtdl_num_embeddings.PiecewiseLinearEmbeddings(
                    rtdl_num_embeddings.compute_bins(quantiles, n_bins), d_embedding, activation=False, version="B"
                )
        self.net = tabm.TabM.make(
            n_num_features=quantiles.shape[1],
            cat_cardinalities=list(cardinalities),
            d_out=num_outputs,
            num_embeddings=embeddings,
            k=k,
            n_blocks=n_blocks,
            d_block=d_block,
            dropout=dropout,
        )

    def forward(
        self, numeric: Float[Tensor, "batch numeric"], categorical: Int64[Tensor, "batch categorical"]
    ) -> Float[Tensor, "batch members outputs"]:
        """Outputs of each member for a batch of rows."""
        return self.net(_or_none(numeric), _or_none(categorical))


def _or_none(inputs: Tensor) -> Tensor | None:
    return inputs if inputs.shape[1] else None
