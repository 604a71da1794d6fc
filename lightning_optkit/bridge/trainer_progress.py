"""A bar of the Trainer's own for something that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

__all__ = ["shown_progress"]


@contextmanager
def shown_progress(
    trainer: pl.Trainer, description: str, total: int
) -> Iterator[Callable[[int], None]]:
    """Show a bar for the block, if the Trainer has one that is enabled.

    Args:
        trainer: the Trainer.
        description: before the bar.
        total: how much there is to do.

    Yields:
        A function that is told how much is done.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        shown = bar.init_validation_tqdm()
        shown.set_description(description)
        shown.total = total

        def tell(done: int) -> None:
            shown.n = done
            shown.refresh()

        try:
            yield tell
        finally:
            shown.close()
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        progress = bar.progress
        task = progress.add_task(description, total=total)
        try:
            yield lambda done: progress.update(task, completed=done, refresh=True)
        finally:
            progress.update(task, visible=False)
    else:
        yield lambda done: None
