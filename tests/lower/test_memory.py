"""The arena plan: nothing alive at one moment overlaps, and the peak is near its lower bound."""

from hypothesis import given
from hypothesis import strategies as st

from vivace.lower.memory import ALIGNMENT, Lifetime, lower_bound, plan_memory

lifetimes = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 10)).map(
        lambda t: Lifetime(t[0], t[1], t[1] + t[2])
    ),
    max_size=40,
)


@given(lifetimes)
def test_nothing_alive_together_overlaps(items: list[Lifetime]) -> None:
    plan = plan_memory(items)
    for i, a in enumerate(items):
        assert plan.offsets[i] % ALIGNMENT == 0
        assert plan.offsets[i] + a.n_bytes <= plan.arena_bytes
        for j, b in enumerate(items[:i]):
            if a.n_bytes and b.n_bytes and a.first <= b.last and b.first <= a.last:
                assert plan.offsets[i] + a.n_bytes <= plan.offsets[j] or plan.offsets[j] + b.n_bytes <= plan.offsets[i]
    assert plan.arena_bytes >= plan.lower_bound_bytes == lower_bound(items)


def test_a_chain_needs_its_two_largest_neighbours() -> None:
    """MobileNetV1's activations, f32 at 224x224: the known bound is 4.594 MiB (Pisarchyk and Lee, table 1)."""
    sizes = (
        [224 * 224 * 3] + [112 * 112 * 32] * 2 + [112 * 112 * 64, 56 * 56 * 64] + [56 * 56 * 128] * 3 + [28 * 28 * 128]
    )
    chain = [Lifetime(4 * n, i, i + 1) for i, n in enumerate(sizes)]
    plan = plan_memory(chain)
    assert plan.arena_bytes == plan.lower_bound_bytes == 4 * (112 * 112 * 32 + 112 * 112 * 64)
    assert round(plan.arena_bytes / 2**20, 3) == 4.594
