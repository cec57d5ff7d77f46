"""Single files of CompVis' latent diffusion and of Stable Diffusion 1, 2 and XL.

Rombach et al. 2022 (arXiv 2112.10752), Podell et al. 2023 (2307.01952). The U-Net has OpenAI's
layout under `model.diffusion_model.`, the autoencoder its own under `first_stage_model.`, and the
text encoder is under `cond_stage_model.` or `conditioner.embedders.`. Averaged weights are named
`model_ema.` plus the parameter's name without its dots. First stages and U-Nets also occur alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoint import bert, text_encoders
from fastdiff.checkpoint.build import Plan, plan_model
from fastdiff.checkpoint.layouts import ddpm, openai
from fastdiff.checkpoint.model import Model, image_channels
from fastdiff.checkpoint.open import Layout, Loading, Source
from fastdiff.checkpoint.weights import Weights, some
from fastdiff.diffusion.schedules import NoiseSchedule, ScheduleConfig
from fastdiff.models.autoencoder import Autoencoder
from fastdiff.models.bert import BERT
from fastdiff.models.text import AnyEncoder
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.names import Prediction

UNET = "model.diffusion_model."
EMA = "model_ema.diffusion_model"
FIRST_STAGE = "first_stage_model."
CONTROL = "control_model."
CONTROL_MARK = f"{CONTROL}input_hint_block.0.weight"
# Tables of the noise schedule and the like, which we compute, and loss networks of a first stage.
_DERIVED = re.compile(
    r"(sqrt_|log_|posterior_|alphas_cumprod|betas$|logvar$|lvlb_weights$|scale_factor$"
    r"|denoiser\.(log_)?sigmas$|v_pred$|ztsnr$|model_ema\.(decay|num_updates)$|(first_stage_model\.)?loss\.)"
)
STABLE_DIFFUSION = ScheduleConfig(kind="scaled_linear", beta_start=0.00085, beta_end=0.012)
LATENT_DIFFUSION = ScheduleConfig(kind="scaled_linear", beta_start=0.0015, beta_end=0.0195)
# Heads of the published models, which their shapes do not determine, from the configs in CompVis'
# repositories. The key is width, channel_mult and width of the context.
PUBLISHED_HEADS: dict[tuple[int, tuple[int, ...], int | None], dict[str, int]] = {
    (256, (1, 2, 4), 512): {"head_dim": 32},  # cin-ldm-vq-f8
    (192, (1, 2, 3, 5), 512): {"num_heads": 1},  # cin256-v2
    (192, (1, 2, 3, 5), 640): {"head_dim": 32},  # text2img256
    (128, (1, 2, 3, 4), 512): {"head_dim": 32},  # layout2img-openimages256
    (256, (1, 2, 3, 4), None): {"num_heads": 8},  # inpainting_big
    (224, (1, 2, 3, 4), None): {"head_dim": 32},  # ffhq256, celebahq256, lsun_beds256
    (192, (1, 2, 2, 4, 4), None): {"num_heads": 8},  # lsun_churches256
    (160, (1, 2, 2, 4), None): {"head_dim": 32},  # bsr_sr
    (320, (1, 2, 4, 4), 1280): {"num_heads": 8},  # txt2img-1p4B
    (320, (1, 2, 4, 4), 768): {"num_heads": 8},  # Stable Diffusion 1
    (320, (1, 2, 4, 4), 1024): {"head_dim": 64},  # Stable Diffusion 2
    (320, (1, 2, 4), 2048): {"head_dim": 64},  # Stable Diffusion XL, and its refiner
    (384, (1, 2, 4, 4), 1280): {"head_dim": 64},
}
# Prediction types in a file's metadata (Stability AI's model metadata specification, and what
# trainers write).
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "eps": "eps",
    "v": "v",
    "v_prediction": "v",
    "sample": "x0",
}
STABLE_2_WIDTH = 1024
"""Width of Stable Diffusion 2's context."""
CONDITION_FIRST_STAGE = (
    "the first stage's latent of another image (inpainting: of the masked one, then the mask), in "
    "the last channels of x"
)
# What marks the conditioners of other published models, and how the message about them goes on.
UNSUPPORTED = {
    "cond_stage_model.channel_mapper.": "the rescaler of LDM's semantic synthesis, which reads a "
    "layout map; fastdiff does not support it",
    "low_scale_model.": "the noise of the x4-upscaler's small picture; load the folder in "
    "diffusers' layout (StableDiffusionUpscalePipeline) instead",
    "depth_model.": "the depth estimator of Stable Diffusion 2's depth model; load the folder in "
    "diffusers' layout (StableDiffusionDepth2ImgPipeline) instead",
}
SCALE_FACTORS = {"xl": 0.13025, "kl": 0.18215, "vq": 1.0}


