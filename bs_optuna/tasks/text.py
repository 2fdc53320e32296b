"""The English text of Python's own manual, for a small character-level transformer."""

from __future__ import annotations

from pydoc_data import topics

import torch
from torch import nn

from bs_optuna.training.task import TrainingTask


CONTEXT = 64  # characters that a prediction can look back on
WIDTH = 64
HEADS = 4
LAYERS = 2


def task() -> TrainingTask:
    """Sequences of 64 characters; 80 % to train on, 10 % to compare on, 10 % for the final test."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([index[character] for character in text])
    sequences = len(codes) // (CONTEXT + 1)
    chunks = codes[: sequences * (CONTEXT + 1)].view(sequences, CONTEXT + 1)
    # Mixed, because neighbouring topics are alike; always the same way, for a resumed study.
    chunks = chunks[torch.randperm(sequences, generator=torch.Generator().manual_seed(0))]
    train, valid, test = chunks.split(
        [sequences - 2 * (sequences // 10), sequences // 10, sequences // 10]
    )
    return TrainingTask(
        name="text",
        model=lambda: CharacterTransformer(len(alphabet)),
        train_data=(train[:, :-1], train[:, 1:]),
        valid_data=(valid[:, :-1], valid[:, 1:]),
        test_data=(test[:, :-1], test[:, 1:]),
        loss=next_character_loss,
    )


class CharacterTransformer(nn.Module):
    """A decoder of two layers; (N, T) character codes to (N, T, characters) logits, T <= 64.

    Args:
        characters: Size of the alphabet.
    """

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Logits of the next character at every position."""
        length = codes.shape[1]
        positions = torch.arange(length, device=codes.device)
        x = self.characters(codes) + self.positions(positions)
        mask: torch.Tensor = self.mask[:length, :length]  # type: ignore[index]
        logits: torch.Tensor = self.head(self.layers(x, mask=mask, is_causal=True))
        return logits


def next_character_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over all positions, in nats per character."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
