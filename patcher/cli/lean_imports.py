"""A command of its own process imports no compiler, and nothing for several processes: a second of every start.

transformers imports torch's compiler for its decorators, which say what a compiled model does and do nothing else, and
the tensors of several processes for the type's name. Nothing is compiled here. Whoever asks the compiler for anything
else gets it: it is then imported as it would have been. Where commands run in several processes, nothing is changed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
_INDEXING = f"{_COMPILER}._trace_wrapped_higher_order_op"
_SEVERAL = "transformers.distributed"
_TENSORS_OF_SEVERAL = "torch.distributed.tensor"
_RELY_ON_IT = ("peft", "lm_eval")
"""Libraries that use that module of torch, and leave it to transformers to import it."""


def import_no_compiler() -> None:
    """From here on, in this process; to be called before torch is imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path) and _COMPILER not in sys.modules:
        sys.meta_path.insert(0, _Finder())


def _decorator(function: Any = None, *_given: Any, **_named: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _SEVERAL:
            _in_one_process()
        elif fullname in _RELY_ON_IT:
            importlib.import_module(_TENSORS_OF_SEVERAL)
        elif fullname == _COMPILER:
            return ModuleSpec(fullname, _Loader(_Compiler), is_package=True)
        elif fullname == _INDEXING:
            return ModuleSpec(fullname, _Loader(_Indexing))
        elif fullname.startswith(f"{_COMPILER}."):
            real_compiler()
            if fullname in sys.modules:
                return ModuleSpec(fullname, _Loader(lambda name: sys.modules[name]))
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, make: Callable[[str], ModuleType]) -> None:
        self.make = make

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.make(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """It is whole."""


class _Compiler(ModuleType):
    """Stands for the compiler until more of it is asked for than its decorators."""

    allow_in_graph = assume_constant_result = disable = staticmethod(_decorator)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(real_compiler(), name)


class _Indexing(ModuleType):
    """Stands for the module of the one class that masks under ``torch.vmap`` are indexed with."""

    @staticmethod
    def TransformGetItemToIndex(*given: Any) -> Any:  # noqa: N802 - the library's name
        """The real one's instance."""
        real_compiler()
        return sys.modules[_INDEXING].TransformGetItemToIndex(*given)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        real_compiler()
        return getattr(sys.modules[_INDEXING], name)


def real_compiler() -> ModuleType:
    """The compiler itself, imported in the place of what stands for it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    importlib.import_module(_TENSORS_OF_SEVERAL)
    for name, kind in ((_INDEXING, _Indexing), (_COMPILER, _Compiler)):
        if isinstance(sys.modules.get(name), kind):
            del sys.modules[name]
    return importlib.import_module(_COMPILER)


def _in_one_process() -> None:
    """Let transformers be as it is with a torch that was built for one process."""
    for name in ("transformers.utils.import_utils", "transformers.utils"):
        module = sys.modules.get(name)
        if hasattr(module, "is_torch_distributed_available"):
            module.is_torch_distributed_available = lambda: False  # type: ignore[union-attr]
