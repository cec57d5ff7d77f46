"""Puts the module of FASTDIFF_SANITIZED_MODULE, built with ASan and UBSan, in the place of
the compiled one: as a pytest plugin (``-p tests.kernels.sanitized``), or alone, to run every row of
every op on every instruction set. test_sanitizers.py starts both, with ASan's runtime preloaded.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

NAME = "fastdiff.kernels._native"


def _load() -> Any:
    path = os.environ["FASTDIFF_SANITIZED_MODULE"]
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    assert NAME not in sys.modules, f"{NAME} is loaded already"
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build()["sanitizers"] == "address undefined"
    return module


native = _load()


def main() -> None:
    """Parity in bf16. In fp32 and fp16, which have code of their own, only that it runs: UBSan's
    checks keep loops from being vectorised, and a long fp32 sum taken one by one rounds more often
    than the one that ships."""
    import torch

    from tests.kernels import cases
    from tests.kernels.test_native import ROWS

    torch.manual_seed(0)
    for isa in native.build()["isas"]:
        try:
            native.use_isa(isa)
        except ValueError as error:
            print(f"skipped: {error}")
            continue
        for op, rows in ROWS.items():
            for case in rows:
                print(isa, op, case, flush=True)  # a fault ends the process: this says where
                cases.check(op, case, torch.bfloat16, "cpu")
                for dtype in (torch.float32, torch.float16):
                    cases.run_on("cpu", op, case.inputs(dtype))


if __name__ == "__main__":
    main()
