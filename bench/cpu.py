"""The yardstick of CPUs, `flashdip bench cpu`: iterations a second, and time to equal quality.

The first table is of one network and one mathematics, the published default network, enlarging
bilinearly as published and by the nearest pixel: the published loop, what PyTorch does with it if
asked well, and our backend. Where an allocator keeps its pages the published loop is faster by
that alone, so every row has its ratio to the loop with either allocator. Where the CPU has no
convolutions in bfloat16 the rows in it are left out, and PyTorch asked well computes in float32.

The second is of what a user waits for: the iterations until the averaged output is as good as the
published network's peak less a margin were recorded once (`flashdip.bench.quality`), the seconds of
an iteration are measured here, and what is shown is the product.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from flashdip.bench import baselines, quality
from flashdip.bench.cases import PUBLISHED, Bench, Settings, configuration
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import judged, judged_plain
from flashdip.bench.curves import BACKEND, ours
from flashdip.bench.measure import Variant, worker
from flashdip.bench.scenarios import chosen
from flashdip.bench.suite import judge, results
from flashdip.bench.turns import Plan
from flashdip.bench.work import Work, count

JUDGED = 256  # pixels a side at most of the picture that shows whether a step is right
BLOCK = 0.5  # seconds of a sample
SETUP = 180.0  # seconds until a variant has made its first step
COMPILED = "compiled"  # begins the name of a row
COMPILATION = 150.0  # the same, where it is compiled, if there is time:
COMPILATION_SHARE = 1 / 6  # of all seconds at most, each time
SHARE_OF_COMPILATION = 5.0  # of the time, in rows of 256x256


@dataclass(frozen=True)
class Group:
    """Rows that take turns.

    Attributes:
        name: Begins the name of each.
        benches: The first is what ratios are taken to.
        weight: Share of the time.
        fits: Recorded, whose iterations the rows make; see `quality.read`.
    """

    name: str
    benches: tuple[Bench, ...]
    weight: float
    fits: tuple[dict[str, Any], ...] = ()


def convolves_bf16() -> bool:
    """Return whether this CPU has instructions for bfloat16, and oneDNN convolves with them.

    With AVX-512 alone oneDNN emulates them: on a Skylake a matrix product took four times as long
    as in float32. Without, PyTorch unfolds maps and multiplies without vectors: on a Zen 3 an
    iteration took 20 times as long (measured).
    """
    onednn = torch.backends.mkldnn.is_available()
    if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or any(
        capabilities.get(name) for name in ("avx512_bf16", "amx_bf16")
    )


def compiled_row(narrow: bool) -> str:
    """Return the name of the row that torch compiles, in bfloat16 or float32."""
    return f"{COMPILED} {'bf16' if narrow else 'fp32'}, pages kept"


def patience(seconds: float) -> float:
    """Return the seconds that compiling may take where everything may take so many."""
    return min(COMPILATION, COMPILATION_SHARE * seconds)


def loops(
    size: int, upsample: str, rounds: int, compiled: bool, narrow: bool, limit: float = COMPILATION
) -> Group:
    """Return the rows of one network at one size.

    Args:
        size: Side of the picture, in pixels.
        upsample: How the network enlarges.
        rounds: Samples of each row that are asked for.
        compiled: Whether there is a row that torch compiles.
        narrow: Whether there are rows in bfloat16.
        limit: Seconds until what is compiled has made its first step.
    """
    of = f"{upsample} {size}"
    small = min(size, JUDGED)
    shared = {"size": size, "fits": 1, "network": PUBLISHED, "upsample": upsample}
    shared |= {"rounds": rounds}
    settings: Settings = (("network.upsample", upsample),)

    def bench(
        name: str, make: Any, arguments: Any, precision: str, kept: bool, check: Any
    ) -> Bench:
        parameters = shared | {"precision": precision, "pages": "kept" if kept else "default"}
        if check is not None:
            parameters["judged_at"] = small
        return Bench(f"{of}: {name}", make, arguments, parameters, 1, check)

    listed = [
        bench(name, baselines.published, (size, False, "cpu", upsample, kept), "fp32", kept, None)
        for name, kept in (("published", False), ("published, pages kept", True))
    ]
    precisions = ("bf16", "fp32") if narrow else ("fp32",)
    for precision in precisions:
        made = (size, "cpu", BACKEND, precision, 1, PUBLISHED, False, settings)
        check = partial(right, small, precision, PUBLISHED, settings)
        name = f"{BACKEND} ({precision})"
        listed.append(bench(name, baselines.engine, made, precision, True, check))
    best = precisions[0]
    for name, whole, kept in (
        (f"eager {best}", False, False),
        (f"eager {best}, pages kept", False, True),
        *([(compiled_row(narrow), True, True)] if compiled else []),
    ):
        plain = (size, whole, "cpu", upsample, kept, best)
        check = partial(plain_right, small, upsample, whole, best, limit)
        listed.append(bench(name, baselines.plain, plain, best, kept, check))
    rows = len(listed) * (1 + (size / 256) ** 2) / 2
    return Group(of, tuple(listed), rows + SHARE_OF_COMPILATION * compiled)


def presets(size: int, rounds: int, listed: Sequence[str], fits: Sequence[dict[str, Any]]) -> Group:
    """Return an iteration of the published loop and of each preset, as a fit makes it.

    Args:
        size: Side of the picture, in pixels.
        rounds: Samples of each row that are asked for.
        listed: The presets.
        fits: Of these and of the published network, recorded.
    """
    of = f"quality {size}"
    shared = {"size": size, "fits": 1, "rounds": rounds}
    loop = {"network": PUBLISHED, "precision": "fp32", "pages": "default"}
    arguments: tuple[Any, ...] = (size, False, "cpu")
    benches = [Bench(f"{of}: published", baselines.published, arguments, shared | loop)]
    small = min(size, JUDGED)
    for name in listed:
        backend, precision = chosen(BACKEND, torch.device("cpu"), name)
        parameters = {"network": name, "backend": backend, "precision": precision, "pages": "kept"}
        benches.append(
            Bench(
                f"{of}: {name}",
                baselines.engine,
                (size, "cpu", backend, precision, 1, name, True),
                shared | parameters | {"judged_at": small},
                1,
                partial(right, small, precision, name, ()),
            )
        )
    weight = len(benches) * (1 + (size / 256) ** 2) / 2
    return Group(of, tuple(benches), weight, tuple(fits))


@functools.cache
def right(size: int, precision: str, name: str, settings: Settings) -> dict[str, Any]:
    """Judge our backend, once for all rows that it is judged for."""
    return judged(size, "cpu", BACKEND, precision, name, 1, settings)


@functools.cache
def plain_right(
    size: int, upsample: str, compiled: bool, precision: str, limit: float
) -> dict[str, Any]:
    """Judge what PyTorch does with the network; compilation may take `limit` seconds."""
    if not compiled:
        return judged_plain(size, upsample, precision)
    with worker(_compiled, size, upsample, precision, limit=limit) as running:
        running.seconds(steps=1, warmup=0)
        return running.facts()


def _compiled(size: int, upsample: str, precision: str) -> Variant:
    """Return the variant whose one step is to judge what is compiled."""
    found: dict[str, Any] = {}
    return Variant(
        lambda: found.update(judged_plain(size, upsample, precision, compiled=True)),
        facts=lambda: found,
    )


def groups(
    sizes: Sequence[int],
    upsamplings: Sequence[str],
    rounds: int,
    compiled: Sequence[int],
    fits: Mapping[str, Any] | None,
    narrow: bool,
    limit: float = COMPILATION,
) -> tuple[list[Group], dict[str, str]]:
    """Return all rows, and what is left out with the reason.

    Args:
        sizes: Sides of the pictures, in pixels.
        upsamplings: How the network enlarges.
        rounds: Samples of each row.
        compiled: Sizes at which torch.compile is measured.
        fits: What was recorded; see `quality.read`. None: nothing.
        narrow: Whether bfloat16 is measured.
        limit: Seconds until what is compiled has made its first step.
    """
    found, left_out = [], {}
    for size in sizes:
        for upsample in upsamplings:
            found.append(loops(size, upsample, rounds, size in compiled, narrow, limit))
            if size not in compiled:
                name = f"{upsample} {size}: {compiled_row(narrow)}"
                left_out[name] = "compiled at no such size: see --compiled"
            if not narrow:
                name = f"{upsample} {size}: {BACKEND} (bf16)"
                left_out[name] = "this CPU has no convolutions in bfloat16"
    if fits is None:
        left_out["quality"] = "nothing was recorded: see 'python -m flashdip.bench.quality'"
        return found, left_out
    valid = [fit for fit in fits["fits"] if quality.current(fit)]
    recorded, size = {each.preset for each in quality.reached(valid)}, fits["size"]
    for name in [PUBLISHED, *ours()]:
        if name not in recorded:
            row = "published" if name == PUBLISHED else name
            left_out[f"quality {size}: {row}"] = (
                f"{name} was not recorded as it is now: see 'python -m flashdip.bench.quality'"
            )
    if PUBLISHED in recorded:
        listed = [name for name in ours() if name in recorded]
        found.append(presets(size, rounds, listed, valid))
    return found, left_out


def run(
    listed: Sequence[Group],
    *,
    rounds: int,
    seconds: float,
    ceilings: Ceilings,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Judge all rows, measure group after group; return what `schema.document` takes as `found`.

    Args:
        listed: See `groups`.
        rounds: The most samples of each row.
        seconds: That everything may take, gates and set-up included.
        ceilings: Of the CPU.
        tell: Is told what is being done.
    """
    deadline = time.monotonic() + seconds
    judged_groups = [judge(group.benches, tell) for group in listed]
    found: dict[str, Any] = {"results": [], "left_out": {}}
    for index, (group, own) in enumerate(zip(listed, judged_groups, strict=True)):
        rest = sum(each.weight for each in listed[index:])
        share = (deadline - time.monotonic()) * group.weight / rest
        limits = {b.name: patience(seconds) for b in group.benches if f": {COMPILED} " in b.name}
        plan = Plan(share, rounds, block=BLOCK, setup=SETUP, limits=limits)
        base = group.benches[0].name
        rows = results(own, plan, work=step_work, ceilings=ceilings, baseline=base, tell=tell)
        found["results"] += [
            to_quality(row, group.fits) if group.fits else row for row in rows["results"]
        ]
        found["left_out"] |= rows["left_out"]
    return found


