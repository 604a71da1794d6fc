"""The command ``lightning-optkit``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        arguments: words after the command's name; ``None`` takes those of the process.
    """
    from lightning_optkit import __version__

    parser = argparse.ArgumentParser(
        prog="lightning-optkit", description="See the loss surface of a Lightning run."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small net on real data and show its Hessian")
    demo.add_argument("--logdir", default="optkit_logs", help="where the logs go")
    demo.add_argument("--epochs", type=_positive, default=15, help="length of the training")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights and shuffling")
    options = parser.parse_args(arguments)
    return _demo(options)


def _demo(options: argparse.Namespace) -> int:
    try:
        from lightning_optkit.demo import run_demo

        return run_demo(options.logdir, epochs=options.epochs, seed=options.seed)
    except ModuleNotFoundError as error:
        print(error)
        return 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number
