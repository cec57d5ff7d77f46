"""The planted faults still fit the code, and name tests that exist."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.faults.faults import NOTHING, Fault, apply, faults, read
from tests.support.imports import ROOT

ROOMS = ("diffusion", "runtime", "models", "generate", "training", "data", "checkpoint", "kernels")


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name)
def test_a_fault_can_still_be_planted(fault: Fault) -> None:
    apply(fault, ROOT, check=True)
    if fault.test != NOTHING:
        file, _, name = fault.test.partition("::")
        function = re.escape(name.partition("[")[0])
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_faults_lie_in_all_rooms() -> None:
    paths = [fault.path.removeprefix("fastdiff/").partition("/")[0] for fault in faults()]
    rooms = Counter(paths)
    assert len(paths) >= 60
    assert all(rooms[room] for room in ROOMS), rooms


def test_a_patch_without_headers_is_refused(tmp_path) -> None:
    patch = tmp_path / "bare.patch"
    patch.write_text("--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n")
    with pytest.raises(ValueError, match="must begin with 'Fault:'"):
        read(patch)
