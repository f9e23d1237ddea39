"""Difficulty of windows of text: scores, and the order by score."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64
from rich.progress import track

from common.cache import CACHE
from common.checksums import check_files
from common.errors import InputError
from common.losses import precise
from common.nets.pretrained import check_context, check_tokens
from common.sources.text import Windows


def check_order(order: Int64[np.ndarray, " samples"], digest: str, whose: str, by_scores: bool) -> None:
    """Check that an order of samples has the :func:`order_digest` of another.

    Args:
        order: the order.
        digest: of the other.
        whose: the other, for messages.
        by_scores: whether it is an order by scores, and not that of the text.

    Raises:
        InputError: it has not.
    """
    if order_digest(order) == digest:
        return
    if not by_scores:
        raise InputError(f"data.path: training windows are others than {whose}; give the same text and data.context")
    problem, fix = f"training windows are in another order than {whose}", "give the same text, context and scores"
    raise InputError(f"data.difficulty: {problem}; {fix}, by a ScoreFile if need be")


def order_digest(order: Int64[np.ndarray, " samples"]) -> str:
    """A short hash of an order; scores from different devices may give different orders."""
    return hashlib.sha256(order.tobytes()).hexdigest()[:16]


class Difficulty:
    """A score for each window of a text; higher is harder. Subclass it for your own."""

    def scores(self, windows: Windows, eos_id: int) -> Float[np.ndarray, " windows"]:
        """Score every window.

        Args:
            windows: the training data.
            eos_id: the token that ends a document.

        Raises:
            InputError: the scores do not fit the data.
        """
        raise NotImplementedError

    def check(self, vocab: Mapping[str, int]) -> None:
        """Refuse scores that another tokenizer would give; ``vocab`` is the number of each token of the data.

        Raises:
            InputError: they are of another tokenizer.
        """


class DocumentLength(Difficulty):
    """Mean length, in tokens, of the pieces of documents in a window: short texts first."""

    def scores(self, windows: Windows, eos_id: int) -> Float[np.ndarray, " windows"]:  # noqa: D102
        ends = [(tokens == eos_id).sum(1) for tokens in _blocks(windows)]
        return windows.length / (1.0 + np.concatenate(ends))


class Rarity(Difficulty):
    """Mean surprise of a window's tokens, ``-log p`` by their frequency in the training data: common words first.

    Platanios et al. 2019, equation 4 (https://aclanthology.org/N19-1119).
    """

    def scores(self, windows: Windows, eos_id: int) -> Float[np.ndarray, " windows"]:  # noqa: D102
        counts = np.zeros(int(np.max(windows.tokens)) + 1)
        for tokens in _blocks(windows):
            counts += np.bincount(tokens.ravel(), minlength=len(counts))
        surprise = -np.log(np.maximum(counts, 1) / counts.sum())
        return np.concatenate([surprise[tokens].mean(1) for tokens in _blocks(windows)])


class ScoreFile(Difficulty):
    """Your own scores: a text file with one number per window, or a NumPy file.

    Args:
        path: the file.
    """

    def __init__(self, path: str):
        self.path = Path(path).expanduser()

    def scores(self, windows: Windows, eos_id: int) -> Float[np.ndarray, " windows"]:  # noqa: D102
        try:
            read = np.load if self.path.suffix == ".npy" else np.loadtxt
            scores = np.atleast_1d(read(self.path)).astype(np.float64)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            raise InputError(f"data.difficulty.path {self.path}: cannot be read as numbers ({reason})") from error
        if scores.shape != (len(windows),):
            found = "x".join(map(str, scores.shape))
            raise InputError(f"data.difficulty.path {self.path}: {found} scores for {len(windows)} training windows")
        if not np.isfinite(scores).all():
            raise InputError(f"data.difficulty.path {self.path}: has scores that are not finite; remove NaN and inf")
        return scores


class ReferenceLoss(Difficulty):
    """A trained net's loss on each window: the net's easy windows first. Computed once and kept.

    Args:
        name: folder or hub name of a causal language model with the same tokenizer, such as an ``export``.
        cache_dir: folder of kept scores.
        batch_size: windows at a time.

    Raises:
        InputError: there is no such net, it knows fewer tokens than the data has, or it takes only shorter windows.
    """

    def __init__(self, name: str, cache_dir: str = os.path.join(CACHE, "scores"), batch_size: int = 32):
        if batch_size < 1:
            raise InputError(f"data.difficulty.batch_size must be at least 1, got {batch_size}")
        self.name, self.cache_dir, self.batch_size = name, Path(cache_dir).expanduser(), batch_size

    def check(self, vocab: Mapping[str, int]) -> None:  # noqa: D102
        check_tokens(self.name, vocab, "data.difficulty.name")

    def scores(self, windows: Windows, eos_id: int) -> Float[np.ndarray, " windows"]:  # noqa: D102
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        check_files(Path(self.name))
        try:
            net = AutoModelForCausalLM.from_pretrained(self.name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with a language model in safetensors nor a hub name ({reason})"
            raise InputError(f"data.difficulty.name {self.name!r}: {problem}") from error
        check_context(net.config, windows.length, f"data.difficulty.name {self.name!r}")
        embeddings: Any = net.get_input_embeddings()
        known, highest = embeddings.num_embeddings, int(np.max(windows.tokens))
        if highest >= known:
            problem = f"knows {known} tokens, but the data has number {highest}; it needs the same tokenizer"
            raise InputError(f"data.difficulty.name {self.name!r}: {problem}")
        sha = hashlib.sha256(np.ascontiguousarray(windows.tokens).data)
        sha.update(str(windows.length).encode())
        for weight in net.state_dict().values():
            sha.update(weight.float().numpy().tobytes())
        path = self.cache_dir / f"{sha.hexdigest()[:16]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                partial = path.with_suffix(".tmp.npy")
                np.save(partial, self._compute(net.eval(), windows))
                partial.rename(path)
        return np.load(path)

    @torch.inference_mode()
    def _compute(self, net: Any, windows: Windows) -> Float[np.ndarray, " windows"]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net, losses = net.to(device), []
        starts = range(0, len(windows), self.batch_size)
        for start in track(starts, f"difficulty by {self.name}"):
            input_ids, target = windows[range(start, min(start + self.batch_size, len(windows)))]
            logits = net(input_ids=input_ids.to(device), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(precise(logits).mT, target.to(device), reduction="none")
            losses.append(loss.mean(1).cpu())
        return torch.cat(losses).double().numpy()


def _blocks(windows: Windows, size: int = 1024) -> Iterator[np.ndarray]:
    """Input tokens (windows, time) of ``size`` windows at a time; all of them may not fit into memory."""
    tokens = np.asarray(windows.tokens[: len(windows) * windows.length]).reshape(len(windows), windows.length)
    for start in range(0, len(windows), size):
        yield tokens[start : start + size]
