"""The small picture: every action has a bar where and when it ran, and a label never leaves its bar."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given

from pipework.errors import InputError
from pipework.plan import Layout, Schedule, Timeline
from pipework.show.picture import picture
from tests.show.timelines import timelines


@given(timelines())
def test_every_action_has_a_bar(timeline: Timeline) -> None:
    root = ET.fromstring(picture(timeline, width=500).replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    bars = [bar.attrib for bar in root.iter("rect") if bar.get("class") != "idle"]
    spans = timeline.spans
    assert len(bars) == len(spans)
    for bar, span in zip(bars, spans, strict=True):
        left = (span.start - timeline.start) / timeline.makespan * 448 + 52
        assert float(bar["x"]) == pytest.approx(left, abs=0.01)
        assert span.rank * 20 <= float(bar["y"]) < span.rank * 20 + 18
    idle = [row.attrib for row in root.iter("rect") if row.get("class") == "idle"]
    assert all(float(row["x"]) + float(row["width"]) == pytest.approx(500, abs=0.01) for row in idle)
    labels = [text for text in root.iter("text") if text.get("class") == "bar"]
    assert {text.text for text in labels} <= {str(span.action.microbatch) for span in spans}


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match="empty"):
        picture(Timeline.recorded(Schedule("nothing", Layout.loop(1), 1, ((),)), []))
