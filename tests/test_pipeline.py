"""Pipelines compute what one process does, under either schedule, and their checkpoints are those of one process."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.nets import causal_lm
from common.strategies.stages import plan_stages
from tests.support import PLAIN, ROOT, difference, halved, logs, main_of, read_metrics, run_ranks
from tests.test_distillation import text_args
from tests.test_resume import digest, killed_main, write_config
from tests.test_strategies import BINNED

pytestmark = pytest.mark.usefixtures("no_report")

NET = "--model.config.init_args"
LAYER = ["--config", str(ROOT / "configs/strategy/pipeline.yaml")]
COLUMNS = ("train/loss", "optim/grad_norm", "val/loss")

Fit = Callable[..., Path]


@pytest.fixture
def fit(work: Path, lm_args: list[str]) -> Fit:
    """Train twenty steps of 16 samples with clipping, and return the run's folder."""

    def run(name: str, world: int, *args: str, batch_size: int = 16, accumulate: int = 1) -> Path:
        layer = LAYER if world > 1 and "--config" not in args else []
        command = [
            "fit", *layer, *PLAIN, *lm_args, "--name", name, "--data.batch_size", str(batch_size),
            "--trainer.accumulate_grad_batches", str(accumulate), "--trainer.accelerator", "cpu",
            "--trainer.devices", str(world), "--trainer.max_steps", "20", "--trainer.gradient_clip_val", "0.5",
            "--trainer.val_check_interval", str(10 * accumulate), "--trainer.check_val_every_n_epoch", "null",
            "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", *args,
        ]  # fmt: skip
        assert run_ranks(main_of("lm"), command, world=world, folder=work / name) == [0] * world, logs(work / name)
        return work / "runs/lm" / name

    return run


def differences(run: Path, expected: Path) -> dict[str, float]:
    """The largest relative difference of the losses, norms and validation losses of two runs."""
    tables = [path / "metrics.csv" for path in (run, expected)]
    assert len(read_metrics(tables[1], "train/loss")) == 20
    assert sum(norm > 0.5 for norm in read_metrics(tables[1], "optim/grad_norm")) > 5, "some are clipped"
    return {column: difference(*(read_metrics(table, column) for table in tables)) for column in COLUMNS}


def check_state(run: Path, expected: Path, atol: float = 1e-4) -> None:
    """Weights and optimizer state of two runs are those of one net, up to rounding."""
    last, wanted = (read_checkpoint(path / "checkpoints/last.ckpt") for path in (run, expected))
    assert list(last["state_dict"]) == list(wanted["state_dict"])
    for name, value in wanted["state_dict"].items():
        assert torch.allclose(last["state_dict"][name], value, atol=atol), name
    states, wanted_states = (checkpoint["optimizer_states"][0] for checkpoint in (last, wanted))
    assert states["param_groups"] == wanted_states["param_groups"]
    assert states["state"].keys() == wanted_states["state"].keys()
    for number, state in wanted_states["state"].items():
        for key, value in state.items():
            assert torch.allclose(states["state"][number][key], value, atol=atol), (number, key)


# Nets of other families, without dropout.
GPT2 = [f"{NET}.n_{key}={value}" for key, value in (("embd", 32), ("layer", 3), ("head", 2))]
GPT2 += [f"{NET}.{part}_pdrop=0.0" for part in ("resid", "embd", "attn")]
FALCON = [f"{NET}.hidden_size=32", f"{NET}.num_hidden_layers=2", f"{NET}.num_attention_heads=2"]
SHAPES: dict[str, tuple[int, list[str], int, int]] = {  # ranks, settings, batch size, accumulation
    "1f1b": (2, [], 16, 1),
    "gpipe": (2, ["--trainer.strategy.schedule", "gpipe", "--trainer.strategy.micro_batches", "2"], 16, 1),
    "accumulation": (2, [], 8, 2),
    "replicas": (4, [], 8, 1),
    "three_stages": (3, ["--trainer.strategy.stages", "3", f"{NET}.num_hidden_layers", "3"], 16, 1),
    "untied": (2, [f"{NET}.tie_word_embeddings", "false"], 16, 1),
    "muon": (2, ["--model.optimizer", "common.optim.MuonAdamW", "--model.l1", "1.0e-4"], 16, 1),
    "gpt2": (2, ["--model.config", "transformers.GPT2Config", *GPT2], 16, 1),
    "blocks_return_tuples": (2, ["--model.config", "transformers.FalconConfig", *FALCON], 16, 1),
    "checkpointed": (2, ["--model.activation_checkpointing", "true"], 16, 1),
}


