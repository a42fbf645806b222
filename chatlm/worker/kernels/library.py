"""decode_core's compiled library, for the modules of this room that call it. Without one of the interface
that this program needs, importing this module raises an ImportError that says so, as `import` would."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.core import decode_core, kernels_line

if TYPE_CHECKING:
    from decode_core import _core
else:
    _core = decode_core()
    if _core is None:
        raise ImportError(kernels_line())

__all__ = ["_core"]
