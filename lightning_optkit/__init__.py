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
    "Sharpness": "lightning_optkit.callbacks.sharpness",
    "LossLandscape": "lightning_optkit.callbacks.loss_landscape",
    "SaddleEscape": "lightning_optkit.callbacks.saddle_escape",
    "SWA": "lightning_optkit.callbacks.swa",
    "EMA": "lightning_optkit.callbacks.ema",
    "Mixup": "lightning_optkit.callbacks.mixup",
    "CutMix": "lightning_optkit.callbacks.cutmix",
    "MixupOrCutMix": "lightning_optkit.callbacks.mixup_or_cutmix",
    "MixedAccuracy": "lightning_optkit.metrics.mixed_accuracy",
    "BatchScaling": "lightning_optkit.callbacks.batch_scaling",
    "TrustRatio": "lightning_optkit.callbacks.trust_ratio",
    "NormSwap": "lightning_optkit.callbacks.norm_swap",
    "GradientMonitor": "lightning_optkit.callbacks.gradient_monitor",
    "GradientNoiseScale": "lightning_optkit.metrics.gradient_noise",
    "LRWarmup": "lightning_optkit.callbacks.lr_warmup",
    "ErrorBelow": "lightning_optkit.methods.triggers",
    "AccuracyAbove": "lightning_optkit.methods.triggers",
    "LARS": "lightning_optkit.optim.lars",
    "LAMB": "lightning_optkit.optim.lamb",
    "lars_param_groups": "lightning_optkit.optim.groups",
    "load_averaged": "lightning_optkit.bridge.averaged_checkpoint",
    "load_raw": "lightning_optkit.bridge.averaged_checkpoint",
    "load_swapped": "lightning_optkit.bridge.swapped_checkpoint",
    "without_average": "lightning_optkit.bridge.averaged_checkpoint",
    "is_probing": "lightning_optkit.bridge.probe",
}

__all__ = list(_EXPORTS)

if TYPE_CHECKING:
    from lightning_optkit.bridge.averaged_checkpoint import load_averaged as load_averaged
    from lightning_optkit.bridge.averaged_checkpoint import load_raw as load_raw
    from lightning_optkit.bridge.averaged_checkpoint import without_average as without_average
    from lightning_optkit.bridge.probe import is_probing as is_probing
    from lightning_optkit.bridge.swapped_checkpoint import load_swapped as load_swapped
    from lightning_optkit.callbacks.batch_scaling import BatchScaling as BatchScaling
    from lightning_optkit.callbacks.cutmix import CutMix as CutMix
    from lightning_optkit.callbacks.ema import EMA as EMA
    from lightning_optkit.callbacks.gradient_monitor import GradientMonitor as GradientMonitor
    from lightning_optkit.callbacks.hessian_spectrum import HessianSpectrum as HessianSpectrum
    from lightning_optkit.callbacks.loss_landscape import LossLandscape as LossLandscape
    from lightning_optkit.callbacks.lr_warmup import LRWarmup as LRWarmup
    from lightning_optkit.callbacks.mixup import Mixup as Mixup
    from lightning_optkit.callbacks.mixup_or_cutmix import MixupOrCutMix as MixupOrCutMix
    from lightning_optkit.callbacks.norm_swap import NormSwap as NormSwap
    from lightning_optkit.callbacks.saddle_escape import SaddleEscape as SaddleEscape
    from lightning_optkit.callbacks.sharpness import Sharpness as Sharpness
    from lightning_optkit.callbacks.stability import Stability as Stability
    from lightning_optkit.callbacks.swa import SWA as SWA
    from lightning_optkit.callbacks.trust_ratio import TrustRatio as TrustRatio
    from lightning_optkit.methods.triggers import AccuracyAbove as AccuracyAbove
    from lightning_optkit.methods.triggers import ErrorBelow as ErrorBelow
    from lightning_optkit.metrics.gradient_noise import GradientNoiseScale as GradientNoiseScale
    from lightning_optkit.metrics.mixed_accuracy import MixedAccuracy as MixedAccuracy
    from lightning_optkit.optim.groups import lars_param_groups as lars_param_groups
    from lightning_optkit.optim.lamb import LAMB as LAMB
    from lightning_optkit.optim.lars import LARS as LARS
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
