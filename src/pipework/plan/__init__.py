"""Planning in pure Python: which rank does what and when, and the proof that it will finish.

`layout + microbatches -> schedule -> timeline` to look at, and `schedule -> programs` to run.
"""

from pipework.plan.action import Action, Kind
from pipework.plan.balance import balance
from pipework.plan.bound import bound
from pipework.plan.channels import Channels
from pipework.plan.check import check
from pipework.plan.costs import Costs
from pipework.plan.families import (
    FAMILIES,
    Family,
    chimera,
    dual_pipe,
    dual_pipe_v,
    forward_only,
    gpipe,
    hanayo,
    interleaved_one_f_one_b,
    interleaved_zero_bubble,
    looped_bfs,
    one_f_one_b,
    sequence_one_f_one_b,
    v_half,
    v_min,
    zero_bubble_1p,
    zero_bubble_2p,
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_v,
)
from pipework.plan.layout import Layout
from pipework.plan.lower import lower
from pipework.plan.measured import measured
from pipework.plan.program import Compute, Instruction, Program, Receive, Send
from pipework.plan.prove import prove
from pipework.plan.rules import Transfer, crossings, is_local, needs, transfers
from pipework.plan.schedule import Schedule
from pipework.plan.search import Found, search
from pipework.plan.simulate import simulate
from pipework.plan.text import grid
from pipework.plan.timeline import Span, Timeline

__all__ = [
    "FAMILIES",
    "Action",
    "Channels",
    "Compute",
    "Costs",
    "Family",
    "Found",
    "Instruction",
    "Kind",
    "Layout",
    "Program",
    "Receive",
    "Schedule",
    "Send",
    "Span",
    "Timeline",
    "Transfer",
    "balance",
    "bound",
    "check",
    "chimera",
    "crossings",
    "dual_pipe",
    "dual_pipe_v",
    "forward_only",
    "gpipe",
    "grid",
    "hanayo",
    "interleaved_one_f_one_b",
    "interleaved_zero_bubble",
    "is_local",
    "looped_bfs",
    "lower",
    "measured",
    "needs",
    "one_f_one_b",
    "prove",
    "search",
    "sequence_one_f_one_b",
    "simulate",
    "transfers",
    "v_half",
    "v_min",
    "zero_bubble_1p",
    "zero_bubble_2p",
    "zero_bubble_h1",
    "zero_bubble_h2",
    "zero_bubble_v",
]
