from dataclasses import replace

import pytest
import torch
from helpers_train import TINY

from sdd.train import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("faster", "said"), [(0.6, None), (1.0, None), (1.9, "1.9 times as fast in bfloat16")])
def test_bfloat16_is_named_where_it_is_faster(monkeypatch, faster, said):
    seconds = {torch.float32: faster, torch.bfloat16: 1.0}
    monkeypatch.setattr(precision, "_seconds", lambda config, dtype: seconds[dtype])
    line = precision.hint(TINY, CPU)
    assert line is None if said is None else said in str(line)
    assert precision.hint(replace(TINY, precision="float32"), CPU) is None