@dataclass
class Reading:
    """A file, and the names of the tensors read from it so far."""

    weights: Weights
    loading: Loading
    read: set[str] = field(default_factory=set)

    def under(self, prefix: str) -> Weights:
        """The tensors under a prefix, which are marked as read."""
        self.read.update(key for key in self.weights.places if key.startswith(prefix))
        return self.weights.under(prefix)

    def assume(self, name: str, value: Any, choices: str | None = None) -> Any:
        return self.loading.assumed.take(name, value, choices)


def load_compvis(weights: Weights, loading: Loading) -> Model:
    """Load a whole file: U-Net, first stage and conditioners.

    Raises:
        ValueError: keys are unknown, missing or of the wrong shape; the message lists them.
    """
    for mark, words in UNSUPPORTED.items():
        if any(key.startswith(mark) for key in weights.places):
            raise ValueError(f"{weights.path} contains {words}")
    reading = Reading(weights, loading)
    unet_weights, averaged = _unet_weights(reading)
    first_stage = _without_loss(reading.under(FIRST_STAGE))
    condition = _condition_weights(reading)
    shared = _is_first_stage(_without_loss(condition), first_stage)
    if shared:
        condition = condition.renamed({})
    _leave_controlnet(reading)
    unknown = [k for k in weights.places if k not in reading.read and not _DERIVED.match(k)]
    if unknown:
        raise ValueError(
            f"{weights.path}: {len(unknown)} tensors belong to no model that fastdiff knows: "
            f"{some(sorted(unknown), 50)}"
        )
    is_table = list(condition.places) == ["embedding.weight"]
    config = unet_config(reading, unet_weights, is_table)
    xl = config.added_condition_dim is not None
    plan = plan_model(config, openai.names, unet_weights)
    vae_plan: Plan | None = None
    if first_stage.places:
        vae_config = ddpm.autoencoder_config(first_stage.shapes, loading.options)
        vae_plan = plan_model(vae_config, ddpm.names, first_stage)
    classes = _class_embedding(condition, loading) if is_table else None
    text_plans = _text_plans(reading, condition, xl) if classes is None else []
    # all assumptions are known before any weights are read, so `strict` fails early
    prediction, schedule = prediction_of(reading, config), _schedule(reading, config)
    unet: UNet = loading.fill(plan)
    autoencoder: Autoencoder | None = None if vae_plan is None else loading.fill(vae_plan)
    return Model(
        layout="compvis",
        denoiser=unet,
        autoencoder=autoencoder,
        text_encoders=_text_encoders(reading, text_plans, xl),
        class_embedding=classes,
        schedule=schedule,
        prediction=prediction,
        scale_factor=_scale_factor(reading, config, autoencoder),
        image_size=loading.options.image_size
        or reading.assume("image_size", _image_size(config, prediction)),
        image_channels=image_channels(unet, autoencoder),
        path=weights.path,
        provenance={
            "facts": weights.facts,
            **loading.assumed.provenance,
            "averaged weights": averaged,
            "linear projections": _linear_projections(unet_weights),
            **({"condition": CONDITION_FIRST_STAGE} if shared else {}),
        },
    )


