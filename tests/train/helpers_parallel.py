"""Several processes of one world, on this machine."""

import multiprocessing
import os
import traceback

import torch

_SPAWN = multiprocessing.get_context("forkserver")
_SPAWN.set_forkserver_preload(
    ["sdd.train.trainer", "torch._dynamo", "torch._decomp", "numpy.ma", "safetensors.torch", "pytest", "hypothesis"]
)


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
