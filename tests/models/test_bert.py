"""txt2img's text transformer against diffusers' LDMBertModel, from both layouts, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.checkpoint import bert as layout
from fastdiff.checkpoint.build import check_names
from fastdiff.models.bert import BERT, BERTConfig
from tests.checkpoint.pipelines import VAE_KL
from tests.models.test_against_diffusers import SD, assert_equal, peer_model
from tests.support.peers import import_diffusers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "."]
BERT_OPTIONS: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 9,
    "encoder_layers": 2,
    "encoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "head_dim": 64,
    "d_model": 24,
}
PUBLISHED = BERTConfig(
    vocabulary=30522, tokens=77, width=1280, depth=32, num_heads=8, head_dim=64, hidden=5120
)


def vocabulary(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def peer_bert(dtype: torch.dtype = torch.float32) -> Any:
    import_diffusers("LDMTextToImagePipeline")
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

    torch.manual_seed(0)
    model = LDMBertModel(LDMBertConfig(**BERT_OPTIONS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def compvis_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' tensors under the names of x-transformers, written out."""
    renamed = {
        "model.embed_tokens.weight": "token_emb.weight",
        "model.embed_positions.weight": "pos_emb.emb.weight",
        "model.layer_norm.weight": "norm.weight",
        "model.layer_norm.bias": "norm.bias",
        "to_logits.weight": "to_logits.weight",
        "to_logits.bias": "to_logits.bias",
    }
    parts = {
        "self_attn_layer_norm": (0, "0"),
        "self_attn.q_proj": (0, "1.to_q"),
        "self_attn.k_proj": (0, "1.to_k"),
        "self_attn.v_proj": (0, "1.to_v"),
        "self_attn.out_proj": (0, "1.to_out"),
        "final_layer_norm": (1, "0"),
        "fc1": (1, "1.net.0.0"),
        "fc2": (1, "1.net.2"),
    }
    for key in state:
        if key.startswith("model.layers."):
            _, _, index, rest = key.split(".", 3)
            stem, _, leaf = rest.rpartition(".")
            half, name = parts[stem]
            renamed[key] = f"attn_layers.layers.{2 * int(index) + half}.{name}.{leaf}"
    return {renamed[key]: value for key, value in state.items()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LDMTextToImagePipeline as diffusers saves it."""
    diffusers = import_diffusers("LDMTextToImagePipeline")
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("ldm")
    unet = peer_model("UNet2DConditionModel", SD | {"in_channels": 4}, torch.float32)
    made = diffusers.LDMTextToImagePipeline(
        vqvae=peer_model("AutoencoderKL", VAE_KL, torch.float32),
        bert=peer_bert(),
        tokenizer=BertTokenizer.from_pretrained(str(vocabulary(folder / "words"))),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
    )
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def model(pipeline: Path) -> Any:
    return fastdiff.load(pipeline)


def test_the_published_transformer_has_exactly_its_tensors() -> None:
    """581,994,042 in the file, of which the prediction of tokens is not read."""
    with torch.device("meta"):
        ours = BERT(PUBLISHED)
    logits = 1280 * 30522 + 30522
    assert sum(p.numel() for p in ours.parameters()) + logits == 581_994_042
    shapes = {
        name: shape
        for theirs, shape in _published_shapes().items()
        for name in [theirs]
        if not name.startswith("to_logits")
    }
    check_names(ours, layout.compvis_names(ours), shapes)
    total = sum(torch.Size(shape).numel() for shape in _published_shapes().values())
    assert total == 581_994_042


def _published_shapes() -> dict[str, tuple[int, ...]]:
    """Of the published file, from the structure of x-transformers' encoder."""
    width, inner, hidden = 1280, 512, 5120
    found: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (30522, width),
        "pos_emb.emb.weight": (77, width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "to_logits.weight": (30522, width),
        "to_logits.bias": (30522,),
    }
    for index in range(64):
        layer = f"attn_layers.layers.{index}"
        found |= {f"{layer}.0.weight": (width,), f"{layer}.0.bias": (width,)}
        if index % 2:
            found |= {
                f"{layer}.1.net.0.0.weight": (hidden, width),
                f"{layer}.1.net.0.0.bias": (hidden,),
                f"{layer}.1.net.2.weight": (width, hidden),
                f"{layer}.1.net.2.bias": (width,),
            }
        else:
            found |= {f"{layer}.1.to_{part}.weight": (inner, width) for part in "qkv"}
            found |= {f"{layer}.1.to_out.weight": (width, inner)}
            found |= {f"{layer}.1.to_out.bias": (width,)}
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@torch.no_grad()
def test_equal_to_diffusers(dtype: torch.dtype, pipeline: Path) -> None:
    theirs = peer_bert(dtype)
    ours: Any = fastdiff.load(pipeline, dtype=dtype).text_encoders[0]
    ids = torch.tensor([[2, 5, 6, 7, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0, 0, 0, 0]])
    assert_equal(ours.model(ids), theirs(ids).last_hidden_state)
    assert_equal(ours.encode("a red CAT").tokens, theirs(ids[:1]).last_hidden_state)
    assert_equal(ours.encode("").tokens, theirs(ids[1:]).last_hidden_state)


@torch.no_grad()
def test_a_file_of_compvis_holds_the_same(pipeline: Path, model: Any, tmp_path: Path) -> None:
    """The U-Net, first stage and transformer under CompVis' names make the same images."""
    from fastdiff.checkpoint.layouts import ddpm, openai

    parts = (
        ("model.diffusion_model.", model.denoiser, openai.names(model.denoiser)),
        ("first_stage_model.", model.autoencoder, ddpm.names(model.autoencoder)),
    )
    state: dict[str, Tensor] = {}
    for prefix, module, sources in parts:
        ours = module.state_dict()
        for name, keys in sources.items():
            pieces = ours[name].chunk(len(keys))
            state |= {prefix + key: piece.clone() for key, piece in zip(keys, pieces, strict=True)}
    written = compvis_state(peer_bert().state_dict())
    state |= {f"cond_stage_model.transformer.{key}": value for key, value in written.items()}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    words = vocabulary(tmp_path / "words")
    other = fastdiff.load(
        tmp_path / "model.ckpt",
        tokenizer=words,
        num_heads=4,
        scale_factor=model.scale_factor,
        image_size=model.image_size,
        schedule=model.schedule,
    )
    options: dict[str, Any] = {"seeds": 1, "steps": 2, "sampler": "ddim"}
    one = model.generate("a red cat", **options).tensor
    two = other.generate("a red cat", **options).tensor
    assert torch.equal(one, two)


UNKNOWN = "ignore:.*are not in the vocabulary"


def test_words_that_are_not_in_the_vocabulary_are_counted(model: Any) -> None:
    """Without a warning an emoji would be the same picture as any other one."""
    encoder = model.text_encoders[0]
    with pytest.warns(UserWarning, match="^2 of the 5 tokens of the prompt 'red .*cats' are not"):
        apple = encoder.encode("red 🍎 قطة \x07 cats").tokens
    with pytest.warns(UserWarning, match="^2 of the 5 tokens"):
        assert torch.equal(encoder.encode("red 🍏 שלום cats").tokens, apple)
    encoder.encode("")
    encoder.encode("a red CAT\0")  # no warning: BERT drops control characters


@pytest.mark.filterwarnings(UNKNOWN)
def test_bytes_do_not_depend_on_the_batch(model: Any) -> None:
    prompts = ["a cat", "", "red 🍎 قطة \x07 cats"]
    together = model.generate(prompts, seeds=[3, 4, 5], steps=2).tensor
    for index, prompt in enumerate(prompts):
        alone = model.generate(prompt, seeds=3 + index, steps=2).tensor
        assert torch.equal(alone[0], together[index])
    assert not torch.equal(together[0], model.generate("red", seeds=3, steps=2).tensor[0])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("cat " * 10_000, {}, "at most 9 tokens, got 10,002; shorten it"),
        ("(cat:1.2)", {}, "no weights and no BREAK"),
        ("cat", {"clip_skip": 1}, "clip_skip must be 0 for this text encoder"),
    ],
)
def test_what_it_cannot_read_is_refused(
    model: Any, prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, seeds=0, steps=1, **options)