def _leave_controlnet(reading: Reading) -> None:
    """Leave out the ControlNet beside a Stable Diffusion, which `controlnet` reads.

    Raises:
        ValueError: there is one, and `controlnet` does not name the file.
    """
    path, asked = reading.weights.path, reading.loading.options.controlnet
    if CONTROL_MARK not in reading.weights.places:
        return
    reading.under(CONTROL)
    if path.resolve() not in [each.resolve() for each in asked]:
        raise ValueError(
            f"{path} contains a ControlNet beside the model; load it with "
            f"controlnet={str(path)!r} (--controlnet {path})"
        )


def load_first_stage(weights: Weights, loading: Loading) -> Model:
    """Load a file that contains only an autoencoder."""
    reading = Reading(weights, loading)
    own = _without_loss(weights)
    config = ddpm.autoencoder_config(own.shapes, loading.options)
    autoencoder: Autoencoder = loading.fill(plan_model(config, ddpm.names, own))
    return Model(
        layout="compvis",
        autoencoder=autoencoder,
        scale_factor=_scale_factor(reading, None, autoencoder),
        image_size=loading.options.image_size,
        image_channels=autoencoder.config.image_channels,
        path=weights.path,
        provenance={"facts": weights.facts, **loading.assumed.provenance},
    )


def _unet_weights(reading: Reading) -> tuple[Weights, bool]:
    """The U-Net's tensors, and whether they are the averaged ones (if present and requested)."""
    places = reading.weights.places
    prefix = UNET if any(key.startswith(UNET) for key in places) else ""
    if not prefix:  # a U-Net alone, without a prefix
        reading.read.update(places)
        return reading.weights, False
    raw = reading.under(prefix)
    averaged = {key for key in places if key.startswith(EMA)}
    reading.read.update(averaged)
    if not averaged or not reading.loading.options.ema:
        return raw, False
    names = {key: EMA + key.replace(".", "") for key in raw.places}
    if missing := sorted(set(names.values()) - averaged):
        raise ValueError(
            f"{reading.weights.path}: averaged weights are missing: {some(missing, 50)}; "
            "set ema=False to use the others"
        )
    return reading.weights.renamed(names), True


def _without_loss(weights: Weights) -> Weights:
    return weights.renamed({k: k for k in weights.places if not _DERIVED.match(k)})


def _linear_projections(unet: Weights) -> bool:
    """Whether the transformers' projections are linear layers (Stable Diffusion 2, XL)."""
    return any(k.endswith(".proj_in.weight") and len(p.shape) == 2 for k, p in unet.places.items())


def unet_config(reading: Reading, unet: Weights, class_embedding: bool) -> UNetConfig:
    options = reading.loading.options
    plain = openai.unet_config(unet.shapes, options, num_heads=1, qkv_order="legacy")
    if options.num_heads is not None or options.head_dim is not None:
        return plain
    published = PUBLISHED_HEADS.get((plain.model_channels, plain.channel_mult, plain.context_dim))
    if published is not None:
        heads = published
    elif plain.context_dim is None:  # like most of LDM's unconditional models
        heads = {"head_dim": 32}
    elif _linear_projections(unet):
        heads = {"head_dim": 64}
    else:
        heads = {"num_heads": 1 if class_embedding else 8}
    choices = openai.head_choices(plain) if published is None else None
    reading.assume(*next(iter(heads.items())), choices)
    fixed: dict[str, Any] = {"num_heads": None, **heads, "qkv_order": "legacy"}
    return openai.unet_config(unet.shapes, options, **fixed)


def prediction_of(reading: Reading, config: UNetConfig) -> Prediction:
    """The prediction from the caller, else from the file (in one of three ways), else the noise."""
    if (asked := reading.loading.options.prediction) is not None:
        return asked
    # trainers mark Stable Diffusion XL files with v-prediction by an empty tensor of this name
    if "v_pred" in reading.weights.places:
        return "v"
    facts = reading.weights.facts
    said = PREDICTIONS.get(str(facts.get("modelspec.prediction_type", "")).lower())
    if said is None and str(facts.get("ss_v_parameterization", "")).lower() == "true":
        said = "v"
    # Stable Diffusion 2 was published with both predictions and the same architecture.
    both = "eps (512 pixels), v (768 pixels)" if config.context_dim == STABLE_2_WIDTH else None
    return said or reading.assume("prediction", "eps", both)


