"""The held-out segments of a study: rates are chosen on one, and the other is reported.

The reporting segment is what a run evaluates on itself, see `sdd.data.eval_windows`.
"""

import numpy as np
import torch

from sdd.data.token_file import TokenFile
from sdd.errors import UserError


def tuning_windows(file: TokenFile, n: int, context: int) -> torch.Tensor:
    """Take n held-out windows midway between those of `sdd.data.eval_windows`, so that no token is a target in both.

    Raises:
        UserError: if the held-out data have fewer than 2 n windows.
    """
    count = file.n_windows(context)
    if count < 2 * n:
        raise UserError(
            f"{file.path}: the held-out data have {count} windows of {context} tokens, a study needs {2 * n}, half of "
            "them to tune on and half to report: lower --eval_sequences, or bring more text"
        )
    starts = np.arange(n + 1) * count // n
    return torch.from_numpy(file.read((starts[:-1] + starts[1:]) // 2 * context, context + 1))
