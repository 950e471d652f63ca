"""A model that another provider runs as a whole, behind the engine's interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vivace.base.errors import EngineError, InputError
from vivace.base.events import Event
from vivace.base.specs import TensorSpec
from vivace.providers.provider import LoadOptions, find
from vivace.runtime.engine import Arrays, Placement


class HostedEngine:
    """An engine whose kernels are another provider's. Made by `vivace.compile`."""

    def __init__(
        self,
        provider: str,
        source: Path | str | bytes,
        options: LoadOptions,
        reason: str,
        nodes: Sequence[tuple[str, str]] = (("*", "*"),),
    ) -> None:
        self.provider, self.threads = provider, options.threads
        self._session = find(provider).load(source, options)
        self.inputs: tuple[TensorSpec, ...] = self._session.inputs
        self.outputs: tuple[TensorSpec, ...] = self._session.outputs
        self.placement = tuple(Placement(node, op, "the whole model", provider, reason) for node, op in nodes)
        self.facts: dict[str, object] = {"provider": provider, "reason": reason}

    @property
    def stats(self) -> dict[str, object]:
        """Who runs the model, and why."""
        return {"threads": self.threads, **self.facts}

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray] | None = None) -> Arrays:
        """One inference; `outputs` may give arrays to copy results into."""
        unknown = sorted(set(inputs) ^ {s.name for s in self.inputs})
        if unknown:
            raise InputError(f"inputs {unknown} are missing or unknown", expected=", ".join(map(str, self.inputs)))
        results = self._session.run(inputs)
        for name, array in (outputs or {}).items():
            array[...] = results[name]
            results[name] = array
        return results

    def __call__(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...] | np.ndarray:
        """One inference with inputs in the model's order; a single output comes bare."""
        results = tuple(self.run(dict(zip((s.name for s in self.inputs), arrays, strict=True))).values())
        return results[0] if len(results) == 1 else results

    def profile(self, inputs: Mapping[str, np.ndarray]) -> list[Event]:
        """The provider keeps its kernels to itself: no events."""
        return []

    def save(self, path: str | Path) -> int:
        """Raises: EngineError: there is no code of ours to save."""
        raise EngineError(
            f"runs in {self.provider} and has no code of ours to save", where=str(path), hint="providers='native'"
        )
