"""What should I fix first? The parts of a profile, by what is to be gained at most."""

from collections.abc import Mapping
from typing import Any

from flashdip.bench.show import number

MOST = 5  # lines


def advice(record: Mapping[str, Any]) -> list[str]:
    """Return the answer, most to gain first; see `profiling.Profile`.

    What a part could gain is what it takes beyond its roof. Waits come first whatever they cost:
    between two readings of the statistics there must be none.
    """
    whole, lines = record["step"]["profiled_ms"], []
    waiting = record["waits"]["in_iterations"]
    if waiting:
        named = ", ".join(f"{name} {number} times" for name, number in waiting.items())
        lines.append(f"the host waits for the device within iterations, where it must not: {named}")
    gains: list[tuple[float, str]] = []
    for part in record["parts"]:
        if part["roof_ms"] is None:
            at, gain = "not counted, so that no roof is known", part["ms"]
        else:
            gain = max(0.0, part["ms"] - part["roof_ms"])
            at = f"at {part['roof_share']:.1%} of its roof"
        name = f"{part['name']} {part['pass']}".strip()
        gains.append((gain, f"{name}: {number(part['ms'], 3)} ms, {at}"))
    gap = record["gaps"]
    where = (
        "between operations, in Python and in torch's dispatch"
        if gap["launches"] is None
        else f"between kernels, {gap['launches']:.0f} launches an iteration"
    )
    gains.append((gap["ms"], f"gaps: {number(gap['ms'], 3)} ms {where}"))
    gains.sort(key=lambda pair: -pair[0])
    for gain, line in gains[: MOST - len(lines)]:
        most = f"at most {number(gain, 3)} ms ({gain / whole:.0%} of the step) to gain"
        lines.append(f"{line}: {most}")
    return [f"{number}. {line}" for number, line in enumerate(lines, 1)]
