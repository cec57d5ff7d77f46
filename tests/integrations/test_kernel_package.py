"""The exported package, loaded by the library `kernels` in a process without fastdiff."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.integrations import kernel_package
from tests.kernels.cases import needs_triton

LIBRARY = Path(sys.prefix) / "kernels-library"
"""`make venv` installs the library there, because diffusers behaves differently where it is."""
needs_library = pytest.mark.skipif(not LIBRARY.is_dir(), reason="the library kernels is missing")
pytestmark = [needs_library, needs_triton]

WITHOUT_FASTDIFF = """
import sys
sys.modules["fastdiff"] = None  # importing it raises ImportError
from pathlib import Path
import torch
from kernels import get_local_kernel
ops = get_local_kernel(Path(sys.argv[1]))
assert not any(name.startswith("fastdiff.") for name in sys.modules)
"""
BITS = """
import hashlib, json
digests = {}
for name in ("group_norm_silu", "ada_layer_norm", "geglu", "attention", "layer_norm"):
    torch.manual_seed(0)
    arguments = ops.OPS[name].example(lambda *shape: torch.randn(shape))
    with ops.backend("triton"), torch.no_grad():
        result = ops.OPS[name].public(**arguments)
    tensors = [t for t in (result, *arguments.values()) if isinstance(t, torch.Tensor)]
    data = b"".join(t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors)
    digests[name] = hashlib.sha256(data).hexdigest()
print(json.dumps(digests))
"""
UNET = """
from torch import nn
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from kernels import LocalLayerRepository, Mode, kernelize
from kernels import replace_kernel_forward_from_hub, use_kernel_mapping

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
).eval()
inputs = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, 32)
with torch.no_grad():
    expected = unet(*inputs).sample


class GroupNorm(nn.GroupNorm):
    "Becomes group_norm_silu; the activation after it then does nothing."


calls = {"group_norm_silu": 0, "geglu": 0}
for name in calls:
    op = ops.OPS[name]

    def counted(*args, forward=op.backends["triton"].forward, name=name):
        calls[name] += 1
        return forward(*args)

    op.use({**op.backends, "triton": op.backends["triton"].wrapped(lambda f, c=counted: c)})
replace_kernel_forward_from_hub(GroupNorm, "GroupNormSiLU")
replace_kernel_forward_from_hub(GEGLU, "GEGLU")
blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
for block in blocks:
    block.norm1.__class__ = block.norm2.__class__ = GroupNorm
    block.time_emb_proj = nn.Sequential(nn.SiLU(), block.time_emb_proj)
    block.nonlinearity = nn.Identity()
gates = [module for module in unet.modules() if isinstance(module, GEGLU)]
names = ("GroupNormSiLU", "GEGLU")
mapping = {
    name: {"cpu": LocalLayerRepository(Path(sys.argv[1]), layer_name=name)} for name in names
}
with use_kernel_mapping(mapping, inherit_mapping=False):
    unet = kernelize(unet, mode=Mode.INFERENCE, device="cpu", use_fallback=False)
with torch.no_grad(), ops.backend("triton"):
    found = unet(*inputs).sample
assert calls == {"group_norm_silu": 2 * len(blocks), "geglu": len(gates)}, (calls, len(gates))
print(float((found - expected).abs().max() / expected.abs().max()))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kernel_package.export(tmp_path_factory.mktemp("hub") / "ops", repository="me/my-ops")


def run(words: list[str], folder: Path, **environment: str) -> str:
    """Run Python away from the checkout, with the library and Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(LIBRARY),
            "TRITON_INTERPRET": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_its_own_test_passes(package: Path, tmp_path: Path) -> None:
    """Parity of every op with a Triton kernel and a formula, as the package's user would run it."""
    out = run([str(package / "tests/test_parity.py"), str(package)], tmp_path)
    agreeing = [line.partition(":")[0] for line in out.splitlines() if "of the bound" in line]
    assert {"group_norm_silu", "add_group_norm_silu", "attention", "geglu"} <= set(agreeing)
    assert out.splitlines()[-1] == f"{len(agreeing)} ops agree with fp64"


@pytest.mark.slow
def test_it_has_the_bits_of_fastdiff(package: Path, tmp_path: Path) -> None:
    exported = run(["-c", WITHOUT_FASTDIFF + BITS, str(package)], tmp_path)
    ours = run(["-c", "import torch\nfrom fastdiff import kernels as ops\n" + BITS], tmp_path)
    assert json.loads(exported.splitlines()[-1]) == json.loads(ours.splitlines()[-1])
    assert len(set(json.loads(ours.splitlines()[-1]).values())) == 5


@pytest.mark.slow
def test_a_diffusers_unet_runs_on_its_layers(package: Path, tmp_path: Path) -> None:
    out = run(["-c", WITHOUT_FASTDIFF + UNET, str(package)], tmp_path)
    assert float(out.splitlines()[-1]) < 1e-5


def test_both_can_be_in_one_process(package: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nimport fastdiff.kernels as mine\n"
        "from kernels import get_local_kernel\nops = get_local_kernel(Path(sys.argv[1]))\n"
        "x = torch.randn(2, 8)\nassert ops.OPS['geglu'] is not mine.OPS['geglu']\n"
        "assert ops.OPS['geglu'].known is not mine.OPS['geglu'].known\n"
        "with ops.backend('reference'), mine.backend('reference'):\n"
        "    assert torch.equal(ops.geglu(x), mine.geglu(x))\n"
    )
    run(["-c", code, str(package)], tmp_path)


def test_the_layout(package: Path) -> None:
    variants = sorted(path.name for path in (package / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda"]
    ids = set()
    for name in variants:
        folder = package / "build" / name
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"]["type"] == name.partition("-")[2]
        ids.add(metadata["id"])
        assert not list(folder.rglob("*.so"))
        for path in folder.rglob("*.py"):  # the library runs from any folder under any name
            text = path.read_text()
            assert "\nfrom fastdiff" not in text, path
            assert "\nimport fastdiff" not in text, path
    assert len(ids) == 2
    card = (package / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\n")
    assert 'get_kernel("me/my-ops")' in card
    assert not [word for word in ("{repository}", "{version}", "{commit}") if word in card]


def test_a_folder_with_contents_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    assert kernel_package.main([str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
