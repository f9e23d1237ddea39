"""Curricula: lessons follow the tokens seen, easy samples come first, and every lesson is the same on all ranks."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from common.cache import CACHE
from common.errors import InputError
from common.sources.text import Windows
from common.sources.tokenizers import Characters
from recipes.curriculum.data import CurriculumData
from recipes.curriculum.difficulty import DocumentLength, Rarity, ReferenceLoss, ScoreFile
from recipes.curriculum.lessons import CurriculumSampler, Lesson, Pacing, halvings
from tests.support import Rank, halved, logs, main_of, read_metrics, run_ranks, text_args

pytestmark = pytest.mark.usefixtures("no_report")


def test_pacing_is_that_of_platanios() -> None:
    linear, root = Pacing(0.1, 1000), Pacing(0.1, 1000, power=2.0)
    assert [linear(seen) for seen in (0, 500, 1000, 5000)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    assert root(500) == pytest.approx(math.sqrt(0.5 * (1 - 0.1**2) + 0.1**2))
    assert root(0) == pytest.approx(0.1)
    for start in (0.5, 0.25, 0.125):  # of which rounding must not make less than a whole part
        for power in (1.0, 1.25, 1.8, 2.0, 3.3):
            assert halvings(Pacing(start, 1000, power)(0)) == halvings(start)


class Growing:
    """Lessons that double the batch from 2 and open a third of the samples after 100 tokens."""

    def __init__(self, full: int, seen: int = 0):
        self.full, self.tokens_seen = full, seen

    def lesson(self, seen: int) -> Lesson:
        return Lesson(self.full if seen >= 100 else self.full // 2, 8, 1 / 3 if seen < 100 else 1.0)


def steps(world: int, accumulate: int, seen: int = 0, processed: int = 0) -> list[set[int]]:
    """Samples of each optimizer step, of 16 in the end, over all ranks and micro-batches."""
    size = 16 // world // accumulate
    lists = [
        [p.indices for p in CurriculumSampler(
            np.arange(90)[::-1].copy(), size, Growing(size, seen), Rank(world, rank, accumulate, processed=processed)
        )]
        for rank in range(world)
    ]  # fmt: skip
    flat = [{index for indices in ranks for index in indices} for ranks in zip(*lists, strict=True)]
    return [set().union(*flat[i : i + accumulate]) for i in range(0, len(flat), accumulate)]


def test_easy_samples_come_first_and_ranks_and_accumulation_change_nothing() -> None:
    one = steps(1, 1)
    assert [len(step) for step in one] == [8, 8, 16, 16, 16]
    assert all(index >= 60 for step in one[:2] for index in step), "the easiest third has the highest numbers"
    assert min(min(step) for step in one[2:]) < 60
    assert steps(2, 1) == steps(1, 2) == steps(2, 2) == one


def test_a_resumed_sampler_goes_on_with_the_same_lesson() -> None:
    assert steps(2, 2, seen=128, processed=4) == steps(1, 1)[2:]
    assert steps(1, 1, seen=64, processed=1) == steps(1, 1)[1:]


def test_a_full_epoch_sees_every_sample_once() -> None:
    whole = steps(1, 1, seen=1000)
    assert sum(map(len, whole)) == len(set().union(*whole)) == 80


@pytest.mark.parametrize(("context", "first"), [(128, 32), (100, 24), (20, 8), (5, 5)])
def test_windows_grow_by_8_tokens_to_the_whole_context(context: int, first: int, small_text: Path) -> None:
    data = CurriculumData(Characters(), str(small_text), context=context, length=Pacing(0.25, 1000))
    lengths = [data.lesson(seen).length for seen in range(0, 1001, 10)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (first, context)
    assert all(length % 8 == 0 for length in lengths if length != context)


@pytest.mark.parametrize(("start", "parts"), [(1.0, 1), (0.5, 2), (0.3, 4), (0.25, 4), (0.1, 16)])
def test_batches_that_cannot_be_divided_are_refused(start: float, parts: int, small_text: Path) -> None:
    """What is left has the same samples on any number of ranks."""

    def data(batch_size: int) -> CurriculumData:
        return CurriculumData(Characters(), str(small_text), batch=Pacing(start, 1000), batch_size=batch_size)

    several = [data(4 * parts // world) for world in (1, 2, 4)]
    for seen in range(0, 1001, 50):
        assert len({each.lesson(seen).batch_size * world for each, world in zip(several, (1, 2, 4), strict=True)}) == 1
    assert several[0].lesson(0).batch_size == 4
    assert several[0].lesson(1000).batch_size == 4 * parts
    for batch_size in range(parts + 1, 2 * parts):
        with pytest.raises(InputError, match=f"data.batch_size {batch_size} is no multiple of {parts}.*{2 * parts} or"):
            data(batch_size)


@pytest.fixture
def windows() -> Windows:
    """Two windows of frequent tokens and one of rare ones, in which a document ends twice."""
    return Windows(np.array([1, 1, 1, 2, 1, 1, 2, 2, 3, 0, 4, 0, 5]), 4, keep_partial=False)


def test_scores_by_hand(windows: Windows) -> None:
    assert DocumentLength().scores(windows, eos_id=0).tolist() == [4.0, 4.0, 4 / 3]
    counts = np.array([2, 5, 3, 1, 1]) / 12
    expected = [-np.log(counts[list(row)]).mean() for row in ([1, 1, 1, 2], [1, 1, 2, 2], [3, 0, 4, 0])]
    assert Rarity().scores(windows, eos_id=0) == pytest.approx(np.array(expected))


def test_scores_of_a_reference_net(windows: Windows, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    net.save_pretrained(tmp_path / "net")
    reference = ReferenceLoss(str(tmp_path / "net"), cache_dir=str(tmp_path / "cache"), batch_size=2)
    scores = reference.scores(windows, eos_id=0)
    for index, score in enumerate(scores):
        input_ids, target = windows[[index]]
        with torch.no_grad():
            logits = net(input_ids=input_ids).logits[0]
        assert score == pytest.approx(torch.nn.functional.cross_entropy(logits, target[0]).item(), rel=1e-5)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert reference.scores(windows, eos_id=0).tolist() == scores.tolist()


SILENT = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
Fit = Callable[..., Any]


@pytest.fixture
def fit(work: Path, small_text: Path) -> Fit:
    """Train the small net without a validation and return the command line."""
    base = [*text_args("curriculum", small_text), *SILENT, "--trainer.limit_val_batches", "0"]
    base += ["--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"]
    return lambda *args: main_of("curriculum")(["fit", *base, *args])


def test_stages_grow_and_are_logged(fit: Fit, work: Path) -> None:
    cli = fit("--trainer.max_steps", "60", "--data.batch_size", "8")
    table = work / "runs/curriculum/default/metrics.csv"
    columns = {name: read_metrics(table, f"curriculum/{name}") for name in ("batch_size", "length", "competence")}
    assert columns["batch_size"][0] == 2
    assert columns["length"][0] == 8
    for name, full in (("batch_size", 8), ("length", 32), ("competence", 1)):
        assert sorted(columns[name]) == columns[name]
        assert columns[name][-1] == full
    tokens = [0.0, *read_metrics(table, "curriculum/tokens")]
    taken = [after - before for before, after in itertools.pairwise(tokens)]
    assert taken == [size * length for size, length in zip(columns["batch_size"], columns["length"], strict=True)]
    assert cli.datamodule.tokens_seen == tokens[-1]


WHOLE = ["--data.length", "null", "--data.batch", "null", "--data.competence", "null"]


@pytest.mark.matrix
def test_self_paced_steps_learn_from_the_windows_that_are_easiest_at_the_time(fit: Fit, work: Path) -> None:
    pace = ["--model.self_paced.start", "0.5", "--model.self_paced.tokens", "1000000000"]
    cli = fit(*WHOLE, *pace, "--trainer.max_steps", "30")
    losses = read_metrics(work / "runs/curriculum/default/metrics.csv", "train/loss")
    assert losses[-1] < losses[0] - 0.3
    batch = cli.datamodule.train_data[list(range(8))]
    each = cli.model.window_losses(batch)
    for share, count in ((1e-9, 1), (0.5, 4), (0.9, 7)):
        cli.model.self_paced = Pacing(share, 10**12)
        loss, counted = cli.model.shared_step(batch, "train")
        assert counted == count
        assert loss.item() == pytest.approx(each.sort().values[:count].mean().item())
    cli.model.self_paced = Pacing(0.5, 1)
    assert cli.model.shared_step(batch, "train")[0].item() == pytest.approx(each.mean().item())
    assert cli.model.double().window_losses(batch).dtype == torch.float64


@pytest.mark.parametrize(
    "pace",
    [
        pytest.param([], marks=pytest.mark.matrix),
        ["--model.self_paced.start", "0.5", "--model.self_paced.tokens", "10000"],
    ],
)
def test_preflight_measures_the_largest_step(pace: list[str], fit: Fit, small_text: Path, work: Path) -> None:
    small = [*text_args("curriculum", small_text), "--data.batch_size", "8", *pace]
    staged, whole = (main_of("curriculum")(["preflight", *small, *more]).trainer.found for more in ([], WHOLE))
    assert staged.items == 8 * 32
    assert staged.activations == whole.activations
    assert staged.activations > 0


def scores_of(path: Path, seed: int) -> list[str]:
    """Random scores of the windows, and the flags that take them."""
    np.savetxt(path, np.random.default_rng(seed).permutation(1687))
    return ["--data.difficulty", "ScoreFile", "--data.difficulty.path", str(path)]


def test_a_run_goes_on_in_the_same_order_of_difficulty_only(
    fit: Fit, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit("--trainer.max_steps", "2", *scores_of(work / "scores.txt", 1))
    again = ["--ckpt_path", "last", "--trainer.max_steps", "4"]
    scores_of(work / "scores.txt", 2)
    with pytest.raises(SystemExit):
        fit(*again)
    assert "training windows are in another order than those of the checkpoint" in capfd.readouterr().err
    scores_of(work / "scores.txt", 1)
    assert fit(*again).trainer.global_step == 4
    (work / "scores.txt").unlink()  # which only training needs
    tested = main_of("curriculum")(["test", "--ckpt_path", "last", *SILENT, "--trainer.limit_test_batches", "1"])
    assert tested.datamodule.difficulty.path == work / "scores.txt"


@pytest.mark.parametrize("scores", [["--data.difficulty", "Rarity"], ["--data.difficulty", "null", *WHOLE]])
def test_a_run_goes_on_with_more_text(
    scores: list[str], fit: Fit, small_text: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Windows of the same text must be the same."""
    (work / "texts").mkdir()
    (work / "texts/a.txt").write_text(small_text.read_text()[:20_000])
    args = ["--data.path", "texts", *scores]
    windows = len(fit("--trainer.max_steps", "2", *args).datamodule.windows)
    again = ["--ckpt_path", "last", "--trainer.max_steps", "4"]
    with pytest.raises(SystemExit):
        fit(*again, *args, "--data.context", "16")
    by_scores, error = scores[1] == "Rarity", capfd.readouterr().err
    assert ("data.difficulty" in error) == by_scores
    key, order = ("data.difficulty", "in another order") if by_scores else ("data.path", "others")
    assert f"{key}: training windows are {order} than those of the checkpoint; give the same text" in error
    (work / "texts/b.txt").write_text(small_text.read_text()[20_000:40_000])
    longer = fit(*again, *args)
    assert longer.trainer.global_step == 4
    assert len(longer.datamodule.windows) > windows
    assert "data.path: the text has changed since the checkpoint; documents: 2 for train" in capfd.readouterr().out


