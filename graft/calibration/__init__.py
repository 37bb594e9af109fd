"""Calibration: what a model bears, measured on given text, as options of passes."""

from graft.calibration.drops import DropCalibration, calibrate_drops
from graft.calibration.layer_parallel import calibrate_layer_parallel
from graft.calibration.self_draft import search_self_draft
from graft.calibration.skip_ffn import SkipCalibration, calibrate_skip_ffn

__all__ = [
    "DropCalibration",
    "SkipCalibration",
    "calibrate_drops",
    "calibrate_layer_parallel",
    "calibrate_skip_ffn",
    "search_self_draft",
]
