"""Other people's code that ours is compared with."""

from __future__ import annotations

import warnings
from types import ModuleType


def import_diffusers(*names: str) -> ModuleType:
    """diffusers, with the classes that a test needs already imported: it imports them when first
    asked for.

    What diffusers and the packages it tries (transformers, torchvision, ...) warn about while
    they are imported is not ours, and must not become an error; warnings while the test runs
    still do.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        for name in names:
            getattr(diffusers, name)
    return diffusers
