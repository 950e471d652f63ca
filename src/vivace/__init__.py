"""vivace: compiles a trained model (an ONNX file) to native code and runs it as fast as the machine allows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vivace.base.version import __version__

if TYPE_CHECKING:
    from vivace.base.errors import VivaceError
    from vivace.compiler import compile, load
    from vivace.runtime.engine import Engine, Placement

_HOMES = {
    "compile": "vivace.compiler",
    "load": "vivace.compiler",
    "Engine": "vivace.runtime.engine",
    "Placement": "vivace.runtime.engine",
    "VivaceError": "vivace.base.errors",
}
__all__ = ["Engine", "Placement", "VivaceError", "__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import vivace` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vivace' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
