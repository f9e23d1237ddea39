"""Running recipes in tests: in this process, or on forked ranks that share its imports."""

import contextlib
import csv
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import secrets
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.parent.name for path in (ROOT / "recipes").glob("*/train.py"))
# Recipes with published results. Contract tests run on all recipes, copies included; pages, and tests that take turns
# through recipes, are about these.
MEASURED = sorted({key.split("/")[0] for key in json.loads((ROOT / "benchmarks/results/recipes.json").read_text())})
# What a recipe is, by the name of its module, which a copy keeps.
SCRIPTS = {name: (ROOT / f"recipes/{name}/train.py").read_text() for name in RECIPES}
KIND = {name: next(iter(re.findall(r"CLI\((\w+)Module", text)), "") for name, text in SCRIPTS.items()}
# Those that read a corpus; the path of a short one makes them quick.
CONFIGS = {name: yaml.safe_load((ROOT / f"recipes/{name}/config.yaml").read_text()) for name in RECIPES}
TEXT = [name for name, config in CONFIGS.items() if "path" in config.get("data", {})]
LAUNCHERS = {"ray"}  # DDP that starts its ranks in a way of its own: tests/test_ray.py
# Layers named as the package that they need, which pip alone does not install: they are left out where it is missing.
MISSING = {name for name in ("horovod",) if importlib.util.find_spec(name) is None}
STRATEGY_LAYERS = sorted(
    path for path in (ROOT / "configs/strategy").glob("*.yaml") if path.stem not in LAUNCHERS | MISSING
)
STRATEGIES = [path.stem for path in STRATEGY_LAYERS]
# Those that train near a single process, not as it does, and what makes short runs show it.
INEXACT = {
    "ddp_powersgd": ["--trainer.strategy.start_step", "2"],
    "diloco": ["--trainer.strategy.sync_every", "2", "--trainer.strategy.outer_momentum", "0.5"],
    "local_sgd": ["--trainer.strategy.sync_every", "2"],
}
EXACT = [name for name in STRATEGIES if name not in INEXACT]
VARIANTS = ("ddp_powersgd", "deepspeed_zero1", "deepspeed_zero3_offload", "diloco", "ring_allreduce")  # of another
# Those whose ranks share samples: how many of them do.
SETTINGS = {path.stem: yaml.safe_load(path.read_text())["trainer"]["strategy"] for path in STRATEGY_LAYERS}
TOGETHER = {
    name: number
    for name, settings in SETTINGS.items()
    for key in ("tensor_parallel", "stages")
    if (number := settings.get("init_args", {}).get(key, 1)) > 1
}


def is_refused(recipe: str, strategy: str) -> bool:
    """Whether a recipe refuses a strategy in one line.

    Attacks differentiate by inputs, after which FSDP1 gets the next gradients wrong. Of the nets in these tests only
    the language models say how they can be sliced, and have blocks for a pipeline; a curriculum begins here with
    batches too small for one.
    """
    carried = {
        "fsdp": KIND[recipe] != "Adversarial",
        "tensor_parallel": recipe in TEXT,
        "pipeline": KIND[recipe] == "LM",
    }
    return not carried.get(strategy, True)


TINY = ["--config", str(ROOT / "configs/tiny.yaml")]
PLAIN = ["--config", str(ROOT / "tests/plain.yaml")]


def code_hash(*files: Path) -> str:
    """A hash of files and of the packages that decide what a test does; of all code and configs if none is named."""
    folders = [ROOT / name for name in ("common", "recipes", "configs", "tests")]
    found = files or [path for folder in folders for path in folder.rglob("*.*") if path.suffix in (".py", ".yaml")]
    sha = hashlib.sha256()
    for path in sorted(found):
        sha.update(path.read_bytes())
    packages = "torch", "lightning", "transformers", "deepspeed", "megatron-core", "ray", "kornia", "tabm", "torchjd"
    for package in packages:
        sha.update(importlib.metadata.version(package).encode())
    return sha.hexdigest()


