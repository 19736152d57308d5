"""Registers the SwiftKV model types with transformers as soon as that is imported, and not before.

transformers and torch take seconds to import, and a command that prints its help, or what is wrong with a config, needs
neither. So a finder at the head of `sys.meta_path` waits until somebody imports transformers. The alternative was to
register at once unless one of our own commands runs. It is shorter, but what runs can only be guessed from `sys.argv`,
and a script of a user that wants `vlskv_ray.config` alone would wait for torch as well.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "transformers"


def register_with_transformers() -> None:
    """Registers the model types: now if transformers is imported, else right after it is."""
    if not sys.modules.get(NAME) and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if sys.modules.get(NAME):  # asked again: another thread may have begun to import it before the finder was there
        import vlskv_ray.model.swiftkv  # noqa: F401 - which registers


class _Finder:
    """Finds transformers as the finders behind it do; loaded, it has our model types. Finding alone registers nothing.

    It stays in `sys.meta_path`: while another thread walks that list, taking it out would hide the finder behind it.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        if name != NAME:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in behind)), None)
        if spec and spec.loader:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """The loader of transformers; registers our model types with what it has loaded."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # of a module that is only found, files can be read
        if name == "loader":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import vlskv_ray.model.swiftkv  # noqa: F401 - which registers
