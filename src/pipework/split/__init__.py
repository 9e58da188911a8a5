"""Cutting a model into stages: capture, cut, generated stage code. Imports torch, never torch.distributed."""

from pipework.split.marks import SplitPoint, pipe_split
from pipework.split.pipe import Pipe, pipeline
from pipework.split.stage import Stage

__all__ = ["Pipe", "SplitPoint", "Stage", "pipe_split", "pipeline"]
