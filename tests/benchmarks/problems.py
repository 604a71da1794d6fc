"""Three nets in the middle of their training, with several batches of data that can be learnt.

The Hessian of an untrained net on noise has no eigenvalue that stands out; what people measure has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from lightning_optkit.measures.operators import HessianOperator, LossFn
from tests.benchmarks.nets import GPT, cross_entropy, perceptron, resnet20

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """A net in eval mode and the batches, all of one size, over which its loss is the mean."""

    name: str
    net: nn.Module
    batches: list[Batch]
    more_batches: Callable[[], Iterator[Batch]]  # an endless stream of fresh ones, to train on
    lr: float

    @property
    def kind(self) -> str:
        """The name of the net alone."""
        return self.name.split()[0].rstrip(",")

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.net.named_parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def losses(self) -> list[LossFn]:
        return [partial(self._loss, batch) for batch in self.batches]

    def _loss(self, batch: Batch, params: dict[str, Tensor]) -> Tensor:
        inputs, targets = batch
        return cross_entropy(functional_call(self.net, params, (inputs,)), targets)

    def gradient(self) -> list[tuple[Tensor, ...]]:
        """Return the gradient of each batch: the unit of cost, once over all batches."""
        params = tuple(self.net.parameters())
        return [
            torch.autograd.grad(cross_entropy(self.net(inputs), targets), params)
            for inputs, targets in self.batches
        ]

    def operator(self, **options: str) -> HessianOperator:
        return HessianOperator(self.losses, self.params, self_check=False, **options)

    def in_float64(self) -> Problem:
        """Return a copy at the same parameters and data, without float32's rounding."""
        batches = [
            (inputs.double() if inputs.is_floating_point() else inputs, targets)
            for inputs, targets in self.batches
        ]
        net = copy.deepcopy(self.net).double()
        return Problem(self.name, net, batches, self.more_batches, self.lr)

    def steps(self) -> Iterator[None]:
        """Train the net by one step of SGD each time, without end."""
        params = tuple(self.net.parameters())
        for inputs, targets in self.more_batches():
            gradients = torch.autograd.grad(cross_entropy(self.net(inputs), targets), params)
            with torch.no_grad():
                for p, g in zip(params, gradients, strict=True):
                    p.sub_(g, alpha=self.lr)
            yield


def mlp_problem() -> Problem:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), perceptron())
    stream = partial(images, 1, 28, batch_size=512)
    return trained(
        Problem("MLP 784-512-512-10, 2 batches of 512", net, taken(stream, 2), stream, lr=0.05), 30
    )


def resnet20_problem() -> Problem:
    torch.manual_seed(0)
    net = resnet20()
    stream = partial(images, 3, 32, grain=0.5)
    problem = Problem(
        "ResNet-20, 8 batches of 4",
        net,
        taken(partial(stream, batch_size=4), 8),
        partial(stream, batch_size=64),
        lr=0.05,
    )
    return trained(problem, 30)


def gpt_problem() -> Problem:
    torch.manual_seed(0)
    net = GPT(vocab=128, length=64, width=128, heads=4, layers=2)
    stream = partial(sentences, batch_size=8)
    return trained(
        Problem("GPT 2×128, 64 tokens, 2 batches of 8", net, taken(stream, 2), stream, lr=0.5), 30
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "MLP": mlp_problem,
    "ResNet-20": resnet20_problem,
    "GPT": gpt_problem,
}


def trained(problem: Problem, num_steps: int) -> Problem:
    """Return the problem after some steps, in eval mode with statistics of these weights."""
    problem.net.train()
    for _ in zip(range(num_steps), problem.steps(), strict=False):
        pass
    for module in problem.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    with torch.no_grad():
        for _, (inputs, _) in zip(range(8), problem.more_batches(), strict=False):
            problem.net(inputs)
    problem.net.eval()
    return problem


def taken(stream: Callable[[], Iterator[Batch]], count: int) -> list[Batch]:
    return [batch for _, batch in zip(range(count), stream(seed=1), strict=False)]


def images(
    channels: int, size: int, *, batch_size: int, grain: float = 0.0, seed: int = 2
) -> Iterator[Batch]:
    """Yield smooth noisy pictures of ten classes, each around a mean picture of its own.

    Without a grain of white noise, filters that see edges alone have almost no variance, and
    BatchNorm blows rounding up with them: eigenvalues in float32 are 1e-4 off.
    """
    means = smooth_noise(10, channels, size, torch.Generator().manual_seed(0))
    means *= (0.8 ** torch.arange(10.0))[:, None, None, None]  # some are easier than others
    generator, grains = (torch.Generator().manual_seed(seed + i) for i in (0, 100))
    while True:
        targets = torch.randint(10, (batch_size,), generator=generator)
        smooth = means[targets] + smooth_noise(batch_size, channels, size, generator)
        yield smooth + grain * torch.randn(smooth.shape, generator=grains), targets


def smooth_noise(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(count, channels, size // 4, size // 4, generator=generator)
    return functional.interpolate(coarse, size=size, mode="bilinear")


def sentences(*, batch_size: int, seed: int = 2) -> Iterator[Batch]:
    """Yield sequences in which each of 128 tokens has four likely successors."""
    successors = torch.randint(128, (128, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = [torch.randint(128, (batch_size,), generator=generator)]
        for _ in range(64):
            choice = torch.randint(4, (batch_size,), generator=generator)
            tokens.append(successors[tokens[-1], choice])
        text = torch.stack(tokens, dim=1)
        yield text[:, :-1], text[:, 1:]
