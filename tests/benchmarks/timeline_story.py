"""What happened to one request, read from the logs of the ranks (`timeline.py`), and its picture."""

from __future__ import annotations

import datetime
import pathlib
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\dT[\d:.]+)Z (?P<level>\w+) +(?P<logger>\S+) (?P<event>\S+)(?P<rest>.*)")


@dataclass(frozen=True, slots=True)
class Event:
    time: float
    """Seconds since the epoch, at its end."""
    name: str
    fields: dict[str, str]

    @property
    def began(self) -> float:
        return self.time - float(self.fields.get("seconds", 0.0))


def parse(line: str) -> Event | None:
    """None of a line that is no event, of a traceback for example."""
    found = LINE.fullmatch(line.strip())
    if found is None:
        return None
    when = datetime.datetime.fromisoformat(found["time"]).replace(tzinfo=datetime.UTC).timestamp()
    pairs = (word.partition("=") for word in shlex.split(found["rest"]) if "=" in word)
    return Event(when, found["event"], {name: value for name, _, value in pairs})


@dataclass(frozen=True, slots=True)
class Written:
    posted: float
    is_posted: float
    """When the call returned; a transport may copy within it."""
    out: float
    num_pages: int
    num_bytes: int
    has_slot: bool


@dataclass(slots=True)
class Story:
    """Times in seconds since the epoch."""

    reserved: float
    accepted: float
    chunks: list[tuple[float, float, int]] = field(default_factory=list)
    """(began, ended, tokens)."""
    writes: list[Written] = field(default_factory=list)
    committed: float = 0.0
    decoding: float = 0.0
    """The first decode step began."""
    decoded: float = 0.0
    released: float = 0.0

    @property
    def began(self) -> float:
        return min(self.reserved, self.accepted)

    @property
    def computed(self) -> float:
        return self.chunks[-1][1]

    @property
    def computing(self) -> float:
        """Seconds from the first chunk's start to the last one's end."""
        return self.computed - self.chunks[0][0]

    @property
    def share_overlapped(self) -> float:
        total = sum(write.num_bytes for write in self.writes)
        return sum(write.num_bytes for write in self.writes if write.out <= self.computed) / total

    @property
    def num_pages_posted_while_computing(self) -> int:
        return sum(write.num_pages for write in self.writes if write.posted < self.computed)

    def as_rows(self) -> list[dict[str, Any]]:
        """Milliseconds since its start, in order."""

        def since(moment: float) -> float:
            return round((moment - self.began) * 1e3, 3)

        rows: list[dict[str, Any]] = [
            {"what": "reserved", "ms": since(self.reserved)},
            {"what": "accepted by prefill", "ms": since(self.accepted)},
        ]
        rows += [{"what": "chunk", "ms": since(a), "until ms": since(b), "tokens": tokens} for a, b, tokens in self.chunks]
        for write in self.writes:
            what = "slot and commit" if write.has_slot else "pages"
            rows.append(
                {
                    "what": what,
                    "ms": since(write.posted),
                    "posted ms": since(write.is_posted),
                    "until ms": since(write.out),
                    "pages": write.num_pages,
                    "MB": round(write.num_bytes / 1e6, 3),
                }
            )
        rows.append({"what": "committed", "ms": since(self.committed)})
        rows.append({"what": "first decode step", "ms": since(self.decoding), "until ms": since(self.decoded)})
        rows.append({"what": "pages of prefill released", "ms": since(self.released)})
        return sorted(rows, key=lambda row: float(row["ms"]))


def read_story(events: list[Event], public_id: str) -> Story:
    """`events`: of prefill and decode rank. Raises KeyError naming what is missing."""
    by_name: dict[str, list[Event]] = {}
    for event in events:
        ids = event.fields.get("request_ids", event.fields.get("request_id", ""))
        if any(name.startswith(public_id) for name in ids.split(",")):
            by_name.setdefault(event.name, []).append(event)
    story = Story(reserved=by_name["decode.accepted"][0].time, accepted=by_name["prefill.accepted"][0].time)
    story.chunks = [(event.began, event.time, int(event.fields["num_tokens"])) for event in by_name["prefill.step"]]
    out = {event.fields["write_id"]: event.time for event in by_name["transfer.out"]}
    story.writes = [
        Written(
            posted=event.began,
            is_posted=event.time,
            out=out[event.fields["write_id"]],
            num_pages=int(event.fields["num_pages"]),
            num_bytes=int(event.fields["num_bytes"]),
            has_slot=event.fields["has_slot"] == "True",
        )
        for event in by_name["transfer.posted"]
    ]
    story.committed = by_name["transfer.committed"][0].time
    started = by_name["decode.started"][0]
    story.decoding, story.decoded = started.began, started.time
    story.released = by_name["prefill.done"][0].time
    return story


def draw(story: Story, title: str, path: pathlib.Path) -> None:
    """Two panels: all of it, and what lies between the last chunk and the first decode step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lanes = ("prefill computes", "pages travel", "slot and commit", "decode")

    def since(moment: float) -> float:
        return (moment - story.began) * 1e3

    figure, panels = pyplot.subplots(2, 1, figsize=(11, 6.5))
    for axes in panels:
        for number, (began, ended, tokens) in enumerate(story.chunks):
            axes.barh(0, since(ended) - since(began), left=since(began), color=("tab:blue", "tab:cyan")[number % 2], height=0.7)
            axes.text((since(began) + since(ended)) / 2, 0, f"{tokens:,}", ha="center", va="center", fontsize=8, clip_on=True)
        for write in story.writes:
            lane = 2 if write.has_slot else 1
            axes.barh(lane, since(write.out) - since(write.posted), left=since(write.posted), color="tab:orange", height=0.7, alpha=0.8)
            pages = f"{write.num_pages} page{'s' if write.num_pages != 1 else ''}"
            label = pages if not write.has_slot else f"slot + {pages}" if write.num_pages else "slot"
            axes.text(since(write.posted), lane - 0.45, label, fontsize=7, va="bottom", clip_on=True)
        axes.barh(3, since(story.decoded) - since(story.decoding), left=since(story.decoding), color="tab:green", height=0.7)
        marks = (
            (3, story.reserved, "reserved"),
            (2, story.committed, "commit arrives"),
            (3, story.decoding, "first decode step"),
            (0, story.computed, "first token"),
            (1, story.released, "prefill's pages released"),
        )
        for lane, moment, text in marks:
            axes.plot([since(moment)] * 2, [lane - 0.45, lane + 0.45], color="black", linewidth=1)
            place, aligned = (lane, "center") if lane == 1 else (lane + 0.45, "top")
            axes.text(since(moment), place, f" {text} {since(moment):.2f}", fontsize=7, va=aligned, clip_on=True)
        axes.set_yticks(range(len(lanes)), lanes)
        axes.invert_yaxis()
    end, left, right = since(max(story.decoded, story.released)), since(story.computed), since(story.decoding)
    panels[0].set_xlim(-0.01 * end, 1.15 * end)
    panels[1].set_xlim(left - 0.3 * (right - left), right + 0.7 * (right - left))
    panels[0].set_title(title, fontsize=9)
    panels[1].set_title("from the end of the last chunk to the first decode step", fontsize=9)
    panels[1].set_xlabel("ms since the request reached the ranks")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
