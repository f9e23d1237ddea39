"""How fast and in how much memory a folder of images is read: ``python benchmarks/images.py --count 200000``.

It makes JPEG files of 64x64 pixels in a temporary folder (4 KB each) and prints the seconds until the first batch, the
images per second beside a plain ``DataLoader`` that decodes the same files with Pillow in as many workers, and the
memory of all processes, without what files mapped from disk take. The two loaders take turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.sources import ImageTable
from recipes.classification.data import ClassificationData


def write_images(folder: Path, count: int) -> None:
    """Blurred noise in ten classes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % 10}"
        place.mkdir(exist_ok=True)
        small = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64)).save(place / f"{number:07d}.jpg")


class Plain(Dataset[Tensor]):
    """One image at a time, as in tutorials."""

    def __init__(self, folder: Path):
        self.paths = [*folder.glob("*/*.jpg")]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        pixels = np.asarray(Image.open(self.paths[number]).convert("RGB"), np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)


def memory() -> float:
    """Of this process and its children, in MiB. A page that several share counts once."""
    found = 0
    for number in [str(os.getpid()), *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
        found += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return found / 1024


def rate(loader: Any, batches: int) -> tuple[float, float, float]:
    """Images per second of an epoch's batches after the first, and memory after a tenth of them and at the last."""
    begun, count, held = 0.0, 0, [0.0, 0.0]
    last = min(batches, len(loader) - 1)
    for number, batch in enumerate(islice(loader, last + 1)):
        count += len(batch if isinstance(batch, Tensor) else batch.target)
        if number in (last // 10, last):  # in the first ones, workers take what they need
            held[number == last] = memory()
        if number == 0:
            begun, count = time.perf_counter(), 0
    return count / (time.perf_counter() - begun), held[0], held[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, args.count)
        start = time.perf_counter()
        data = ClassificationData(ImageTable(name), num_workers=args.workers)
        read = time.perf_counter() - start
        trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        trainer.datamodule, data.trainer = data, trainer  # type: ignore[attr-defined]
        data.setup("fit")
        next(iter(data.train_dataloader()))
        print(f"{read:.1f} s to list, check and split, {time.perf_counter() - start:.1f} s until the first batch")
        plain: Any = DataLoader(Plain(folder), batch_size=64, shuffle=True, num_workers=args.workers)
        found = [(rate(data.train_dataloader(), args.batches), rate(plain, args.batches)) for _ in range(args.rounds)]
    for kind, rounds in zip(("ImageTable", "plain loader"), zip(*found, strict=True), strict=True):
        speed, first, last = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"{kind}: {speed:,.0f} images/s; {first:.0f} MiB after a tenth of the batches, {last:.0f} at the last")
