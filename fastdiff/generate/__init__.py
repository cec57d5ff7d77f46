"""From jobs to images.

The package is callable: `fastdiff.generate(model, jobs)` runs the jobs and yields a `Result` for
each of them, in their order. `fastdiff.generate.run.generate` documents the arguments.
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
    """Makes the package callable, because `fastdiff.generate` is both a function and this package.

    (The import system always sets the attribute of `fastdiff` to the package.)
    """

    def __call__(self, *args: Any, **options: Any) -> Iterator[Result]:
        """See `fastdiff.generate.run.generate`."""
        from fastdiff.generate.run import generate

        return generate(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the function, for `inspect.signature`, editors and IPython's ``?``."""
        from fastdiff.generate.run import generate

        return inspect.signature(generate)


sys.modules[__name__].__class__ = _Callable
