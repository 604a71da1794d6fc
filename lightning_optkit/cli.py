"""The command ``lightning-optkit``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_optkit.measures.cost_model import MeasurementCost

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
    demo.add_argument("--seed", type=_whole, default=0, help="seed of weights and shuffling")
    demo.set_defaults(run=_demo)
    _add_inspect(commands)
    _add_plan(commands)
    _add_report(commands)
    _add_summary(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show the Hessian at a checkpoint",
        description="Show the curvature of the training loss at a checkpoint of Lightning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = inspect.add_argument
    add("checkpoint", help="a file that Lightning wrote")
    add("--module", required=True, help="package.module.Class of the LightningModule")
    add(
        "--data",
        help="package.module.DataModule, or package.module:loader, a DataLoader or a function that "
        "returns one; by default the module's own train_dataloader",
    )
    for name, whose in (("--module-args", "module"), ("--data-args", "data")):
        add(
            name,
            action="append",
            type=_pairs,
            default=[],
            metavar="KEY=VALUE",
            help=f"arguments of the {whose}, before those in the checkpoint: key=value, a value "
            "being JSON or a string, or one JSON object; may be repeated",
        )
    add("--num-batches", type=_positive, default=4, help="training batches to measure on")
    add("--num-matvecs", type=_at_least_two, default=80, help="Lanczos steps of one probe")
    add("--num-probes", type=_positive, default=4, help="Lanczos probes")
    add("--tol-rel", type=_tolerance, default=1e-3, help="what counts as zero, or auto")
    add("--curvature", choices=("hessian", "gauss_newton"), default="hessian", help="which matrix")
    add(
        "--graphs",
        choices=("cached", "lockstep"),
        default="cached",
        help="gradient graphs of all batches, or one at a time and all probes' vectors",
    )
    add("--mode", choices=("eval", "train"), default="eval", help="of dropout and BatchNorm")
    add("--parameters", nargs="+", metavar="PATTERN", help="glob patterns of parameter names")
    add("--loss-index", type=_natural, default=0, help="which manual_backward gives the loss")
    add("--top-k", type=_positive, default=5, help="eigenvalues of largest size to find")
    add("--exact-below", type=_natural, default=1000, help="parameters up to which all are found")
    add("--per-layer", action="store_true", help="measure each layer's own block too")
    add("--out", metavar="DIR", help="where figures go, as PNG")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    add("--seed", type=_natural, default=0, help="of the choice of batches and the probes")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--trust", action="store_true", help="unpickle any object in the checkpoint, and run it")
    inspect.set_defaults(run=_inspect)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="tell what a measurement costs before it is made",
        description="Products, bytes and seconds of one measurement, from a cost model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = plan.add_argument
    add("--params", type=_count, required=True, help="number of parameters, such as 7e9")
    add("--world-size", type=_positive, default=1, help="number of devices")
    add("--num-batches", type=_positive, default=4, help="batches on each device")
    add("--batch-size", type=_positive, default=1, help="samples in a batch")
    add("--sequence-length", type=_positive, default=1024, help="tokens of a sample")
    add("--num-matvecs", type=_at_least_two, default=80, help="Lanczos steps of one probe")
    add("--num-probes", type=_positive, default=4, help="Lanczos probes")
    add("--activations", type=_count, help="floats that one forward pass keeps for each token; "
        "by default those of a transformer of this size")  # fmt: skip
    add("--flops", type=_speed, default=67e12, help="peak of a device in float32, FLOP/s")
    add("--efficiency", type=_share, default=0.4, help="share of the peak that is reached")
    add("--bandwidth", type=_speed, default=50e9, help="of the network at a device, bytes/s")
    plan.set_defaults(run=_plan)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="put runs into one HTML file that needs no server",
        description="The Optkit tab as one file: open it anywhere, offline, and mail it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = report.add_argument
    add("folders", nargs="+", metavar="LOGDIR", help="with event files, or optkit.npz, below it")
    add("-o", "--out", default="report.html", metavar="FILE", help="what to write")
    add("--max-points", type=_at_least_two, default=200, help="of a quantity; fewer above 2 MB")
    add("--json", action="store_true", help="print verdicts and last numbers, and write nothing")
    report.set_defaults(run=_report)


def _add_summary(commands: Any) -> None:
    summary = commands.add_parser(
        "summary",
        help="show runs as a table, and fail where a condition holds",
        description="A run a row, worst verdict and last numbers.",
    )
    add = summary.add_argument
    add("folders", nargs="+", metavar="LOGDIR", help="with event files, or optkit.npz, below it")
    add(
        "--fail-on",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 if it holds of the last value of any run, such as 'lambda_max>50' or "
        "'critical>0'; may be repeated",
    )
    add("--json", action="store_true", help="print one JSON object and nothing else")
    summary.set_defaults(run=_summary)


def _demo(options: argparse.Namespace) -> int:
    try:
        from lightning_optkit.demo import run_demo

        return run_demo(options.logdir, epochs=options.epochs, seed=options.seed)
    except ModuleNotFoundError as error:
        print(error)
        return 1


def _inspect(options: argparse.Namespace) -> int:
    from lightning_optkit.inspection import InspectionSettings
    from lightning_optkit.inspection_report import run_inspection

    return run_inspection(
        options.checkpoint,
        module=options.module,
        data=options.data,
        module_args={key: value for given in options.module_args for key, value in given.items()},
        data_args={key: value for given in options.data_args for key, value in given.items()},
        settings=InspectionSettings(
            num_batches=options.num_batches,
            num_matvecs=options.num_matvecs,
            num_probes=options.num_probes,
            tol_rel=options.tol_rel,
            mode=options.mode,
            parameters=None if options.parameters is None else tuple(options.parameters),
            loss_index=options.loss_index,
            top_k=options.top_k,
            exact_below=options.exact_below,
            curvature=options.curvature,
            graphs=options.graphs,
            per_layer=options.per_layer,
            seed=options.seed,
            device=options.device,
        ),
        trust=options.trust,
        folder=options.out,
        as_json=options.json,
    )


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from lightning_optkit.measures.cost_model import Hardware, Route, measurement_cost

    routes: dict[Route, str] = {
        "cached": 'whole, graphs="cached"',
        "lockstep": 'whole, graphs="lockstep"',
        "sharded": "FSDP2, finite differences",
    }
    costs = {
        label: measurement_cost(
            options.params,
            route=route,
            world_size=options.world_size,
            num_matvecs=options.num_matvecs,
            num_probes=options.num_probes,
            num_batches=options.num_batches,
            batch_size=options.batch_size,
            sequence_length=options.sequence_length,
            activations=options.activations,
            hardware=Hardware(options.flops, options.efficiency, options.bandwidth),
        )
        for route, label in routes.items()
    }
    Console().print(_plan_table(costs))
    return 0


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from lightning_optkit.board.report import html_report, json_report, read_folders

    try:
        runs = read_folders(options.folders)
    except (FileNotFoundError, LookupError) as error:
        print(error.args[0], file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(json_report(runs), allow_nan=False))
        return 0
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html_report(runs, max_points=options.max_points), encoding="utf-8")
    except OSError as error:
        print(f"`--out` must be a file that can be written, got {out}: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(runs)} run{'s' * (len(runs) != 1)}, {out.stat().st_size / 1e6:.2f} MB")
    return 0


def _summary(options: argparse.Namespace) -> int:
    from lightning_optkit.run_summary import run_summary

    return run_summary(options.folders, fail_on=options.fail_on, as_json=options.json)


def _plan_table(costs: Mapping[str, MeasurementCost]) -> Table:
    """Return the costs as columns, by their labels."""
    from rich.table import Table

    cost = next(iter(costs.values()))
    title = ", ".join(
        f"{count:,} {name}{'s' * (count != 1)}"
        for count, name in (
            (cost.num_params, "parameter"),
            (cost.world_size, "device"),
            (cost.num_samples, "sample"),
        )
    )
    table = Table(
        title=f"One measurement: {title}",
        title_justify="left",
        caption="bytes on each device, beside what training holds there",
    )
    table.add_column("on each device", style="bold", no_wrap=True)
    for label in costs:
        table.add_column(label, justify="right")
    rows: dict[str, Callable[[MeasurementCost], str]] = {
        "products": lambda cost: f"{cost.num_products:,}",
        "work, gradients": lambda cost: f"{cost.gradients:,.0f}",
        "work, FLOP": lambda cost: f"{cost.flops:.2g}",
        "parameters": lambda cost: _bytes(cost.parameter_bytes),
        "Krylov vectors": lambda cost: _bytes(cost.krylov_bytes),
        "gradient graphs": lambda cost: _bytes(cost.graph_bytes),
        "working memory": lambda cost: _bytes(cost.working_bytes),
        "memory in all": lambda cost: _bytes(cost.total_bytes),
        "time, arithmetic": lambda cost: _duration(cost.compute_seconds),
        "time, network": lambda cost: _duration(cost.network_seconds),
        "time in all": lambda cost: _duration(cost.seconds),
    }
    for row, shown in rows.items():
        table.add_row(row, *(shown(cost) for cost in costs.values()))
    return table


def _bytes(count: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


# -- types of arguments -----------------------------------------------------------------------


def _positive(text: str) -> int:
    return _integer(text, least=1)


def _natural(text: str) -> int:
    return _integer(text, least=0)


def _at_least_two(text: str) -> int:
    return _integer(text, least=2)


def _whole(text: str) -> int:
    return int(_checked(text, int, lambda number: True, "a whole number"))


def _integer(text: str, *, least: int) -> int:
    rule = f"a whole number of at least {least}"
    return int(_checked(text, int, lambda number: number >= least, rule))


def _count(text: str) -> int:
    fits = _checked(text, float, lambda number: number >= 1, "a positive number such as 7e9")
    return round(fits)


def _speed(text: str) -> float:
    return _checked(text, float, lambda number: number > 0, "a positive number such as 5e10")


def _share(text: str) -> float:
    return _checked(text, float, lambda number: 0 < number <= 1, "a number in (0, 1]")


def _tolerance(text: str) -> float | str:
    if text == "auto":
        return text
    return _checked(text, float, lambda number: number >= 0, "a number of at least 0, or auto")


def _checked(
    text: str, kind: Callable[[str], float], fits: Callable[[float], bool], rule: str
) -> float:
    """Return the finite number in ``text``, or refuse it by its rule."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and fits(number)):
        raise argparse.ArgumentTypeError(f"must be {rule}, got {text}")
    return number


def _pairs(text: str) -> dict[str, Any]:
    """Return arguments from ``key=value``, the value being JSON or a string, or a JSON object."""
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from error
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"must be key=value or a JSON object, got {text}")
    try:
        return {key: json.loads(value)}
    except ValueError:
        return {key: value}
