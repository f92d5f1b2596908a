"""Processes that start in milliseconds: each is a fork of one interpreter that has imported what they need.

A new interpreter takes seconds to import torch or MLflow. The interpreter that is forked runs no thread, and each fork
has its own arguments, environment and output, and can be killed like any process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event

import pytest
from conftest import PATIENCE, ROOT, interruptible, until

SERVER = """
import json, os, signal, sys, threading, traceback
folder = sys.argv[1]
exec(sys.argv[2])

def write(name, text):
    with open(f"{folder}/.{name}", "w") as file: file.write(str(text))
    os.rename(f"{folder}/.{name}", f"{folder}/{name}")

def report_ended(*_):
    while True:
        try: pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: return
        if not pid: return
        write(f"{pid}.status", os.waitstatus_to_exitcode(status))

def run(job):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["env"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["-c", *job["args"]]
    code = 1
    try:
        exec(job["code"], {"__name__": "__main__"})
        code = 0
    except SystemExit as e: code = e.code if isinstance(e.code, int) else int(bool(e.code))
    except BaseException: traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

signal.signal(signal.SIGCHLD, report_ended)
assert threading.active_count() == 1, threading.enumerate()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid: run(job)
    write(f"{job['number']}.pid", pid)
"""


class Fork:
    "A process, with the methods of `subprocess.Popen` that tests use; `communicate` returns all that it wrote."

    def __init__(self, pid, output, status, args):
        self.pid, self.args, self.returncode, self._output, self._status = pid, args, None, output, status

    def poll(self):
        if self.returncode is None and self._status.exists():
            self.returncode = int(self._status.read_text())
        return self.returncode

    def wait(self, timeout):
        pause, waited = 0.005, 0.0
        while self.poll() is None:
            if waited >= timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            Event().wait(pause)
            waited += pause
        return self.returncode

    def communicate(self, timeout):
        self.wait(timeout)
        return self._output.read_text(), ""

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forks:
    "Runs code in forks of an interpreter that has executed `imports`."

    def __init__(self, imports):
        self._folder, self._number = tempfile.TemporaryDirectory(), 0
        self._log = open(Path(self._folder.name) / "log", "w")
        command = [sys.executable, "-c", SERVER, self._folder.name, imports]
        self._server = interruptible(command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, cwd=ROOT)

    def __call__(self, code, *args, **env):
        "Starts a process that executes `code`, with the present environment and the variables in `env`."
        folder, self._number = Path(self._folder.name), self._number + 1
        output, started = folder / f"{self._number}.out", folder / f"{self._number}.pid"
        environment = dict(os.environ) | {key: str(value) for key, value in env.items()}
        job = dict(number=self._number, code=code, args=[str(a) for a in args], env=environment, output=str(output))
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        until(lambda: started.exists() or self._server.poll() is not None, "a fork")
        if not started.exists():
            pytest.fail((folder / "log").read_text())
        pid = int(started.read_text())
        return Fork(pid, output, folder / f"{pid}.status", job["args"])

    def run(self, words, timeout, **options):
        "Executes the words `python -c CODE ARGUMENTS` as `subprocess.run` does; standard error holds all output."
        _, _, code, *args = words
        fork = self(code, *args)
        text, _ = fork.communicate(timeout)
        return subprocess.CompletedProcess(words, fork.returncode, text, text)

    def close(self):
        self._server.stdin.close()
        self._server.wait(PATIENCE)
        self._log.close()
        self._folder.cleanup()
