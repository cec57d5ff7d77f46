"""From jobs to images. `fastdiff.generate(model, jobs)` is a call of this package."""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastdiff.generate.run import Result


class _Callable(types.ModuleType):
    """`fastdiff.generate` names a function and this package: the package is called as the function.

    The import system sets the attribute of `fastdiff` to the package, whatever else is there.
    """

    def __call__(self, *args: Any, **options: Any) -> Iterator[Result]:
        """See `fastdiff.generate.run.generate`."""
        from fastdiff.generate.run import generate

        return generate(*args, **options)


sys.modules[__name__].__class__ = _Callable
