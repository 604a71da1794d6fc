"""The loss of a module as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["ModuleLoss", "tensors_replaced"]


class ModuleLoss:
    """The loss of a module as a function of ``{name: parameter}``, for a ``LossSurface``.

    What it returns can be differentiated as often as the module allows. The parameters stand in the
    module for the call, without a copy of the module; those that are left out keep their values.

    Args:
        module: the net. Its mode is the caller's to choose; buffers that it writes into, as
            BatchNorm does in train mode, stay written.
        loss: ``module -> loss``, a scalar.

    Raises:
        ValueError: when called with a name that the module does not have.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> loss = ModuleLoss(net, lambda net: (net(x) - y).square().mean())
        >>> float(loss({"weight": torch.tensor([[1.0, 2.0]])}))  # (1 + 4 - 3) squared
        4.0
    """

    def __init__(self, module: nn.Module, loss: Callable[[nn.Module], Any]) -> None:
        self._module = module
        self._loss = loss

    def __call__(self, params: Mapping[str, Tensor]) -> Any:
        """Return the loss at these parameters."""
        with tensors_replaced(self._module, params):
            return self._loss(self._module)

    @contextmanager
    def holding(self, params: Mapping[str, Tensor]) -> Iterator[Callable[[], Any]]:
        """Yield the loss at what these very tensors hold when it is called, for many points."""
        own = dict(self._module.named_parameters(remove_duplicate=False))
        for name in params.keys() & own.keys():  # which a loss may ask for
            params[name].requires_grad_(own[name].requires_grad)
        with tensors_replaced(self._module, params):
            yield partial(self._loss, self._module)


@contextmanager
def tensors_replaced(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers for the block.

    As ``torch.func.functional_call`` does, in a tenth of its time. What is shared under several
    names is replaced under all of them.

    Raises:
        ValueError: for a name that the module does not have.
    """
    own: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    own |= dict(module.named_buffers(remove_duplicate=False))
    if unknown := sorted(set(tensors) - set(own)):
        raise ValueError(
            f"`params` must have names of the module's parameters or buffers, got {unknown[:8]}. "
            f"The module's begin with: {', '.join(list(own)[:8])}."
        )
    substitutes = {id(own[name]): tensor for name, tensor in tensors.items()}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    for child in module.modules():
        places: dict[str, Any]
        for places in (child._parameters, child._buffers):
            for name, tensor in places.items():
                if id(tensor) in substitutes:
                    replaced.append((places, name, tensor))
    try:
        for places, name, tensor in replaced:
            places[name] = substitutes[id(tensor)]
        yield
    finally:
        for places, name, tensor in replaced:
            places[name] = tensor
