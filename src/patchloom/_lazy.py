"""What keeps `import patchloom` light: verbs and methods that load when used, encoders that register with timm."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


class LazyTable(Mapping[str, T]):
    """A table of classes by name, each of which is imported when it is asked for.

    Args:
        places: Where each is, as `module:class`.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> T:
        """Import and return a class."""
        module, _, attribute = self.places[name].partition(":")
        found: T = getattr(importlib.import_module(module), attribute)
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the names, without importing anything."""
        return iter(self.places)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.places)


class _CallableModule(ModuleType):
    """A module that is called like the function it is named after: `patchloom.pretrain("ccvit", …)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_call"](*args, **kwargs)


def make_callable(module_name: str, function: Callable[..., Any]) -> None:
    """Let the module `module_name` be called as `function`.

    A folder is a verb here, and so is a function of the Python API; both are `patchloom.VERB`, so the one
    object has to serve as both.
    """
    module = sys.modules[module_name]
    module.__class__ = _CallableModule
    module.__dict__["_call"] = function
    module.__doc__ = f"{module.__doc__ or ''}\n\nCalled as a function:\n\n{function.__doc__ or ''}"


class _AfterImport(MetaPathFinder, Loader):
    """Runs a callback right after the first import of one module, without importing it."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name = name
        self.callback = callback
        self.spec: ModuleSpec | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        self.spec = importlib.util.find_spec(fullname)
        if self.spec is None or self.spec.loader is None:
            return None
        wrapped = ModuleSpec(
            fullname,
            self,
            origin=self.spec.origin,
            is_package=self.spec.submodule_search_locations is not None,
        )
        wrapped.submodule_search_locations = self.spec.submodule_search_locations
        wrapped.has_location = self.spec.has_location
        return wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self.spec is not None
        assert self.spec.loader is not None
        return self.spec.loader.create_module(self.spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self.spec is not None
        assert self.spec.loader is not None
        module.__spec__ = self.spec
        module.__loader__ = self.spec.loader
        self.spec.loader.exec_module(module)
        self.callback()


def after_import(name: str, callback: Callable[[], None]) -> None:
    """Call `callback` once the module `name` is imported: now if it already is, else right after."""
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(name, callback))
