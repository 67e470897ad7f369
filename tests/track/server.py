"""`launch/serve_tracking.py` as a person starts it, and what can happen to the server it started."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]


def free_port():
    """A free port below those that the system hands out by itself: it stays free while a server is away."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """The program with its MLflow server; `folder` is its own, since PostgreSQL's user has to get in where root runs it."""

    def __init__(self, *words):
        self.folder = Path(tempfile.mkdtemp(prefix="jmt-server-"))
        self.folder.chmod(0o711)
        self.port, self.words, self.program, self.said = free_port(), words, None, []
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self):
        command = [sys.executable, str(ROOT / "launch" / "serve_tracking.py"), f"out={self.folder / 'out'}", f"port={self.port}"]
        self.program = subprocess.Popen([*command, *self.words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        timer = threading.Timer(400, self.program.kill)
        timer.start()
        self.said = []
        for line in self.program.stdout:
            self.said.append(line.rstrip())
            if line.startswith("http://"):  # the last line, once it answers
                timer.cancel()
                return self
        raise AssertionError((self.said, self.log()))

    def log(self):
        path = self.folder / "out" / "server.log"
        return path.read_text(errors="replace")[-4_000:] if path.exists() else ""

    def group(self):
        """The process group of `mlflow server`, without the program and PostgreSQL."""
        return next(child.pid for child in psutil.Process(self.program.pid).children() if "mlflow" in child.cmdline())

    def send(self, number):
        os.killpg(self.group(), number)

    def kill(self):
        """SIGKILL to the whole MLflow server; returns the program's exit code and last words."""
        self.send(signal.SIGKILL)
        rest, _ = self.program.communicate(timeout=60)
        return self.program.returncode, rest

    def stop(self):
        self.program.send_signal(signal.SIGINT)
        self.program.communicate(timeout=60)
        return self.program.returncode

    def remove(self):
        if self.program is not None and self.program.poll() is None:
            with contextlib.suppress(StopIteration):
                self.send(signal.SIGCONT)
            self.stop()
        shutil.rmtree(self.folder)
