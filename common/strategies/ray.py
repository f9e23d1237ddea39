"""DDP on a Ray cluster: the user's command starts workers there, and these run it again as ranks."""

import logging
import math
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.launcher import _Launcher
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import is_torchelastic_launched
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from common.errors import ENDING, LOST_RANK_EXIT, InputError, Stopped

STARTED = "RECIPES_RAY"  # variable of the ranks that workers of Ray start
GRACE = 30.0  # seconds that ranks have to end by themselves once another has failed


def _end_with_worker() -> None:
    """Send this rank SIGTERM once its worker, which holds the other end of stdin, is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class _RayLauncher(_Launcher):
    """Runs this process's command line in Ray's workers, as torchrun would; see :class:`RayDDP`."""

    def __init__(self, strategy: "RayDDP"):
        self.strategy = strategy
        self._workers: list[Any] = []
        self._terminated = 0  # by this signal

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        return False

    @override
    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer, **kwargs: Any) -> None:
        """Run the command to its end, and again if ranks were lost.

        Raises:
            InputError: the settings do not fit, there is no Ray, or no such cluster.
            Stopped: a rank was lost or the driver was sent SIGTERM.
            SystemExit: a rank has failed, with a code and a message of its own.
        """
        self.strategy.check()
        command, env = [sys.executable, *sys.orig_argv[1:]], dict(os.environ)
        fits = trainer.state.fn == TrainerFn.FITTING
        last = Path(trainer.default_root_dir) / "checkpoints/last.ckpt"
        saved = _stamp(last)
        self._connect()
        numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
        handlers = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if handlers[number] != signal.SIG_IGN:
                signal.signal(number, self._terminate)
        import ray

        try:
            for left in reversed(range(self.strategy.max_restarts + 1)):
                codes = self._run(command, env)
                if self._terminated and any(codes):
                    raise SystemExit(128 + self._terminated)  # the ranks say the rest
                if failed := [code for code in codes if code > 0 and code != LOST_RANK_EXIT]:
                    raise SystemExit(failed[0])
                if not any(codes):
                    return
                killed = [rank for rank, code in enumerate(codes) if code < 0]
                lost = f"ray: lost rank {', '.join(map(str, killed))}" if killed else "ray: ranks lost one another"
                if not left:
                    goes_on = "; --ckpt_path last goes on from the last checkpoint" if fits else ""
                    raise Stopped(lost + goes_on, LOST_RANK_EXIT)
                print(f"{lost}; starting again, {left - 1} more times at most", flush=True)
                if fits and _stamp(last) not in (None, saved):  # else it is an earlier run's
                    command = [sys.executable, *sys.orig_argv[1:], "--ckpt_path", "last"]
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            ray.shutdown()

    @override
    def kill(self, signum: int) -> None:
        for worker in self._workers:
            worker.send.remote(signum)

    def _terminate(self, number: int, _: Any) -> None:
        self._terminated = number
        self.kill(number)

    def _connect(self) -> None:
        """Join the cluster, or start one on this machine."""
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
        strategy, settings = self.strategy, {}
        if strategy.address is None:
            # It listens on the network: nobody gets in without this run's token.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            settings = {
                "num_cpus": math.ceil(strategy.bundle["CPU"]),
                "include_dashboard": False,
                "object_store_memory": 100 << 20,  # what ranks print
            }
        import ray

        try:
            ray.init(strategy.address or "local", logging_level=logging.CRITICAL, log_to_driver=False, **settings)
        except ConnectionError as error:
            raise InputError(strategy.no_cluster) from error

    def _run(self, command: list[str], env: dict[str, str]) -> list[int]:
        """Run a command as ranks, print what they print, and return their exit codes; negative for a lost one."""
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.placement_group import remove_placement_group

        group = self._reserve()
        self._workers = self._start_workers(group)
        codes = [-signal.SIGKILL.value] * len(self._workers)  # of a rank that is lost with its node
        try:
            outputs = self._start_ranks(command, env)
            if self._terminated:
                self.kill(self._terminated)
            self._follow(outputs, codes)
        except RayTaskError:
            raise
        except RayError:  # a node that was lost while workers started
            pass
        finally:
            workers, self._workers = self._workers, []
            for worker in workers:
                ray.kill(worker)
            remove_placement_group(group)
        return codes

    def _reserve(self) -> Any:
        """Reserve CPUs and GPUs for the ranks on as many nodes as the trainer wants."""
        import ray
        from ray.util.placement_group import placement_group

        strategy = self.strategy
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fit = [node for node in nodes if all(node.get(key, 0) >= n for key, n in strategy.bundle.items())]
        if len(fit) < strategy.num_nodes:
            need = " and ".join(f"{n:g} {key}s" for key, n in strategy.bundle.items())
            problem = f"the cluster has {len(fit)} nodes with {need}, of {strategy.num_nodes} that are needed"
            raise InputError(f"trainer.num_nodes: {problem}; take fewer of trainer.devices or trainer.num_nodes")
        group = placement_group([strategy.bundle] * strategy.num_nodes, strategy="STRICT_SPREAD")
        if not group.wait(strategy.timeout.total_seconds()):
            raise InputError(f"trainer.strategy.timeout: the cluster was in use for {strategy.timeout}; wait longer")
        return group

    def _start_workers(self, group: Any) -> list[Any]:
        """Start an actor for each rank, in the order of ranks."""
        import ray
        from ray import cloudpickle
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from common.strategies import ray_worker

        cloudpickle.register_pickle_by_value(ray_worker)  # actors need not find it, nor import what this module does
        strategy, actor = self.strategy, ray.remote(ray_worker.Worker)
        return [
            actor.options(
                num_cpus=strategy.cpus_per_worker,
                num_gpus=strategy.gpus_per_worker,
                max_concurrency=2,  # a signal while the rank runs
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, node),
            ).remote()
            for node in range(strategy.num_nodes)
            for _ in range(strategy.num_processes)
        ]

    def _start_ranks(self, command: list[str], env: dict[str, str]) -> dict[Any, int]:
        """Let each worker run the command; returns the rank of each worker's stream."""
        import ray

        places = ray.get([worker.place.remote() for worker in self._workers])
        outputs: dict[Any, int] = {}
        for rank, worker in enumerate(self._workers):
            whole = {**env, **self._variables(rank, places, env)}
            outputs[worker.run.options(num_returns="streaming").remote(command, os.getcwd(), whole)] = rank
        return outputs

    def _variables(self, rank: int, places: list[tuple[str, int, list[str]]], env: dict[str, str]) -> dict[str, str]:
        """The variables that make a process a rank, torchrun's and others."""
        size = self.strategy.num_processes
        node, local = divmod(rank, size)
        variables: dict[str, Any] = {
            "RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node,
            "WORLD_SIZE": len(places), "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": places[0][0], "MASTER_PORT": places[0][1], "TORCHELASTIC_RUN_ID": "ray", STARTED: 1,
            "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", max(int(self.strategy.cpus_per_worker), 1)),
        }  # fmt: skip
        if sys.stdout.isatty():  # or rank 0 would show its progress at the end only
            variables |= {"TTY_COMPATIBLE": 1, "COLUMNS": shutil.get_terminal_size().columns}
        of_node = places[node * size : (node + 1) * size]
        if gpus := [gpu for *_, worker_gpus in of_node for gpu in worker_gpus]:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)  # ranks tell them apart by LOCAL_RANK
        return {key: str(value) for key, value in variables.items()}

    def _follow(self, outputs: dict[Any, int], codes: list[int]) -> None:
        """Print what ranks write, and note their codes, until all have ended; the rest is killed if one fails."""
        import ray

        killed_at = float("inf")
        while outputs:
            ready: list[Any] = ray.wait(list(outputs), timeout=1.0)[0]
            for output in ready:
                number, content = _next(output)
                if number is None:
                    failed = codes[outputs.pop(output)]
                    killed_at = min(killed_at, time.monotonic() + GRACE) if failed else killed_at
                elif number:
                    stream = sys.stdout if number == 1 else sys.stderr
                    stream.buffer.write(content)
                    stream.flush()
                else:
                    codes[outputs[output]] = content
            if time.monotonic() > killed_at:
                self.kill(signal.SIGKILL)


