"""Measurements against torch.distributed.pipelining and against the unsplit model: `python -m benchmarks`."""
