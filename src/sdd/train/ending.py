"""How a process ends: its exit code, what torchrun is told, and when it may look."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

from sdd.train.parallel import in_environment, shared

#: Names the file in which torchrun looks for the error of a process.
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Seconds after which torchrun, which polls every 0.1 seconds, has surely noticed that a process has ended.
_TORCHRUN_LOOKS = 1.0


def supervised(main: Callable[[], int]) -> int:
    """Call `main` and return its exit code. That and an exception that leaves `main` are reported to torchrun.

    torchrun ends with 1 whatever happened. Where TORCHELASTIC_ERROR_FILE is set for it, it writes there what the
    process reported that ended first, `"errorCode": 2` for instance.

    In a job of several processes a failed one ends right here: at an orderly end, threads that still wait for other
    processes abort it now and then, and its exit code is lost. First it gives torchrun time to look: a process that
    ends because another was lost must not be taken for the cause.
    """
    if _ERROR_FILE in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        main = cast("Callable[[], int]", record(main))
    code = main()
    if code:
        _report(code)
    if code and shared():
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_TORCHRUN_LOOKS)
        os._exit(code)
    return code


def _report(code: int) -> None:
    """Leave torchrun the file from which it takes how a process ended, if it wants one."""
    file = os.environ.get(_ERROR_FILE)
    if not (file and in_environment()):
        return
    text = f"sdd ended with exit code {code}: its last line says why"
    message = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": message}))
