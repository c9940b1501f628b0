"""Makes the bundled CLIP: `python -m fedclip_flwr.bundled.pretrain FOLDER` (about 35 minutes on two CPU cores).

A small `transformers.CLIPModel` is trained from scratch with CLIP's own contrastive loss on pictures with captions.
It sees 50 kinds of figures as photos, paintings and cartoons, drawn with a seed that no data set may have, and
**never a sketch**: that domain stays unseen, so that zero-shot has errors which an adapter can correct.
During training half of the patches of each picture are dropped at random (twice as fast); at the end none are.

Then the image tower is frozen, and a new text tower is trained to match it from natural captions: they always name
colour and place, and never say "a picture of". So a bare prompt is a little out of distribution, as it is for a CLIP
trained on the web, and the class features are not the best that the image features allow.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from fedclip_flwr.data.drawn import DOMAINS, FIGURES, SEEDS, SIZE, Scene, picture
from fedclip_flwr.data.drawn.canvas import COLOURS, Rng
from fedclip_flwr.data.drawn.scene import PLACES

SEED = SEEDS  # data sets have smaller ones
DECK = ("photo", "photo", "photo", "art", "cartoon")  # a picture's domain is drawn from these
WORDS = {"photo": "photo", "art": "painting", "cartoon": "cartoon"}
PICTURES = 120_000
BATCH, RATE, WARMING, COOLING, STEPS = 256, 1.5e-3, 200, 500, 4_000
TEXT_PICTURES, TEXT_STEPS, TEXT_RATE = 40_000, 400, 1e-3
GOAL = 2.75  # the loss at which it has learnt enough and cools down: good, but with something left to adapt
MEAN = STD = 0.5
EMBEDDING = 128

assert set(DECK) == DOMAINS.keys() - {"sketch"}, "the bundled CLIP must see all domains but sketches"
assert SEED >= SEEDS, "the bundled CLIP must not see a picture that a data set may hold"


def scene_of(index: int) -> tuple[np.ndarray, str, Scene]:
    """Picture number `index` of the corpus: its pixels, its domain, its scene."""
    r = Rng(f"{SEED}/corpus/{index}")
    domain = r.pick(DECK)
    image, scene = picture(SEED, domain, r.pick(tuple(FIGURES)), index)
    return np.asarray(image), domain, Scene(scene.figure, scene.colour, scene.size, scene.place, [], [], [])


def corpus(count: int) -> tuple[torch.Tensor, list[tuple[str, Scene]]]:
    """All pictures (uint8, N×3×64×64) with what captions may say of them."""
    pixels, facts = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8), []
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(scene_of, range(count), chunksize=500)
        for i, (image, domain, scene) in enumerate(tqdm(drawn, "drawing", count, unit=" pictures")):
            pixels[i] = torch.from_numpy(image.copy()).permute(2, 0, 1)
            facts.append((domain, scene))
    return pixels, facts


def caption(domain: str, scene: Scene, r: Rng) -> str:
    """One of the many ways to say it: "a photo of a small red house in front of hills"."""
    words = [scene.figure]
    if r.chance(0.5):
        words.insert(0, scene.colour)
    if scene.size and r.chance(0.5):
        words.insert(0, scene.size)
    text = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
    if r.chance(0.7):
        text = (
            f"a {r.pick(('picture', 'picture', WORDS[domain], 'photo' if domain == 'photo' else 'drawing'))} of {text}"
        )
    return f"{text} {scene.place}" if r.chance(0.4) else text


def full_caption(scene: Scene) -> str:
    """All there is to say, and no more: "a small red house in front of hills"."""
    words = " ".join(word for word in (scene.size, scene.colour, scene.figure) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {scene.place}"


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that make each word one piece: the commonest pair first, then the first by alphabet."""
    pieces, merges = [[*word[:-1], f"{word[-1]}</w>"] for word in words], []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1 : i] + word[i : i + 1]) == list(best):
                    word[i - 1 : i + 1] = ["".join(best)]
    return merges


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learnt from the words that captions are made of."""
    names = [*FIGURES, *COLOURS, *PLACES, *WORDS.values(), "a", "an", "small", "big", "picture", "drawing", "of"]
    merges = merges_of(sorted({word for name in names for word in name.split()}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=32)


def model(vocabulary: CLIPTokenizer) -> CLIPModel:
    """Two small transformers with random weights: four layers for pictures, two for captions."""
    ids = {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    text = {**tower, **ids, "pad_token_id": vocabulary.eos_token_id, "num_hidden_layers": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={**text, "vocab_size": len(vocabulary), "max_position_embeddings": 32},
            vision_config={**tower, "num_hidden_layers": 4, "image_size": SIZE, "patch_size": 8},
            projection_dim=EMBEDDING,
        )
    )


def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as the model takes them: the batch shifted a little, some pictures grey, each in another light."""
    n = len(batch)
    images = batch.float().div_(255)
    dx, dy = torch.randint(-5, 6, (2,), generator=generator).tolist()
    images = torch.roll(images, (dy, dx), (2, 3))
    grey = torch.rand(n, 1, 1, 1, generator=generator) < 0.2
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    gain = torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3, generator=generator)
    bias = torch.empty(n, 1, 1, 1).uniform_(-0.15, 0.15, generator=generator)
    return ((images - 0.5) * gain + 0.5 + bias).clamp_(0, 1).sub_(MEAN).div_(STD)


