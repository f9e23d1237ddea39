"""Every command in the READMEs runs, with the tiny layer added where it trains."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.support import MEASURED, RECIPES, ROOT, logs, main_of, run_ranks, write_decoder, write_encoder, write_resnet

# The page of a copy that has not been edited speaks of the original, whose page is tested.
OWN = [page for page in (ROOT / "recipes").glob("*/README.md") if f"recipes/{page.parent.name}/" in page.read_text()]
PAGES = sorted([ROOT / "README.md", ROOT / "docs/scaling.md", *OWN])


def commands(page: Path) -> list[str]:
    """The lines of the page's shell blocks, without comments and without what needs make."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    blocks = [block.replace("\\\n", " ") for block in blocks]
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("make ")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, with the files that the commands take as a user's own."""
    import pydoc_data.topics as topics

    folder = tmp_path_factory.mktemp("docs") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "*.egg-info"))
    texts = list(topics.topics.values())
    (folder / "tinyshakespeare.txt").write_text("".join(texts)[:50_000])
    (folder / "notes").mkdir()
    for number, text in enumerate(texts[:20]):
        (folder / f"notes/{number}.md").write_text(text)
    (folder / "my_texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[:20]))
    rows = [f"a {'very ' * (n % 3)}{word} film,{word}" for n in range(40) for word in ("good", "bad")]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    write_encoder(folder / "sentence-transformers/all-MiniLM-L6-v2", rows)
    topics = [f"{word} news {n},{labels}" for n in range(20) for word, labels in (("good", "art;law"), ("bad", ""))]
    (folder / "news.csv").write_text("\n".join(["text,topics", *topics]))
    tagged = [{"tokens": ["a", word, "film"], "tags": ["O", "B-X", "I-X"]} for word in ("good", "bad", "very") * 10]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    write_decoder(folder / "llama", "".join(texts)[:50_000], positions=512)
    for size in (18, 50):
        write_resnet(folder / f"microsoft/resnet-{size}")
    generator = np.random.default_rng(0)
    names = ("longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households")
    houses = pd.DataFrame(generator.uniform(1, 50, (400, len(names))), columns=pd.Index(names))
    houses["median_income"], houses["ocean_proximity"] = generator.uniform(1, 9, 400), ["INLAND", "NEAR BAY"] * 200
    houses.head(9).to_csv(folder / "new.csv", index=False)
    houses.assign(median_house_value=houses["median_income"] * 40_000).to_csv(folder / "housing.csv", index=False)
    flowers = pd.DataFrame(generator.uniform(1, 5, (150, 2)), columns=pd.Index(["petal", "sepal"]))
    flowers.head(9).to_csv(folder / "new_flowers.csv", index=False)
    flowers.assign(species=np.where(flowers["petal"] > 3, "iris", "lily")).to_csv(folder / "flowers.csv", index=False)
    (folder / "fashion-mnist").mkdir()
    for part, size in (("train", 1000), ("t10k", 50)):
        pixels = generator.integers(0, 256, (size, 28, 28), np.uint8)
        labels = np.arange(size, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"fashion-mnist/{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    for kind in ("cat", "dog"):
        (folder / "photos" / kind).mkdir(parents=True)
        for number in range(30):
            Image.fromarray(generator.integers(0, 256, (9, 12), np.uint8)).save(folder / f"photos/{kind}/{number}.png")
    return folder


def run_in(folder: Path, recipe: str, args: list[str]) -> None:
    """Run a recipe from another working directory."""
    os.chdir(folder)
    main_of(recipe)(args)


# What the suite has time for; `make test-all` has the other pages.
FAST = [ROOT / "README.md"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page in FAST else pytest.mark.matrix) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_commands_run(page: Path, clone: Path, tmp_path: Path) -> None:
    """``python recipes/<task>/train.py`` runs in forks of this process, one per rank; the rest as typed."""
    lines = commands(page)
    assert len(lines) > 3
    environment = {**os.environ, "PYTHONPATH": str(clone), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for line in lines:
        small = line
        if " fit" in line:
            small += " --config configs/tiny.yaml"
            if "/lm/" in line or "/mine/" in line:
                small += " --model.sample_tokens 16"
                small += "" if "--data." in line else " --data.path tinyshakespeare.txt"
            if "/distillation/" in line and "pretrained" not in line:
                small += " --model.teacher_training small_teacher.yaml"
            if "/distillation/lm" in line:
                small += " --data.source.init_args.path tinyshakespeare.txt"
        plain = re.fullmatch(r"(WANDB_MODE=offline )?python recipes/(\w+)/train\.py (.*)", small)
        if plain and plain[2] in RECIPES:
            devices = re.search(r"--trainer\.devices (\d+)", small)
            world = int(devices[1]) if devices else 1
            args = shlex.split(plain[3])
            codes = run_ranks(run_in, clone, plain[2], args, world=world, folder=tmp_path, WANDB_MODE="offline")
            assert codes == [0] * world, f"{small}\n{logs(tmp_path)}"
            continue
        done = subprocess.run(
            ["bash", "-c", small], cwd=clone, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{small}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def test_no_page_names_a_missing_file() -> None:
    for page in PAGES:
        names = re.findall(r"(?:configs|recipes)/[\w./-]+\.(?:yaml|py|md)", page.read_text())
        # What a copy is called has the files of what it was copied from.
        places = [[name.replace("recipes/mine/", f"recipes/{recipe}/") for recipe in MEASURED] for name in names]
        assert [some[0] for some in places if not any((ROOT / name).exists() for name in some)] == [], page
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