FAST = ("three_stages",)


@pytest.mark.parametrize(
    "shape", [pytest.param(name, marks=[] if name in FAST else pytest.mark.matrix) for name in SHAPES]
)
def test_pipelines_equal_one_process(shape: str, fit: Fit, record_property: Any) -> None:
    world, flags, batch_size, accumulate = SHAPES[shape]
    of_net = flags[2 * sum("strategy" in flag for flag in flags) :]
    expected = fit("one", 1, *of_net)
    run = fit("run", world, *flags, batch_size=batch_size, accumulate=accumulate)
    off = differences(run, expected)
    record_property("summary", f"pipeline, {shape}: largest relative difference {max(off.values()):.1e}")
    norms, room = off.pop("optim/grad_norm"), 10 if shape == "muon" else 1  # its products in bf16 magnify rounding
    assert max(off.values()) < 1e-5
    assert norms < room * 1e-5
    check_state(run, expected, room * 1e-4)


@pytest.mark.matrix
def test_both_schedules_drop_the_same_places(fit: Fit) -> None:
    """Of each micro-batch, in whichever order it is computed; and other ones than without stages."""
    dropout = [f"{NET}.attention_dropout", "0.5", "--trainer.max_steps", "5"]
    runs = [fit("gpipe", 2, *dropout, "--trainer.strategy.schedule", "gpipe"), fit("1f1b", 2, *dropout)]
    losses, expected, whole = (
        read_metrics(run / "metrics.csv", "train/loss") for run in (*runs, fit("one", 1, *dropout))
    )
    assert difference(losses, expected) < 1e-6
    assert difference(losses, whole) > 1e-4


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("classification", []),
        ("distillation", []),
        ("curriculum", ["--data.batch", "null", "--trainer.strategy.micro_batches", "8"]),
    ],
)
def test_other_recipes_equal_one_process(
    recipe: str, flags: list[str], work: Path, plain_args: dict[str, list[str]], record_property: Any
) -> None:
    """Nets of other kinds, metrics of all kinds, batches of changing length; two replicas."""
    runs = []
    for world, batch_size, layer in ((1, 32, []), (4, 16, LAYER)):
        args = [
            "fit", *layer, *PLAIN, *plain_args[recipe], *(flags if world > 1 else flags[:2]), "--name", str(world),
            "--data.batch_size", str(batch_size), "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
            "--trainer.max_steps", "10", "--trainer.log_every_n_steps", "1", "--trainer.val_check_interval", "10",
            "--trainer.check_val_every_n_epoch", "null", "--trainer.enable_progress_bar", "false",
        ]  # fmt: skip
        folder = work / str(world)
        assert run_ranks(main_of(recipe), args, world=world, folder=folder) == [0] * world, logs(folder)
        runs.append(work / "runs" / recipe / str(world))
    tables = [run / "metrics.csv" for run in runs]
    names = [name for name in tables[0].read_text().splitlines()[0].split(",") if name.startswith(("train/", "val/"))]
    assert {"train/loss", "val/loss"} < {*names}
    off = {name: difference(*(read_metrics(table, name) for table in reversed(tables))) for name in names}
    record_property("summary", f"pipeline, {recipe}: largest relative difference {max(off.values()):.1e}")
    assert max(value for name, value in off.items() if name.rpartition("/")[2] not in BINNED) < 1e-5, off


@pytest.mark.matrix
def test_checkpoints_travel(fit: Fit, record_property: Any) -> None:
    """From a pipeline to one process, to DDP, to two pipelines and back, as if it had been one process all along."""
    schedule = ["--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR"]  # the same however long the run is
    again = ["--ckpt_path", "last"]
    ddp = ["--config", str(ROOT / "configs/strategy/ddp.yaml")]
    hops: list[tuple[int, int, list[str]]] = [
        (2, 16, []),
        (1, 16, ["--trainer.strategy", "auto", *again]),
        (2, 8, [*ddp, *again]),
        (4, 8, [*LAYER, *again]),
    ]
    values: dict[str, list[float]] = {column: [] for column in COLUMNS}
    run = Path()
    for hop, (world, batch_size, flags) in enumerate(hops, 1):
        steps = ["--trainer.max_steps", str(4 * hop), "--trainer.val_check_interval", "4"]
        run = fit("hops", world, *schedule, *steps, *flags, batch_size=batch_size)
    for column, found in values.items():
        found += read_metrics(run / "metrics.csv", column)
    whole = fit("whole", 1, *schedule, "--trainer.max_steps", str(4 * len(hops)), "--trainer.val_check_interval", "4")
    off = max(difference(values[column], read_metrics(whole / "metrics.csv", column)) for column in COLUMNS)
    record_property("summary", f"pipeline, through {len(hops)} strategies: largest relative difference {off:.1e}")
    assert off < 1e-5
    check_state(run, whole)


