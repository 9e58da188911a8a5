"""Cutting a model into stages: capture, cut, generated stage code. Imports torch, never torch.distributed."""

from pipework.split.marks import SplitPoint, pipe_split
from pipework.split.measure import module_costs
from pipework.split.parts import ModuleCosts
from pipework.split.pipe import Pipe, pipeline
from pipework.split.points import CutPoint, CutPoints, PipeSplit
from pipework.split.stage import Stage

__all__ = [
    "CutPoint",
    "CutPoints",
    "ModuleCosts",
    "Pipe",
    "PipeSplit",
    "SplitPoint",
    "Stage",
    "module_costs",
    "pipe_split",
    "pipeline",
]
