"""Let a recipe's ``train.py`` use relative imports however it is started.

Importing this module first in a script gives ``__main__`` the package its folder belongs to (PEP 366), so that
``from .data import …`` works with ``python recipes/lm/train.py``, ``python -m recipes.lm.train``, ``torchrun`` and in
the ranks that DDP launches again, from any working directory and in a copied recipe too. It also imports
``common.run.cli``, and with it all large libraries, in less time.
"""

import gc
import importlib
import os
import signal
import sys
from pathlib import Path

from common.errors import ENDING, signal_name

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection would print a page on stderr

_main = sys.modules["__main__"]
_file = getattr(_main, "__file__", None)


def _end(number: int, _: object) -> None:
    os.write(2, f"stopped by {signal_name(number)}\n".encode())
    os._exit(128 + number)


# Until the command line listens. As a container's first process this one hears no signal that has no handler.
if _file and (Path(_file).resolve().parent / "module.py").is_file():
    for _name in ENDING:
        _number = getattr(signal, _name, None)
        if _number and signal.getsignal(_number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(_number, _end)

if _file and not getattr(_main, "__package__", None) and (Path(_file).resolve().parent / "__init__.py").is_file():
    _folder = Path(_file).resolve().parent
    _parts: list[str] = []
    while (_folder / "__init__.py").is_file():
        _parts.insert(0, _folder.name)
        _folder = _folder.parent
    # The script's own folder must not shadow top-level modules: its data.py is recipes.<task>.data, never `data`.
    sys.path[:] = [str(_folder), *(path for path in sys.path if Path(path).resolve() != Path(_file).resolve().parent)]
    _main.__package__ = ".".join(_parts)
    importlib.import_module(_main.__package__)

# What libraries make while they are imported stays: to look for garbage among it takes a seventh of the start, and as
# long again whenever Python looks through all of its objects later.
gc.disable()
importlib.import_module("common.run.cli")
gc.freeze()
gc.enable()
