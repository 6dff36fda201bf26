"""Several processes of one world, on this machine."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch

_SPAWN = multiprocessing.get_context("forkserver")
_PRELOADED = ["sdd.train.trainer", "sdd.commands.main", "torch._dynamo", "torch._decomp", "numpy.ma"]
_SPAWN.set_forkserver_preload([*_PRELOADED, "safetensors.torch", "pytest", "hypothesis"])


def in_world(size, function, *args):
    """Call `function(world, *args)` in each of `size` processes and return the answers in rank order.

    The processes are forked from one that has imported everything, which takes a fraction of torchrun's time.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    workers = []
    for rank in range(size):
        here, there = _SPAWN.Pipe()
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        worker = _SPAWN.Process(target=_work, args=(there, environment, function, args))
        worker.start()
        there.close()
        workers.append((worker, here))
    answers = []
    for _, pipe in workers:
        try:
            answers.append(pipe.recv() if pipe.poll(120) else (False, "no answer within two minutes"))
        except EOFError:
            answers.append((False, "the process died"))
    for worker, pipe in workers:
        worker.join(10)
        worker.kill()
        worker.join()
        worker.close()
        pipe.close()
    for rank, (fine, answer) in enumerate(answers):
        assert fine, f"rank {rank}: {answer}"
    return [answer for _, answer in answers]


def _work(pipe, environment, function, args):
    os.environ.update(environment)
    torch.set_num_threads(1)
    from sdd.train.parallel import joined

    try:
        with joined() as world:
            answer = function(world, *args)
            pipe.send((True, answer))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


class Forked:
    """`sdd WORDS` in a process forked from one that has imported everything; answers as a `subprocess.Popen` does."""

    def __init__(self, words):
        stream, self._err = tempfile.mkstemp(prefix="stderr-")
        os.close(stream)
        self._process = _SPAWN.Process(target=_command, args=(words, self._err))
        self._process.start()

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def communicate(self, timeout=None):
        """Wait for the end; nothing of its output, and what it wrote to stderr."""
        self._process.join(timeout)
        err = Path(self._err).read_text()
        Path(self._err).unlink()
        return "", err


def _command(words, err):
    stream = os.open(err, os.O_WRONLY)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    from sdd.commands.main import main

    sys.exit(main(words))