def _condition_weights(reading: Reading) -> Weights:
    """All tensors under the conditioner's names, whatever it is."""
    old, new = reading.under("cond_stage_model."), reading.under("conditioner.embedders.")
    return old if old.places else new


def _is_first_stage(condition: Weights, first_stage: Weights) -> bool:
    """Whether the conditioner is the first stage itself, saved under a second name.

    LDM's `__is_first_stage__` (inpainting_big): both names have the same bytes of the file.
    """
    return bool(condition.places) and condition.places == first_stage.places


def _text_plans(reading: Reading, weights: Weights, xl: bool) -> list[Plan]:
    """Plan the text encoders; those of XL are numbered 0 and 1."""
    loading = reading.loading
    if not weights.places or not loading.options.text_encoders:
        return []
    plans: list[Plan] = []
    parts = [weights.under(f"{i}.") for i in (0, 1)] if xl else [weights]
    if sum(len(part.places) for part in parts) != len(weights.places):
        raise ValueError(
            f"{weights.path}: expected text encoders as embedders 0 and 1, got "
            f"{some(sorted(weights.places))}; set text_encoders=False to load the rest"
        )
    for part in parts:
        if not part.places:
            continue
        clip = part.under("transformer.")
        if bert.MARK in clip.places:
            plans.append(bert.plan_compvis(clip, loading))
            continue
        own = clip if clip.places else part.under("model.")
        kept = [k for k in part.places if k != "logit_scale"]  # present in merged files
        if len(own.places) != len(kept):
            strays = [k for k in kept if not k.startswith(("transformer.", "model."))]
            raise ValueError(
                f"{weights.path}: the text encoder contains {some(sorted(strays), 50)}, which CLIP "
                "does not have; set text_encoders=False to load the rest"
            )
        if clip.places:
            plans.append(text_encoders.plan_clip(clip, loading))
        else:
            leave_out = 0 if xl else 1
            plans.append(
                text_encoders.plan_open_clip(own, loading, projection=xl, leave_out=leave_out)
            )
    return plans


def _text_encoders(reading: Reading, plans: list[Plan], xl: bool) -> tuple[AnyEncoder, ...]:
    folders = reading.loading.options.tokenizer
    if folders and len(folders) not in (1, len(plans)):
        raise ValueError(
            f"expected 1 tokenizer folder or {len(plans)}, one per text encoder, got {len(folders)}"
        )
    if plans and isinstance(plans[0].model, BERT):
        return (bert.encoder(plans[0], folders[0] if folders else None, reading.loading),)
    tokenizers = [text_encoders.read_tokenizer(folder) for folder in folders] or [None]
    if len(tokenizers) == 1:
        tokenizers *= len(plans)
    return tuple(
        text_encoders.conditioned(reading.loading.fill(plan), tokenizer, xl=xl)
        for plan, tokenizer in zip(plans, tokenizers, strict=True)
    )


def _class_embedding(weights: Weights, loading: Loading) -> nn.Embedding:
    table = weights.tensor("embedding.weight")
    if table.ndim != 2:
        raise ValueError(
            f"{weights.path}: the class embedding must have 2 dimensions, got shape "
            f"{tuple(table.shape)}"
        )
    table = table.to(loading.device, loading.dtype or table.dtype)
    return nn.Embedding.from_pretrained(table).eval()


def _schedule(reading: Reading, config: UNetConfig) -> ScheduleConfig:
    """The schedule of the file's betas if it contains any, else the published or given one."""
    loading, weights = reading.loading, reading.weights
    if "betas" in weights.places and loading.schedule is None:
        return loading.noise(schedule_of(weights.tensor("betas"), str(weights.path)))
    if "alphas_cumprod" in weights.places and loading.schedule is None:
        table = weights.tensor("alphas_cumprod")
        return loading.noise(_schedule_of_products(table, str(weights.path)))
    stable = config.context_dim is not None and config.model_channels >= 320
    schedule = STABLE_DIFFUSION if stable else LATENT_DIFFUSION
    if "ztsnr" in weights.places:  # another mark, which accompanies v_pred
        schedule = replace(schedule, zero_terminal_snr=True)
    if loading.says_noise:
        return loading.noise(schedule)
    return reading.assume("schedule", schedule)