def main_of(recipe: str) -> Callable[[list[str]], Any]:
    """The recipe's command line, in this process: it takes the arguments, and a mistake ends it with a code."""
    script = ROOT / f"recipes/{recipe}/train.py"

    def run(args: list[str]) -> Any:
        before, sys.argv = sys.argv, [str(script), *args]
        try:
            return importlib.import_module(f"recipes.{recipe}.train").main()
        finally:
            sys.argv = before

    return run


def refused(recipe: str, args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line ends in."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main_of(recipe)(args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2, error
    assert error.endswith("\n")
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 241, error
    return error.strip()


def small_args(recipe: str, text: Path) -> list[str]:
    """What makes a recipe's net small, and lets it read a short text if it reads one."""
    return [
        "--config",
        str(ROOT / f"recipes/{recipe}/small.yaml"),
        *(["--data.path", str(text)] if recipe in TEXT else []),
    ]


def text_args(recipe: str, text: Path) -> list[str]:
    """The same for recipes that read a text, and a quick teacher; nothing for the others, whose nets are quick."""
    if "teacher_training" in CONFIGS[recipe]["model"]:
        return ["--model.teacher_training", "small_teacher.yaml"]
    return small_args(recipe, text) if recipe in TEXT else []


class Rank(L.Trainer):
    """The settings and counters of one rank at some point of a run, without the run."""

    strategy: Any = None

    def __init__(
        self, world: int = 1, rank: int = 0, accumulate: int = 1, limit: float | None = 1.0, processed: int = 0
    ):
        self.world, self.rank = world, rank
        self.accumulate_grad_batches, self.limit_train_batches = accumulate, limit  # type: ignore[assignment]
        self.fast_dev_run = False
        total = SimpleNamespace(processed=processed)
        self.fit_loop: Any = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))

    @property
    def world_size(self) -> int:
        return self.world

    @property
    def global_rank(self) -> int:
        return self.rank


def strategies_of(recipe: str) -> list[str]:
    """The strategies that carry a recipe."""
    return [name for name in STRATEGIES if not is_refused(recipe, name)]


def runs_on(strategy: str, world: int) -> bool:
    """Whether a strategy works on so many ranks."""
    return world % TOGETHER.get(strategy, 1) == 0


def per_rank(total: int, world: int, strategy: str | None) -> int:
    """The batch size with which all ranks together read so many samples."""
    return total * TOGETHER.get(strategy or "", 1) // world


def turn(strategy: str, number: int) -> str:
    """The recipe whose turn it is, of those that a strategy carries."""
    carried = [recipe for recipe in MEASURED if not is_refused(recipe, strategy)]
    return carried[number % len(carried)]


def under(recipe: str) -> str:
    """The strategy under which the suite has a recipe; together they are the ways to share a net and its optimizer."""
    own = {
        "classification": "fsdp2", "curriculum": "deepspeed_zero3", "lm": "tensor_parallel",
        "multitask": "fsdp", "regression": "parameter_server",
    }  # fmt: skip
    return own.get(recipe, "ddp")


def covering(*settings: Iterable[Any], allowed: Callable[[tuple[Any, ...]], bool] = bool) -> list[tuple[Any, ...]]:
    """Cells, with one value of each setting, in which any two values meet that an allowed cell has."""
    cells = [cell for cell in itertools.product(*settings) if allowed(cell)]
    random.Random(1).shuffle(cells)
    pairs = {cell: set(itertools.combinations(enumerate(cell), 2)) for cell in cells}
    left = set[Any]().union(*pairs.values())
    chosen = []
    while left:
        chosen.append(max(cells, key=lambda cell: len(pairs[cell] & left)))
        left -= pairs[chosen[-1]]
    return chosen


def halved(cases: Iterable[Any]) -> list[Any]:
    """The suite runs every second case, the long sweep all."""
    params = [case if hasattr(case, "marks") else pytest.param(*case) for case in cases]
    return [
        pytest.param(*each.values, marks=[*each.marks, pytest.mark.matrix], id=each.id) if number % 2 else each
        for number, each in enumerate(params)
    ]


def read_metrics(path: Path, name: str) -> list[float]:
    """The values of one column of a ``metrics.csv``, empty cells left out."""
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def difference(values: list[float], expected: list[float]) -> float:
    """The largest difference, relative to what is expected."""
    return max(abs(value - wanted) / (abs(wanted) or 1) for value, wanted in zip(values, expected, strict=True))


