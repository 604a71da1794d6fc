"""The same questions to lightning_optkit and to its peers, one after another in one run.

Run with ``python -m tests.benchmarks.bench_peers``: about sixteen minutes of one thread.
``--quick`` leaves ResNet-20 out and leaves the page as it is; ``--only GPT`` measures one net and
writes its section. Peers that are not installed are left out, and the page says so. CPU seconds of
one thread, as in ``bench_products``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import questions
from tests.benchmarks.equal_error import top_in_float64
from tests.benchmarks.page import machine, markdown_table, write_section
from tests.benchmarks.peers import PEERS, Peer
from tests.benchmarks.problems import PROBLEMS, Problem
from tests.benchmarks.questions import Answer

SLOW = "ResNet-20"  # one round of the bundle, between two of ours, and no following


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers'
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="leave out ResNet-20, write nothing")
    parser.add_argument("--only", choices=PROBLEMS, help="measure this net alone")
    options = parser.parse_args()
    peers = [peer for peer in PEERS if peer.is_installed()]
    console = Console(width=120)
    console.print(roll(peers))
    for kind, make in PROBLEMS.items():
        if options.only not in (None, kind) or (options.quick and kind == SLOW):
            continue
        problem = make()
        shown = []
        for answer in answers(problem, peers):
            console.print(
                f"\n{problem.name}: {answer.title}", table(answer), *answer.lines, sep="\n"
            )
            shown.append(markdown(answer))
        if not options.quick:
            title = f"### {problem.name}: {problem.num_params:,} parameters\n\n{machine()}."
            write_section("bench_peers", heading(peers))
            write_section(f"bench_peers {kind}", "\n\n".join([title, *shown]))


def answers(problem: Problem, peers: list[type[Peer]]) -> Iterator[Answer]:
    """Yield the answer to each question, as soon as it is there."""
    is_slow = problem.kind == SLOW
    yield questions.product(problem, peers)
    yield questions.memory(problem, peers)
    truth = top_in_float64(problem, questions.TOP)
    answer, tops = questions.top(problem, peers, truth)
    yield answer
    yield questions.bundle(problem, peers, truth, tops, rounds=1 if is_slow else 2)
    if not is_slow:
        yield questions.following(problem)


def table(answer: Answer) -> Table:
    shown = Table(*answer.columns)
    for row in answer.rows:
        shown.add_row(*row)
    return shown


def markdown(answer: Answer) -> str:
    lines = "\n".join(f"- {line}" for line in answer.lines)
    table = markdown_table(answer.columns, answer.rows)
    return f"**{answer.title.capitalize()}**\n\n{table}\n\n{lines}"


def roll(peers: list[type[Peer]]) -> str:
    present = ", ".join(peer.version() for peer in peers) or "none"
    missing = ", ".join(peer.label for peer in PEERS if peer not in peers)
    return f"Peers: {present}." + (f" Not installed and left out: {missing}." if missing else "")


def heading(peers: list[type[Peer]]) -> str:
    return f"""\
## Beside the peers

{roll(peers)}

Each library answers the same questions about the same nets in the middle of their training, on the
same batches, in one process that runs them in turn, in CPU seconds of one thread. There are several
batches: PyHessian keeps the graph of a single one, and then its products cost what ours do.
Self-checks are off on both sides. Two runs differ by 2 %: a ratio that is as near to its target as
that is a draw.

- *One product*: in gradients over the same batches; error against forward over reverse mode.
  curvlinops is 0.3 % off on the GPT, all of it in the weights of LayerNorm: there torch 2.13's
  `jvp` of `jacrev`, which it rests on, is wrong.
- *Peak memory*: tensors of one product, set-up included. Lockstep of 4 multiplies four vectors at
  once and holds four products: no peer does, and it is over PyHessian's one by 1.6 to 2 times.
- *Top {questions.TOP}*: eigenvalues of largest magnitude; error of the worst against float64. Ours
  is asked for `rtol={questions.RTOL:.0e}`, as a user would, and stops by itself. Each peer has an
  advantage that no user has: the cheapest settings that reach this error, found by a search that
  knew the answer. A peer is cut off at {questions.PATIENCE} times our time: then its figures are
  lower bounds, marked >.
- *Density, top eigenvalues and trace*: ours reads them off one call with {questions.PROBES} probes
  of {questions.STEPS} steps; a peer makes three calls: the same density, the top
  {questions.TOP} of above, and a trace. The standard errors of the trace are equal: a peer gets
  as many products as bring its own down to ours, by the cheapest of its methods, computed from the
  spectrum on the assumption, in its favour, that a sketch finds the largest eigenvalues exactly.
  curvlinops is given the ends of its interval. Without the other two calls we are less far
  ahead: see the last line under each table.
  PyHessian's density calls `torch.eig`, which is gone: two lines stand in for it.
- *The largest eigenvalue, followed*: after each of {questions.TRAINING_STEPS} steps of SGD on fresh
  batches, warm-started, to {questions.FOLLOWING_RTOL:.0e}; every {questions.CHECKED_EVERY}th step
  is checked by ARPACK from a random start. It takes the fewer products the further the largest
  eigenvalue stands from the next: 13 % of its size on the MLP at the start, 3 % on the GPT."""


if __name__ == "__main__":
    main()
