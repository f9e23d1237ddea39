"""Runs of a benchmark, each in a process of its own on one core."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent


def run_each(script: str, runs: Sequence[list[str]], keep: Callable[[int, Any], None]) -> None:
    """Call a script with each list of arguments, as many at a time as there are cores.

    Args:
        script: path; prints its result as JSON in the last line of standard output.
        runs: arguments of each call.
        keep: takes the number of a run and its result, as soon as it has ended.

    Raises:
        subprocess.CalledProcessError: a run failed; those before it have been kept, those after it do not start.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def call(args: list[str]) -> Any:
        done = subprocess.run(
            [sys.executable, script, *args], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        numbers = {pool.submit(call, args): number for number, args in enumerate(runs)}
        try:
            for future in track(as_completed(numbers), "runs", total=len(runs), disable=not runs):
                keep(numbers[future], future.result())
        finally:
            pool.shutdown(cancel_futures=True)