class Shared(nn.Module):
    """Blocks of a net of one's own, with a weight in each that is the same for all."""

    _no_split_modules = ("Block",)

    def __init__(self, blocks: int = 4, shared: bool = False, norm: bool = False):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.BatchNorm1d(4) if norm else nn.LayerNorm(4)
        if shared:
            for layer in self.layers:
                layer.weight = self.layers[0].weight


class Block(nn.Linear):
    """One of them."""

    def __init__(self) -> None:
        super().__init__(4, 4)


def test_plans_of_nets() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    net: Any = causal_lm(LlamaConfig(**sizes, tie_word_embeddings=True), 10)
    plan = plan_stages(net, 2)
    assert plan.layers == list(net.model.layers)
    assert [list(numbers) for numbers in plan.own] == [[0, 1], [2]]
    assert plan.stages_of[net.lm_head.weight] == {0, 1}, "the embedding's"
    assert plan.stages_of[net.model.norm.weight] == {1}
    assert plan.stage_of["lm_head.weight"] == plan.stage_of["model.embed_tokens.weight"] == 0
    assert plan.stage_of["model.layers.2.mlp.up_proj.weight"] == 1
    untied: Any = causal_lm(LlamaConfig(**sizes, tie_word_embeddings=False), 10)
    assert plan_stages(untied, 3).stages_of[untied.lm_head.weight] == {2}
    assert plan_stages(nn.Sequential(Shared()), 4).stage_of["0.norm.weight"] == 3


@pytest.mark.parametrize(
    ("make", "stages", "line"),
    [
        (lambda: nn.Linear(2, 2), 2, "Linear names no list of blocks"),
        (lambda: Shared(3), 4, "Shared has 3 blocks, fewer than 4 stages"),
        (lambda: Shared(shared=True), 4, "layers.0.weight of Shared is shared by blocks of several stages"),
        (lambda: Shared(norm=True), 2, "batch norm of Shared would take its statistics of micro-batches"),
        (
            lambda: T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=2, num_heads=1, vocab_size=9)),
            2,
            r"T5ForConditionalGeneration has blocks in several lists \(encoder.block and decoder.block\)",
        ),
    ],
)
def test_nets_that_cannot_be_divided(make: Callable[[], nn.Module], stages: int, line: str) -> None:
    with pytest.raises(InputError, match=line):
        plan_stages(make(), stages)


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    halved(
        [
            ("lm", ["--trainer.strategy.stages", "3"], "stages: 3 is no divisor of 2 ranks"),
            ("lm", ["--trainer.strategy.stages", "1"], "stages: must be at least 2, got 1"),
            ("lm", ["--trainer.strategy.micro_batches", "1"], "micro_batches: must be at least 2 with 1f1b, got 1"),
            (
                "lm",
                ["--trainer.strategy.micro_batches", "0", "--trainer.strategy.schedule", "gpipe"],
                "at least 1 with",
            ),
            ("lm", ["--data.batch_size", "6"], "micro_batches: 4 is no divisor of the 6 samples of a batch"),
            ("lm", [f"{NET}.num_hidden_layers", "1"], "LlamaForCausalLM has 1 blocks, fewer than 2 stages"),
            ("lm", ["--trainer.sync_batchnorm", "true"], "trainer.sync_batchnorm: Pipeline does not support it"),
            ("classification", [], "ConvNet names no list of blocks (_no_split_modules)"),
        ]
    ),
)
def test_mistakes(recipe: str, flags: list[str], line: str, work: Path, lm_args: list[str]) -> None:
    own = lm_args if recipe == "lm" else []
    args = [*LAYER, "--trainer.accelerator", "cpu", *own, *flags, "--trainer.devices", "2"]
    for command, world in (("fit", 2), ("preflight", 1)):
        assert run_ranks(main_of(recipe), [command, *args], world=world, folder=work) == [2] * world, logs(work)
        assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / f"runs/{recipe}/default/checkpoints").exists()


