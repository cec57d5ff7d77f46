"""Perceptual distances between images: LPIPS with the user's weights, or a local feature loss.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) needs a VGG16 trained on ImageNet, which is not part of
this package. `LocalFeatureLoss` needs no weights: it compares the responses of edge and line
filters.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# VGG16 up to relu5_3: index of each convolution in torchvision's `features` -> (in, out) channels
VGG16_CONVOLUTIONS: dict[int, tuple[int, int]] = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    17: (256, 512),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}
VGG16_POOLS = (4, 9, 16, 23)
VGG16_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
TAP_CHANNELS = (64, 128, 256, 512, 512)


def unit_normalize(features: Tensor, floor: float = 1e-10) -> Tensor:
    """f / sqrt(|f|^2 + floor^2) for each pixel's vector f; smooth at 0. features: (N, C, H, W)."""
    return features * (features.square().sum(1, keepdim=True) + floor**2).rsqrt()


class LPIPS(nn.Module):
    """Learned perceptual distance, eq. 1 of Zhang et al. 2018, on VGG16 features.

    sum over layers of mean over pixels of w_l . (f_l(x) - f_l(y))^2 with unit-length features f_l.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict(
            {
                str(index): nn.Conv2d(cin, cout, 3, padding=1)
                for index, (cin, cout) in VGG16_CONVOLUTIONS.items()
            }
        )
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(c)) for c in TAP_CHANNELS])
        # ImageNet's mean and standard deviation for images in [-1, 1]
        shift = torch.tensor([-0.030, -0.088, -0.188])
        scale = torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, *paths: str | Path) -> LPIPS:
        """Load the weights from the user's own files, which together must contain all of them.

        It reads torchvision's VGG16 (`features.0.weight` ...), the linear weights of the `lpips`
        package (`lin0.model.1.weight` ...) and full LPIPS state dicts (`net.slice1.0.weight` ...).

        Args:
            paths: safetensors files, or PyTorch files, which are read with `weights_only=True`.

        Raises:
            FileNotFoundError: a path does not exist.
            ValueError: a file cannot be read, or weights are missing or of the wrong shape.
        """
        found: dict[str, Tensor] = {}
        for path in paths:
            found |= {_our_name(key): value for key, value in _read(Path(path)).items()}
        model = cls()
        expected = model.state_dict()
        problems = [f"{key} is missing" for key in expected if key not in found]
        for key in expected.keys() & found.keys():
            if key.startswith("weights."):
                found[key] = found[key].flatten()  # stored as a 1x1 convolution
            if found[key].shape != expected[key].shape:
                got, want = tuple(found[key].shape), tuple(expected[key].shape)
                problems.append(f"{key} has shape {got}, expected {want}")
        if problems:
            names = ", ".join(str(path) for path in paths)
            raise ValueError(
                f"expected LPIPS weights in {names}: {'; '.join(sorted(problems))}; "
                "give torchvision's VGG16 and the linear weights of the lpips package"
            )
        model.load_state_dict({key: found[key] for key in expected})
        return model.eval()

    def features(self, x: Tensor) -> list[Tensor]:
        """x: (N, 1 or 3, H, W) in [-1, 1] -> unit-length features of five layers."""
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x = (x.expand(-1, 3, -1, -1) - shift) / scale
        taps = []
        for index in range(VGG16_TAPS[-1] + 1):
            if index in VGG16_CONVOLUTIONS:
                x = self.convolutions[str(index)](x)
            elif index in VGG16_POOLS:
                x = F.max_pool2d(x, 2)
            else:
                x = F.relu(x)
            if index in VGG16_TAPS:
                taps.append(unit_normalize(x))
        return taps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (N, 1 or 3, H, W) in [-1, 1], sides of 16 or more -> distance (N,)."""
        check_pair(x, y, smallest=16)
        total = x.new_zeros(len(x))
        for fx, fy, weight in zip(self.features(x), self.features(y), self.weights, strict=True):
            difference = (fx - fy).square() * weight.view(1, -1, 1, 1)
            total = total + difference.sum(1).mean((1, 2))
        return total