def differing_main(args: list[str], path: Path) -> None:
    """Train with scores that are not the same on each rank."""
    rank = int(os.environ["RANK"])
    main_of("curriculum")([*args, *scores_of(path / f"scores{rank}.txt", rank)])


def test_ranks_must_have_the_same_order_of_difficulty(small_text: Path, work: Path) -> None:
    args = ["fit", *text_args("curriculum", small_text), *SILENT, "--trainer.accelerator", "cpu"]
    args += ["--trainer.devices", "2", "--trainer.max_steps", "2"]
    assert 2 in run_ranks(differing_main, args, work, folder=work), logs(work)
    assert "training windows are in another order than those of rank 0" in logs(work)


FILES: dict[str, Callable[[Path], Any]] = {
    "short.txt": lambda path: path.write_text("1\n2\n"),
    "words.txt": lambda path: path.write_text("easy\nhard\n"),
    "nan.npy": lambda path: np.save(path, np.full(1687, np.nan)),
    "pickle.npy": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
}
OTHER = "--data.difficulty ReferenceLoss --data.difficulty.name"
SCORES = "--data.difficulty ScoreFile --data.difficulty.path"


MISTAKES = [
    ("--data.length.start 0", "--data.length.start: start must be above 0 and at most 1, got '0'"),
    ("--data.length.start 1.5", "--data.length.start: start must be above 0 and at most 1, got '1.5'"),
    ("--data.batch.tokens 0", "--data.batch.tokens: tokens must be at least 1, got '0'"),
    ("--data.competence.power 0", "--data.competence.power: power must be above 0, got '0'"),
    ("--data.competence.power .nan", "--data.competence.power: power must be above 0, got 'nan'"),
    ("--data.competence.power x", "--data.competence.power: expected float, got 'x'"),
    ("--data.length.starts 0.5", "did you mean 'start'?"),
    ("--data.length 3", "data.length"),
    ("--data.difficulty null", "needs data.difficulty; take Rarity"),
    ("--data.difficulty Rarety", "did you mean 'Rarity'?"),
    ("--data.context 0", "data.context: must be at least 1, got 0"),
    ("--data.context 100000", "too few for a window"),
    ("--data.batch_size 4000", "data.batch_size: 4000 x 1 ranks"),
    ("--data.batch_size 6", "data.batch_size: 6 is no multiple of 4, into which data.batch.start 0.25 divides it"),
    ("--data.context 600", "data.context: 600 exceeds max_position_embeddings 512 of model.config"),
    ("--model.config transformers.ViTConfig", "ViTConfig makes no language model"),
    ("--model.self_paced.start 2 --model.self_paced.tokens 3", "--model.self_paced.start: start must be above 0"),
    ("--model.self_paced.start 0.5", "tokens"),
    (f"{SCORES} short.txt", "short.txt: 2 scores for 1687 training windows"),
    (f"{SCORES} words.txt", "words.txt: cannot be read as numbers"),
    (f"{SCORES} nan.npy", "nan.npy: has scores that are not finite"),
    (f"{SCORES} pickle.npy", "pickle.npy: cannot be read as numbers"),
    (f"{SCORES} missing.txt", "missing.txt: cannot be read as numbers"),
    (f"{OTHER} no/such", "neither a folder with a language model"),
    (f"{OTHER} no/such --data.difficulty.batch_size 0", "data.difficulty.batch_size: must be at least 1, got 0"),
    ("--data.path missing.txt", "missing.txt"),
]


