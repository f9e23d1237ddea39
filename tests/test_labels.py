"""Several labels per sample, and a tag per word: their data, scores, runs and exports."""

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import transformers

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.sources import ImageTable, Labelled, TextTable
from common.sources.labelled import keys_of, split_by_class
from recipes.classification.entities import EntityCounts, entities, precision_recall_f1
from recipes.classification.objectives import SeveralLabels, WordTags
from recipes.classification.words import PythonLines, TaggedWords, tagged_lines
from tests.support import PLAIN, ROOT, TINY, logs, main_of, read_metrics, refused, run_ranks, write_encoder

FIT = [*TINY, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
pytestmark = pytest.mark.usefixtures("no_report")

LABELS = ["bright", "even", "round"]
CITIES = ["Oslo", "Rome", "New York", "Rio de Janeiro"]


def write_images(path: Path, count: int = 120, first: int = 0) -> str:
    """Scikit-learn's digits with what is true of them: lists in one column, and columns of 0 and 1."""
    import datasets
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    rows = []
    for number in range(first, first + count):
        pixels, digit = digits.images[number], int(digits.target[number])
        has = {"bright": bool(pixels.mean() > 5), "even": digit % 2 == 0, "round": digit in (0, 6, 8, 9)}
        image = np.uint8(np.minimum(pixels * 16, 255))
        row = {"image": image, "labels": [name for name in LABELS if has[name]], "number": number}
        rows.append(row | {name: int(value) for name, value in has.items()})
    features = datasets.Features(
        {"image": datasets.Image(), "labels": datasets.List(datasets.Value("string")),
         "number": datasets.Value("int64"), **{name: datasets.Value("int64") for name in LABELS}}
    )  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def write_sentences(path: Path, count: int = 60, tagged: bool = True) -> str:
    """Sentences that name a person or not, and a city of one to three words."""
    rows = []
    for number in range(count):
        city, name = CITIES[number % 4].split(), ["Ada", "Bo"][number % 2]
        words = [name, "goes", "to", *city, "on", *f"{number:02d}"]
        tags = ["B-PER", "O", "O", *["B-LOC", *["I-LOC"] * (len(city) - 1)], "O", "O", "O"]
        if number % 3 == 0:
            words[0], tags[0] = "she", "O"
        rows.append({"tokens": words, **({"tags": tags} if tagged else {}), "key": f"k{number}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = ["Ada Bo she goes to on day 0 1 2 3 4 5 6 7 8 9", *CITIES] * 3
    return str(write_encoder(tmp_path_factory.mktemp("encoder") / "bert", texts))


def image_args(path: str, label: str = "labels") -> list[str]:
    return [
        *FIT, "--config", str(ROOT / "recipes/classification/small.yaml"), "--model.objective", "SeveralLabels",
        "--data.source", "common.sources.ImageTable", "--data.source.path", path, "--data.source.label", label,
        "--data.source.size", "8",
    ]  # fmt: skip


def word_args(path: str, encoder: str) -> list[str]:
    return [
        "--config", str(ROOT / "recipes/classification/tokens.yaml"), *FIT, "--data.source", "TaggedWords",
        "--data.source.path", path, "--data.source.tokenizer", encoder,
        "--model.net", "common.nets.PretrainedWordClassifier", "--model.net.name", encoder,
    ]  # fmt: skip


def predictions(work: Path) -> list[dict[str, str]]:
    with (work / "runs/classification/default/predict/predictions.csv").open() as file:
        return list(csv.DictReader(file))


# Scores beside those of others


def test_several_labels_beside_scikit_learn() -> None:
    generator = np.random.default_rng(3)
    target = (generator.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]).astype(int)
    probabilities = np.clip(target * 0.3 + generator.random((200, 4)) * 0.7, 0, 1).astype(np.float32)
    objective, names = SeveralLabels(threshold=0.4), ["a", "b", "c", "never"]
    outcomes = objective.outcomes(names)
    for part in torch.arange(200).split(64):
        mask = torch.arange(len(part) + 3) < len(part)  # padding does not count
        part = torch.cat([part, part[-1:].expand(3)])
        objective.update(outcomes, torch.tensor(probabilities)[part], torch.tensor(target)[part], mask)
    found = {name: float(value) for name, value in objective.scores(outcomes.compute(), names, each=True).items()}
    measured: Any = sklearn.metrics
    given = probabilities > 0.4
    f1 = measured.f1_score(target, given, average=None, zero_division=0)
    known = target[:, :3], probabilities[:, :3]  # of a label that nothing has there is no curve
    assert found == pytest.approx(
        {
            "subset_accuracy": measured.accuracy_score(target, given),
            "f1": f1.mean(),
            "f1_micro": measured.f1_score(target, given, average="micro"),
            "average_precision": measured.average_precision_score(*known, average="macro"),
            "auroc": measured.roc_auc_score(*known, average="macro"),
            **{f"f1({name})": value for name, value in zip(names, f1, strict=True)},
        },
        abs=1e-6,
    )


# The examples of seqeval's README, with what it prints for them, and cases by hand: micro precision, recall and F1.
TRUE = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
PRED = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


@pytest.mark.parametrize(
    ("true", "preds", "expected"),
    [
        (TRUE, PRED, (0.5, 0.5, 0.5)),
        ([["B-NP", "I-NP", "O"]], [["I-NP", "I-NP", "O"]], (1.0, 1.0, 1.0)),  # its default mode
        ([["O", "B-X", "B-X"]], [["O", "B-X", "I-X"]], (0.0, 0.0, 0.0)),
        ([["B-X", "I-Y", "O", "I-Y"]], [["B-X", "I-X", "O", "B-Y"]], (0.5, 1 / 3, 0.4)),
        ([["O", "O"]], [["O", "O"]], (0.0, 0.0, 0.0)),
        ([["B-X", "I-X", "O"], ["I-X", "O"]], [["B-X", "I-X", "O"], ["O", "O"]], (1.0, 0.5, 2 / 3)),
    ],
)
def test_entities_beside_seqeval(true: list[list[str]], preds: list[list[str]], expected: tuple[float, ...]) -> None:
    counts = torch.zeros(3)
    for each, other in zip(true, preds, strict=True):
        found, there = entities(other), entities(each)
        counts += torch.tensor([len(found & there), len(found), len(there)])
    assert [float(value) for value in precision_recall_f1(counts)] == pytest.approx(expected)


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The same as :func:`entities`, in another way: runs of tags of one type, cut before each B."""
    found: set[tuple[str, int, int]] = set()
    for kind in {tag[2:] for tag in tags if tag != "O"}:
        marks = "".join(tag[0] if tag[2:] == kind and tag != "O" else "." for tag in tags)
        found |= {(kind, m.start(), m.end()) for m in __import__("re").finditer(r"[BI]I*", marks)}
    return found


def test_counts_of_entities_are_those_of_any_batches() -> None:
    generator, names = np.random.default_rng(0), ["B-X", "B-Y", "I-X", "I-Y", "O"]
    target, preds = (torch.from_numpy(generator.integers(0, 5, (300, 9))) for _ in range(2))
    preds = torch.where(torch.from_numpy(generator.random((300, 9))) < 0.7, target, preds)
    target[:, ::4] = -100  # further tokens of words
    metric, wanted = EntityCounts(names), {kind: [0, 0, 0] for kind in "XY"}
    for rows in torch.arange(300).split(70):
        metric.update(F.one_hot(preds[rows], 5).float(), target[rows])
    kept = [n for n in range(9) if n % 4]
    for row, true in zip(preds[:, kept].tolist(), target[:, kept].tolist(), strict=True):
        found, there = (spans([names[tag] for tag in tags]) for tags in (row, true))
        for column, group in enumerate((found & there, found, there)):
            for kind, *_ in group:
                wanted[kind][column] += 1
    outcome = metric.compute()
    assert outcome["entities"].tolist() == list(wanted.values())
    right = (preds == target)[:, kept].float().mean()
    scores = WordTags().scores(outcome, names, each=True)
    assert scores["accuracy"] == pytest.approx(float(right))
    assert {"precision", "recall", "f1", "f1(X)", "f1(Y)"} < scores.keys()


def test_losses_are_means_that_batches_share() -> None:
    """The mean over two halves is that of the whole, with weights and smoothing; tokens that do not count do not."""
    torch.manual_seed(0)
    logits, target = torch.randn(6, 5, 3), torch.randint(0, 3, (6, 5))
    target[:, 3] = -100
    target[2, 1:] = -100
    weight, each = torch.tensor([1.0, 2.0, 0.5]), []
    for row, true in zip(logits, target, strict=True):
        log_p, wanted = row[true >= 0].log_softmax(-1), F.one_hot(true[true >= 0], 3) * 0.9 + 0.1 / 3
        each.append(-(wanted * log_p * weight).sum() / len(wanted))
    tags = WordTags()
    assert torch.allclose(tags.loss(logits, target, weight, 0.1), torch.stack(each).mean(), atol=1e-6)
    logits, target = torch.randn(8, 3), torch.randint(0, 2, (8, 3))
    several = SeveralLabels()
    balance = several.balance(target.sum(0), 8)
    wanted = target * 0.8 + 0.1
    terms = balance * wanted * F.logsigmoid(logits) + (1 - wanted) * F.logsigmoid(-logits)
    assert torch.allclose(several.loss(logits, target, balance, 0.2), -terms.mean(), atol=1e-6)
    for objective, given in ((several, (logits, target)), (tags, (torch.randn(6, 5, 3), torch.ones(6, 5).long()))):
        halves = torch.stack([objective.loss(*half) for half in zip(*(each.chunk(2) for each in given), strict=True)])
        assert torch.allclose(halves.mean(), objective.loss(*given), atol=1e-6)


# Data


def test_labels_as_lists_as_text_and_as_columns(encoder: str, tmp_path: Path) -> None:
    rows = [{"text": f"Ada {n}", "label": [["red"], ["red", "round"], [], ["round"]][n % 4]} for n in range(8)]
    pandas.DataFrame(rows).to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    text = [{**row, "label": "; ".join(row["label"])} for row in rows]
    pandas.DataFrame(text).to_csv(tmp_path / "b.csv", index=False)
    columns = [{"text": row["text"], **{name: name in row["label"] for name in ("red", "round")}} for row in rows]
    pandas.DataFrame(columns).to_csv(tmp_path / "c.csv", index=False)
    sources = [
        TextTable(str(tmp_path / "a.jsonl"), encoder),
        TextTable(str(tmp_path / "b.csv"), encoder, separator=";"),
        TextTable(str(tmp_path / "c.csv"), encoder, label=["red", "round"]),
    ]
    for source in sources:
        read = source.read()
        assert (read.labels, read.class_names) == ("several", ["red", "round"])
        assert read.target.tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]] * 2
    images = ImageTable(write_images(tmp_path / "d.parquet", 5), size=8)
    images.label = "labels"
    listed = images.read()
    images.label = list(LABELS)
    assert torch.equal(listed.target, images.read().target)


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        (
            [["a"], None, ["b"]],
            {},
            "1 of 3 lists are missing; write [] for a sample without a label, or drop those rows",
        ),
        ([["a"], [], ["a"]], {}, "its lists hold the labels ['a']; several labels are at least two"),
        ([[0.5], [], [1.5]], {}, "a list holds 0.5; each label is one text or whole number"),
        ([0, 1, 2], {"label": ["label", "other"]}, "'label': 1 values such as 2 are neither; write 1 where"),
        ([0, 1, 1], {"label": ["label"]}, "several labels are at least two different columns; a single one is named"),
        (["a", "a;b", "b"], {"separator": ""}, "data.source.separator: is empty; give what stands between labels"),
    ],
)
def test_mistakes_in_labels(rows: list[Any], settings: dict[str, Any], line: str, encoder: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n}", "label": row, "other": 1}) + "\n" for n, row in enumerate(rows))
    )
    with pytest.raises(InputError) as caught:
        TextTable(str(tmp_path / "a.jsonl"), encoder, **settings).read()
    assert line in str(caught.value)


def test_rare_labels_get_into_every_part() -> None:
    """Of 400 samples, 30 have the rare label beside others; equal samples go together; no label is one of them too."""
    generator = np.random.default_rng(0)
    target = torch.from_numpy((generator.random((400, 3)) < [0.6, 0.4, 0.0]).astype(np.int64))
    target[:30, 2] = 1
    values = torch.arange(400)[:, None]
    values[31::40] = values[30::40]
    data = Labelled({"value": values}, target, ["a", "b", "rare"], labels="several")
    parts = split_by_class(data, 0.1, 0.2, 0, keys_of(data))
    assert [int(target[part, 2].sum()) for part in parts] == pytest.approx([21, 3, 6], abs=1)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(400))
    places = [set(values[part, 0].tolist()) for part in parts]
    assert not (places[0] & places[1] | places[0] & places[2] | places[1] & places[2])


def test_the_first_token_of_a_word_has_its_tag(encoder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_sentences(tmp_path / "a.jsonl", 4)
    source = TaggedWords(path, encoder)
    read, tokenizer = source.read(), transformers.AutoTokenizer.from_pretrained(encoder)
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for ids, target, row in zip(read.inputs["input_ids"], read.target, rows, strict=True):
        assert [read.class_names[tag] for tag in target.tolist() if tag >= 0] == row["tags"]
        first = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in row["tokens"]]
        assert ids[target >= 0].tolist() == first
    assert capfd.readouterr().out == ""
    source.max_length = 6
    cut = source.read()
    assert cut.target.shape[1] == 6
    lost = sum(len(row["tags"]) for row in rows) - int((cut.target >= 0).sum())
    assert (
        f"max_length 6: leaves out the last {lost} words of 4 texts, which get no tag; raise it"
        in capfd.readouterr().out
    )
    source.label, source.max_length = None, 128
    assert torch.equal(source.read().target, read.target.clamp(max=-1))


def test_words_without_a_token_are_unknown(encoder: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "\u200b \n", "Rome"], "tags": ["B-PER", "O", "B-LOC"]}] * 2
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = TaggedWords(str(tmp_path / "a.jsonl"), encoder).read()
    assert [read.class_names[tag] for tag in read.target[0].tolist() if tag >= 0] == ["B-PER", "O", "B-LOC"]


def test_conll_files_are_read(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O\n\nAda NNP B-PER\ngoes VB O\n\nto TO O\nRome NNP B-LOC\n")
    read = TaggedWords(str(tmp_path / "a.conll"), encoder, columns=["tokens", "pos", "tags"]).read()
    assert read.class_names == ["B-LOC", "B-PER", "O"]
    assert [[tag for tag in row if tag >= 0] for row in read.target.tolist()] == [[1, 2], [2, 0]]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"tokens": ["a", "b"], "tags": ["O"]},
            "data.source.label 'tags': text 1 has 2 words and 1 tags; give each word one",
        ),
        ({"tokens": [], "tags": []}, "data.source.words: text 1 has no word; drop it"),
        ({"tokens": None, "tags": ["O"]}, "data.source.words 'tokens': text 1 is missing; give a list with one text"),
    ],
)
def test_mistakes_in_tags(row: dict[str, Any], line: str, encoder: str, tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada"], "tags": ["B-PER"]}, row]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(InputError) as caught:
        TaggedWords(str(tmp_path / "a.jsonl"), encoder).read()
    assert line in str(caught.value)


def test_lines_of_python_have_the_tags_of_their_parser() -> None:
    source = (
        "import os.path as p, re\nfrom . import x\nclass A(b.C):\n  def f(self, *, n=g(1)):\n    raise E('x') # no\n"
    )
    tagged = [
        " ".join(f"{w}/{t}" if t != "O" else w for w, t in zip(*line, strict=True)) for line in tagged_lines(source)
    ]
    assert tagged == [
        "import os/B-MODULE ./I-MODULE path/I-MODULE as p , re/B-MODULE",
        "from . import x",
        "class A/B-CLASS ( b/B-CLASS ./I-CLASS C/I-CLASS ) :",
        "def f ( self/B-PARAMETER , * , n/B-PARAMETER = g/B-CALL ( 1 ) ) :",
        'raise E/B-CLASS ( "" )',
    ]
    read = PythonLines("json").read()
    assert {"B-CALL", "I-CALL", "B-CLASS", "B-MODULE", "B-PARAMETER", "O"} <= set(read.class_names)


# Runs


def test_several_labels_from_fit_to_export(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fit, grow, test, predict and export; plain transformers gives the same probabilities."""
    path = write_images(work / "a.parquet")
    fitted = main_of("classification")(["fit", *image_args(path)]).datamodule
    keys = keys_of(fitted.samples.labelled)
    before = [set(keys[part].tolist()) for part in fitted.samples.parts]
    write_images(work / "a.parquet", 200)
    tested = main_of("classification")(["test"]).datamodule
    keys = keys_of(tested.samples.labelled)
    after = [set(keys[part].tolist()) for part in tested.samples.parts]
    assert all(old <= new for old, new in zip(before, after, strict=True))
    assert sum(map(len, after)) == 200
    names = (work / "runs/classification/default/test/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"test/f1", "test/f1_micro", "test/subset_accuracy", "test/f1(even)"} < set(names)
    frame = pandas.read_parquet(path)
    frame["labels"] = [[{"even": "evan"}.get(label, label) for label in row] for row in frame["labels"]]
    (work / "kept").mkdir()
    shutil.move(path, work / "kept/a.parquet")
    frame.to_parquet(path)
    line = refused("classification", ["test"], capfd)
    assert line.endswith("data.source: the checkpoint was not trained on a class 'evan'; did you mean 'even'?")
    Path(path).unlink()
    images = ["--data.predict_source", "common.sources.ImageTable", "--data.predict_source.size", "8"]
    images += ["--data.predict_source.path", write_images(work / "new.parquet", 20, 300)]
    images += [
        "--data.predict_source.label",
        "null",
        "--data.keep",
        "[number]",
        "--trainer.limit_predict_batches",
        "1.0",
    ]
    main_of("classification")(["predict", *images])
    rows = predictions(work)
    assert [row["number"] for row in rows] == [str(n) for n in range(300, 320)]
    assert "target" not in rows[0]
    for row in rows:
        assert json.loads(row["prediction"]) == [name for name in LABELS if float(row[f"p({name})"]) > 0.5]
    main_of("classification")(["export"])
    folder = work / "runs/classification/default/export"
    net = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert net.config.problem_type == "multi_label_classification"
    assert net.config.id2label == dict(enumerate(LABELS))
    images = ImageTable(str(work / "new.parquet"), label=None, size=8).read().inputs["pixel_values"]
    with torch.no_grad():
        expected = net(images[torch.arange(len(images))]).logits.sigmoid()
    found = torch.tensor([[float(row[f"p({name})"]) for name in LABELS] for row in rows])
    assert torch.allclose(found, expected, atol=1e-5)


def test_tags_from_fit_to_export(encoder: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_sentences(work / "a.jsonl")
    fitted = main_of("classification")(["fit", *word_args(path, encoder), "--model.body_lr_scale", "0.1"])
    assert {group["lr_scale"] for group in fitted.trainer.optimizers[0].param_groups} == {0.1, 1.0}
    parts = parts_of(fitted.datamodule)
    write_sentences(work / "a.jsonl", 90)
    grown = parts_of(main_of("classification")(["test"]).datamodule)
    assert all(old <= new for old, new in zip(parts, grown, strict=True))
    assert read_metrics(work / "runs/classification/default/test/metrics.csv", "test/f1(LOC)")
    Path(path).write_text(Path(path).read_text().replace("-PER", "-PERSON"))
    line = refused("classification", ["test"], capfd)
    assert line.endswith("data.source: the checkpoint was not trained on a class 'B-PERSON'; did you mean 'B-PER'?")
    Path(path).unlink()
    words = ["--data.predict_source", "TaggedWords", "--data.predict_source.tokenizer", encoder]
    words += ["--data.predict_source.path", write_sentences(work / "new.jsonl", 10, tagged=False)]
    words += [
        "--data.predict_source.label",
        "null",
        "--data.keep",
        "[tokens, key]",
        "--trainer.limit_predict_batches",
        "1.0",
    ]
    main_of("classification")(["predict", *words])
    rows = predictions(work)
    assert list(rows[0]) == ["index", "tokens", "key", "prediction"]
    tags = [json.loads(row["prediction"]) for row in rows]
    assert [len(row) for row in tags] == [len(json.loads(row["tokens"])) for row in rows]
    main_of("classification")(["export"])
    folder = work / "runs/classification/default/export"
    net = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert list(net.config.id2label.values()) == fitted.datamodule.class_names
    for row, its in zip(rows, tags, strict=True):
        encoded = tokenizer(json.loads(row["tokens"]), is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            best = net(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits.argmax(-1)[0]
        places = encoded.word_ids()
        assert [net.config.id2label[int(best[places.index(word)])] for word in range(len(its))] == its


def parts_of(data: Any) -> list[set[int]]:
    keys = keys_of(data.samples.labelled)
    return [set(keys[positions].tolist()) for positions in data.samples.parts]


@pytest.mark.parametrize("kind", [pytest.param("several", marks=pytest.mark.matrix), "words"])
def test_a_stopped_run_goes_on_to_the_bit(kind: str, encoder: str, work: Path) -> None:
    if kind == "several":
        args = [*image_args(write_images(work / "a.parquet")), "--model.balance_classes", "true"]
    else:
        args = [*word_args(write_sentences(work / "a.jsonl"), encoder), "--model.balance_classes", "true"]
    args += ["--model.label_smoothing", "0.1", "--model.lr_scheduler", "null", *PLAIN]
    run = main_of("classification")
    run(["fit", *args, "--name", "whole", "--trainer.max_steps", "4"])
    run(["fit", *args, "--name", "stopped", "--trainer.max_steps", "3"])
    run(["fit", "--name", "stopped", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    states = [
        read_checkpoint(work / f"runs/classification/{name}/checkpoints/last.ckpt") for name in ("whole", "stopped")
    ]
    weights = [state["state_dict"] for state in states]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    moments = [state["optimizer_states"][0]["state"] for state in states]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("several", "fsdp2"),
        ("words", "ddp"),
        ("several", "ddp"),
        ("words", "fsdp2"),
    ],
)
def test_two_ranks_equal_one(kind: str, strategy: str, encoder: str, work: Path) -> None:
    if kind == "several":
        args = image_args(write_images(work / "a.parquet", 121))
    else:
        args = word_args(write_sentences(work / "a.jsonl"), encoder)
        config = json.loads((Path(encoder) / "config.json").read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        shutil.copytree(encoder, work / "bert")
        (work / "bert/config.json").write_text(json.dumps(config))
        (work / "bert/checksums.json").unlink(missing_ok=True)
        args = [*args, "--model.net.name", str(work / "bert")]
    found = []
    for world in (1, 2):
        layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.accelerator", "cpu"]
        layer += [
            *PLAIN,
            "--trainer.devices",
            str(world),
            "--data.batch_size",
            str(8 // world),
            "--data.eval_batch_size",
            "5",
        ]
        fit = ["fit", *args, *layer, "--name", f"n{world}", "--trainer.limit_val_batches", "1.0"]
        codes = run_ranks(main_of("classification"), fit, world=world, folder=work)
        assert codes == [0] * world, logs(work)
        table = work / f"runs/classification/n{world}/metrics.csv"
        names = [name for name in table.read_text().splitlines()[0].split(",") if name.startswith(("train/", "val/"))]
        found.append({name: read_metrics(table, name) for name in names})
    assert {"train/loss", "val/f1"} < found[0].keys()
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


# What does not fit is one line


def test_what_does_not_fit_is_one_line(encoder: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, sentences = write_images(work / "a.parquet"), write_sentences(work / "a.jsonl")
    args = image_args(path)
    without = [arg for arg in args if arg not in ("--model.objective", "SeveralLabels")]
    assert refused("classification", ["fit", *without], capfd) == (
        "model.objective: the data have several labels per sample, and OneLabel is for one class per sample; "
        "take SeveralLabels"
    )
    assert "the data have one class per sample, and SeveralLabels is for several" in refused(
        "classification", ["fit", *image_args(path, "even")], capfd
    )
    assert "the data have one class per sample, and WordTags is for a tag per word; take OneLabel" in refused(
        "classification", ["fit", *FIT, "--model.objective", "WordTags"], capfd
    )
    line = refused("classification", ["fit", *args, "--model.objective.threshold", "1"], capfd)
    assert line == "--model.objective.threshold: must be between 0 and 1, got 1.0"
    text = Path(sentences).read_text()
    Path(sentences).write_text(text.replace("B-PER", "PER"))
    line = refused("classification", ["fit", *word_args(sentences, encoder)], capfd)
    assert line.endswith(": has the tag 'PER'; write O, B-type or I-type (the BIO scheme)")
    tokens = ["--config", str(ROOT / "recipes/classification/tokens.yaml"), *FIT]
    line = refused("classification", ["fit", *tokens, "--data.source.vocab_size", "1100"], capfd)
    assert "WordClassifier knows fewer tokens than the tokenizer of the data; set its vocab_size" in line
    other = ["--data.source", "common.sources.ImageTable", "--data.source.path", path, "--data.source.label", "labels"]
    line = refused("distillation", ["fit", *FIT, *other, "--data.source.size", "8", "--model.teacher", "null"], capfd)
    assert line.endswith(
        ": has several labels per sample, which this recipe does not take; recipes/classification does"
    )
