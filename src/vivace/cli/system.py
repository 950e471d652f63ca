"""`vivace sys`: the machine as vivace sees it, the engines installed, and the measured peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vivace.cli import options

if TYPE_CHECKING:
    from vivace.base.machine import Machine
    from vivace.measure.peaks import Peaks


def show_system(
    renew: Annotated[bool, typer.Option("--renew", help="Measure the peaks again.")] = False,
    peaks: Annotated[bool, typer.Option(help="Measure the peaks, or take them from the cache.")] = True,
    threads: options.Threads = 0,
    as_json: options.Json = False,
) -> None:
    """Shows the machine, the installed engines, and the measured peaks of arithmetic and bandwidth.

    Example: vivace sys --json
    """
    from vivace.base.machine import host
    from vivace.cli.console import print_json, progress
    from vivace.providers.provider import KNOWN, availability

    machine = host()
    engines = [availability(name) for name in KNOWN]
    found = None
    if peaks:
        from vivace.measure.peaks import machine_peaks

        with progress() as show:
            found = machine_peaks(options.threads_of(threads), renew=renew, progress=show)
    if as_json:
        print_json(_data(machine, engines, found))
    else:
        _print(machine, engines, found)


def machine_facts(machine: Machine) -> dict[str, Any]:
    """What a report says about the machine that it was made on."""
    from vivace.base.machine import ISAS, missing_flags
    from vivace.targets.cpu.amx import host_isa

    used = host_isa()
    return {
        "cpu": machine.model,
        "vendor": machine.vendor,
        "arch": machine.arch,
        "instruction_sets": [name for name, isa in ISAS.items() if not missing_flags(machine, isa)],
        "used_instruction_set": used.level,
        "extras": [flag for flag in _EXTRAS if used.has(flag)],
        "caches": [
            {
                "level": c.level,
                "kind": c.kind,
                "bytes": c.size_bytes,
                "ways": c.n_ways,
                "sharing_cores": c.n_sharing_cores,
            }
            for c in machine.caches
        ],
        "cores": len(machine.affinity),
        "physical_cores": machine.n_physical_cores,
        "quota_cores": machine.quota_cores,
        "threads": machine.n_compute_threads,
        "memory_bytes": machine.memory_bytes,
        "memory_limit_bytes": machine.memory_limit_bytes,
        "fingerprint": machine.fingerprint(),
    }


_EXTRAS = ("avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")


def _data(machine: Machine, engines: Any, peaks: Peaks | None) -> dict[str, Any]:
    from vivace import __version__
    from vivace.cli.console import plain

    data = {"vivace": __version__, "machine": plain(machine_facts(machine)), "engines": plain(engines)}
    if peaks is not None:
        data["peaks"] = {"isa": peaks.isa, "is_disturbed": peaks.is_disturbed, "rates": plain(peaks.peaks)}
    return data


def _print(machine: Machine, engines: Any, peaks: Peaks | None) -> None:
    from vivace import __version__
    from vivace.cli.console import size

    facts = machine_facts(machine)
    quota = "none" if machine.quota_cores is None else f"{machine.quota_cores:g} cores"
    limit = "" if machine.memory_limit_bytes is None else f", limited to {size(machine.memory_limit_bytes)}"
    caches = ", ".join(f"L{c.level} {c.kind} {size(c.size_bytes)}" for c in machine.caches)
    extras = f" (also {', '.join(facts['extras'])})" if facts["extras"] else ""
    print(f"vivace {__version__}")
    print(f"CPU      {machine.model} ({machine.vendor}, {machine.arch})")
    print(f"code for {facts['used_instruction_set']}{extras}; runs {', '.join(facts['instruction_sets'])}")
    print(f"caches   {caches or 'unknown'}")
    print(f"cores    {len(machine.affinity)} allowed, {machine.n_physical_cores} physical; quota {quota}")
    print(f"threads  {machine.n_compute_threads}")
    print(f"memory   {size(machine.memory_bytes)}{limit}")
    for engine in engines:
        print(f"engine   {engine.name} {engine.version if engine.is_available else 'missing: ' + engine.reason}")
    if peaks is not None:
        _print_peaks(peaks)


def _print_peaks(peaks: Peaks) -> None:
    from vivace.cli.console import amount, print_table

    counts = sorted({p.threads for p in peaks.peaks})
    units = {"arithmetic": "op/s", "read": "B/s", "copy": "B/s"}
    kinds = dict.fromkeys((p.what, p.of) for p in peaks.peaks)
    rates = {(p.what, p.of, p.threads): p.rate for p in peaks.peaks}
    rows = [[what, of, *(amount(rates[what, of, n]) + units[what] for n in counts)] for what, of in kinds]
    columns = ["peak", "of", *(f"{n} thread{'s' if n > 1 else ''}" for n in counts)]
    title = f"measured on {peaks.isa}" + (", DISTURBED by other processes" if peaks.is_disturbed else "")
    print_table(title, columns, sorted(rows, key=lambda row: list(units).index(row[0])), left=2)
