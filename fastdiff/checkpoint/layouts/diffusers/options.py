"""A config.json of diffusers whose every entry must be understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What has no bearing on the network, or is the pipeline's business.
IGNORED_OPTIONS = {
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
    "upcast_attention",
    "addition_embed_type_num_heads",
    "num_train_timesteps",
}
# Options that our models have in one way only.
FIXED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "mid_block_scale_factor": (1,),
    "norm_type": ("group",),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


class Options:
    """A config whose every entry must be read, fixed or switched off."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = {key: value for key, value in data.items() if not key.startswith("_")}
        self.read: set[str] = set(IGNORED_OPTIONS)
        self.class_name = data.get("_class_name")

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.data.get(name, default)
        return default if value is None else value

    def require(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ValueError(
                f"{self.class_name}: {name} is missing; give the whole config.json of the model"
            )
        return value

    def fail(self, name: str, expected: str) -> ValueError:
        return ValueError(
            f"{self.class_name}: {name} must be {expected}, got {self.data.get(name)!r}; "
            "fastdiff has no such model"
        )

    def finish(self) -> None:
        """Raise unless all that was not read is at the only value we have, or off."""
        for name, value in self.data.items():
            if name in self.read:
                continue
            if name in FIXED_OPTIONS:
                if value not in FIXED_OPTIONS[name]:
                    raise self.fail(name, " or ".join(map(repr, FIXED_OPTIONS[name])))
            elif value not in (None, False):
                raise self.fail(name, "absent or off")
