"""Windows of counts -> the load to plan for, and how wrong such forecasts have been."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.types import Floats, check_load

_SPANS = (1.0, 0.5, 0.2)  # EWMA weights of the newest window; 0.5 alone did well on real traces
_PRIOR = np.array([0.1, 0.6, 0.2, 0.1])  # the blend before anything is known
_SHIFT = 2.0  # an error so many times the usual one is a change of regime, not noise
_DOUBT = 0.5  # log-size of the errors expected before any was seen
_KEEP = 0.97  # how slowly old errors fade from the weights and from the long mean
_PARTS = 16  # parts of a window that are told apart, at most
_WINDOWS = 3  # windows whose parts are kept
_FROM_PARTS = 24  # scenarios made from them
_DEALT = 4  # times an error is dealt out to other experts, where no parts are known


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

    def __init__(self, layers: int, experts: int, errors_kept: int = 6, seed: int = 0) -> None:
        self._seed = seed
        self._averages = np.zeros((len(_SPANS), layers, experts))
        self._mean = np.zeros((layers, experts))
        self._seen = np.zeros(layers)  # faded number of windows with tokens
        self._tokens = np.zeros(layers)  # EWMA of the layer's total
        size = len(_SPANS) + 1
        self._normal = np.eye(size)
        self._target = self._normal @ _PRIOR
        self._prior_weight = 0.0  # known with the first error: the size of one window's evidence
        self._errors: list[Floats] = []
        self._usual: list[float] = []  # sizes of the last errors that were no shift
        self._errors_kept = errors_kept
        self._parts: list[Floats] = []  # of each window, [P, L, E]: how its parts differed from it

    def update(self, counts: npt.ArrayLike, parts: npt.ArrayLike | None = None) -> None:
        """Take in one window's counts [L, E]. Raises PlacementError on NaN or negative ones.

        parts  counts [P, L, E] of the window's parts, oldest first, when they are known: they show
               which experts are busy together, and scenarios are then made from them
        """
        window = check_load(counts, len(self._seen))
        if parts is not None:
            self._note_parts(check_load(parts, len(self._seen)))
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
        spread = np.zeros_like(part)
        if self._errors:
            spread = np.sqrt((np.stack(self._errors) ** 2).mean(0))
        return Forecast(
            load=part * scale, scenarios=self._cases(part) * scale, spread=spread * scale
        )

    def _note_parts(self, parts: Floats) -> None:
        """Keep how the parts of a window, [P, L, E], differ from one another; few are merged."""
        if len(parts) > _PARTS:
            starts = np.arange(_PARTS) * len(parts) // _PARTS
            parts = np.add.reduceat(parts, starts, axis=0)
        if len(parts) < 4:
            return
        totals = parts.sum(2, keepdims=True)
        share = parts / np.maximum(totals, 1e-300)
        whole = parts.sum(0) / np.maximum(totals.sum(0), 1e-300)
        self._parts = [*self._parts, np.where(totals > 0, share - whole, 0.0)][-_WINDOWS:]

    def _from_parts(self) -> Floats | None:
        """What parts of windows had more or less than their window, [N, L, E], by layer as large
        as the errors of forecasts are; None when no parts are known."""
        if not self._parts:
            return None
        found = np.concatenate(self._parts)
        found = found[:: -(-len(found) // _FROM_PARTS)]
        size = (found**2).mean((0, 2))
        if self._errors:
            usual = np.mean([(error**2).mean(1) for error in self._errors[-_WINDOWS:]], axis=0)
        else:
            usual = size / 4
        factor = np.sqrt(usual / np.maximum(size, 1e-300))
        scaled: Floats = found * factor[:, None]
        return scaled

    def _cases(self, part: Floats) -> Floats:
        """The load as it may turn out, [M, L, E] parts, the most telling last.

        Past errors as they were. With them what parts of past windows had more or less than the
        whole, which shows what goes up together; where that is not known, past errors dealt out
        to other experts: what hit one may hit another. Before anything is known, errors of a
        usual size.
        """
        rng = np.random.default_rng(self._seed)
        layers, experts = part.shape
        errors, found = list(self._errors), self._from_parts()
        while len(errors) < 3:
            guess = rng.lognormal(-(_DOUBT**2) / 2, _DOUBT, part.shape)
            errors.insert(0, part * (guess - 1) + 0.2 * (rng.exponential(1 / experts, part.shape)))
        more: list[Floats] = []
        cases: list[Floats] = []
        if found is not None:
            more = [part + some for some in found]
        root = np.sqrt(np.maximum(part, 0.1 / experts))  # errors grow like the root of the load
        for error in errors:
            for turn in range(_DEALT if found is None else 0):
                order = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
                dealt = np.take_along_axis(error / root, order, 1) * root
                (cases if turn == 0 else more).append(part + dealt)
            cases.append(part + error)
        cases = more + cases
        out = np.maximum(np.stack(cases), 0)
        out /= np.maximum(out.sum(2, keepdims=True), 1e-300)
        return np.where(part.sum(1, keepdims=True) > 0, out, 0.0)

    def _features(self) -> Floats:
        return np.concatenate([self._averages, self._mean[None]])  # [F, L, E]

    def _blend(self, features: Floats) -> Floats:
        weights = np.linalg.solve(self._normal, self._target)
        blended: Floats = np.einsum("fle,f->le", features, weights)
        return blended

    def _forget(self) -> None:
        """The load became another one: start from the newest window, keep what is usual."""
        self._seen[:] = 0

    def _learn(self, features: Floats, truth: Floats) -> None:
        flat = features.reshape(len(features), -1)
        prior = np.eye(len(flat))
        if not self._prior_weight:
            self._prior_weight = 0.3 * float((flat * flat).sum()) / len(flat)
            self._normal = prior * self._prior_weight
            self._target = self._normal @ _PRIOR
        # the prior never fades: all experts of a window err together, so the evidence of one
        # window is less than its many numbers suggest
        fresh = (1 - _KEEP) * self._prior_weight
        self._normal = self._normal * _KEEP + flat @ flat.T + fresh * prior
        self._target = self._target * _KEEP + flat @ truth.ravel() + fresh * _PRIOR


def forecast_windows(counts: npt.ArrayLike) -> Forecast:
    """Forecast from all windows at once: counts [W, L, E] (or one window [L, E]), oldest first."""
    windows = check_load(counts)
    if windows.ndim == 2:
        windows = windows[None]
    forecaster = Forecaster(windows.shape[1], windows.shape[2])
    for window in windows:
        forecaster.update(window)
    return forecaster.forecast()
