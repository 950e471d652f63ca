"""Choice by measurement, with measurements that are made up: what is tried, kept, cached, taken up again and merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.lower.harness import build
from tests.lower.test_choices import ISA, conv, graph_of, random, sites_of

from vivace.base.dtypes import DType
from vivace.base.errors import InputError
from vivace.base.machine import ISAS, with_extras
from vivace.building import apply_precision
from vivace.graph.graph import Type
from vivace.lower.candidates import Rates, neighbours
from vivace.lower.choices import DEFAULT, Choice, Choices, Site
from vivace.lower.lowering import lower
from vivace.lower.plan import steps_of
from vivace.lower.timings import TimingCache, merge, read, summary, write
from vivace.lower.tune import WHOLE, Run, Tuning

RATES = Rates({"f32": 300.0, "bf16": 600.0, "i8": 1200.0}, 100.0, 30.0, 2)
WAYS = [Choice(rows=r) for r in range(1, 13)]
SITE = sites_of(lower(graph_of("matmul")[0], ISA))[0]
SITES = [Site("a", SITE.spec), Site("b", SITE.spec), Site("tiny", SITE.spec)]


@dataclass
class Machine:
    """Sites that take `base` ns by default and less or more by choice; noise that comes around; a clock that a run and
    a build advance."""

    factors: Mapping[tuple[str, Choice], float] = field(default_factory=dict)
    base: Mapping[str, float] = field(default_factory=lambda: {"a": 500.0, "b": 300.0, "tiny": 1.0})
    noise: float = 0.0
    ns: float = 0.0
    n_built: int = 0
    stops_after: int = 10**9
    build_ns: float = 100.0

    def measure(self, versions: Sequence[Mapping[str, Choice]], rounds: int, until: float) -> list[list[Run]]:
        found = []
        for i, version in enumerate(versions):
            if i >= 2 and self.ns > until:
                break
            self.n_built += 1
            if self.n_built > self.stops_after:
                raise KeyboardInterrupt
            self.ns += self.build_ns
            runs = []
            for k in range(rounds):
                shake = 1 + self.noise * ((k * 7 + i * 3) % 5)
                run = {
                    s: ns * self.factors.get((s, version.get(s, DEFAULT)), 1.0) * shake for s, ns in self.base.items()
                }
                runs.append(run | {WHOLE: sum(run.values())})
            found.append(runs)
        return found


def cache_of(folder: Path, machine: str = "here", threads: int = 2, file: str = "") -> TimingCache:
    return TimingCache(folder / file if file else None, folder / "own.jsonl", machine, "avx512", threads)


def search(
    machine: Machine, cache: TimingCache, effort: str = "fast", budget: float = 1e9, sites: Sequence[Site] = SITES
) -> Tuning:
    return Tuning(sites, lambda site, now: WAYS, machine.measure, cache, effort, budget, lambda: machine.ns)


def test_the_fastest_way_is_found_and_kept(tmp_path: Path) -> None:
    machine = Machine({("a", WAYS[2]): 0.7, ("a", WAYS[5]): 0.6, ("b", WAYS[1]): 1.4, ("tiny", WAYS[0]): 0.1})
    result = search(machine, cache_of(tmp_path)).run()
    assert result.choices == {"a": WAYS[5]}
    assert [c.ratio for c in result.changes] == [pytest.approx(0.6)]
    assert result.whole == pytest.approx((300 + 300 + 1) / 801)
    again = cache_of(tmp_path)
    assert again.decided() == {"a": WAYS[5], "b": DEFAULT, "tiny": DEFAULT}
    assert again.choices().by_key == {"a": WAYS[5]}


def test_what_is_not_faster_beyond_noise_is_not_kept(tmp_path: Path) -> None:
    machine = Machine({("a", c): 0.99 for c in WAYS}, noise=0.1)
    assert search(machine, cache_of(tmp_path)).run().choices == {}


def test_a_way_that_is_faster_by_chance_is_found_out(tmp_path: Path) -> None:
    class Lucky(Machine):
        def measure(self, versions: Sequence[Mapping[str, Choice]], rounds: int, until: float) -> list[list[Run]]:
            if rounds > 10:  # when it is confirmed, the luck is gone
                self.factors = {}
            return super().measure(versions, rounds, until)

    assert search(Lucky({("a", WAYS[3]): 0.5}), cache_of(tmp_path)).run().choices == {}


def test_nothing_is_kept_that_makes_the_model_slower(tmp_path: Path) -> None:
    """A site that is faster at the cost of its neighbour."""

    class Shared(Machine):
        def measure(self, versions: Sequence[Mapping[str, Choice]], rounds: int, until: float) -> list[list[Run]]:
            found = super().measure(versions, rounds, until)
            for version, runs in zip(versions, found):
                slower = 500.0 if version.get("a", DEFAULT) == WAYS[0] else 0.0
                runs[:] = [{**r, WHOLE: r[WHOLE] + slower} for r in runs]
            return found

    result = search(Shared({("a", WAYS[0]): 0.5}), cache_of(tmp_path)).run()
    assert result.choices == {} and result.whole == 1.0
    assert cache_of(tmp_path).decided()["a"] == DEFAULT


def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    factors = {("a", WAYS[1]): 0.5}
    machine = Machine(factors, stops_after=8)  # within the second turn
    with pytest.raises(KeyboardInterrupt):
        search(machine, cache_of(tmp_path)).run()
    tried = cache_of(tmp_path).tried("a")
    assert len(tried) == 4 and tried[WAYS[1]] == pytest.approx(0.5)
    machine.stops_after = 10**9
    second = search(machine, cache_of(tmp_path))
    assert second.run().choices == {"a": WAYS[1]}
    assert not set(tried) & (second.tried["a"] - {DEFAULT} - set(tried))
    assert second.result.n_measured == 2 * 8  # of a and b, four in each of two turns


def test_a_budget_ends_the_search_and_full_goes_on_later(tmp_path: Path) -> None:
    machine = Machine({("a", WAYS[11]): 0.5})
    short = search(machine, cache_of(tmp_path), "full", budget=1000.0)
    result = short.run()
    assert not result.is_complete and result.choices == {}
    assert "a" in cache_of(tmp_path).decided("fast") and "a" not in cache_of(tmp_path).decided("full")
    result = search(machine, cache_of(tmp_path), "full").run()
    assert result.is_complete and result.choices == {"a": WAYS[11]}
    assert cache_of(tmp_path).decided("full")["a"] == WAYS[11]


def test_a_site_that_was_never_reached_is_not_decided(tmp_path: Path) -> None:
    machine = Machine({("a", WAYS[0]): 0.5})
    assert not search(machine, cache_of(tmp_path), budget=0.0).run().is_complete
    assert cache_of(tmp_path).decided() == {"tiny": DEFAULT}  # which takes too little to be looked at
    assert search(machine, cache_of(tmp_path)).run().choices == {"a": WAYS[0]}


def test_versions_that_there_is_no_time_for_stay_untried(tmp_path: Path) -> None:
    machine = Machine({("a", WAYS[0]): 0.5}, build_ns=1000.0)
    tuning = search(machine, cache_of(tmp_path), budget=3000.0)
    assert tuning.run().choices == {"a": WAYS[0]}
    assert tuning.tried["a"] == {DEFAULT, WAYS[0]}


def test_damaged_lines_and_unknown_settings_are_passed_over(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    good = cache.timing("a", "matmul", WAYS[0], 0.5, 10.0, "fast")
    data = json.loads(good.line())
    bad = [
        "{", "null", "[]", good.line()[:40], json.dumps(data | {"format": 99}), json.dumps(data | {"ratio": "fast"}),
        json.dumps(data | {"choice": {"warp": 9}}), json.dumps(data | {"choice": {"rows": -3}}),
        json.dumps(data | {"decided": "maybe"}),
        json.dumps(data | {"choice": []}), json.dumps(data | {"choice": "x"}), json.dumps(data | {"decided": []}),
        json.dumps(data | {"threads": float("inf")}), json.dumps(data | {"threads": float("nan")}),
        json.dumps({k: v for k, v in data.items() if k != "site"}), "\udcff",
    ]  # fmt: skip
    text = "\n".join([*bad, good.line()])
    (tmp_path / "own.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert read(tmp_path / "own.jsonl") == [good]
    assert cache_of(tmp_path).decided() == {"a": WAYS[0]}


def test_lines_of_other_machines_do_not_count_but_stay(tmp_path: Path) -> None:
    for machine, threads in (("there", 2), ("here", 1)):
        other = cache_of(tmp_path, machine, threads)
        other.add([other.timing("a", "matmul", WAYS[0], 0.5, 10.0, "fast")])
    assert cache_of(tmp_path).decided() == {}
    assert len(read(tmp_path / "own.jsonl")) == 2


def test_lines_of_another_version_do_not_count_but_stay(tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    mine = cache.timing("a", "matmul", WAYS[0], 0.5, 10.0, "fast")
    data = json.loads(mine.line())
    old = [data | {"version": "0.0.1", "choice": {"rows": 7}}, {k: v for k, v in data.items() if k != "version"}]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert cache_of(tmp_path).decided() == {}
    cache_of(tmp_path).add([mine])
    assert cache_of(tmp_path).decided() == {"a": WAYS[0]}
    write(path, merge(read(path)))
    assert sorted(t.version for t in read(path)) == ["", "0.0.1", mine.version]


def test_files_are_shipped_and_merged(tmp_path: Path) -> None:
    for name, choice, decided in (("one", WAYS[0], "fast"), ("two", WAYS[1], "full"), ("three", WAYS[2], "fast")):
        cache = TimingCache(tmp_path / f"{name}.jsonl", None, "here", "avx512", 2)
        cache.add([cache.timing("a", "matmul", choice, 0.5, 10.0, decided), cache.timing(name, "x", choice, 0.9, 1.0)])
    timings = merge(t for name in ("one", "two", "three") for t in read(tmp_path / f"{name}.jsonl"))
    write(tmp_path / "all.jsonl", timings)
    assert summary(timings) == {("here", "avx512", 2): {"measured": 3, "decided": 1, "changed": 1}}
    shipped = cache_of(tmp_path, file="all.jsonl")
    assert shipped.decided("full") == {"a": WAYS[1]}  # more effort counts more than later
    assert shipped.tried("three") == {WAYS[2]: 0.9}
    shipped.add([shipped.timing("b", "matmul", WAYS[3], 0.5, 10.0, "fast")])
    assert cache_of(tmp_path).decided() == {"b": WAYS[3]}  # the machine's own file learns what the user's does
    assert read(tmp_path / "all.jsonl")[-1].site == "b"


def test_a_file_that_cannot_be_written_is_an_error_the_own_is_not(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").mkdir()
    cache = cache_of(tmp_path)
    cache.add([cache.timing("a", "matmul", WAYS[0], 0.5, 10.0)])
    wrong = TimingCache(tmp_path / "own.jsonl", None, "here", "avx512", 2)
    with pytest.raises(InputError, match="cannot write"):
        wrong.add([wrong.timing("a", "matmul", WAYS[0], 0.5, 10.0)])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda b, x: b.matmul(x, b.const(random(512, 512))), (256, 512)),
        (lambda b, x: conv(b, x, 128, 1), (1, 28, 28, 256)),
        (lambda b, x: conv(b, x, 64), (1, 28, 28, 64)),
        (lambda b, x: conv(b, x, 128, 3, 2), (1, 28, 28, 128)),
        (lambda b, x: conv(b, x, 128, 3, 128), (1, 28, 28, 128)),
        (lambda b, x: b.attention(x, x, x, scale=0.1, causal=True, softcap=0.0), (1, 2, 300, 64)),
    ],
    ids=["matmul", "pointwise", "3x3", "grouped", "depthwise", "attention"],
)
def test_candidates_are_other_kernels(make: Callable[..., object], shape: tuple[int, ...]) -> None:
    (site,) = sites_of(lower(build(make, Type(DType.f32, shape)), ISA))
    found = neighbours(site, DEFAULT, ISA, RATES)
    assert len(found) >= 3 and DEFAULT not in found and len(set(found)) == len(found)
    further = neighbours(site, found[0], ISA, RATES)
    assert further and found[0] not in further


@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_blocks_of_an_attention_that_come_to_the_same_are_one_candidate(precision: str) -> None:
    """Of 300 queries and keys: chunks of at most 256, 192 or, in f32, 128 keys have 160, 160 and 100."""
    isa = with_extras(ISAS["avx512"], {"avx512_bf16"})
    wide = build(lambda b, x: b.attention(y := b.tanh(x), y, y, scale=0.5, causal=False, softcap=0.0),
                 Type(DType.f32, (1, 2, 300, 16)))  # fmt: skip
    graph, _ = apply_precision(wide, precision, isa)
    (site,) = sites_of(lower(graph, isa))
    kernels = []
    for choice in (DEFAULT, *neighbours(site, DEFAULT, isa, RATES)):
        (step,) = (s for s in steps_of(lower(graph, isa, choices=Choices({site.key: choice})).body) if s.site)
        kernels.append(step.spec)
    assert len(kernels) >= 5 and all(x != y for i, x in enumerate(kernels) for y in kernels[:i])
