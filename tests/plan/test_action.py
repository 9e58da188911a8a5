from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipework.errors import ScheduleError
from pipework.plan import Action, Kind

actions = st.builds(Action, st.integers(0, 10**6), st.sampled_from(Kind), st.integers(0, 10**6))


@given(actions)
def test_what_is_written_is_read(action: Action) -> None:
    assert Action.parse(str(action)) == action


@given(actions)
def test_a_copy_from_another_process_is_found(action: Action) -> None:
    assert pickle.loads(pickle.dumps(action)) in {action}


@pytest.mark.parametrize(
    "text", ["", "2", "F0", "2F", "2X0", "2f0", "-1F0", "02F0", "2F00", " 2F0", "2F0\n", "2F0>3", "²F0"]
)
def test_junk_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="is not an action"):
        Action.parse(text)
