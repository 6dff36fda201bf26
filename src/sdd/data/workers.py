"""Chunks tokenised by several processes, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from pathlib import Path

from sdd.data.chunks import Chunk, ChunkTokenizer, ChunkTokens, Manifest
from sdd.data.tokenizer import Tokenizer
from sdd.errors import RunFailed

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_work: ChunkTokenizer  # of a worker process


def available_cpus() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenized(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, manifest: Manifest, workers: int
) -> Iterator[tuple[Chunk, ChunkTokens]]:
    """Every chunk with its tokens, in order; about two chunks a worker are in memory at any time.

    Args:
        chunks: the work.
        tokenizer: the tokenizer.
        manifest: how text becomes tokens.
        workers: processes, each on one core; 1 is this process itself. 0 is this process with as many threads as the
            tokenizer starts, for callers that may not start processes.

    Raises:
        UserError: see `ChunkTokenizer`.
        RunFailed: a worker was killed.
    """
    if workers <= 1:
        work = ChunkTokenizer(tokenizer, manifest, threaded=not workers)
        with _single_threaded() if workers else nullcontext():
            for chunk in chunks:
                yield chunk, work(chunk)
        return
    waiting: deque[tuple[Chunk, Future[ChunkTokens]]] = deque()
    pool = _pool(tokenizer, manifest, workers)
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_tokenize, chunk)))
            if len(waiting) > 2 * workers:
                done, tokens = waiting.popleft()
                yield done, tokens.result()
        for done, tokens in waiting:
            yield done, tokens.result()
    except BrokenProcessPool:
        raise RunFailed(
            "a worker process was killed, out of memory perhaps: give the same command again with fewer --workers, "
            "it goes on where it was"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(tokenizer: Tokenizer, manifest: Manifest, workers: int) -> ProcessPoolExecutor:
    # A fork of this process would copy its threads' locks; a fork server imports once and forks without them.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path, tokenizer.data, manifest))


def _start_worker(path: Path, data: bytes, manifest: Manifest) -> None:
    global _work
    # Ctrl-C reaches every process of the terminal; only the parent acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[_PARALLELISM] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = ChunkTokenizer(Tokenizer(path, data, manifest.eos), manifest)


def _end_with_parent() -> None:
    """End this worker with its parent: a parent that was killed cannot stop its workers."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _tokenize(chunk: Chunk) -> ChunkTokens:
    return _work(chunk)


@contextmanager
def _single_threaded() -> Iterator[None]:
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before
