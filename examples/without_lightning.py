"""Curvature without a Trainer: where gradient descent ends, by the size of its step.

    python examples/without_lightning.py

Gradient descent with a step of size η cannot stay where the sharpness λmax exceeds 2/η. So the
larger step ends where the loss surface is flatter, and λmax comes to rest near that limit.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from lightning_optkit.measures import HessianOperator, hessian_spectrum


def train(step_size: float, num_steps: int = 3000) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Fit a wave with full-batch gradient descent."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
    inputs = torch.linspace(-2, 2, 40)[:, None]
    targets = torch.sin(3 * inputs)
    optimizer = torch.optim.SGD(net.parameters(), lr=step_size)
    for _ in range(num_steps):
        optimizer.zero_grad()
        mse_loss(net(inputs), targets).backward()
        optimizer.step()
    return net, inputs, targets


def main() -> None:
    print(f"{'step size':>10} {'2 / step':>9} {'loss':>9} {'λmax':>7}   minimum ratio")
    for step_size in (0.05, 0.1, 0.2):
        net, inputs, targets = train(step_size)
        operator = HessianOperator(
            lambda p, net=net, x=inputs, y=targets: mse_loss(functional_call(net, p, (x,)), y),
            dict(net.named_parameters()),
        )
        spectrum = hessian_spectrum(operator)
        print(
            f"{step_size:>10} {2 / step_size:>9.1f} {float(operator.loss()):>9.2g} "
            f"{spectrum.lambda_max:>7.2f}   {spectrum.positive}"
        )


if __name__ == "__main__":
    main()
