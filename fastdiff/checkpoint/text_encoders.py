"""CLIP text encoders, from diffusers folders and from single files.

The network is transformers' own; only its config and its weights are read here. OpenCLIP's names
are converted to CLIP's: its packed in_proj is split into three, its text_projection is transposed.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastdiff.checkpoint.build import Plan, check_names
from fastdiff.checkpoint.open import Loading
from fastdiff.checkpoint.weights import Place, Sources, Weights, read_json
from fastdiff.extras import import_extra
from fastdiff.models.text import TextEncoder

HEAD_DIM = 64  # of every published CLIP
_BLOCK = {  # OpenCLIP's name inside a block -> CLIP's
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The fields that are read from a config.json. Others are not passed to transformers, because
# "attn_implementation" may name a repository of kernels, which it would download and run.
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps"),
    *_TOKEN_IDS,
)
_NO_WEIGHTS = ("logit_scale", "position_ids", "attn_mask")


def plan_folder(folder: Path, weights: Weights, loading: Loading) -> Plan:
    """Plan a text_encoder folder of a diffusers pipeline, with its config.json and weights.

    Raises:
        ValueError: the architecture is another one, or the weights do not fit.
        ImportError: transformers is not installed.
    """
    path = folder / "config.json"
    data = read_json(path)
    kinds = data.get("architectures")
    known = (["CLIPTextModel"], ["CLIPTextModelWithProjection"])
    if kinds not in known:
        raise ValueError(
            f"{path}: architectures must be CLIPTextModel or CLIPTextModelWithProjection, got "
            f"{kinds!r:.60}; set text_encoders=False to load the rest"
        )
    for name in _TOKEN_IDS:
        number = data.get(name)
        if number is not None and not (type(number) is int and 0 <= number < 2**31):
            raise ValueError(
                f"{path}: {name} must be a token id of 0 or more, got {number!r:.20}; "
                "set text_encoders=False to load the rest"
            )
    return _clip(data, kinds == known[1], weights, loading)


def plan_clip(weights: Weights, loading: Loading) -> Plan:
    """Plan CLIP's text model inside a single file, with transformers' own names."""
    weights = plain_names(weights)
    # files of merged models also contain the projection, which Stable Diffusion never runs
    names = {key: key for key in weights.places if key != "text_projection.weight"}
    weights = weights.renamed(names)
    return _clip(_config(weights, "quick_gelu"), False, weights, loading)


def plan_open_clip(
    weights: Weights, loading: Loading, *, projection: bool, leave_out: int = 0
) -> Plan:
    """Plan OpenCLIP's text model inside a single file.

    leave_out: layers at the end that are never run (Stable Diffusion 2 uses the last but one).
    """
    as_clip = open_clip_as_clip(weights, projection=projection)
    layers = _layers(as_clip)
    for index in range(layers - leave_out, layers):
        prefix = f"encoder.layers.{index}."
        as_clip = replace(
            as_clip,
            places={k: v for k, v in as_clip.places.items() if not k.startswith(prefix)},
        )
    return _clip(_config(as_clip, "gelu"), projection, as_clip, loading)


def open_clip_as_clip(weights: Weights, *, projection: bool) -> Weights:
    """OpenCLIP's tensors under CLIP's names: only names and places change, not the bytes."""
    places: dict[str, Place] = {}
    for key, place in weights.places.items():
        if key in _NO_WEIGHTS or (key == "text_projection" and not projection):
            continue
        if key == "text_projection" and len(place.shape) == 2:
            rows, columns = place.shape
            places["text_projection.weight"] = replace(
                place, shape=(columns, rows), stride=(1, columns)
            )
        elif ".attn.in_proj_" in key and place.shape and place.shape[0] % 3 == 0:
            block, leaf = key.split(".attn.in_proj_")
            shape = (place.shape[0] // 3, *place.shape[1:])
            for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                part = replace(place, shape=shape)
                offset = place.offset + index * part.numel * place.dtype.itemsize
                places[f"{_block(block)}.self_attn.{name}.{leaf}"] = replace(part, offset=offset)
        else:
            places[_clip_name(key)] = place
    return Weights(weights.path, places, weights.facts, weights.checked)


def _clip_name(key: str) -> str:
    for ours, theirs in _BLOCK.items():
        block, found, leaf = key.partition(f".{ours}.")
        if found:
            return f"{_block(block)}.{theirs}.{leaf}"
    return (
        key.replace("token_embedding.", "embeddings.token_embedding.")
        .replace("ln_final.", "final_layer_norm.")
        .replace("positional_embedding", "embeddings.position_embedding.weight")
    )


def _block(block: str) -> str:
    return block.replace("transformer.resblocks.", "encoder.layers.")


TokenizerKind = Literal["CLIPTokenizer", "GPT2Tokenizer", "BertTokenizer"]
_MARKS: dict[TokenizerKind, tuple[str, ...]] = {
    "CLIPTokenizer": _TOKEN_IDS,
    "BertTokenizer": ("pad_token_id",),
}
"""The ids of marks that a kind of tokenizer must have."""
_VOCABULARIES: dict[TokenizerKind, str] = {
    "CLIPTokenizer": "vocab.json and merges.txt",
    "GPT2Tokenizer": "vocab.json and merges.txt",
    "BertTokenizer": "vocab.txt",
}


def read_tokenizer(folder: str | os.PathLike[str], kind: TokenizerKind = "CLIPTokenizer") -> Any:
    """Load one of transformers' tokenizers from a local folder.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the tokenizer is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; give the folder of a tokenizer")
    transformers = import_extra("transformers", extra="diffusers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(transformers, kind)
            tokenizer = made.from_pretrained(str(folder), local_files_only=True)
        _try_tokenizer(tokenizer, _MARKS.get(kind, ()))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: cannot read a {kind.removesuffix('Tokenizer')} tokenizer ({reason:.200}); "
            f"give a folder with {_VOCABULARIES[kind]}"
        ) from error
    return tokenizer


