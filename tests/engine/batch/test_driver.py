"""What is given out together, what is given out again, and what the journal says of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flashdip.engine.batch.driver import ATTEMPTS, Listed, drive
from flashdip.engine.batch.jobs import Job, Opened, Outcome
from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.pool import Event, Lost
from flashdip.engine.batch.worker import Hopeless
from flashdip.engine.errors import OutputError


@dataclass(frozen=True)
class Named:
    name: str
    group: tuple[Any, ...] = ()
    pixels: int = 1
    memory: int = 0

    def open(self) -> Opened | Outcome:
        raise AssertionError("the driver opens no job")


@dataclass
class Scripted:
    """A pool whose workers do what a script says: a word for each name, one a poll."""

    script: dict[str, list[str]] = field(default_factory=dict)
    size: int = 2
    together: int = 8
    given: list[list[str]] = field(default_factory=list)
    at_work: list[list[str]] = field(default_factory=list)

    @property
    def free(self) -> int:
        return self.size - len(self.at_work)

    @property
    def busy(self) -> int:
        return len(self.at_work)

    def holds(self, memory: int) -> bool:
        return True

    def submit(self, jobs: Sequence[Job]) -> None:
        assert self.free
        self.given.append([job.name for job in jobs])
        self.at_work.append([job.name for job in jobs])

    def poll(self, seconds: float) -> list[Event]:
        events: list[Event] = []
        names = self.at_work.pop(0)
        while names:
            words = self.script.get(names[0], [])
            word = words.pop(0) if words else "done"
            if word == "lost":
                events.append(Lost(tuple(names), "the power went"))
                break
            if word == "full":
                events.append(Hopeless("the disk is full"))
                break
            events.append(Outcome(names.pop(0), "done", record={"word": word}))
        return events

    def close(self) -> None:
        pass


def run(pool: Scripted, jobs: list[Named], journal: Journal) -> dict[str, Outcome]:
    source = Listed([(job, f"from {job.name}") for job in jobs])
    outcomes = [each for each in drive(source, pool, journal) if each is not None]
    assert len({each.name for each in outcomes}) == len(outcomes)
    return {each.name: each for each in outcomes}


def test_jobs_of_a_group_are_given_out_together_fewer_towards_the_end() -> None:
    jobs = [Named(f"small{i}", ("small",), 10) for i in range(3)]
    jobs += [Named(f"large{i}", ("large",), 99) for i in range(20)]
    pool = Scripted()
    with Journal(":memory:") as journal:
        assert len(run(pool, jobs, journal)) == 23
        assert journal.counts() == {"done": 23}
        assert (journal.left, journal.pixels_left, journal.pixels_done) == (0, 0, 30 + 20 * 99)
    groups = [{name.rstrip("0123456789") for name in names} for names in pool.given]
    assert all(len(group) == 1 for group in groups)
    assert groups.index({"small"}) > 0  # the large ones come first
    sizes = [len(names) for names in pool.given]
    assert sizes[0] == 5  # a fourth
    assert sizes[-1] == 1
    assert sorted(sizes, reverse=True) == sizes


def test_jobs_of_a_lost_worker_are_given_out_one_by_one_and_given_up_in_the_end() -> None:
    jobs = [Named(str(i)) for i in range(20)]
    pool = Scripted({"1": ["lost"] * ATTEMPTS, "5": ["lost"]})
    with Journal(":memory:") as journal:
        outcomes = run(pool, jobs, journal)
        rows = {row["name"]: row for row in journal.rows()}
    assert len(outcomes) == 20
    failed = [name for name, outcome in outcomes.items() if outcome.state == "failed"]
    assert failed == ["1"]
    assert "the power went" in (outcomes["1"].reason or "")
    assert (rows["1"]["attempts"], rows["1"]["state"]) == (ATTEMPTS, "failed")
    assert (rows["5"]["attempts"], rows["5"]["state"]) == (1, "done")
    assert rows["5"]["source"] == "from 5"
    seen: set[str] = set()
    for names in pool.given:
        again = [name for name in names if name in seen]
        assert not again or len(names) == 1
        seen.update(names)


def test_a_full_disk_ends_it_all_and_the_journal_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    jobs = [Named(str(i)) for i in range(6)]
    with Journal(path) as journal, pytest.raises(OutputError, match="disk is full"):
        run(Scripted({"3": ["full"]}), jobs, journal)
    with Journal(path) as journal:
        assert len(run(Scripted(), jobs, journal)) == 6
        assert journal.run == 2
        assert journal.counts() == {"done": 6}


def test_an_interruption_leaves_what_runs(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    jobs = [Named(str(i)) for i in range(40)]
    with Journal(":memory:") as journal:
        source = Listed([(job, "") for job in jobs])
        ended = list(drive(source, Scripted(), journal, interrupted=lambda: next(answers)))
        counts = journal.counts()
    done = [each for each in ended if each is not None]
    assert 0 < len(done) < 40
    assert counts == {"done": len(done), "waiting": 40 - len(done)}


class Repeating:
    """Returns the same job in two looks, the second while it runs."""

    looks = 0

    @property
    def over(self) -> bool:
        return self.looks >= 2

    def look(self) -> list[tuple[Job, str]]:
        self.looks += 1
        return [(Named("a"), "same")]


def test_what_changes_while_it_runs_is_done_again_afterwards() -> None:
    @dataclass
    class Slow(Scripted):
        polls: int = 0

        def poll(self, seconds: float) -> list[Event]:
            self.polls += 1
            return [] if self.polls == 1 else super().poll(seconds)

    pool = Slow()
    with Journal(":memory:") as journal:
        outcomes = [each for each in drive(Repeating(), pool, journal) if each is not None]
        assert journal.left == 0
    assert [each.name for each in outcomes] == ["a", "a"]
    assert pool.given == [["a"], ["a"]]


def test_a_journal_is_one_drivers(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal"), pytest.raises(OutputError, match="another batch uses it"):
        Journal(tmp_path / "journal")
    (tmp_path / "text").write_text("no journal" * 1000)
    with pytest.raises(OutputError, match="loses no picture"):
        Journal(tmp_path / "text")
    with pytest.raises(OutputError, match="cannot be written"):
        Journal(tmp_path / "nowhere" / "journal")
