"""Calibration: which range of numbers a layer sees. ``observer`` says what an observer is; each rule has its file."""

from octavo.calibration.entropy import Entropy
from octavo.calibration.histogram import Histogram, HistogramObserver
from octavo.calibration.line_search import LineSearch
from octavo.calibration.minmax import MinMax
from octavo.calibration.moving_average import MovingAverage
from octavo.calibration.mse import MSE
from octavo.calibration.observer import Observer, from_settings
from octavo.calibration.percentile import Percentile

__all__ = [
    "MSE",
    "Entropy",
    "Histogram",
    "HistogramObserver",
    "LineSearch",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "from_settings",
]