def _try_tokenizer(tokenizer: Any, marks: tuple[str, ...]) -> None:
    """Use the tokenizer once, because transformers checks some of its options only then."""
    ids = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    for name in marks:
        ids.append(getattr(tokenizer, name))
    if not all(type(number) is int and number >= 0 for number in ids):
        raise ValueError(f"expected ids of 'a', of begin, end and padding, got {ids}")


def _bare(name: str) -> str:
    return name.removeprefix("text_model.").removeprefix("vision_model.")


def plain_names(weights: Weights) -> Weights:
    """Remove the prefix that some versions of transformers add to the names."""
    names = {_bare(key): key for key in weights.places}
    return weights.renamed({k: v for k, v in names.items() if k.split(".")[-1] not in _NO_WEIGHTS})


def _layers(weights: Weights) -> int:
    found = {k.split(".")[2] for k in weights.places if k.startswith("encoder.layers.")}
    return len(found)


def _config(weights: Weights, activation: str) -> dict[str, Any]:
    shapes = weights.shapes
    try:
        vocabulary, width = shapes["embeddings.token_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"][0]
        inner = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{weights.path}: expected a CLIP text encoder, got {', '.join(list(shapes)[:3])}; "
            "set text_encoders=False to load the rest"
        ) from error
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _layers(weights),
        "num_attention_heads": max(1, width // HEAD_DIM),
        "max_position_embeddings": positions,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "hidden_act": activation,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _clip(data: dict[str, Any], projection: bool, weights: Weights, loading: Loading) -> Plan:
    weights = plain_names(weights)
    layers = data.get("num_hidden_layers")
    if not isinstance(layers, int) or layers > len(weights.places):
        raise ValueError(
            f"{weights.path}: the config has {layers!r:.20} layers, but the file only "
            f"{len(weights.places)} tensors; use the weights that belong to this config"
        )
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    fields = {k: data[k] for k in _FIELDS if k in data}
    return plan_transformer(kind, "CLIPTextConfig", fields, weights, loading)


def plan_transformer(
    kind: str, config: str, fields: dict[str, Any], weights: Weights, loading: Loading
) -> Plan:
    """Plan one of transformers' CLIP models, in whose file no name has the prefix of its half.

    kind, config: names of its class and of that of its config. fields: of the config.

    Raises:
        ValueError: the config describes none, or the weights do not fit.
        ImportError: transformers is not installed.
    """
    transformers = import_extra("transformers", extra="diffusers")
    try:
        made = getattr(transformers, config)(**fields)
        with torch.device("meta"):
            model: Any = getattr(transformers, kind)(made)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{weights.path}: cannot build the {kind} from its config ({reason:.200})"
        ) from error
    sources: Sources = {name: (_bare(name),) for name in model.state_dict()}
    check_names(model, sources, weights.shapes, str(weights.path))
    for module in model.modules():
        if isinstance(ids := getattr(module, "position_ids", None), torch.Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=loading.device).expand(1, -1)
    return Plan(model, sources, weights)


def check_vocabulary(tokenizer: Any, vocabulary: int) -> None:
    """Raise ValueError unless the encoder knows all ids of a tokenizer."""
    highest = max([*tokenizer.get_vocab().values(), tokenizer.pad_token_id or 0])
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer has token ids up to {highest}, but the text encoder only has "
            f"{vocabulary} tokens; use the tokenizer that belongs to it"
        )


def conditioned(model: nn.Module, tokenizer: Any, *, xl: bool) -> TextEncoder:
    """Select the outputs of an encoder that the U-Net was trained on.

    Raises:
        ValueError: the tokenizer has tokens that the encoder does not know.
    """
    if tokenizer is not None:
        config: Any = model.config
        check_vocabulary(tokenizer, config.vocab_size)
    pooled = type(model).__name__ == "CLIPTextModelWithProjection"
    return TextEncoder(
        model=model, tokenizer=tokenizer, skip=int(xl), final_norm=not xl, pooled=xl and pooled
    )
