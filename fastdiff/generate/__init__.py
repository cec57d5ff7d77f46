"""From jobs to images.

The package can be called: `fastdiff.generate(model, jobs)` does the jobs and yields a `Result` for
each, in their order. `fastdiff.generate.run.generate` documents the arguments.
"""

from __future__ import annotations

import inspect
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

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's, for `inspect.signature`, editors and IPython's ``?``."""
        from fastdiff.generate.run import generate

        return inspect.signature(generate)


sys.modules[__name__].__class__ = _Callable
