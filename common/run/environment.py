"""With which code, packages and command line a run was made."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line without the values of secrets."""
    words, secret = list(command), re.compile(r"(--\S*(?:key|token|secret|password))(?:=.*)?", re.IGNORECASE)
    for place, word in enumerate(command):
        if found := secret.fullmatch(word):
            words[place : place + 1 + ("=" not in word)] = [f"{found[1]}=…"] if "=" in word else [word, "…"]
    # In a mapping, the query of a URL, and before its host.
    inside = re.compile(r"([\w-]*(?:key|token|secret|password|signature)[\"']?\s*[:=]\s*)[^\s,&}]+", re.IGNORECASE)
    words = [re.sub(r"(://[^/@\s]*:)[^/@\s]+@", r"\1…@", word) for word in words]
    return [inside.sub(r"\1…", word) if re.search(r"[{?]", word) else word for word in words]


def code_hash(recipe: type) -> str:
    """A hash of the code of a module's recipe and of ``common``."""
    sha = hashlib.sha256()
    common, own = Path(__file__).resolve().parents[1], Path(inspect.getfile(recipe)).resolve().parent
    for path in sorted([*common.rglob("*.py"), *own.glob("*.py")]):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]


def describe_environment() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, the machine, the git commit and what it lacks."""
    packages = (
        "torch",
        "lightning",
        "torchmetrics",
        "transformers",
        "tokenizers",
        "datasets",
        "deepspeed",
        "megatron-core",
        "ray",
        "horovod",
        "kornia",
        "numpy",
    )
    versions = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit = ""
    if git := shutil.which("git"):
        # Whoever owns the clone; files that git does not know yet make it dirty as well.
        command = [git, "-c", "safe.directory=*"]
        about = {"capture_output": True, "text": True, "check": False, "cwd": Path(__file__).resolve().parents[2]}
        commit = subprocess.run([*command, "rev-parse", "HEAD"], **about).stdout.strip()
        if commit and (changed := subprocess.run([*command, "status", "--porcelain"], **about).stdout.rstrip()):
            commit += "-dirty"
            names = [line[3:] for line in changed.splitlines()]
            versions["uncommitted"] = ", ".join(names[:20]) + f" and {len(names) - 20} more" * (len(names) > 20)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), "device": device, "commit": commit, **versions}