def counting_main(args: list[str]) -> None:
    """The loss counts its calls in a buffer."""
    from recipes.lm.module import LMModule

    make, step = LMModule.configure_model, LMModule.shared_step

    def make_with_count(self: Any) -> None:
        make(self)
        self.register_buffer("count", torch.zeros(()))

    def counted(self: Any, batch: Any, stage: Any) -> Any:
        result = step(self, batch, stage)
        if stage == "train":
            self.count += 1
        return result

    LMModule.configure_model, LMModule.shared_step = make_with_count, counted  # type: ignore[method-assign]
    main_of("lm")(args)


def test_a_state_that_steps_change_is_refused(work: Path, lm_args: list[str]) -> None:
    """Only the last stage comes to the loss, and the first one saves it."""
    args = ["fit", *LAYER, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    assert run_ranks(counting_main, args, folder=work) == [3, 2], logs(work)
    line = (work / "rank1.log").read_text().splitlines()[-1]
    assert "stages: a step changes the buffer count of LMModule, each stage in its own way; take" in line


@pytest.mark.parametrize(
    ("recipe", "flags", "line"),
    halved(
        [
            ("adversarial", [], "stages: the recipe wants other gradients than those of its loss"),
            ("multitask", [], "stages: the recipe wants other gradients than those of its loss"),
            ("curriculum", ["--data.batch_size", "8"], "micro_batches: 4 is no divisor of the 2 samples of a batch"),
            ("lm", ["--model.optimizer", "pytorch_optimizer.Prodigy"], "Prodigy goes by all parameters at once"),
        ]
    ),
)
def test_what_shows_in_training(
    recipe: str, flags: list[str], line: str, work: Path, plain_args: dict[str, list[str]]
) -> None:
    args = ["fit", *LAYER, "--trainer.accelerator", "cpu", *plain_args[recipe], *flags, "--trainer.devices", "2"]
    assert run_ranks(main_of(recipe), args, folder=work) == [2, 2], logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]


def test_a_net_that_registers_its_parts_in_another_order(work: Path, lm_args: list[str]) -> None:
    """OPT registers its last norm before the blocks, to the stage of which it does not come."""
    config = ["--model.config", "transformers.OPTConfig", f"{NET}.num_hidden_layers", "2", f"{NET}.hidden_size", "32"]
    net = [*config, f"{NET}.word_embed_proj_dim", "32", f"{NET}.ffn_dim", "64", f"{NET}.num_attention_heads", "2"]
    own = [*lm_args[: lm_args.index(f"{NET}.hidden_size")], *net]
    args = ["fit", *LAYER, "--trainer.accelerator", "cpu", *own, "--trainer.devices", "2"]
    assert run_ranks(main_of("lm"), args, folder=work) == [3, 2], logs(work)
    last = (work / "rank1.log").read_text().splitlines()[-1]
    assert "stages: OPTForCausalLM uses in stage 1 what it registers for another" in last


