"""Triton's interpreter, mended where its version and NumPy's do not fit, and made faster."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any


def mend_interpreter() -> None:
    """Mend the interpreter where its version needs it, and spare it what takes most of its time."""
    if importlib.util.find_spec("triton"):
        _take_bounds_of_loops()
        _know_builtins()


def _take_bounds_of_loops() -> None:
    """Let the interpreter of Triton 3.6, which torch 2.11 brings, take a loop's bound from NumPy 2.4 and later.

    It makes an integer of an array of one number, which they refuse. Later ones take the number out of it first.
    """
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


def _know_builtins() -> None:
    """Look for the functions of Triton's language once, not at each launch and each call of a device function.

    The interpreter puts its own in their place for the time of a launch. To find them it goes through all members of
    the language's modules and classes, which is two fifths of the time of a small launch.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original: Any = getattr(interpreter, "_patch_builtin", None)
    if original is None or hasattr(original, "names"):
        return
    packages = [tl, tl.core, tl.math, tl.tensor, getattr(tl.core, "tensor_descriptor_base", tl.tensor)]
    names = {
        id(package): [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in packages
    }

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in names:
            original(package, builder, scope)
            return
        for name in names[id(package)]:
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    patch_builtin.names = names  # type: ignore[attr-defined]
    interpreter._patch_builtin = patch_builtin  # type: ignore[attr-defined]
    whole: Any = interpreter._patch_lang

    def patch_lang(fn: Any) -> Any:
        """Nothing where a launch has put them in place already, for the device functions that it calls."""
        seen = [lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values())]
        patched = seen and not any(tl.core.is_builtin(lang.load) for lang in seen)
        return interpreter._LangPatchScope() if patched else whole(fn)

    interpreter._patch_lang = patch_lang  # type: ignore[attr-defined]