def _schedule_of_products(products: torch.Tensor, file: str) -> ScheduleConfig:
    """Recognise the schedule of alphas_cumprod (T,), from which half precision loses the betas."""
    total = products.double().flatten()
    eps = torch.finfo(products.dtype).eps if products.is_floating_point() else 0.0
    for known in (STABLE_DIFFUSION, LATENT_DIFFUSION, ScheduleConfig()):
        ours = NoiseSchedule(known).alphas_cumprod
        if len(total) == len(ours) and bool(((ours - total).abs() <= eps * ours).all()):
            return known
    before = torch.cat([torch.ones(1, dtype=torch.float64), total[:-1]])
    return schedule_of(1 - total / before, file, tolerance=1e-2)


def schedule_of(betas: torch.Tensor, file: str, tolerance: float = 1e-4) -> ScheduleConfig:
    """Recognise the schedule of betas, within a relative tolerance or their dtype's precision.

    betas: (T,), any dtype.

    Raises:
        ValueError: fastdiff has no schedule with these betas.
    """
    if betas.is_floating_point():
        tolerance = max(tolerance, torch.finfo(betas.dtype).eps)
    betas = betas.double().flatten()
    kinds: list[ScheduleConfig] = []
    if len(betas) > 1 and bool(((betas > 0) & (betas <= 1)).all()):
        for digits in (2, 3, 4):  # prefer the roundest: half precision changes the third digit
            start, end = (float(f"{beta:.{digits}g}") for beta in (betas[0], betas[-1]))
            if 0 < start <= end < 1:
                ends: dict[str, Any] = {"beta_start": start, "beta_end": end}
                ends["num_timesteps"] = len(betas)
                kinds += [ScheduleConfig(kind=k, **ends) for k in ("scaled_linear", "linear")]
        kinds.append(ScheduleConfig(kind="cosine", num_timesteps=len(betas)))
    for schedule in kinds:
        ours = NoiseSchedule(schedule).betas
        if bool(((ours - betas).abs() <= tolerance * ours).all()):
            return schedule
    raise ValueError(
        f"{file}: its betas do not fit any schedule that fastdiff has; give schedule= "
        "(a ScheduleConfig)"
    )


def _scale_factor(
    reading: Reading, unet: UNetConfig | None, autoencoder: Autoencoder | None
) -> float:
    weights, asked = reading.weights, reading.loading.options.scale_factor
    if asked is not None:
        return asked
    if "scale_factor" in weights.places and weights.places["scale_factor"].numel == 1:
        return float(weights.tensor("scale_factor"))
    kind: str = "kl" if autoencoder is None else autoencoder.config.regularization
    if unet is not None and unet.added_condition_dim is not None:
        kind = "xl"
    return reading.assume("scale_factor", SCALE_FACTORS[kind])


def _image_size(config: UNetConfig, prediction: str) -> int:
    if config.added_condition_dim is not None:
        return 1024
    if config.context_dim is not None and config.model_channels >= 320:
        return 768 if prediction == "v" else 512
    return 256


FIRST_STAGE_ALONE = ("encoder.down.0.block.0.norm1.weight", "post_quant_conv.weight")


def _open(source: Source, loading: Loading) -> Model:
    assert isinstance(source, Weights)
    first_stage = all(mark in source.places for mark in FIRST_STAGE_ALONE)
    return (load_first_stage if first_stage else load_compvis)(source, loading)


LAYOUT = Layout(
    name="compvis",
    files=(
        (f"{UNET}input_blocks.0.0.weight",),
        FIRST_STAGE_ALONE,
        # a U-Net alone: OpenAI's layout with transformers inside
        (
            "input_blocks.0.0.weight",
            "output_blocks.0.0.in_layers.0.weight",
            "*.transformer_blocks.*",
        ),
    ),
    refused={
        "the weights of a ControlNet; load the model that it was trained for with "
        "controlnet= (--controlnet)": ("*input_hint_block.0.weight",)
    },
    open=_open,
)
