"""What the importer assumes about symbolic dims so that the model makes sense, and how it learns it.

Broadcasting and contraction assume that two symbolic dims that meet are equal; slicing a table up to a symbol assumes
that the table is long enough. `Assumptions` holds what was learnt: replacements of symbols by dims, and tighter bounds.
The importer starts again with every new assumption, so types never change after the fact.

What a branch of an `If` needs need not hold for the other branch, nor without either: what is learnt of the sizes of
inputs inside a branch holds only there (`local`, by the path of the branch). When it runs, its bounds are checked (rule
NARROWER of `graph.ops.control`); an equality that only one branch needs is left to a provider. The body of a loop that
may have no turn (a path that ends with `TURN`) keeps its bounds to itself likewise.

Not handled: sizes that only data determines; what is learnt of them inside a branch holds everywhere. Sizes that are
equal in a body are equal around it, also where it has no turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vivace.base.dims import (
    Apply,
    Bound,
    Dim,
    Expr,
    Symbol,
    as_symbol,
    bounds,
    evaluate,
    exact_div,
    linear,
    substitute,
    symbol,
    symbols,
)

_LARGEST = 1 << 31
BODY, TURN = "/body", "/turn"
"""How the paths of loop bodies end: of those that run at least once, and of those that may not run at all."""


class Learnt(Exception):
    """Something new was assumed: the import has to start again."""


@dataclass(slots=True)
class Assumptions:
    """Replacements and bounds of symbols, by name; `declared` are those of the inputs, which are the last to be
    replaced.
    """

    replaced: dict[str, Dim] = field(default_factory=dict)
    bounded: dict[str, tuple[Bound, Bound]] = field(default_factory=dict)
    declared: set[str] = field(default_factory=set)
    local: dict[str, Assumptions] = field(default_factory=dict)

    def copy(self) -> Assumptions:
        local = {path: inner.copy() for path, inner in self.local.items()}
        return Assumptions(dict(self.replaced), dict(self.bounded), set(self.declared), local)

    def inside(self, path: str) -> dict[str, Dim]:
        """The symbols as the nested graph `path` sees them, where it assumes more of them."""
        inner = self.local.get(path, Assumptions())
        return {name: symbol(name, *b) for name, b in inner.bounded.items()} | inner.replaced

    def learn_inside(self, a: Dim, b: Dim, paths: Sequence[str]) -> bool:
        """As `learn_equal`, for a mismatch in a nested graph; `paths` leads to it from the outermost."""
        regions, branches = _regions(paths), _branches(paths)
        if not regions:
            return self.learn_equal(a, b)
        trial = Assumptions(dict(self.replaced), dict(self.bounded), self.declared)
        for path in regions:
            trial._add(self.local.get(path, Assumptions()))
        seen = trial.copy()
        if not trial.learn_equal(a, b):
            return False
        bounded = {name: bound for name, bound in trial.bounded.items() if seen.bounded.get(name) != bound}
        replaced = {name: d for name, d in trial.replaced.items() if name not in seen.replaced}
        inner = {name: d for name, d in replaced.items() if name in self.declared and branches}
        self._add(Assumptions({name: self.apply(d) for name, d in replaced.items() if name not in inner}))
        if inner:
            self.local.setdefault(branches[-1], Assumptions())._add(Assumptions(inner))
        if bounded:
            self.local.setdefault(regions[-1], Assumptions())._add(Assumptions(bounded=bounded))
        return bool(replaced or bounded)

    def promote(self, path: str, paths: Sequence[str]) -> bool:
        """Let what was learnt inside a branch hold in the graph around it, to which `paths` lead. False when nothing
        was.
        """
        learnt, around = self.local.pop(path, None), _regions(paths)
        if learnt is not None:
            (self.local.setdefault(around[-1], Assumptions()) if around else self)._add(learnt)
        return learnt is not None

    def share(self, then: str, other: str, paths: Sequence[str]) -> bool:
        """Let an equality that both branches need hold in the graph around them. False when there is none."""
        env = self.inside(other)
        for name, value in self.local.get(then, Assumptions()).replaced.items():
            if substitute(symbol(name), env) == substitute(value, env):
                for path in (then, other):
                    self.local[path] = Assumptions(bounded=self.local[path].bounded)
                return self.learn_inside(self.symbol(name), value, paths)
        return False

    def equalities(self, path: str) -> dict[str, Dim]:
        """The symbols that a branch takes for other dims."""
        return self.local.get(path, Assumptions()).replaced

    def _add(self, more: Assumptions) -> None:
        """Assume what else was learnt of the same symbols."""
        self.bounded |= more.bounded
        env = {name: symbol(name, *b) for name, b in more.bounded.items()} | more.replaced
        self.replaced = {name: substitute(d, env) for name, d in self.replaced.items()} | more.replaced

    def symbol(self, name: str) -> Dim:
        """The dim that stands for a symbol of the model."""
        if name in self.replaced:
            return self.replaced[name]
        return symbol(name, *self.bounded.get(name, (0, None)))

    def apply(self, d: Dim) -> Dim:
        return substitute(d, {s.name: self.symbol(s.name) for s in symbols(d)})

    def fix(self, s: Symbol, size: int) -> bool:
        """Give a symbol one size everywhere. False when that contradicts what is known of it."""
        return self._replace(s, size)

    def learn_equal(self, a: Dim, b: Dim) -> bool:
        """Assume a == b. False when nothing new that makes them equal can be assumed."""
        a, b = self.apply(a), self.apply(b)
        if a == b:
            return True
        low, high = bounds(a - b)
        if (low is not None and low > 0) or (high is not None and high < 0):
            return False
        factor = _common_factor(a - b)
        if factor != 1:  # N*x == N*y: nobody means N == 0
            a, b = (q if (q := exact_div(d, factor)) is not None else d for d in (a, b))
        return self._solve(a, b) or self._choose(a, b) or self._choose(b, a) or self._divide(a, b)

    def _solve(self, a: Dim, b: Dim) -> bool:
        """Replace a symbol by what makes the two equal; a bare side first, else a symbol with a coefficient that
        divides.
        """
        for x, y in sorted(((b, a), (a, b)), key=lambda pair: self._is_declared(pair[0])):
            s = as_symbol(x)
            if s is not None and s.name not in {t.name for t in symbols(y)}:
                return self._replace(s, y)
        for name, s in sorted({s.name: s for s in symbols(b - a)}.items(), key=lambda item: item[0] in self.declared):
            split = linear(b - a, name)
            if split is None or split[0] == 0:
                continue
            if split[1] != 0:
                value = exact_div(-split[1], split[0])
                if value is not None and not (isinstance(value, Expr) and isinstance(split[0], Expr)):
                    return self._replace(s, value)
        return self._rename(a, b) or self._invert(a - b) or self._invert(b - a)

    def _divide(self, a: Dim, b: Dim) -> bool:
        """`2*((H+1)//2) == H` holds for even H: take the symbol, or all that are divided, for multiples of the least
        power of two, or of what they are divided by, that makes the two equal.
        """
        divided = [d for d in _divisions(a - b) if isinstance(d.b, int) and d.b > 1]
        together = {s.name for d in divided for s in symbols(d.a)}
        for names in [*({s.name} for s in symbols(a - b)), together]:
            for by in sorted({2, 4, 8, 16, 32, 64, 128, 256, *(int(d.b) for d in divided)}):  # type: ignore[arg-type]
                parts = {name: self.symbol(f"{name}_by_{by}") * by for name in names}
                if substitute(a, parts) == substitute(b, parts):
                    self.replaced = {k: substitute(v, parts) for k, v in self.replaced.items()} | parts
                    return True
        return False

    def _is_declared(self, d: Dim) -> bool:
        s = as_symbol(d)
        return s is not None and s.name in self.declared

    def _invert(self, d: Dim) -> bool:
        """Assume d == 0 for a monotone function of one symbol, such as `(H+1)//2 - 4`: the symbol is bounded to
        where it holds.
        """
        names = {s.name: s for s in symbols(d)}
        if len(names) != 1 or not _is_monotone(d):
            return False
        ((name, s),) = names.items()
        low, high = _first(d, name, 0), _first(d, name, 1) - 1
        if (
            low > high
            or substitute(d, {name: low}) != 0
            or (s.hi is not None and low > s.hi)
            or (s.lo is not None and high < s.lo)
        ):
            return False
        return self._replace(s, low) if low == high else self._bound(name, low, high)

    def _rename(self, a: Dim, b: Dim) -> bool:
        """`M*k == N*k` (k not zero) and `(N*k // M) * M == N*k`: take the symbols that stand in only one of the two
        for equal.
        """
        sa, sb = {s.name: s for s in symbols(a)}, {s.name: s for s in symbols(b)}
        only_a, only_b = [s for n, s in sa.items() if n not in sb], [s for n, s in sb.items() if n not in sa]
        if len(only_a) + len(only_b) == 1:
            # (N*S // M) * M == N*S: the divisor M must be a factor, and the only symbol that it can be is one of the
            # others.
            (odd,) = only_a or only_b
            for other in (sa if only_b else sb).values():
                env = {odd.name: _as_dim(other)}
                if substitute(a, env) == substitute(b, env):
                    return self._replace(odd, _as_dim(other))
        if len(only_a) == len(only_b) == 1:
            env = {only_b[0].name: _as_dim(only_a[0])}
            if substitute(b, env) == a:
                return self._replace(only_b[0], _as_dim(only_a[0]))
        return False

    def _replace(self, s: Symbol, value: Dim) -> bool:
        if not isinstance(value, Expr) and ((s.lo is not None and value < s.lo) or (s.hi is not None and value > s.hi)):
            return False
        unknown = {t.name for t in symbols(value)} - self.declared
        if s.name in self.declared and (len(unknown) > 1 or any(linear(value, name) is None for name in unknown)):
            return False  # no input would tell them
        if (other := as_symbol(value)) is not None:  # the bounds of both hold
            self._bound(other.name, s.lo, s.hi)
            value = self.symbol(other.name)
        self.replaced = {k: substitute(v, {s.name: value}) for k, v in self.replaced.items()} | {s.name: value}
        return True

    def _choose(self, a: Dim, b: Dim) -> bool:
        """`min(x, y) == x` needs x <= y, `max(x, y) == x` needs x >= y; the same inside a sum."""
        for atom in [t[0] for t, _ in a.terms if len(t) == 1] if isinstance(a, Expr) else []:
            if not isinstance(atom, Apply) or atom.fn not in ("min", "max"):
                continue
            for x, y in ((atom.a, atom.b), (atom.b, atom.a)):
                if _replace_atom(a, atom, x) == b:
                    return self._at_most(x, y) if atom.fn == "min" else self._at_most(y, x)
        return False

    def _at_most(self, x: Dim, y: Dim) -> bool:
        """Assume x <= y, when that is a bound of one symbol of which y - x or x - y is a monotone function."""
        names = {s.name for s in symbols(x - y)}
        if len(names) != 1:
            return False
        (name,) = names
        if _is_monotone(y - x):
            return self._bound(name, _first(y - x, name, 0), None)
        return _is_monotone(x - y) and self._bound(name, None, _first(x - y, name, 1) - 1)

    def _bound(self, name: str, lo: Bound, hi: Bound) -> bool:
        old_lo, old_hi = self.bounded.get(name, (0, None))
        lo = old_lo if lo is None or (old_lo is not None and old_lo >= lo) else lo
        hi = old_hi if hi is None or (old_hi is not None and old_hi <= hi) else hi
        if (lo, hi) == (old_lo, old_hi) or (lo is not None and hi is not None and lo > hi):
            return False
        self.bounded[name] = (lo, hi)
        fresh = {name: symbol(name, lo, hi)}
        self.replaced = {k: substitute(v, fresh) for k, v in self.replaced.items()}
        return True


def _regions(paths: Sequence[str]) -> list[str]:
    """Those of paths whose graphs may not run: they may assume bounds for themselves."""
    return [p for p in paths if not p.endswith(BODY)]


def _branches(paths: Sequence[str]) -> list[str]:
    """Those of paths that are branches: they may assume equalities for themselves."""
    return [p for p in paths if not p.endswith((BODY, TURN))]


def _divisions(d: Dim) -> list[Apply]:
    """Every division in an expression."""
    atoms = [a for t, _ in d.terms for a in t if isinstance(a, Apply)] if isinstance(d, Expr) else []
    inner = [x for a in atoms for part in (a.a, a.b) for x in _divisions(part)]
    return [a for a in atoms if a.fn == "//"] + inner


def _first(d: Dim, name: str, at_least: int) -> int:
    """The least size of a symbol for which d, a monotone function of it, reaches `at_least`."""
    low, high = -1, _LARGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if evaluate(d, {name: middle}) >= at_least else (middle, high)
    return high


def _common_factor(d: Dim) -> Dim:
    """The product of the atoms that stand in every term."""
    if not isinstance(d, Expr):
        return 1
    shared = list(d.terms[0][0])
    for atoms, _ in d.terms[1:]:
        rest, kept = list(atoms), []
        for a in shared:
            if a in rest:
                rest.remove(a)
                kept.append(a)
        shared = kept
    return Expr(((tuple(shared), 1),)) if shared else 1


def _is_monotone(d: Dim) -> bool:
    """True for a function that grows with its symbols: positive coefficients over symbols, divisions by constants,
    min and max.
    """
    if not isinstance(d, Expr):
        return True
    for atoms, coefficient in d.terms:
        if atoms and coefficient < 0:
            return False
        for a in atoms:
            if isinstance(a, Apply) and (
                a.fn == "%"
                or not _is_monotone(a.a)
                or not _is_monotone(a.b)
                or (a.fn == "//" and not isinstance(a.b, int))
            ):
                return False
    return True


def _as_dim(s: Symbol) -> Dim:
    return symbol(s.name, s.lo, s.hi)


def _replace_atom(d: Dim, atom: Apply, value: Dim) -> Dim:
    assert isinstance(d, Expr)
    out: Dim = 0
    for t, c in d.terms:
        out = out + (value * c if t == (atom,) else _term(t, c))
    return out


def _term(t: tuple[object, ...], c: int) -> Dim:
    return Expr(((t, c),)) if t else c  # type: ignore[arg-type]