def train(
    clip: CLIPModel, vocabulary: CLIPTokenizer, pixels: torch.Tensor, facts: list[tuple[str, Scene]], steps: int
) -> None:
    """Both towers learn in place: the rate warms up, stays, and falls to nothing once GOAL is reached."""
    count = len(pixels)
    generator = torch.Generator().manual_seed(SEED)
    words = Rng(f"{SEED}/captions")
    groups = [
        {"params": [p for p in clip.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in clip.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    masked, cooling = True, 0

    def leave_out(_module: torch.nn.Module, _args: object, tokens: torch.Tensor) -> torch.Tensor:
        """Keeps the class token and a random half of the patches."""
        if not masked:
            return tokens
        n, patches = len(tokens), tokens.shape[1] - 1
        kept = torch.rand(n, patches, generator=generator).argsort(1)[:, : patches // 2] + 1
        return torch.cat([tokens[:, :1], tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))], 1)

    hook = clip.vision_model.embeddings.register_forward_hook(leave_out)
    clip.train()
    order = torch.randperm(count, generator=generator)
    at = 0
    mean = math.inf
    for step in (bar := tqdm(range(steps), "learning", unit=" steps")):
        if at + BATCH > count:
            order, at = torch.randperm(count, generator=generator), 0
        rows = order[at : at + BATCH]
        at += BATCH
        if cooling or mean < GOAL or step >= steps - COOLING:
            cooling += 1
        if cooling > COOLING:
            break
        left = 1 - cooling / (COOLING + 1)
        masked = left > 0.5
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMING) * left
        texts = [caption(domain, scene, words) for domain, scene in (facts[i] for i in rows.tolist())]
        tokens = vocabulary(texts, padding=True, return_tensors="pt")
        loss = clip(**tokens, pixel_values=augment(pixels[rows], generator), return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        clip.logit_scale.data.clamp_(max=math.log(100))
        mean = loss.item() if math.isinf(mean) else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}")
    hook.remove()


def train_texts(
    clip: CLIPModel, vocabulary: CLIPTokenizer, pixels: torch.Tensor, facts: list[tuple[str, Scene]], steps: int
) -> None:
    """A new text tower learns in place, from full captions, what the frozen image tower makes of the pictures."""
    fresh = model(vocabulary)
    clip.text_model, clip.text_projection = fresh.text_model, fresh.text_projection
    clip.config.text_config = fresh.config.text_config
    clip.eval()
    with torch.no_grad():
        batches = tqdm(torch.split(pixels, BATCH), "encoding", unit=" batches")
        images = torch.cat([clip.get_image_features((b.float() / 255 - MEAN) / STD).pooler_output for b in batches])
    images = images / images.norm(dim=1, keepdim=True)
    parameters = [*clip.text_model.parameters(), *clip.text_projection.parameters(), clip.logit_scale]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1, fused=True)
    for step in tqdm(range(steps), "learning captions", unit=" steps"):
        for group in optimizer.param_groups:
            group["lr"] = TEXT_RATE * min(1, (step + 1) / 100) * (1 - step / steps)
        rows = torch.randint(0, len(images), (BATCH,))
        captions = [full_caption(facts[i][1]) for i in rows.tolist()]
        texts = clip.get_text_features(**vocabulary(captions, padding=True, return_tensors="pt")).pooler_output
        logits = clip.logit_scale.exp() * images[rows] @ (texts / texts.norm(dim=1, keepdim=True)).T
        targets = torch.arange(BATCH)
        loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def save(clip: CLIPModel, vocabulary: CLIPTokenizer, folder: Path) -> None:
    """The folder as the hub would hold it; weights in float16, which is half the bytes."""
    vocabulary.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3
    ).save_pretrained(folder)
    half = CLIPModel(clip.config).half()
    half.load_state_dict(clip.state_dict())
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--texts-only", action="store_true", help="the folder holds the first half's model already")
    given = parser.parse_args()
    start = time.perf_counter()
    vocabulary = tokenizer()
    pixels, facts = corpus(min(given.pictures, TEXT_PICTURES) if given.texts_only else given.pictures)
    if not given.texts_only:
        torch.manual_seed(SEED)
        clip = model(vocabulary)
        train(clip, vocabulary, pixels, facts, given.steps)
        save(clip, vocabulary, given.folder)
    torch.manual_seed(SEED)
    clip = CLIPModel.from_pretrained(given.folder, dtype=torch.float32)
    train_texts(clip, vocabulary, pixels[:TEXT_PICTURES], facts[:TEXT_PICTURES], min(given.steps, TEXT_STEPS))
    save(clip, vocabulary, given.folder)
    print(
        f"{given.folder}: {sum(p.numel() for p in clip.parameters()):,} parameters, {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
