"""Replace the compiled module with the one in FASTDIFF_SANITIZED_MODULE, built with ASan and UBSan.

As a pytest plugin (``-p tests.kernels.sanitized``) it only replaces the module; run as a script, it
runs every case of every op on every instruction set. test_sanitizers.py does both, with ASan's
runtime preloaded.
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
    assert NAME not in sys.modules, f"{NAME} is already loaded"
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build()["sanitizers"] == "address undefined"
    return module


native = _load()


def main() -> None:
    """Check parity in bf16. The fp32 and fp16 code is only run, because UBSan's checks prevent
    vectorization and a long fp32 sum without it rounds more often than the code that ships."""
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
                print(isa, op, case, flush=True)  # a fault ends the process; this shows where
                cases.check(op, case, torch.bfloat16, "cpu")
                for dtype in (torch.float32, torch.float16):
                    cases.run_on("cpu", op, case.inputs(dtype))


if __name__ == "__main__":
    main()