@pytest.mark.parametrize(("flags", "line"), halved(MISTAKES))
def test_mistakes_cost_a_line(
    flags: str, line: str, fit: Fit, work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, write in FILES.items():
        write(work / name)
    with pytest.raises(SystemExit) as stop:
        fit(*flags.split())
    error = capfd.readouterr().err
    assert stop.value.code == 2, error
    assert line in error
    assert len(error.splitlines()) == 1
    assert len(error) <= 241
    assert not list(work.glob("runs/*/*/checkpoints"))


def test_scores_must_fit_the_data(windows: Windows, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="knows 3 tokens, but the data has number 5"):
        ReferenceLoss(str(tmp_path), cache_dir=str(tmp_path)).scores(windows, eos_id=0)
    short = transformers.GPT2Config(vocab_size=6, n_positions=2, n_embd=4, n_layer=1, n_head=1)
    transformers.AutoModelForCausalLM.from_config(short).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"data.context 4 exceeds max_position_embeddings 2 of"):
        ReferenceLoss(str(tmp_path), cache_dir=str(tmp_path)).scores(windows, eos_id=0)
    assert ReferenceLoss("any").cache_dir == Path(CACHE).expanduser() / "scores"
    (tmp_path / "scores.txt").write_text("3\n1\n2\n")
    assert ScoreFile(str(tmp_path / "scores.txt")).scores(windows, eos_id=0).tolist() == [3, 1, 2]
