"""Small models in the hub's own file formats, with random weights."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from fedclip_flwr.features import models

WORDS = ["a picture of a cat", "a photo of the dog", "sketch car boat bird house", "fish flower tree chair cup"]
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 1000,
}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}


def small_clip(folder: Path) -> Path:
    """As CLIPProcessor saves it: the image processor's settings are in processor_config.json."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(1)
    vision = {**VISION, "image_size": 32}
    tokenizer = AutoTokenizer.from_pretrained(models.BUNDLED)
    text = {**TEXT, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 20}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def small_siglip(folder: Path) -> Path:
    """As google/siglip-*: a sentencepiece model, a scale and a bias that matter."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel, SiglipTokenizer

    torch.manual_seed(2)
    config = SiglipConfig(
        text_config={**TEXT, "max_position_embeddings": 24, "projection_size": 16},
        vision_config={**VISION, "image_size": 32},
    )
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.5)
        model.logit_bias.fill_(-7.0)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    pieces(folder / "spiece.model")
    SiglipTokenizer(str(folder / "spiece.model"), model_max_length=24).save_pretrained(folder)
    return folder


def small_siglip2(folder: Path) -> Path:
    """As google/siglip2-*-naflex: images of any shape, as patches with a mask; no sentencepiece model."""
    from transformers import AutoTokenizer, Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    torch.manual_seed(3)
    AutoTokenizer.from_pretrained(models.BUNDLED, model_max_length=24).save_pretrained(folder)
    config = Siglip2Config(
        text_config={**TEXT, "max_position_embeddings": 24, "projection_size": 16},
        vision_config={**VISION, "num_patches": 16},
    )
    Siglip2Model(config).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(folder)
    return folder


def pieces(path: Path) -> None:
    """A sentencepiece model with a vocabulary of its own."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_writer=made,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
    )
    path.write_bytes(made.getvalue())
