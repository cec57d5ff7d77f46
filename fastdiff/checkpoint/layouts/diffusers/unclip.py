"""diffusers' UnCLIPPipeline: karlo's prior, decoder and super-resolution, with CLIP's text encoder;
and UnCLIPImageVariationPipeline, which has CLIP's image encoder in place of the prior.

Ramesh et al. 2022 (arXiv 2204.06125). A prior makes an image embedding from a text, a projection
turns both into the conditions of the decoder, and two U-Nets, one of which takes only the last
step, enlarge its image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoint import image_encoders, text_encoders
from fastdiff.checkpoint.build import Place, Plan, plan_model, source_names
from fastdiff.checkpoint.layouts.diffusers.options import Options
from fastdiff.checkpoint.layouts.diffusers.parts import (
    Files,
    noise_of,
    plan_of,
    reading,
    scheduler_of,
)
from fastdiff.checkpoint.layouts.diffusers.read import CONFIG
from fastdiff.checkpoint.model import Model
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.scheduler import SchedulerConfig
from fastdiff.checkpoint.weights import Sources, Weights, read_json
from fastdiff.models.network import Network
from fastdiff.models.prior import Prior
from fastdiff.models.unclip import CLIPTextEncoder, ImageProjection, ImageProjectionConfig
from fastdiff.models.unet import UNet

PROJECTION = "UnCLIPTextProjModel"
PRIOR_GUIDANCE, DECODER_GUIDANCE = 4.0, 8.0
"""Guidance scales of diffusers' UnCLIPPipeline."""
NETWORKS = ("prior", "decoder", "super_res_first", "super_res_last")
UPSAMPLERS = NETWORKS[2:]
SCHEDULERS = {
    "prior": "prior_scheduler",
    "decoder": "decoder_scheduler",
    "super_res_first": "super_res_scheduler",
    "super_res_last": "super_res_scheduler",
}
"""Network -> the part that says how it is sampled."""
SHARED = {"decoder", "text_proj", "text_encoder", "tokenizer", "super_res_first", "super_res_last"}
SHARED |= {"decoder_scheduler", "super_res_scheduler"}
PIPELINES = {
    "UnCLIPPipeline": SHARED | {"prior", "prior_scheduler"},
    "UnCLIPImageVariationPipeline": SHARED | {"image_encoder", "feature_extractor"},
}
"""Class -> its parts."""
REFUSED = ("vae", "lora", "scale_factor", "image_size")
"""Options of loading that would have no effect."""


def names(model: nn.Module) -> Sources:
    """(our parameter -> diffusers') of the projection."""
    assert isinstance(model, ImageProjection)
    places: list[Place] = [
        ("text_added", model.text_added, "embedding_proj"),
        ("image_added", model.image_added, "clip_image_embeddings_project_to_time_embeddings"),
        ("image_tokens", model.image_tokens, "clip_extra_context_tokens_proj"),
        ("text_tokens", model.text_tokens, "encoder_hidden_states_proj"),
        ("norm", model.norm, "text_encoder_hidden_states_norm"),
    ]
    null = ("learned_classifier_free_guidance_embeddings",)
    return {"null_embed": null, **source_names(places, {})}


def config(data: Mapping[str, Any]) -> ImageProjectionConfig:
    """Our config for the `config.json` of an UnCLIPTextProjModel.

    Raises:
        ValueError: another class, or an option that our projection does not have.
    """
    options = Options(data)
    if options.class_name != PROJECTION:
        raise ValueError(
            f"_class_name must be {PROJECTION!r}, got {options.class_name!r:.60}; give the "
            "text_proj of the pipeline"
        )
    made = ImageProjectionConfig(
        embedding_dim=options.get("clip_embeddings_dim", 768),
        image_tokens=options.get("clip_extra_context_tokens", 4),
        context_dim=options.require("cross_attention_dim"),
        added_dim=options.require("time_embed_dim"),
    )
    options.finish()
    return made


def open_pipeline(folder: Path, name: str, parts: Mapping[str, str], loading: Loading) -> Model:
    """Open the folder of a pipeline in PIPELINES.

    parts: those of its model_index.json.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part is unknown, damaged, or does not fit the others.
    """
    needed = PIPELINES[name]
    if unlike := sorted(needed ^ parts.keys()):
        verb = "contains" if unlike[0] in parts else "lacks"
        raise ValueError(
            f"{folder}: {name} {verb} {unlike[0]}; fastdiff opens it with exactly "
            f"{', '.join(sorted(needed))}"
        )
    if given := [option for option in REFUSED if option in loading.given]:
        raise ValueError(f"{folder}: {', '.join(given)} cannot be given for {name}; leave them out")
    files = Files(loading.options.variant)
    networks = [part for part in NETWORKS if part in needed]
    data = {part: read_json(folder / part / CONFIG) for part in networks}
    schedulers = {part: scheduler_of(folder / SCHEDULERS[part]) for part in networks}
    plans = {
        part: plan_of(folder / part, options, files.find(folder / part))
        for part, options in data.items()
    }
    projection = _projection(folder / "text_proj", files.find(folder / "text_proj"))
    text = sight = None
    if loading.options.text_encoders:
        place = folder / "text_encoder"
        text = text_encoders.plan_folder(place, files.find(place), loading)
    if "image_encoder" in needed:
        place = folder / "image_encoder"
        sight = image_encoders.plan_folder(place, files.find(place), loading)
    files.finish(folder)
    _check(folder, plans, projection, text, sight)
    stages = {
        part: _stage(folder / part, plan, schedulers[part], loading) for part, plan in plans.items()
    }
    sizes = {part: _sample_size(folder / part, data[part]) for part in ("decoder", *UPSAMPLERS)}
    model = stages["decoder"]
    model.path, model.image_size = folder, sizes["super_res_first"]
    model.prior, model.guidance_scale = stages.get("prior"), DECODER_GUIDANCE
    if model.prior is not None:
        model.prior.guidance_scale = PRIOR_GUIDANCE
    model.upsamplers = stages["super_res_first"], stages["super_res_last"]
    for upsampler, part in zip(model.upsamplers, UPSAMPLERS, strict=True):
        upsampler.image_size = sizes[part]
    model.upsampling = _upsampling(folder, sizes)
    model.projection = loading.fill(projection)
    if text is not None:
        model.text_encoders = (_encoder(folder, text, loading),)
    if sight is not None:
        model.image_encoder = image_encoders.encoder(sight, folder / "feature_extractor", loading)
    model.provenance["pipeline"] = name
    if files.plain:
        model.provenance["without variant"] = files.plain
    return model


