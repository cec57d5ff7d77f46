"""Time and memory to load a full-size Stable Diffusion 1.5 U-Net, against safetensors itself.

    python -m benchmarks.networks.bench_checkpoint

Writes random fp32 weights once (3.4 GB, removed afterwards), reads them once to fill the page
cache, then loads them in a fresh process per measurement, and compares the output of the loaded
U-Net with that of diffusers on the same file, in fp32. "pread" and "mmap, copied" are safetensors'
two ways to read everything into the memory of the process; "fastdiff.load" reads the same file as
part of a diffusers folder, checks it and builds the U-Net. Memory is the growth of the process's
peak resident set since the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastdiff.bench.memory import peak_bytes

WAYS = ("pread", "mmap, copied", "fastdiff.load", "fastdiff.load, torch.save's file")


def write(folder: Path) -> None:
    """Write the same random weights in both formats, as diffusers would save them."""
    from safetensors.torch import save_file

    from fastdiff.checkpoint.layouts.diffusers.read import names
    from fastdiff.checkpoint.layouts.diffusers.write import diffusers_state_dict, unet_options
    from fastdiff.models.presets import UNETS
    from fastdiff.models.unet import UNet

    config = UNETS["sd1"]
    with torch.device("meta"):
        model = UNet(config)
    assert names(model)
    state = {
        key: torch.randn(value.shape).mul_(0.02)
        for key, value in diffusers_state_dict(model, linear_projections=False).items()
    }
    for part, kind in (("safetensors", "safetensors"), ("bin", "bin")):
        (folder / part).mkdir()
        options = unet_options(config, linear_projections=False)
        (folder / part / "config.json").write_text(json.dumps(options))
        path = folder / part / f"diffusion_pytorch_model.{kind}"
        if kind == "bin":
            torch.save(state, path)
        else:
            save_file(state, path, {"format": "pt"})


def measure(way: str, folder: Path) -> dict[str, float]:
    """Load once in this process, which must be fresh: seconds, and peak memory over file size."""
    import fastdiff
    from fastdiff.checkpoint.open import load  # noqa: F401 - import outside of the measurement

    file = folder / "safetensors" / "diffusion_pytorch_model.safetensors"
    torch.zeros(1)
    before = peak_bytes()
    run = _way(way, folder, file, fastdiff.load)
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    assert kept is not None
    return {"seconds": seconds, "memory": (peak_bytes() - before) / file.stat().st_size}


def _way(way: str, folder: Path, file: Path, load: Callable[..., object]) -> Callable[[], object]:
    from safetensors.torch import load_file

    if way == "pread":
        return lambda: load_file(file, backend="pread")
    if way == "mmap, copied":
        return lambda: {key: value.clone() for key, value in load_file(file).items()}
    part = "bin" if "torch.save" in way else "safetensors"
    return lambda: load(folder / part)


@torch.no_grad()
def difference(folder: Path) -> float:
    """Largest difference between the outputs of the two U-Nets, relative to the largest output."""
    import fastdiff
    from fastdiff.extras import import_extra

    diffusers = import_extra("diffusers", extra="diffusers")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 32, 32, generator=generator)
    context = torch.randn(1, 77, 768, generator=generator)
    t = torch.tensor([501])
    unet = fastdiff.load(folder / "safetensors").denoiser
    assert unet is not None
    ours = unet(x, t, context=context)
    del unet
    peer = diffusers.UNet2DConditionModel.from_pretrained(folder / "safetensors")
    theirs = peer.eval()(x, t, encoder_hidden_states=context).sample
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--repeat", type=int, default=3, help="fresh processes per way")
    parser.add_argument(
        "--folder", type=Path, help="folder with room for 6.9 GB (default: a temporary one)"
    )
    parser.add_argument("--measure", choices=(*WAYS, "difference"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "difference":
        print(difference(options.folder))
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_in_a_process(folder)
        results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for round_ in range(options.repeat + 1):  # the first fills the page cache
            for way in WAYS:
                output = in_a_process(way, folder)
                if round_:
                    results[way].append(json.loads(output))
        error = float(in_a_process("difference", folder))
    own = statistics.median(r["seconds"] for r in results["pread"])
    for way, rows in results.items():
        seconds = statistics.median(row["seconds"] for row in rows)
        memory = max(row["memory"] for row in rows)
        print(
            f"{way:34} {seconds:6.2f} s  {seconds / own:5.2f} of pread  {memory:5.2f} of the file"
        )
    print(f"the outputs differ from diffusers' by {error:.1e} of the largest")


def in_a_process(way: str, folder: Path) -> str:
    words = ["--measure", way, "--folder", str(folder)]
    command = [sys.executable, "-m", "benchmarks.networks.bench_checkpoint", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_in_a_process(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from benchmarks.networks.bench_checkpoint import write\n"
        "write(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


if __name__ == "__main__":
    main()
