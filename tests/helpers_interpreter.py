"""Triton's interpreter, mended where its version and NumPy's do not fit."""

import importlib.util
from pathlib import Path
from typing import Any


def mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6, which torch 2.11 brings, take a loop's bound from NumPy 2.4 and later.

    It makes an integer of an array of one number, which they refuse. Later ones take the number out of it first.
    """
    if not importlib.util.find_spec("triton"):
        return
    from triton.runtime import interpreter

    if (
        'set_attr(tensor, "__index__", lambda self: int(self.handle.data))'
        not in Path(interpreter.__file__).read_text()
    ):
        return
    scope = interpreter._LangPatchScope
    original = scope.set_attr

    def set_attr(self: Any, obj: object, name: str, value: Any) -> None:
        original(self, obj, name, (lambda tensor: tensor.handle.data.item()) if name == "__index__" else value)

    scope.set_attr = set_attr
