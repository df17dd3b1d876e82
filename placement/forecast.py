"""Windows of counts -> the load to plan for, and how wrong such forecasts have been."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.types import Floats, check_load

_SPANS = (1.0, 0.5, 0.2)  # EWMA weights of the newest window; 0.5 alone did well on real traces
_SHIFT = 2.0  # an error so many times the usual one is a change of regime, not noise
_KEEP = 0.97  # how slowly old errors fade from the weights and from the long mean


@dataclass(frozen=True, kw_only=True, eq=False)
class Forecast:
    """What to plan for, in the units of the counts per window.

    load       float64 [L, E], expected counts of the next window
    scenarios  float64 [M, L, E], the load as it may turn out: load + past one-step errors
    spread     float64 [L, E], standard deviation of those errors
    """

    load: Floats
    scenarios: Floats
    spread: Floats

    def scaled(self, factor: float) -> Forecast:
        """The same in other units, e.g. counts per window -> pairs per second."""
        return Forecast(
            load=self.load * factor,
            scenarios=self.scenarios * factor,
            spread=self.spread * factor,
        )


class Forecaster:
    """Feed one window after another; `forecast()` at any time.

    The forecast of an expert's part of its layer's load is a blend of three moving averages and
    the long mean. The blend's weights are fitted online (ridge regression over all experts, old
    windows fading), so a steady load is averaged over long and a drifting one followed fast.
    Layers that saw no token in a window keep their state.
    """

    def __init__(self, layers: int, experts: int, errors_kept: int = 6) -> None:
        self._averages = np.zeros((len(_SPANS), layers, experts))
        self._mean = np.zeros((layers, experts))
        self._seen = np.zeros(layers)  # faded number of windows with tokens
        self._tokens = np.zeros(layers)  # EWMA of the layer's total
        size = len(_SPANS) + 1
        self._normal = np.eye(size) * 1e-3
        prior = np.full(size, 0.1)
        prior[1] = 0.7  # before anything is known: mostly the EWMA of 0.5
        self._target = self._normal @ prior
        self._errors: list[Floats] = []
        self._usual: list[float] = []  # sizes of the last errors that were no shift
        self._errors_kept = errors_kept

    def update(self, counts: npt.ArrayLike) -> None:
        """Take in one window's counts [L, E]. Raises PlacementError on NaN or negative ones."""
        window = check_load(counts, len(self._seen))
        totals = window.sum(1)
        active = totals > 0
        if not active.any():
            return
        part = window[active] / totals[active, None]
        known = active & (self._seen > 0)
        if known.any():
            features = self._features()[:, known]
            truth = window[known] / totals[known, None]
            error = np.zeros_like(window)
            error[known] = truth - self._blend(features)
            size = float(np.abs(error).sum() / known.sum())
            if self._usual and size > _SHIFT * float(np.median(self._usual)):
                self._forget()
            else:
                self._learn(features, truth)
                self._errors = [*self._errors, error][-self._errors_kept :]
                self._usual = [*self._usual, size][-9:]
        for average, span in zip(self._averages, _SPANS, strict=True):
            weight = np.where(self._seen[active] > 0, span, 1.0)[:, None]
            average[active] += weight * (part - average[active])
        self._seen[active] = self._seen[active] * _KEEP + 1
        self._mean[active] += (part - self._mean[active]) / self._seen[active, None]
        weight_tokens = np.where(self._tokens[active] > 0, 0.5, 1.0)
        self._tokens[active] += weight_tokens * (totals[active] - self._tokens[active])

    def forecast(self) -> Forecast:
        """The next window, in counts a window."""
        part = np.maximum(self._blend(self._features()), 0)
        total = part.sum(1, keepdims=True)
        part = part / np.where(total > 0, total, 1.0)
        scale = self._tokens[:, None]
        if not self._errors:
            return Forecast(
                load=part * scale, scenarios=(part * scale)[None], spread=np.zeros_like(part)
            )
        errors = np.stack(self._errors)
        cases = np.maximum(part + errors, 0)
        cases /= np.maximum(cases.sum(2, keepdims=True), 1e-300)
        return Forecast(
            load=part * scale,
            scenarios=np.where(scale > 0, cases * scale, 0.0),
            spread=np.sqrt((errors**2).mean(0)) * scale,
        )

    def _forget(self) -> None:
        """The load became another one: start from the newest window, keep what is usual."""
        self._seen[:] = 0

    def _features(self) -> Floats:
        return np.concatenate([self._averages, self._mean[None]])  # [F, L, E]

    def _blend(self, features: Floats) -> Floats:
        weights = np.linalg.solve(self._normal, self._target)
        blended: Floats = np.einsum("fle,f->le", features, weights)
        return blended

    def _learn(self, features: Floats, truth: Floats) -> None:
        flat = features.reshape(len(features), -1)
        self._normal = self._normal * _KEEP + flat @ flat.T
        self._target = self._target * _KEEP + flat @ truth.ravel()


def forecast_windows(counts: npt.ArrayLike) -> Forecast:
    """Forecast from all windows at once: counts [W, L, E] (or one window [L, E]), oldest first."""
    windows = check_load(counts)
    if windows.ndim == 2:
        windows = windows[None]
    forecaster = Forecaster(windows.shape[1], windows.shape[2])
    for window in windows:
        forecaster.update(window)
    return forecaster.forecast()
