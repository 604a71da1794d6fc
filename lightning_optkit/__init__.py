"""Callbacks that see the loss surface of a Lightning run, and act on it.

The public names are loaded when they are first used, so `import lightning_optkit` costs nothing:
neither torch nor Lightning is imported by it.

Example:
    >>> import lightning_optkit
    >>> "HessianSpectrum" in dir(lightning_optkit)
    True
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> the module that defines it. A new public name is one row here and one import below.
_EXPORTS = {
    "HessianSpectrum": "lightning_optkit.callbacks.hessian_spectrum",
    "Stability": "lightning_optkit.callbacks.stability",
    "SaddleEscape": "lightning_optkit.callbacks.saddle_escape",
    "SWA": "lightning_optkit.callbacks.swa",
    "EMA": "lightning_optkit.callbacks.ema",
    "load_averaged": "lightning_optkit.bridge.averaged_checkpoint",
    "load_raw": "lightning_optkit.bridge.averaged_checkpoint",
    "without_average": "lightning_optkit.bridge.averaged_checkpoint",
    "is_probing": "lightning_optkit.bridge.probe",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from lightning_optkit.bridge.averaged_checkpoint import load_averaged as load_averaged
    from lightning_optkit.bridge.averaged_checkpoint import load_raw as load_raw
    from lightning_optkit.bridge.averaged_checkpoint import without_average as without_average
    from lightning_optkit.bridge.probe import is_probing as is_probing
    from lightning_optkit.callbacks.ema import EMA as EMA
    from lightning_optkit.callbacks.hessian_spectrum import HessianSpectrum as HessianSpectrum
    from lightning_optkit.callbacks.saddle_escape import SaddleEscape as SaddleEscape
    from lightning_optkit.callbacks.stability import Stability as Stability
    from lightning_optkit.callbacks.swa import SWA as SWA
else:  # hidden from type checkers, so that they report a misspelt name too

    def __getattr__(name):
        """Return the public object called `name`, importing its module on first use (PEP 562)."""
        if name not in _EXPORTS:
            from difflib import get_close_matches

            nearest = get_close_matches(name, _EXPORTS, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
        return value

    def __dir__():
        """Return the names of the module, those not yet loaded included."""
        return sorted({*globals(), *_EXPORTS})
