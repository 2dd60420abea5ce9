"""Small models and a split op that the tests share."""

from __future__ import annotations

import torch
from torch import nn

import pcg_compile as pcg

calls: list[int] = []


@pcg.split_op("silly::attention", mutates_args=("out",))
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """out = q + k + v, and one more call counted."""
    calls.append(q.shape[0])
    out.copy_(q + k + v)


@pcg.split_op("silly::fresh")
def fresh(x: torch.Tensor) -> torch.Tensor:
    """A new tensor, at a new address, at each call."""
    calls.append(x.shape[0])
    return x * 2 + 1


def _two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], 2)


@pcg.split_op("silly::two", fake=_two)
def two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results of different widths."""
    calls.append(x.shape[0])
    return x + 1, x[:, :2] * 3


class ToyLlama(nn.Module):
    """A decoder with fused qkv, gated MLP and residuals, its attention the silly one."""

    def __init__(self, hidden: int = 128, mlp: int = 256, vocab: int = 128, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(ToyLayer(hidden, mlp) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class ToyLayer(nn.Module):
    """One layer of :class:`ToyLlama`."""

    def __init__(self, hidden: int, mlp: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate_up = nn.Linear(hidden, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        attended = torch.empty_like(q)
        torch.ops.silly.attention(q, k, v, attended)
        x = x + self.out(attended)
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
        return x + self.down(nn.functional.silu(gate) * up)


def word_tokenizer(words: list[str]):
    """A tokenizer of transformers, without files: the id of a word is its place, behind that of ``<end>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate(["<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
