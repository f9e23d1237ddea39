"""The module: a language model trained by a curriculum."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from common.data import data_ranks
from common.losses import cross_entropy, text_scores, window_losses
from common.module import BaseModule, Stage
from common.nets import check_net, freeze_blocks, language_model, router_factor, train_logits

from .data import Batch
from .lessons import Lesson, Pacing
from .pictures import curriculum


class CurriculumModule(BaseModule):
    """A decoder-only transformer trained with the cross-entropy of the next token, by a curriculum.

    Args:
        config: any causal language model of transformers, by its config's class path and settings; None for that of the
            weights.
        vocab_size: number of tokens; comes from the data.
        context: tokens of a window; comes from the data.
        weights: folder or hub name of a causal language model of transformers to train further; None for a new one.
        frozen_blocks: how many of its first blocks stay as they are, and with them the embeddings.
        self_paced: share of the windows that count in each micro-batch of each rank: the windows with the lowest loss,
            at least one (Kumar et al. 2010, https://papers.nips.cc/paper/3923; here the loss that admits this share is
            their threshold); None for all of them.
        kwargs: of :class:`common.module.BaseModule`.
    """

    unit = "tokens"

    def __init__(
        self,
        config: PretrainedConfig | None,
        vocab_size: int,
        context: int,
        weights: str | None = None,
        frozen_blocks: int = 0,
        self_paced: Pacing | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_net(config, weights, context)
        self.weights, self.frozen_blocks = weights, frozen_blocks
        self.config, self.vocab_size = config, vocab_size
        self.context, self.self_paced = context, self_paced
        self.lesson: Lesson | None = None  # of the last complete step

    @override
    def build_net(self) -> nn.Module:
        net = language_model(self.config, self.weights, self.vocab_size, self.context)
        self.frozen = freeze_blocks(net, self.frozen_blocks)
        self.router = router_factor(net)
        return net

    def forward(self, batch: Batch) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at each position."""
        return self.net(input_ids=batch.input_ids, use_cache=False).logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.ends_step:
            self.lesson = self.data.lesson(self.data.tokens_seen)
            micro_batches = data_ranks(self.trainer)[0] * self.trainer.accumulate_grad_batches
            self.data.tokens_seen += batch.input_ids.numel() * micro_batches
        return loss

    def window_losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """Mean loss of each window over its targets; NaN if it has none."""
        total, count = window_losses(self(batch), batch.target)
        return total / count

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train" and self.self_paced and (share := self.self_paced(self.data.tokens_seen)) < 1:
            logits, further = train_logits(self.net, batch.input_ids, self.router)
            total, count = window_losses(logits, batch.target)
            each = total / count
            easy = each.detach() <= each.detach().quantile(share)  # the same number in each micro-batch, up to ties
            return (each * easy).sum() / easy.sum() + further, easy.sum()
        if stage == "train":
            logits, further = train_logits(self.net, batch.input_ids, self.router)
            loss = cross_entropy(logits.flatten(0, 1), batch.target.flatten()) + further
            return loss, (batch.target != -100).sum()
        target = batch.target.masked_fill(~batch.mask[:, None], -100)
        total, count = window_losses(self(batch), target)
        self.note_losses((total / count)[batch.mask])
        return total.sum() / count.sum(), count.sum()

    @override
    def captions(self, batch: Batch) -> list[str]:
        return []  # the text says it

    @override
    def train_metrics(self) -> dict[str, float]:
        assert self.lesson is not None, "a row is written after a step"
        lesson = {f"curriculum/{name}": float(value) for name, value in self.lesson._asdict().items()}
        return {"curriculum/tokens": float(self.data.tokens_seen), **lesson}

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        scores = text_scores(stage, self.mean_loss[stage].compute(), self.data.corpus.bytes_per_token[stage])
        self.log_dict(scores, sync_dist=True)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        texts = [self.data.tokenizer.decode(ids.tolist()) for ids in batch.input_ids[batch.mask]]
        return {"loss": self.window_losses(batch)[batch.mask].tolist(), "text": texts}

    @override
    def media(self, stage: str) -> dict[str, Any]:
        figure = curriculum(self.run_dir)
        return {"curriculum": figure} if figure and stage == "val" else {}

    @override
    def num_items(self, batch: Batch) -> int:
        return batch.input_ids.numel()
