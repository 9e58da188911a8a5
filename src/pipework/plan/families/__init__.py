"""The published schedules, each from a layout and a number of microbatches; FAMILIES has them all by name."""

from collections.abc import Mapping

from pipework.errors import ScheduleError
from pipework.plan.families.automatic import zero_bubble_1p, zero_bubble_2p
from pipework.plan.families.breadth_first import forward_only, gpipe, looped_bfs
from pipework.plan.families.building_block import v_half, v_min
from pipework.plan.families.dual_pipe import dual_pipe, dual_pipe_v
from pipework.plan.families.family import Family
from pipework.plan.families.one_f_one_b import interleaved_one_f_one_b, one_f_one_b
from pipework.plan.families.sequence import sequence_one_f_one_b
from pipework.plan.families.vee import zero_bubble_v
from pipework.plan.families.waves import chimera, hanayo
from pipework.plan.families.zero_bubble import interleaved_zero_bubble, zero_bubble_h1, zero_bubble_h2
from pipework.plan.layout import Layout


def _replicas(ranks: int, per_rank: int) -> Layout:
    if per_rank != 2:
        raise ScheduleError(f"two replicas have 2 stages per rank, not {per_rank}", remedy="give 2, or leave it out")
    return Layout.bidirectional(ranks)


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(gpipe, "arXiv:1811.06965"),
        Family(one_f_one_b, "arXiv:2006.09503"),
        Family(interleaved_one_f_one_b, "arXiv:2104.04473", per_rank=2),
        Family(looped_bfs, "arXiv:2211.05953", per_rank=2),
        Family(zero_bubble_h1, "arXiv:2401.10241"),
        Family(zero_bubble_h2, "arXiv:2401.10241"),
        Family(zero_bubble_1p, "arXiv:2401.10241", heeds_costs=True),
        Family(zero_bubble_2p, "arXiv:2401.10241", heeds_costs=True),
        Family(interleaved_zero_bubble, "arXiv:2401.10241", per_rank=2),
        Family(zero_bubble_v, "arXiv:2405.15362", Layout.vee, per_rank=2, heeds_costs=True),
        Family(v_half, "arXiv:2405.15362", Layout.vee, per_rank=2),
        Family(v_min, "arXiv:2405.15362", Layout.vee, per_rank=2),
        Family(hanayo, "arXiv:2308.15762", Layout.vee, per_rank=2),
        Family(dual_pipe_v, "arXiv:2412.19437", Layout.vee, per_rank=2),
        Family(dual_pipe, "arXiv:2412.19437", _replicas, per_rank=2, least=2, runs=False),
        Family(chimera, "arXiv:2107.06925", _replicas, per_rank=2, least=2, runs=False),
        Family(sequence_one_f_one_b, "arXiv:2406.03488", runs=False),
        Family(forward_only, "arXiv:1811.06965", trains=False),
    )
}
"""Every family by its name."""

__all__ = [
    "FAMILIES",
    "Family",
    "chimera",
    "dual_pipe",
    "dual_pipe_v",
    "forward_only",
    "gpipe",
    "hanayo",
    "interleaved_one_f_one_b",
    "interleaved_zero_bubble",
    "looped_bfs",
    "one_f_one_b",
    "sequence_one_f_one_b",
    "v_half",
    "v_min",
    "zero_bubble_1p",
    "zero_bubble_2p",
    "zero_bubble_h1",
    "zero_bubble_h2",
    "zero_bubble_v",
]
