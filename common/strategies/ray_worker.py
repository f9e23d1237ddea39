"""A rank on a node of a Ray cluster. Ray is given this code itself, so it imports nothing of ours."""

import os
import secrets
import selectors
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any


class Worker:
    """The actor of a rank. The rank is a process of its own: Ray's has threads, and data loaders fork it."""

    process: subprocess.Popen[bytes] | None = None

    def place(self) -> tuple[str, int, list[str]]:
        """Address of the node, a free port, and the worker's GPUs."""
        import ray.util

        while True:
            port = 20_000 + secrets.randbelow(12_000)  # below those that any connection may be given meanwhile
            with socket.socket() as listener, suppress(OSError):
                listener.bind(("", port))
                return ray.util.get_node_ip_address(), port, [str(i) for i in ray.get_gpu_ids()]

    def run(self, command: list[str], folder: str, env: dict[str, str]) -> Iterator[tuple[int, Any]]:
        """Run a command. Yield 1 or 2 with the bytes written to that stream, and 0 with the exit code in the end."""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=folder, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
        yield from written_by(self.process)
        yield 0, self.process.wait()

    def send(self, number: int) -> None:
        """Send the rank a signal, as soon as it runs."""
        while self.process is None:
            time.sleep(0.1)
        self.process.send_signal(number)


def written_by(process: subprocess.Popen[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the output of a process: stdout at once, stderr by whole lines, as several ranks share it."""
    with selectors.DefaultSelector() as streams:
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            streams.register(stream, selectors.EVENT_READ, number)  # type: ignore[arg-type]
        rest = b""  # of a line on 2
        while streams.get_map():
            ready = streams.select(1.0)
            if not ready and process.poll() is not None:
                break  # processes that a killed rank has left behind hold them open
            for key, _ in ready:
                if not (written := os.read(key.fd, 1 << 16)):
                    streams.unregister(key.fileobj)
                elif key.data == 2:
                    lines, end, rest = (rest + written).rpartition(b"\n")
                    yield 2, lines + end
                else:
                    yield 1, written
        yield 2, rest