def _next(output: Any) -> tuple[int | None, Any]:
    """The next pair that a worker yields; a None for its number once it has ended or is lost."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        yielded: Any = ray.get(next(output))
        return yielded
    except RayTaskError as error:  # the worker lives, and could not start its rank
        if isinstance(error.cause, FileNotFoundError):
            problem = f"a node has no {error.cause.filename}; all need the same files at the same paths"
            raise InputError(f"trainer.strategy: {problem}") from error
        raise
    except (StopIteration, RayError):
        return None, None


def _listens(address: str) -> bool:
    """Whether something listens at ``host:port``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


def _stamp(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


class RayDDP(DDPStrategy):
    """DDP whose ranks are started by Ray (Moritz et al. 2018, https://arxiv.org/abs/1712.05889), as torchrun would.

    The process of the command is a driver. It finds mistakes, and starts ``trainer.devices`` workers on each of
    ``trainer.num_nodes`` nodes of the cluster. These run the same command with torchrun's variables; the driver prints
    their output and ends with their exit code. Under torchrun's variables this is plain DDP. All nodes need the same
    files at the same paths, and ranks have the environment of the command. A rank has one GPU if
    ``trainer.accelerator`` is one, and none otherwise; Lightning wants the machine of the command to have GPUs as well.

    Args:
        address: ``host:port`` of a running cluster, ``auto`` for the one that this machine belongs to; None starts one
            of this machine alone, for this run.
        cpus_per_worker: CPUs that Ray keeps free for a rank and its ``data.num_workers``, and the threads of a rank
            unless OMP_NUM_THREADS is set.
        max_restarts: how many times the command is started again, from its last checkpoint, when ranks were lost.
        timeout: after which a rank that waits for another gives up, and a command that waits for a cluster in use.

    Raises:
        InputError: Ray is not installed, a number is out of its range, or the cluster is too small.
    """

    def __init__(
        self,
        address: str | None = None,
        cpus_per_worker: float = 1.0,
        max_restarts: int = 0,
        timeout: timedelta = default_pg_timeout,
    ):
        super().__init__(gradient_as_bucket_view=True, timeout=timeout)
        self.address, self.cpus_per_worker, self.max_restarts = address, cpus_per_worker, max_restarts
        self.timeout = timeout

    @property
    def gpus_per_worker(self) -> int:
        """Number of GPUs of a rank."""
        return int(self.root_device.type == "cuda")

    @property
    def bundle(self) -> dict[str, float]:
        """The needs of a node's ranks together, in Ray's words."""
        needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        return {key: number * self.num_processes for key, number in needs.items() if number}

    def check(self) -> None:
        """Find mistakes before anything is started.

        Raises:
            InputError: see above.
        """
        key = "trainer.strategy"
        if find_spec("ray") is None:
            raise InputError(f"{key}: Ray is not installed; run pip install -e '.[ray]'")
        if self.cpus_per_worker <= 0:
            raise InputError(f"{key}.cpus_per_worker: must be above 0, got {self.cpus_per_worker:g}")
        if self.max_restarts < 0:
            raise InputError(f"{key}.max_restarts: must be at least 0, got {self.max_restarts}")
        if self.address is None and self.num_nodes > 1:
            problem = f"this machine is one node, not {self.num_nodes}"
            raise InputError(f"{key}.address: {problem}; give the address of a Ray cluster")
        if self.address not in (None, "auto") and not _listens(self.address):
            raise InputError(self.no_cluster)

    @property
    def no_cluster(self) -> str:
        """The message where no cluster is found."""
        problem = f"there is no Ray cluster at {self.address}"
        return f"trainer.strategy.address: {problem}; give host:port, or null for one of this machine"

    @property
    @override
    def global_rank(self) -> int:
        # The driver is no rank: it makes no folder, and prints nothing that rank 0 prints.
        return super().global_rank if is_torchelastic_launched() else -1

    @override
    def _configure_launcher(self) -> None:
        if not is_torchelastic_launched():
            self._launcher = _RayLauncher(self)
            return
        super()._configure_launcher()
        if STARTED in os.environ:
            threading.Thread(target=_end_with_worker, daemon=True).start()
