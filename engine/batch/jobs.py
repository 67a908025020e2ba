"""What a job is to the driver and to a worker, wherever it comes from."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from flashdip.engine.result import Result
    from flashdip.engine.tasks import Statement

State = Literal["done", "kept", "failed"]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a job ended.

    Attributes:
        name: Of the job.
        state: "done"; "kept": an earlier run had published it already; "failed".
        reason: Why it failed, one line.
        record: Plain values about it, for the summary.
        thumbnails: Small WebP files of the picture before and after; None: there are none.
        result: For who asked from Python.
    """

    name: str
    state: State
    reason: str | None = None
    record: dict[str, Any] = field(default_factory=dict)
    thumbnails: tuple[bytes, bytes] | None = None
    result: "Result | None" = None


@dataclass(frozen=True, eq=False)
class Opened:
    """A job whose input was read and is ready to be fitted.

    Attributes:
        statement: What is fitted, and how.
        finish: Publishes the result, or hands it over; raises `OutputError` if it cannot.
        tile: Side of the tiles that it is cut into; None: as the memory asks.
        scratch: How the name of a folder begins where tiles can be kept, to go on from; None: there
            is no such place.
    """

    statement: "Statement"
    finish: "Callable[[Result], Outcome]"
    tile: int | None = None
    scratch: str | None = None


class Job(Protocol):
    """One picture to restore; travels to a worker by pickle."""

    @property
    def name(self) -> str:
        """What it is called, among all jobs of its batch."""
        ...

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for jobs that a worker can probably fit in one step; it need not be certain."""
        ...

    @property
    def pixels(self) -> int:
        """How large its picture is, as far as is known; at least 1."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that a worker on a CPU takes for it, beside its own; 0: not known."""
        ...

    def open(self) -> Opened | Outcome:
        """Read the input; or say that an earlier run published this already.

        Raises:
            FlashDIPError: The input cannot be used.
        """
        ...
