"""Tokenizers for language models: trained on the corpus, or pretrained."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from typing_extensions import override

from common.checksums import is_shape
from common.errors import InputError, short_path

EOS = "<|endoftext|>"


class TokenizerSource(ABC):
    """A source of a tokenizer. Subclass it for your own, and name the class in YAML."""

    eos_token: str = EOS
    sample_chars: float = 50e6  # training text for `build`; more text hardly changes the merges

    def settings(self) -> dict[str, Any]:
        """All settings that the tokenizer depends on, as JSON values."""
        return dict(vars(self))

    def special(self) -> dict[str, Any]:
        """Further arguments of ``transformers.PreTrainedTokenizerFast``, as plain values, which an export keeps."""
        return {}

    @abstractmethod
    def build(self, texts: Iterable[str]) -> Tokenizer:
        """Make the tokenizer from pieces of training text, in order. It must know `eos_token`."""


class BPE(TokenizerSource):
    """Byte-level byte-pair encoding, trained on the corpus. No text is unknown to it."""

    def __init__(self, vocab_size: int = 4096):
        if vocab_size < 257:
            raise InputError(f"vocab_size is {vocab_size}: 256 bytes and {EOS} need at least 257")
        self.vocab_size = vocab_size

    @override
    def build(self, texts: Iterable[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer


class Characters(TokenizerSource):
    """Every character of the training text is a token; all others are ``<unk>``."""

    sample_chars = math.inf

    @override
    def build(self, texts: Iterable[str]) -> Tokenizer:
        vocab = {token: index for index, token in enumerate(["<unk>", EOS, *sorted(set().union(*texts))])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens(["<unk>", EOS])
        return tokenizer


class KnownTokenizer(TokenizerSource):
    """The tokenizer of a checkpoint.

    Args:
        text: its ``tokenizer.json``.
        eos_token: the token that ends a text.
    """

    def __init__(self, text: str, eos_token: str):
        self.text, self.eos_token = text, eos_token

    @override
    def build(self, texts: Iterable[str]) -> Tokenizer:
        return Tokenizer.from_str(self.text)


class PretrainedTokenizer(TokenizerSource):
    """An existing tokenizer: a folder, a ``tokenizer.json`` file or a name on the Hugging Face hub."""

    def __init__(self, name: str):
        self.name = name

    @override
    def settings(self) -> dict[str, Any]:
        path = Path(self.name).expanduser()
        files = [path] if path.is_file() else [*sorted(path.glob("*.json")), *sorted(path.glob("*.model"))]
        return {"name": self.name, "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]}

    def _read(self) -> Any:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path, name = Path(self.name).expanduser(), short_path(self.name)
        try:
            if path.is_file():
                found = PreTrainedTokenizerFast(tokenizer_file=str(path))
            else:
                found = AutoTokenizer.from_pretrained(path if path.is_dir() else self.name, trust_remote_code=False)
            found.backend_tokenizer  # noqa: B018  # a slow one has none
        except Exception as error:  # tokenizers raises nothing narrower for a foreign file
            fix = "give a folder, a tokenizer.json or a hub name"
            raise InputError(f"{name}: no fast tokenizer there ({shorten(str(error), 36)}); {fix}") from error
        return found

    @override
    def special(self) -> dict[str, Any]:
        found = self._read()
        tokens = {name: token for name, token in found.special_tokens_map.items() if isinstance(token, str)}
        length = {"model_max_length": found.model_max_length} if found.model_max_length < 1 << 30 else {}
        template = {"chat_template": found.chat_template} if isinstance(found.chat_template, str) else {}
        sides = {side: "left" for side in ("padding_side", "truncation_side") if getattr(found, side) == "left"}
        return {**tokens, **length, **template, **sides}

    @override
    def build(self, texts: Iterable[str]) -> Tokenizer:
        found, name = self._read(), short_path(self.name)
        tokenizer: Tokenizer = found.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A bare tokenizer.json does not say which token ends a text.
        names = [str(found.eos_token or ""), EOS, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"]
        known = [token for token in names if tokenizer.token_to_id(token) is not None]
        if not known:
            raise InputError(f"{name}: no end-of-text token; set eos_token in its tokenizer_config.json")
        self.eos_token = known[0]
        return tokenizer


def chosen(tokenizer: TokenizerSource | None, weights: str | None, facts: Mapping[str, Any]) -> TokenizerSource:
    """The tokenizer that is given, or else that of a checkpoint or of a pretrained net.

    Args:
        tokenizer: the one that is given.
        weights: folder or hub name of the net.
        facts: those of the checkpoint that a command is about; empty if there is none.

    Raises:
        InputError: there is none, or one that is made from a text is given to a pretrained net.
    """
    if tokenizer is None and weights is None:
        if facts:
            return KnownTokenizer(facts["tokenizer"], facts["eos_token"])
        raise InputError("data.tokenizer is null, and there are no model.weights to take it from; name one")
    made = tokenizer is not None and not isinstance(tokenizer, PretrainedTokenizer)
    if made and weights is not None and not facts and not is_shape(weights):
        problem = f"{type(tokenizer).__name__} is not the tokenizer of model.weights"
        raise InputError(f"data.tokenizer: {problem}; add the recipe's pretrained.yaml by --config, or give null")
    return tokenizer or PretrainedTokenizer(str(weights))
