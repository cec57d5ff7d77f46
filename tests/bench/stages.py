"""Stages that end badly, as processes of `benchmarks.device` run them; none needs torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.device import records
from benchmarks.device.table import Failed, LeftOut, Plan

CONTEXT = "CUDA error: an illegal memory access was encountered"
HANGS = "import time; time.sleep(600)"


def fine(plan: Plan) -> list[str]:
    print(f"measured {plan.part}".rstrip())
    return [f"fine within {plan.seconds:.0f} s"]


def hang(plan: Plan) -> list[str]:
    """Hangs, as does a process that it has started, with its output still open."""
    child = subprocess.Popen([sys.executable, "-c", HANGS])
    (plan.out / "child.txt").write_text(str(child.pid))
    print("half way", flush=True)
    time.sleep(600)
    return []


def die(plan: Plan) -> list[str]:
    records.add_parity(plan.out, pair="geglu/cuda", case="one", status="ok")
    print("measured one", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def lose(plan: Plan) -> list[str]:
    """Loses the GPU context as PyTorch reports it."""
    raise RuntimeError(CONTEXT)


def abort(plan: Plan) -> list[str]:
    """Loses the GPU context as a C++ destructor does: the process ends without a word of Python."""
    print(f"terminate called after throwing an instance of 'c10::Error'\n  what():  {CONTEXT}")
    sys.stdout.flush()
    os.abort()


def fail(plan: Plan) -> list[str]:
    raise Failed("a kernel is wrong", "and another")


def leave(plan: Plan) -> list[str]:
    raise LeftOut("no tool")


def stumble(plan: Plan) -> list[str]:
    raise KeyError("a bug of ours")


def warn(plan: Plan) -> list[str]:
    """Warns, as other versions of torch do."""
    import warnings

    warnings.warn("torch 2.11 has another opinion", FutureWarning, stacklevel=1)
    return ["went on"]


def parts(plan: Plan) -> list[str]:
    """Does what its part says."""
    return {"fine": fine, "lose": lose, "hang": hang, "leave": leave}[plan.part](plan)


def hang_at_exit(plan: Plan) -> list[str]:
    """Hangs after its work, as a GPU driver may when a process ends."""
    import threading

    threading.Thread(target=time.sleep, args=(600,)).start()
    return ["measured everything"]


def import_wheel(plan: Plan) -> list[str]:
    import carried  # type: ignore[import-not-found]

    return [carried.WORD]
