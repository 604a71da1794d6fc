"""An inspection as tables, figures and JSON."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from lightning_optkit import __version__
from lightning_optkit.figures.spectrum import spectrum_figure
from lightning_optkit.inspection import (
    OPERATORS,
    Inspection,
    InspectionError,
    InspectionSettings,
    OptimizerStability,
    inspect_checkpoint,
    one_line,
)
from lightning_optkit.measures import CriticalPoint, Share, Spectrum

__all__ = ["inspection_json", "inspection_tables", "run_inspection", "write_figures"]

_JSON_VERSION = 1  # goes up where a key changes its meaning or goes away


def run_inspection(
    checkpoint: str,
    *,
    module: str,
    data: str | None,
    module_args: Mapping[str, Any],
    data_args: Mapping[str, Any],
    settings: InspectionSettings,
    trust: bool,
    folder: str | None,
    as_json: bool,
) -> int:
    """Inspect, and print the tables or one JSON object; return the exit status.

    Returns:
        0, or 2 if something cannot be loaded, or 1 if it cannot be measured.
    """
    screen = sys.stdout
    try:
        with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the result
            found = inspect_checkpoint(
                checkpoint,
                module=module,
                data=data,
                module_args=module_args,
                data_args=data_args,
                settings=settings,
                trust=trust,
            )
            figures = [] if folder is None else write_figures(found, folder)
    except InspectionError as error:
        print(f"lightning-optkit inspect: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        cause = f"{type(error).__name__}: {one_line(error)}"
        print(f"lightning-optkit inspect: nothing was measured. {cause}", file=sys.stderr)
        return 1
    if as_json:
        result = inspection_json(found) | {"figures": [str(path) for path in figures]}
        print(json.dumps(result, indent=2, allow_nan=False), file=screen)
        return 0
    console = Console(file=screen)
    console.print(inspection_tables(found))
    for path in figures:
        console.print(f"Picture: {path}", soft_wrap=True)
    return 0


def inspection_tables(found: Inspection) -> Group:
    """Return the tables that the command prints."""
    tables = [_summary(found), _eigenvalues(found)]
    if found.layers:
        tables.append(_layers(found))
    return Group(*tables)


def _summary(found: Inspection) -> Table:
    spectrum, point, step = found.spectrum, found.point, found.step
    when = ", ".join(
        f"{name} {value:,}"
        for name, value in (("epoch", found.epoch), ("step", found.global_step))
        if value is not None
    )
    bounds = (
        "all eigenvalues computed"
        if spectrum.method == "exact"
        else f"in brackets: {spectrum.confidence:.0%} bounds"
    )
    table = Table(
        title=escape(f"{found.module} at a checkpoint"),
        title_justify="left",
        caption=f"{bounds}; {found.num_products:,} products, {found.seconds:.1f} s",
        show_header=False,
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for row in (
        ("checkpoint", found.checkpoint, when),
        ("parameters", f"{spectrum.num_params:,}", f"{found.settings.mode} mode"),
        ("matrix", _matrix(found), ""),
        ("loss", f"{found.loss:.4g}", f"on {_counted(found.num_samples, 'training sample')}"),
        ("kind of point", _kind(found), _gradient_note(found)),
        ("flatness", _number(point.flatness), "‖Hg‖ / (max|λ| ‖g‖): near 0, g lies in flat space"),
        ("λ max", _with_error(spectrum.lambda_max, spectrum.lambda_max_error), "sharpness"),
        ("λ min", _with_error(spectrum.lambda_min, spectrum.lambda_min_error), _descent(point)),
        ("minimum ratio", str(spectrum.positive), f"share of λ > {spectrum.tol:.2g}"),
        ("negative ratio", str(spectrum.negative), f"share of λ < -{spectrum.tol:.2g}"),
        ("zero ratio", str(spectrum.zero), f"share within {spectrum.tol:.2g} of zero"),
        ("trace", _with_error(spectrum.trace, spectrum.trace_standard_error), "sum of all λ"),
        ("condition", _condition(spectrum), spectrum.condition_reason),
        ("best step", _number(step.step), "learning rate gᵀg / gᵀHg: lowest along the gradient"),
        ("  lowers loss", _number(step.decrease), "by the quadratic model"),
        *_stability_rows(found.stability),
    ):
        table.add_row(*map(escape, row))
    return table


def _matrix(found: Inspection) -> str:
    return OPERATORS[found.settings.curvature].matrix_name


def _kind(found: Inspection) -> str:
    critical = found.point.kind != "not critical"
    if critical and found.settings.curvature != "hessian":
        return "critical, of a kind that only the Hessian tells"
    return found.point.kind


def _condition(spectrum: Spectrum) -> str:
    bound = "≥ " if _is_lower_bound(spectrum) else ""
    return f"{bound}{_number(spectrum.condition_number)}"


def _is_lower_bound(spectrum: Spectrum) -> bool:
    """Return whether the condition number may be larger than what was found."""
    return spectrum.method != "exact" and math.isfinite(spectrum.condition_number)


def _stability_rows(found: OptimizerStability | str) -> list[tuple[str, str, str]]:
    if isinstance(found, str):
        return [("stability", "not known", found)]
    with_error = _with_error(found.lambda_max, found.lambda_max_error)
    stable_at = f"of {found.optimizer} at the learning rate {found.learning_rate:.3g}"
    return [
        ("threshold", _number(found.threshold), f"largest stable curvature {stable_at}"),
        ("  ratio", _number(found.ratio), f"λ max as the optimizer scales it, {with_error}, to it"),
    ]


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'s' * (count != 1)}"


def _gradient_note(found: Inspection) -> str:
    noise = found.point.gradient_noise
    text = f"gradient norm {found.point.gradient_norm:.2g}"
    return text if math.isnan(noise) else f"{text}, noise {noise:.2g}"


def _descent(point: CriticalPoint) -> str:
    return "" if point.descent is None else str(point.descent)


def _eigenvalues(found: Inspection) -> Table:
    table = Table(title="Eigenvalues of largest size", title_justify="left")
    for column in ("", "λ", "error", "residual", "converged"):
        table.add_column(column, justify="right")
    pairs = found.pairs
    for i, value in enumerate(pairs.values):
        table.add_row(
            f"{i + 1}",
            f"{float(value):.5g}",
            f"{float(pairs.errors[i]):.1e}",
            f"{float(pairs.residuals[i]):.1e}",
            "yes" if pairs.converged[i] else "no",
        )
    return table


def _layers(found: Inspection) -> Table:
    table = Table(title="Layer by layer", title_justify="left")
    table.add_column("layer", overflow="fold")
    for column in ("parameters", "λ max", "λ min", "trace", "minimum ratio"):
        table.add_column(column, justify="right")
    for name, spectrum in found.layers.items():
        table.add_row(
            escape(name),
            f"{spectrum.num_params:,}",
            f"{spectrum.lambda_max:.3g}",
            f"{spectrum.lambda_min:.3g}",
            f"{spectrum.trace:.3g}",
            escape(str(spectrum.positive)),
        )
    return table


def _number(value: float) -> str:
    if math.isnan(value):
        return "not defined"
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def _with_error(value: float, error: float) -> str:
    return f"{value:.4g} ± {error:.0e}" if error > 0 else f"{value:.4g}"


def write_figures(found: Inspection, folder: str | Path) -> list[Path]:
    """Write the spectrum, and that of each layer, as PNG files; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spectra = {"spectrum": ("", found.spectrum)}
    spectra |= {f"layer-{name}": (f" of {name}", each) for name, each in found.layers.items()}
    paths = []
    for name, (of_layer, spectrum) in spectra.items():
        figure = spectrum_figure(spectrum, num_eigenvalues=found.settings.top_k)
        size = _counted(spectrum.num_params, "parameter")
        figure.suptitle(f"{_matrix(found)} spectrum{of_layer}, {size}", fontsize=12)
        paths.append(folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def inspection_json(found: Inspection) -> dict[str, Any]:
    """Return an inspection without its vectors, for :func:`json.dumps`.

    What is not defined is ``None``; an infinite number is ``"Infinity"`` or ``"-Infinity"``,
    for which JSON has no literal.
    """
    point = asdict(found.point)
    for share in ("positive", "negative"):  # the spectrum has them
        del point[share]
    return _plain(
        {
            "version": _JSON_VERSION,
            "lightning_optkit": __version__,
            "checkpoint": found.checkpoint,
            "module": found.module,
            "epoch": found.epoch,
            "global_step": found.global_step,
            "settings": asdict(found.settings),
            "num_params": found.spectrum.num_params,
            "num_samples": found.num_samples,
            "loss": found.loss,
            "spectrum": _spectrum_json(found.spectrum),
            "top_eigenvalues": [
                {
                    "value": float(value),
                    "residual": float(residual),
                    "error": float(error),
                    "converged": bool(converged),
                }
                for value, residual, error, converged in zip(
                    found.pairs.values,
                    found.pairs.residuals,
                    found.pairs.errors,
                    found.pairs.converged,
                    strict=True,
                )
            ],
            "critical_point": point,
            "gradient_step": asdict(found.step),
            **_stability_json(found.stability),
            "layers": {name: _spectrum_json(spectrum) for name, spectrum in found.layers.items()},
            "num_products": found.num_products,
            "seconds": found.seconds,
        }
    )


def _stability_json(found: OptimizerStability | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"stability": None, "stability_reason": found}
    return {"stability": asdict(found) | {"ratio": found.ratio}, "stability_reason": None}


def _spectrum_json(spectrum: Spectrum) -> dict[str, Any]:
    def share(found: Share) -> dict[str, Any]:
        return {
            "value": found.value,
            "lower": found.lower,
            "upper": found.upper,
            "resolved": found.resolved,
        }

    return {
        "num_params": spectrum.num_params,
        "method": spectrum.method,
        "confidence": spectrum.confidence,
        "minimum_ratio": share(spectrum.positive),
        "negative_ratio": share(spectrum.negative),
        "zero_ratio": share(spectrum.zero),
        "tol": spectrum.tol,
        "tol_rel": spectrum.tol_rel,
        "noise": spectrum.noise,
        "lambda_max": spectrum.lambda_max,
        "lambda_max_error": spectrum.lambda_max_error,
        "lambda_min": spectrum.lambda_min,
        "lambda_min_error": spectrum.lambda_min_error,
        "trace": spectrum.trace,
        "trace_standard_error": spectrum.trace_standard_error,
        "condition_number": spectrum.condition_number,
        "condition_number_is_lower_bound": _is_lower_bound(spectrum),
        "condition_reason": spectrum.condition_reason,
        "num_matvecs": spectrum.num_matvecs,
        **_quadrature_json(spectrum),
    }


def _quadrature_json(spectrum: Spectrum) -> dict[str, Any]:
    """Return nodes and weights of each probe, without the padding."""
    nodes, weights = spectrum.ritz_values, spectrum.ritz_weights
    filled = [~probe.isnan() for probe in nodes]
    return {
        "ritz_values": [probe[own].tolist() for probe, own in zip(nodes, filled, strict=True)],
        "ritz_weights": [probe[own].tolist() for probe, own in zip(weights, filled, strict=True)],
    }


def _plain(value: Any) -> Any:
    """Return the value with numbers that JSON has no literal for replaced."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