def biased_main(args: list[str]) -> None:
    """Blocks that pass on what the next ones need, beside the hidden state, as T5's."""
    from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

    forward = FalconDecoderLayer.forward

    def with_bias(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden, *_ = forward(self, *args, **kwargs)
        return hidden, hidden.mean()

    FalconDecoderLayer.forward = with_bias  # in this forked process only
    main_of("lm")(args)


def logging_main(args: list[str]) -> None:
    """A recipe whose ``shared_step`` logs by itself."""
    from recipes.lm.module import LMModule

    shared_step = LMModule.shared_step

    def with_log(self: LMModule, batch: Any, stage: Any) -> Any:
        loss, count = shared_step(self, batch, stage)
        if stage == "train":
            self.log("train/own", loss.detach())
        return loss, count

    LMModule.shared_step = with_log  # type: ignore[method-assign]  # in this forked process only
    main_of("lm")(args)


def doubling_main(args: list[str]) -> None:
    """A recipe that trains with something made of the loss of its ``shared_step``."""
    from recipes.lm.module import LMModule

    training_step = LMModule.training_step
    LMModule.training_step = lambda *args: 2 * training_step(*args)  # type: ignore  # in this forked process only
    main_of("lm")(args)


@pytest.mark.parametrize(
    ("main", "flags", "codes", "line"),
    halved(
        [
            (
                biased_main,
                ["--model.config", "transformers.FalconConfig", *FALCON],
                [2, 2],
                "FalconDecoderLayer does not return what it gets, in shape and type, and nothing else",
            ),
            (doubling_main, [], [2, 2], "stages: the recipe trains with another loss than that of its shared_step"),
            (logging_main, [], [3, 2], "shared_step logs train/own in training"),
        ]
    ),
)
def test_what_would_be_lost(
    main: Callable[..., None], flags: list[str], codes: list[int], line: str, work: Path, lm_args: list[str]
) -> None:
    args = ["fit", *LAYER, "--trainer.accelerator", "cpu", *lm_args, *flags, "--trainer.devices", "2"]
    assert run_ranks(main, args, folder=work) == codes, logs(work)
    assert line in (work / "rank1.log").read_text().splitlines()[-1]


@pytest.mark.matrix
def test_features_of_another_stage(work: Path, small_text: Path) -> None:
    """A block that the last stage skips, and a layer within, after a validation that asks for neither."""
    net = ["--model.net.config.init_args.num_hidden_layers", "4", "--model.teacher_training", "null"]
    features = ["--model.feature_loss", "SimilarityPreserving", "--model.features"]
    for layer, line in (
        ("model.layers.0", "CausalLM uses in stage 1 what it registers for another"),
        ("model.layers.0.mlp", "model.features: this rank's part of the net has no output of"),
    ):
        pair = f"[[model.{layer}, model.{layer}]]"
        args = ["fit", *LAYER, *text_args(small_text), *net, *features, pair, "--trainer.devices", "2"]
        assert run_ranks(main_of("distillation"), args, folder=work) == [3, 2], logs(work)
        assert line in (work / "rank1.log").read_text().splitlines()[-1]


@pytest.mark.matrix
def test_a_checkpoint_of_other_parameters(fit: Fit, work: Path, lm_args: list[str]) -> None:
    """The rest of whose optimizer's state would be that of other parameters."""
    fit("tied", 2, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    args = ["fit", "--name", "tied", "--ckpt_path", "last", f"{NET}.tie_word_embeddings", "false"]
    assert run_ranks(main_of("lm"), args, folder=work) == [2, 2], logs(work)
    last = (work / "rank0.log").read_text().splitlines()[-1]
    assert last.startswith("--ckpt_path: does not fit this model or optimizer: contains a parameter group")


@pytest.mark.parametrize("temperature", [pytest.param("0", marks=pytest.mark.matrix), "0.8"])
def test_texts_are_those_of_one_process(temperature: str, work: Path, lm_args: list[str]) -> None:
    """Two pipelines share three prompts; all ranks draw the same tokens."""
    args = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    fit = ["fit", *PLAIN, *lm_args, *args, "--trainer.max_steps", "4", "--trainer.limit_val_batches", "0"]
    assert run_ranks(main_of("lm"), fit, world=1, folder=work) == [0], logs(work)
    prompts, texts = '["The import", "a", "An object"]', []
    for world in (1, 4) if temperature == "0" else (1, 2):
        layer = ["--trainer.devices", str(world), *(LAYER if world > 1 else [])]
        given = ["--ckpt_path", "last", "--data.prompts", prompts, "--model.temperature", temperature]
        codes = run_ranks(main_of("lm"), ["predict", *given, *layer], world=world, folder=work / "predict")
        assert codes == [0] * world, logs(work / "predict")
        texts.append((work / "runs/lm/default/predict-last/predictions.csv").read_text())
    assert len(texts[0].splitlines()) > 3
    assert texts[0] == texts[1]


def test_killed_pipelines_go_on_to_the_bit(work: Path, lm_args: list[str]) -> None:
    """Two of them, in the middle of an accumulated step, with dropout."""
    saves = {"every_n_train_steps": 3}
    args = [
        "fit", *LAYER, "--config", str(write_config(work, saves)), *lm_args, "--data.batch_size", "8",
        "--trainer.accelerator", "cpu", "--trainer.devices", "4", "--trainer.max_steps", "6",
        "--trainer.accumulate_grad_batches", "2", "--trainer.limit_val_batches", "0",
        "--trainer.enable_progress_bar", "false", f"{NET}.attention_dropout", "0.1",
    ]  # fmt: skip
    codes = run_ranks(main_of("lm"), [*args, "--name", "whole"], world=4, folder=work / "whole")
    assert codes == [0] * 4, logs(work / "whole")
    cut = [*args, "--name", "cut"]
    killed = run_ranks(killed_main, "lm", cut, 8, world=4, folder=work / "killed")
    assert killed == [-signal.SIGKILL] * 4, logs(work / "killed")
    last = work / "runs/lm/cut/checkpoints/last.ckpt"
    assert read_checkpoint(last)["global_step"] == 3
    resumed = run_ranks(main_of("lm"), [*cut, "--ckpt_path", "last"], world=4, folder=work / "resumed")
    assert resumed == [0] * 4, logs(work / "resumed")
    assert digest(last) == digest(work / "runs/lm/whole/checkpoints/last.ckpt")