def _projection(folder: Path, weights: Weights) -> Plan:
    data = read_json(folder / CONFIG)
    return plan_model(reading(folder / CONFIG, lambda: config(data)), names, weights)


def _stage(folder: Path, plan: Plan, scheduler: SchedulerConfig, loading: Loading) -> Model:
    """A network with its schedule and sampler, as a model."""
    denoiser: Network = loading.fill(plan)
    model = Model(
        layout="diffusers",
        denoiser=denoiser,
        schedule=noise_of(folder, scheduler, loading),
        prediction=scheduler.prediction,
        sampler=scheduler.sampler,
        image_channels=3 if isinstance(denoiser, UNet) else None,
        path=folder,
    )
    if scheduler.no_sampler:
        if isinstance(denoiser, Prior):
            raise ValueError(f"{folder}: the prior cannot be sampled: {scheduler.no_sampler}")
        model.provenance["no_sampler"] = scheduler.no_sampler
    learned = scheduler.sampler is not None and scheduler.sampler.variance == "learned"
    if learned and not denoiser.config.learned_sigma:
        raise ValueError(
            f"{folder}: its scheduler has variance_type 'learned_range', but the network predicts "
            "no variance; set it to 'fixed_small_log'"
        )
    return model


def _encoder(folder: Path, plan: Plan, loading: Loading) -> CLIPTextEncoder:
    given = loading.options.tokenizer
    if len(given) > 1:
        raise ValueError(f"expected 1 tokenizer folder, got {len(given)}")
    tokenizer = text_encoders.read_tokenizer(given[0] if given else folder / "tokenizer")
    config: Any = plan.model.config
    text_encoders.check_vocabulary(tokenizer, config.vocab_size)
    return CLIPTextEncoder(model=loading.fill(plan), tokenizer=tokenizer)


def _sample_size(folder: Path, data: Mapping[str, Any]) -> int:
    size = data.get("sample_size")
    if type(size) is not int or size <= 0:
        raise ValueError(f"{folder / CONFIG}: sample_size must be positive, got {size!r:.40}")
    return size


def _upsampling(folder: Path, sizes: Mapping[str, int]) -> int:
    """The factor of super-resolution.

    Raises:
        ValueError: the two networks differ in it, or it is not a whole number.
    """
    small, first, last = (sizes[part] for part in ("decoder", *UPSAMPLERS))
    if first != last or first % small:
        raise ValueError(
            f"{folder}: the sample_size of super_res_first and super_res_last must be the same "
            f"multiple of the decoder's {small}, got {first} and {last}"
        )
    return first // small


def _check(
    folder: Path,
    plans: Mapping[str, Plan],
    projection: Plan,
    text: Plan | None,
    sight: Plan | None,
) -> None:
    """Raise ValueError unless the widths and channels of the parts fit each other."""
    prior = plans["prior"].model if "prior" in plans else None
    decoder = plans["decoder"].model
    upsamplers = [plans[part].model for part in UPSAMPLERS]
    shared: Any = projection.model.config
    kinds = isinstance(prior, Prior | None), *(isinstance(m, UNet) for m in (decoder, *upsamplers))
    if not all(kinds):
        raise ValueError(f"{folder}: expected a PriorTransformer and three U-Nets in {NETWORKS}")
    reads: Any = decoder.config
    widths = [
        ("the decoder's cross_attention_dim", reads.context_dim, shared.context_dim),
        ("the decoder's time embedding", reads.added_condition_dim, shared.added_dim),
    ]
    if isinstance(prior, Prior):
        widths.append(("the prior's embedding_dim", prior.config.in_channels, shared.embedding_dim))
    if sight is not None:
        seen: Any = sight.model.config
        widths.append(
            ("the image encoder's projection_dim", seen.projection_dim, shared.embedding_dim)
        )
    if text is not None:
        spoken: Any = text.model.config
        widths += [
            ("the text encoder's hidden_size", spoken.hidden_size, shared.embedding_dim),
            ("the text encoder's projection_dim", spoken.projection_dim, shared.embedding_dim),
        ]
        if isinstance(prior, Prior):
            tokens = prior.config.context_tokens
            widths.append(("the prior's num_embeddings", tokens, spoken.max_position_embeddings))
    for what, got, wanted in widths:
        if got != wanted:
            raise ValueError(
                f"{folder}: {what} must be {wanted} to fit the other parts, got {got}; use parts "
                "that were trained together"
            )
    for network in upsamplers:
        channels: Any = network.config
        if (channels.in_channels, channels.out_channels, channels.context_dim) != (6, 3, None):
            raise ValueError(
                f"{folder}: super-resolution must read 6 channels and predict 3, got "
                f"{channels.in_channels} and {channels.out_channels}"
            )
