"""The Optkit tab of TensorBoard: the entry point ``tensorboard_plugins`` names its loader.

TensorBoard imports this module whenever it starts, on every machine that has the package: it loads
neither torch nor lightning, and what reads data is imported by the first request.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend.http_util import Respond
from tensorboard.context import RequestContext
from tensorboard.errors import NotFoundError
from tensorboard.plugins import base_plugin
from werkzeug.wrappers import Request, Response

from lightning_optkit.board.page import STATIC

if TYPE_CHECKING:
    from lightning_optkit.board.runs import Run

__all__ = ["OptkitLoader", "OptkitPlugin"]

_NAME = "optkit"  # as `board.schema`, which loads protocol buffers
_POINTS = 1000  # kept of an array's steps; TensorBoard's own 10 would lose a run's spectra
_TYPES = {".js": "application/javascript", ".css": "text/css"}

_log = logging.getLogger(__name__)


class OptkitLoader(base_plugin.TBLoader):
    """Loads the tab, and asks TensorBoard to keep as many spectra as it keeps scalars."""

    def fix_flags(self, flags: Any) -> None:
        """Raise ``--samples_per_plugin`` of this plugin, unless the user gave it."""
        samples = getattr(flags, "samples_per_plugin", None)
        if isinstance(samples, dict):
            samples.setdefault(_NAME, _POINTS)

    def load(self, context: base_plugin.TBContext) -> base_plugin.TBPlugin | None:
        """Return the plugin, or ``None`` where TensorBoard has no data to read."""
        return None if context.data_provider is None else OptkitPlugin(context)


class OptkitPlugin(base_plugin.TBPlugin):
    """Serves the page and the runs.

    Args:
        context: what TensorBoard gives a plugin; only its data provider is used, which both of
            TensorBoard's loaders have.
    """

    plugin_name = _NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._has_data = False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and its module."""
        return base_plugin.FrontendMetadata(
            es_module_path="/index.js", tab_name="Optkit", disable_reload=True
        )

    def is_active(self) -> bool:
        """Return whether any callback logged a scalar; arrays TensorBoard finds by itself."""
        if not self._has_data:
            try:
                scalars = self._provider.list_scalars(
                    RequestContext(), experiment_id="", plugin_name="scalars"
                )
                self._has_data = any(
                    tag.startswith("optkit-") for tags in scalars.values() for tag in tags
                )
            except Exception as error:  # an error here would take every other tab with it
                _log.debug("lightning-optkit cannot look for data: %s", error)
        return self._has_data

    def get_plugin_apps(self) -> Mapping[str, Callable[..., Any]]:
        """Return what answers each route."""
        pages = {
            f"/{file.relative_to(STATIC).as_posix()}": _page(file)
            for file in sorted(STATIC.rglob("*"))
            if file.suffix in _TYPES
        }
        texts = {"/about": self._about, "/runs": self._runs, "/alerts": self._alerts}
        numbers = {"/scalars": self._scalars, "/array": self._array}
        return (
            pages
            | {route: _answer(f, "application/json") for route, f in texts.items()}
            | {route: _answer(f, "application/octet-stream") for route, f in numbers.items()}
        )

    # -- routes -----------------------------------------------------------------------------------

    def _about(self, request: Request) -> bytes:
        from lightning_optkit.board.page import about

        return _json(about())

    def _runs(self, request: Request) -> bytes:
        from lightning_optkit.board.reader import listed_runs

        found = listed_runs(self._provider, *_experiment(request))
        self._has_data = self._has_data or bool(found)
        return _json(found)

    def _scalars(self, request: Request) -> bytes:
        from lightning_optkit.board.payload import encode_run

        return encode_run(self._read(request, arrays=()))

    def _array(self, request: Request) -> bytes:
        from lightning_optkit.board.payload import encode_run

        tag = request.args.get("tag", "")
        run = self._read(request, arrays=(tag,), with_scalars=False)
        if tag not in run.arrays:
            message = next((p.message for p in run.problems if p.tag == tag), "there is none")
            raise LookupError(f"array {tag!r} of run {run.name!r}: {message}")
        return encode_run(run)

    def _alerts(self, request: Request) -> bytes:
        from lightning_optkit.diagnosis import EVIDENCE, alerts

        return _json([vars(alert) for alert in alerts(self._read(request, arrays=EVIDENCE))])

    def _read(self, request: Request, **what: Any) -> Run:
        from lightning_optkit.board.reader import read_run

        name = request.args.get("run", "")
        return read_run(self._provider, *_experiment(request), name, **what)


def _page(file: Path) -> Callable[..., Any]:
    """Return what serves one file of the page: no other can be asked for."""
    content, content_type = file.read_bytes(), _TYPES[file.suffix]

    @Request.application
    def serve(request: Request) -> Response:
        response: Response = Respond(request, content, content_type)
        return response

    return serve


def _answer(function: Callable[[Request], bytes], content_type: str) -> Callable[..., Any]:
    """Return what answers with the function's bytes, or says what is wrong in one line of text."""

    @Request.application
    def serve(request: Request) -> Response:
        try:
            content = function(request)
        except (LookupError, NotFoundError) as error:
            return _respond(request, str(error.args[0] if error.args else error), code=404)
        except Exception as error:
            _log.exception("lightning-optkit could not answer %s", request.path)
            return _respond(request, f"{type(error).__name__}: {error}", code=500)
        response: Response = Respond(request, content, content_type)
        return response

    return serve


def _respond(request: Request, text: str, *, code: int) -> Response:
    response: Response = Respond(request, text, "text/plain; charset=utf-8", code=code)
    return response


def _experiment(request: Request) -> tuple[RequestContext, str]:
    from tensorboard import plugin_util  # loads a parser of HTML, for text that others show

    environ = request.environ
    return plugin_util.context(environ), plugin_util.experiment_id(environ)


def _json(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()