def _rank(
    rank: int,
    world: int,
    port: int,
    log: Path,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    env: dict[str, str],
) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        )  # fmt: skip
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that another test has used did not survive the fork
    os.environ.update(env)
    rank_zero_only.rank = rank  # which has been read from the environment when it was imported
    gc.freeze()  # looking through what the parent has made would copy its memory
    import torch

    torch.set_num_threads(1)
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


WARM = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # compiles, which imports half of torch
    "common.strategies.deepspeed",
    "common.strategies.pipeline",
    "pyarrow.pandas_compat",
    "sklearn.datasets",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.pipelining",
    "transformers.generation.utils",
    "transformers.models.auto.processing_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
)


@functools.cache
def _prepare_forks() -> None:
    """Do once what every fork would do: import what nets, data and strategies need, read what configs name."""
    for name in WARM:
        importlib.import_module(name)
    for recipe in RECIPES:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main_of(recipe)(["fit", "--print_config"])


def free_port() -> int:
    """A port below those that connections of other tests are given: they could take it before the ranks listen."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4  # each has ports of its own
    while True:
        port = 20_000 + 3_000 * worker + secrets.randbelow(3_000)  # `random` is seeded, the same in every worker
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_ranks(
    function: Callable[..., Any], *args: Any, world: int = 2, folder: Path, timeout: float = 120, **env: str
) -> list[int]:
    """Call a function in ``world`` forked processes with torchrun's variables; returns their exit codes.

    A fork of a process that has imported everything starts in a moment instead of ten seconds. What rank r prints is in
    ``folder/rank<r>.log``. Ranks still alive after ``timeout`` seconds, or 10 after another was killed, are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _prepare_forks()
    port = free_port()
    context = multiprocessing.get_context("fork")
    ranks: list[Any] = [
        context.Process(target=_rank, args=(rank, world, port, folder / f"rank{rank}.log", function, args, env))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(10 if any((p.exitcode or 0) < 0 for p in ranks) else timeout)
    for process in ranks:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def logs(folder: Path) -> str:
    """What the ranks of the last run in a folder printed, to be shown by a failing assertion."""
    return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("rank*.log")))


def write_encoder(folder: Path, texts: list[str]) -> Path:
    """A BERT with new weights, small enough to train in a moment, and its tokenizer, trained on the texts."""
    import tokenizers
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=fast.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def write_decoder(
    folder: Path, text: str, kind: str = "LlamaConfig", tokens: int = 0, dtype: str = "float32", positions: int = 64
) -> Path:
    """A causal net of transformers with new weights, and its tokenizer, trained on the text.

    Args:
        folder: where to.
        text: for the tokenizer.
        kind: class of its config.
        tokens: how many more it knows than the tokenizer, or fewer if negative.
        dtype: of its weights.
        positions: the longest window that it takes.
    """
    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[1])
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": positions, "bos_token_id": 1, "eos_token_id": 0}
    sizes |= {} if kind == "GPT2Config" else {"intermediate_size": 64, "num_key_value_heads": 2}
    config = getattr(transformers, kind)(vocab_size=len(fast) + tokens, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = transformers.AutoModelForCausalLM.from_config(config)
    net.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def tokens_until_the_end(folder: Path) -> int:
    """How many tokens an exported language model generates whose every token is the one that ends a text."""
    import torch
    import transformers

    net: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    end = transformers.AutoTokenizer.from_pretrained(folder).eos_token_id
    net.set_output_embeddings(head := torch.nn.Linear(net.config.hidden_size, net.config.vocab_size))
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.nn.functional.one_hot(torch.tensor(end), net.config.vocab_size).float()
    return net.generate(torch.tensor([[end]]), max_new_tokens=5, do_sample=False).shape[1] - 1


def write_resnet(folder: Path) -> Path:
    """A ResNet of transformers for seven classes of colour images, with new weights and its own mean and scale."""
    import torch
    import transformers

    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 7}
    config = transformers.ResNetConfig(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ResNetForImageClassification(config).save_pretrained(folder)
    scale = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.2]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**scale, "image_processor_type": "ViTImageProcessor"}))
    return folder