def _our_name(key: str) -> str:
    """The name in `LPIPS.state_dict()` for a key of a published file."""
    parts = key.split(".")
    if parts[0] == "features":
        return f"convolutions.{parts[1]}.{parts[2]}"
    if parts[0] == "net" and len(parts) == 4:
        return f"convolutions.{parts[2]}.{parts[3]}"
    if parts[0].startswith("lin") and parts[0][3:].isdigit():
        return f"weights.{parts[0][3:]}"
    return key


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"weights file {path} cannot be read ({reason}); give safetensors or a state dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"weights file {path} must contain a state dict, got {type(state).__name__}"
        )
    return state


def check_pair(x: Tensor, y: Tensor, smallest: int) -> None:
    """Raise ValueError unless x and y are images of one shape, with 1 or 3 channels."""
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < smallest:
        raise ValueError(
            f"images must both be (N, 1 or 3, H, W) with sides of {smallest} or more, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}; convert or enlarge them"
        )


def derivative_filters() -> Tensor:
    """First and second Gaussian derivatives, sigma 1, on 7x7: (5, 1, 7, 7) fp32.

    g_x, g_y, g_xx, g_yy, g_xy: the steerable basis of Freeman & Adelson 1991 (edges and lines of
    every orientation are linear combinations of these). Each has zero mean and unit L2 norm.
    """
    axis = torch.arange(-3, 4, dtype=torch.float64)
    g = torch.exp(-axis.square() / 2)
    d1, d2 = axis * g, (axis.square() - 1) * g
    pairs = [(g, d1), (d1, g), (g, d2), (d2, g), (d1, d1)]
    bank = torch.stack([torch.outer(a, b) for a, b in pairs])
    bank -= bank.mean((1, 2), keepdim=True)
    return (bank / bank.square().sum((1, 2), keepdim=True).sqrt())[:, None].float()


class LocalFeatureLoss(nn.Module):
    """Distance between edge and line features at several scales; no weights, no data, no seed.

    With an L1 loss, sharpness is lost first, and sharpness shows in the local derivatives. As in
    LPIPS, each pixel's feature vector is normalised before the comparison, so that a faint stroke
    counts as much as a bold one; `floor` prevents flat areas, where the direction is noise, from
    counting. The filters are fixed derivatives rather than random ones, because they are the same
    for every seed and version, treat all orientations equally and have a meaning.
    """

    def __init__(self, scales: int = 3, floor: float = 0.1) -> None:
        super().__init__()
        if scales < 1 or floor <= 0:
            raise ValueError(
                "LocalFeatureLoss: scales must be 1 or more and floor positive, "
                f"got {scales} and {floor}"
            )
        self.scales, self.floor = scales, floor
        self.register_buffer("filters", derivative_filters(), persistent=False)

    def features(self, x: Tensor) -> list[Tensor]:
        """x: (N, C, H, W) -> per scale (N, 5C, H / 2^i, W / 2^i), vectors shorter than 1."""
        channels = x.shape[1]
        filters = self.get_buffer("filters").to(x.dtype).repeat(channels, 1, 1, 1)
        features = []
        for scale in range(self.scales):
            if scale:
                x = F.avg_pool2d(x, 2)
            padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
            responses = F.conv2d(padded, filters, groups=channels)
            features.append(unit_normalize(responses, self.floor))
        return features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (N, 1 or 3, H, W) in [-1, 1], sides of 4 or more -> distance (N,), from 0 to 4."""
        check_pair(x, y, smallest=2 ** (self.scales - 1))
        pairs = zip(self.features(x), self.features(y), strict=True)
        distances = [(fx - fy).square().sum(1).mean((1, 2)) for fx, fy in pairs]
        return torch.stack(distances).mean(0)
