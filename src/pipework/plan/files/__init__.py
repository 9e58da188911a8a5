"""Schedules in files: as JSON with all there is to a schedule, and as the rows of actions that torch reads and writes.

    plan.json    a schedule, exactly
    plan.csv     its orders alone, or the programs of its ranks, in the text form of torch.distributed.pipelining

What a file says is never believed: whatever is wrong with it, reading ends soon and with a PipeworkError.
"""

from pipework.plan.files.record import read_json, write_json
from pipework.plan.files.rows import read_csv, read_programs, write_csv, write_programs

__all__ = ["read_csv", "read_json", "read_programs", "write_csv", "write_json", "write_programs"]
