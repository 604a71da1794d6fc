"""The three workloads that benchmarks share: a perceptron, ResNet-20 and a small GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Workload:
    """A net in eval mode, one batch and the cross-entropy between them."""

    name: str
    net: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def loss(self, params: dict[str, Tensor] | None = None) -> Tensor:
        """Return the loss at the net's own parameters, or at the given ones."""
        if params is None:
            return cross_entropy(self.net(self.inputs), self.targets)
        return cross_entropy(functional_call(self.net, params, (self.inputs,)), self.targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over samples, or over all positions of all sequences."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def mlp_workload() -> Workload:
    torch.manual_seed(0)
    net = perceptron()
    inputs, targets = torch.randn(512, 784), torch.randint(10, (512,))
    return Workload("MLP 784-512-512-10, batch 512", net.eval(), inputs, targets)


def resnet20_workload() -> Workload:
    torch.manual_seed(0)
    net = resnet20()
    inputs, targets = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    with torch.no_grad():
        net.train()(inputs)  # running statistics of this batch, so that eval mode is a sane net
    return Workload("ResNet-20, batch 128", net.eval(), inputs, targets)


def gpt_workload() -> Workload:
    torch.manual_seed(0)
    net = GPT(vocab=128, length=64, width=128, heads=4, layers=2)
    tokens = torch.randint(128, (16, 65))
    return Workload("GPT 2×128, 64 tokens, batch 16", net.eval(), tokens[:, :-1], tokens[:, 1:])


WORKLOADS: list[Callable[[], Workload]] = [mlp_workload, resnet20_workload, gpt_workload]


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def resnet20(num_classes: int = 10) -> nn.Module:
    """Return ResNet-20 for 32×32 images (He et al. 2016, section 4.2): 0.27 M parameters."""
    blocks = []
    for channels_in, channels_out, stride in [(16, 16, 1), (16, 32, 2), (32, 64, 2)]:
        blocks.append(Block(channels_in, channels_out, stride))
        blocks += [Block(channels_out, channels_out, 1) for _ in range(2)]
    return nn.Sequential(
        convolution(3, 16, 1),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


def convolution(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out, momentum=None),  # one training pass sets the statistics
    )


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels_in, channels_out, stride),
            nn.ReLU(),
            convolution(channels_out, channels_out, 1),
        )
        self.stride = stride
        self.new_channels = channels_out - channels_in

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new_channels:
            shortcut = x[:, :, :: self.stride, :: self.stride]
            shortcut = functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(self.body(x) + shortcut)


class GPT(nn.Module):
    """A causal transformer of pre-norm blocks on token numbers of shape ``(batch, length)``."""

    def __init__(self, *, vocab: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(tokens) + self.position))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attention(self.norm(x)))
        return x + self.mlp(x)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.MATH):  # the only kernel with a second derivative
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(-2)