def step_work(bench: Bench) -> Mapping[tuple[str, str], Work]:
    """Count one iteration of a row's network."""
    upsample = bench.parameters.get("upsample")
    settings: Settings = (("network.upsample", upsample),) if upsample else ()
    config = configuration("auto", bench.parameters["network"], settings)
    size = bench.parameters["size"]
    return count(config, (size, size), bench.parameters["precision"])


def to_quality(row: Mapping[str, Any], fits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row with the fits of its preset in "facts": lists with an entry for each.

    "iterations_to_target" are those of each run, null: it is never reached; "seconds_to_target" is
    their product with the median seconds of an iteration and the runs. "..._to_peak" are the same
    for the published network's peak itself.
    """
    preset = row["parameters"]["network"]
    own = [each for each in quality.reached(list(fits)) if each.preset == preset]
    precisions = {
        (fit["picture"], fit["seed"]): fit["precision"] for fit in fits if fit["preset"] == preset
    }
    median = row["seconds"]["median"]
    facts = {
        "picture": [each.picture for each in own],
        "seed": [each.seed for each in own],
        "runs": [each.runs for each in own],
        "recorded_in": [precisions[each.picture, each.seed] for each in own],
        "target_db": [each.target_db for each in own],
        "peak_db": [each.peak_db for each in own],
        "peak_at": [each.peak_at for each in own],
    }
    for goal, counts in (
        ("target", [each.reached_at for each in own]),
        ("peak", [each.matched_at for each in own]),
    ):
        facts[f"iterations_to_{goal}"] = counts
        facts[f"seconds_to_{goal}"] = [
            None if at is None else median * each.runs * at
            for each, at in zip(own, counts, strict=True)
        ]
    return {**row, "facts": row["facts"] | facts}
