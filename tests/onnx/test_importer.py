"""What the importer makes of models: dims, constants, shape arithmetic, assumptions, control flow, names."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import TensorProto, helper
from tests.onnx.making import BOOL, F32, I64, graph, model, node, value

from vivace.base import dims
from vivace.base.dim_notation import parse
from vivace.base.dims import bounds, symbols
from vivace.base.errors import InputError, ModelError, UnsupportedError
from vivace.graph.graph import Graph
from vivace.graph.reference import evaluate
from vivace.graph.sizes import inner_demands
from vivace.graph.verify import verify
from vivace.onnx.importer import import_model


def ops(g: Graph) -> list[str]:
    return [n.op.name for n in g.walk()]


def shapes(g: Graph) -> list[str]:
    return [str(v.type) for v in g.outputs]


def imported(*args: object, **kwargs: object) -> Graph:
    g = import_model(model(*args, **kwargs))  # type: ignore[arg-type]
    verify(g)
    return g


RELU = [node("Relu", "x", "y")]


class TestDims:
    def test_names_stay_and_unnamed_dims_get_symbols(self) -> None:
        x = value("x", ["batch", "?", -1, "", None, 3])
        assert shapes(imported(RELU, [x], [value("y", None)])) == ["f32[batch,x_1,x_2,x_3,x_4,3]"]

    def test_expressions_are_read_when_their_names_are_dims(self) -> None:
        inputs = [value("x", ["past + new", "2*new"]), value("p", ["past", "new"])]
        nodes = [node("Relu", "x", "y"), node("Relu", "p", "q")]
        assert shapes(imported(nodes, inputs, [value("y", None), value("q", None)]))[0] == "f32[new+past,2*new]"

    def test_a_name_with_a_dash_is_a_name(self) -> None:
        assert shapes(imported(RELU, [value("x", ["batch-size", "seq len"])], [value("y", None)])) == [
            "f32[batch_size,seq_len]"
        ]

    def test_a_multiple_of_a_name_is_read_as_one(self) -> None:
        g = imported(RELU, [value("x", ["8*rows", "rows-8", "2*a*b"])], [value("y", None)])
        assert shapes(g) == ["f32[8*rows,rows_8,2_a_b]"]
        with pytest.raises(InputError, match="rows"):
            evaluate(g, [np.zeros((12, 4, 1), np.float32)])

    def test_zero_sized_dims(self) -> None:
        g = imported(
            [node("Relu", "x", "r"), node("Concat", "r r", "y", axis=0)], [value("x", ["n", 3])], [value("y", None)]
        )
        assert evaluate(g, [np.zeros((0, 3), np.float32)])[0].shape == (0, 3)

    def test_overrides(self) -> None:
        m = model([node("Add", "x k", "y")], [value("x", ["n", 3]), value("k", ["n", 3])], [value("y", None)])
        assert shapes(import_model(m, overrides={"x": (5, None)})) == ["f32[5,3]"]
        assert str(import_model(m, overrides={"x": ("2*m", 3)}).inputs[1].type) == "f32[2*m,3]"
        for bad, expected in (
            ({"z": (1,)}, "no input"),
            ({"x": (1,)}, "2 dims"),
            ({"x": (1, 4)}, "declares"),
            ({"x": (-1, 3)}, "at least 0"),
        ):
            with pytest.raises(ModelError, match=expected):
                import_model(m, overrides=bad)

    def test_a_missing_rank_is_asked_for(self) -> None:
        m = model(RELU, [value("x", None)], [value("y", None)])
        with pytest.raises(ModelError, match=r"no declared rank.*shapes="):
            import_model(m)
        assert shapes(import_model(m, overrides={"x": ("n", 2)})) == ["f32[n,2]"]


class TestAssumptions:
    def test_symbols_that_meet_are_one(self) -> None:
        g = imported([node("Add", "x k", "y")], [value("x", ["a", 3]), value("k", ["b", 3])], [value("y", None)])
        assert str(g.inputs[0].type) == str(g.inputs[1].type)

    def test_a_symbol_that_meets_a_number_is_that_number(self) -> None:
        g = imported([node("Add", "x k", "y")], [value("x", ["a", "b"]), value("k", [4, 1])], [value("y", None)])
        assert [str(v.type) for v in g.inputs] == ["f32[4,b]", "f32[4,1]"]

    def test_a_sum_determines_a_symbol(self) -> None:
        inputs = [value("past", [1, "p", 4]), value("x", [1, "s", 4]), value("mask", [1, "t", 4])]
        g = imported(
            [node("Concat", "past x", "all", axis=1), node("Add", "all mask", "y")], inputs, [value("y", None)]
        )
        assert str(g.inputs[2].type) == "f32[1,p+s,4]"
        with pytest.raises(InputError, match="mask"):
            evaluate(g, [np.zeros(s, np.float32) for s in ((1, 2, 4), (1, 3, 4), (1, 6, 4))])

    def test_a_table_bounds_the_length(self) -> None:
        constants = {
            "table": np.zeros((1, 512, 8), np.float32),
            "zero": np.array([0]),
            "one": np.array([1]),
            "s1": np.array([1]),
        }
        nodes = [
            node("Shape", "x", "shape"),
            node("Slice", "shape one two", "len"),
            node("Slice", "table zero len one", "part"),
            node("Add", "x part", "y"),
        ]
        g = imported(nodes, [value("x", ["n", "s", 8])], [value("y", None)], constants | {"two": np.array([2])})
        assert bounds(g.inputs[0].shape[1]) == (0, 512)
        assert ops(g) == ["slice", "add"]

    def test_halving_and_doubling_makes_a_multiple(self) -> None:
        nodes = [
            node("MaxPool", "x", "half", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 1, 1]),
            node("Resize", "half _ scales", "up", mode="nearest"),
            node("Add", "x up", "y"),
        ]
        x = value("x", [1, 1, "h", 4])
        g = imported(nodes, [x], [value("y", None)], {"scales": np.array([1, 1, 2, 2], np.float32)})
        assert str(g.inputs[0].type) == "f32[1,1,2*h_by_2,4]"

    def test_a_squeeze_bounds_the_window(self) -> None:
        pool = node("AveragePool", "x", "p", kernel_shape=[4], strides=[4])
        g = imported(
            [pool, node("Squeeze", "p axes", "y")],
            [value("x", [1, 2, "t"])],
            [value("y", None)],
            {"axes": np.array([2])},
        )
        assert bounds(g.inputs[0].shape[2]) == (4, 7)
        assert shapes(g) == ["f32[1,2]"]

    def test_a_size_that_a_hole_hides_bounds_the_window(self) -> None:
        """What -1 stands for is `n` only while one window fits: how files without Squeeze say the same."""
        nodes = [
            node("MaxPool", "x", "p", kernel_shape=[4], strides=[4]),
            node("Reshape", "p shape", "r"),
            node("Add", "r state", "y"),
        ]
        inputs = [value("x", ["n", 2, "t"]), value("state", [1, "n", 2])]
        g = imported(nodes, inputs, [value("y", None)], {"shape": np.array([1, -1, 2])})
        assert bounds(g.inputs[0].shape[2]) == (4, 7)
        assert shapes(g) == ["f32[1,n,2]"]

    @pytest.mark.parametrize("n", ["n", 2, 0])
    def test_a_hole_beside_any_number_of_rows(self, n: int | str) -> None:
        """What stays where it is leaves the others as they are, also where it is 0."""
        reshape = node("Reshape", "x shape", "y")
        g = imported([reshape], [value("x", [n, 3, 4, 5])], [value("y", None)], {"shape": np.array([0, -1, 5])})
        assert shapes(g) == [f"f32[{n},12,5]"]

    @pytest.mark.parametrize(("at", "least"), [(0, 1), (2, 3), (-1, 1), (-3, 3)])
    def test_a_position_bounds_the_axis(self, at: int, least: int) -> None:
        """Behind the end of an axis lies the memory of others."""
        g = imported(
            [node("Gather", "x i", "y", axis=1)], [value("x", [2, "t"])], [value("y", None)], {"i": np.array(at)}
        )
        assert bounds(g.inputs[0].shape[1]) == (least, None)

    def test_contradictions_are_errors(self) -> None:
        inputs = [value("x", [3, "a"]), value("k", [4, "a"])]
        with pytest.raises(ModelError, match="3 and 4 must be equal"):
            imported([node("Add", "x k", "y")], inputs, [value("y", None)])


class TestShapeArithmetic:
    def test_it_leaves_no_node(self) -> None:
        nodes = [
            node("Shape", "x", "s"),
            node("Gather", "s i0", "n", axis=0),
            node("Gather", "s i1", "h", axis=0),
            node("Mul", "n h", "nh"),
            node("Unsqueeze", "nh zero", "nh1"),
            node("Concat", "nh1 minus", "target", axis=0),
            node("Reshape", "x target", "y"),
        ]
        constants = {"i0": np.array(0), "i1": np.array(1), "zero": np.array([0]), "minus": np.array([-1])}
        g = imported(nodes, [value("x", ["n", 4, 5])], [value("y", None)], constants)
        assert ops(g) == ["reshape"]
        assert shapes(g) == ["f32[4*n,5]"]

    def test_a_scale_of_floats_that_is_floored(self) -> None:
        nodes = [
            node("Shape", "x", "s", start=2),
            node("Cast", "s", "f", to=F32),
            node("Mul", "f half", "g"),
            node("Floor", "g", "h"),
            node("Cast", "h", "i", to=I64),
            node("Concat", "nc i", "sizes", axis=0),
            node("Resize", "x _ _ sizes", "y", mode="linear"),
        ]
        constants = {"half": np.float32(0.5), "nc": np.array([1, 2])}
        g = imported(nodes, [value("x", [1, 2, "h", 8])], [value("y", None)], constants)
        assert shapes(g) == ["f32[1,2,(h)//(2),4]"]
        assert ops(g) == ["resize"]

    def test_a_comparison_that_bounds_decide(self) -> None:
        nodes = [
            node("Shape", "x", "s"),
            node("Equal", "s minus", "e"),
            node("Where", "e one s", "t"),
            node("Expand", "x t", "y"),
        ]
        g = imported(
            nodes, [value("x", ["n", 2])], [value("y", None)], {"minus": np.array([-1, -1]), "one": np.array([1, 1])}
        )
        assert (ops(g), shapes(g)) == (["reshape"], ["f32[n,2]"])  # the copy that gives an output its name

    def test_dims_become_data_where_a_value_needs_them(self) -> None:
        nodes = [node("Shape", "x", "s"), node("Cast", "s", "f", to=F32), node("Sqrt", "f", "y")]
        g = imported(nodes, [value("x", ["n", 4])], [value("y", None)])
        assert ops(g) == ["dims", "cast", "sqrt"]
        np.testing.assert_array_equal(evaluate(g, [np.zeros((9, 4), np.float32)])[0], [3, 2])

    def test_a_range_of_symbolic_length(self) -> None:
        nodes = [node("Shape", "x", "s"), node("Squeeze", "s", "n"), node("Range", "zero n one", "y")]
        g = imported(nodes, [value("x", ["n"])], [value("y", None, I64)], {"zero": np.array(0), "one": np.array(1)})
        assert ops(g) == ["iota"]
        np.testing.assert_array_equal(evaluate(g, [np.zeros(4, np.float32)])[0], [0, 1, 2, 3])

    def test_what_depends_on_data_is_left_to_a_provider(self) -> None:
        nodes = [node("NonZero", "x", "i"), node("Transpose", "i", "t"), node("Relu", "x", "y")]
        g = imported(nodes, [value("x", ["n", 3])], [value("t", None, I64), value("y", None)])
        assert ops(g) == ["onnx", "transpose", "relu"]
        (left,) = [n for n in g.nodes if n.op.name == "onnx"]
        assert left.attrs["reason"] and left.origin == ("NonZero:i",)
        assert str(g.outputs[0].type) == "i64[i_1,2]"


class TestConstants:
    def test_an_initializer_that_is_an_input_is_a_constant(self) -> None:
        g = imported(
            [node("Add", "x w", "y")], [value("x", [2]), value("w", [2])], [value("y", None)], {"w": np.float32([1, 2])}
        )
        assert [v.name for v in g.inputs] == ["x"]

    def test_batch_normalization_is_a_scale_and_an_offset(self) -> None:
        rng = np.random.default_rng(0)
        constants = {n: rng.random(3).astype(np.float32) for n in "sbmv"}
        g = imported(
            [node("BatchNormalization", "x s b m v", "y")], [value("x", ["n", 3, 4])], [value("y", None)], constants
        )
        assert ops(g) == ["mul", "add"]
        x = rng.standard_normal((2, 3, 4)).astype(np.float32)
        s, b, m, v = (constants[n][:, None] for n in "sbmv")
        np.testing.assert_allclose(evaluate(g, [x])[0], (x - m) / np.sqrt(v + 1e-5) * s + b, rtol=1e-5, atol=1e-6)

    def test_gemm_transposes_its_weight_at_once(self) -> None:
        constants = {"w": np.ones((4, 3), np.float32), "b": np.ones(4, np.float32)}
        g = imported(
            [node("Gemm", "x w b", "y", transB=1, alpha=0.5)], [value("x", ["n", 3])], [value("y", None)], constants
        )
        assert ops(g) == ["matmul", "add"]
        np.testing.assert_array_equal(evaluate(g, [np.ones((1, 3), np.float32)])[0], np.full((1, 4), 2.5))

    def test_large_repeats_are_not_folded(self) -> None:
        g = imported(
            [node("Expand", "one shape", "t"), node("Add", "x t", "y")],
            [value("x", [1000, 1000])],
            [value("y", None)],
            {"one": np.float32(1), "shape": np.array([1000, 1000])},
        )
        assert ops(g) == ["expand", "add"]


class TestNames:
    def test_outputs_keep_their_names_and_are_distinct(self) -> None:
        nodes = [
            node("Identity", "x", "same"),
            node("Identity", "w", "constant"),
            node("Relu", "x", "a"),
            node("Identity", "a", "b"),
        ]
        g = imported(
            nodes,
            [value("x", [2])],
            [value(n, None) for n in ("same", "constant", "a", "b")],
            {"w": np.float32([1, 2])},
        )
        assert [v.name for v in g.outputs] == ["same", "constant", "a", "b"]
        assert len(set(g.outputs)) == 4
        got = evaluate(g, {"x": np.float32([-1, 3])})
        np.testing.assert_array_equal(np.stack(got), [[-1, 3], [1, 2], [0, 3], [0, 3]])

    def test_every_value_has_a_name_of_its_own(self) -> None:
        nodes = [node("Relu", "x", "t1"), node("HardSwish", "t1", "t2"), node("Mish", "t2", "y")]
        names = [v.name for n in imported(nodes, [value("x", [2])], [value("y", None)]).nodes for v in n.outputs]
        assert len(set(names)) == len(names)
        assert {"t1", "t2", "y"} <= set(names)

    def test_the_origin_is_the_node(self) -> None:
        n = helper.make_node("Mish", ["x"], ["y"], name="/act/Mish")
        assert {m.origin for m in imported([n], [value("x", [2])], [value("y", None)]).nodes} == {("/act/Mish",)}


def _branch(op: str, out: str, read: str = "x") -> object:
    return graph([node(op, read, out)], [], [value(out, None)])


class TestControlFlow:
    X = value("x", ["n"])

    def test_a_known_condition_selects_its_branch(self) -> None:
        n = helper.make_node("If", ["c"], ["y"], then_branch=_branch("Relu", "a"), else_branch=_branch("Neg", "b"))
        assert ops(imported([n], [self.X], [value("y", None)], {"c": np.array(True)})) == ["relu"]

    def test_a_condition_on_data_keeps_closed_branches(self) -> None:
        then = graph([node("Mul", "x w", "a")], [], [value("a", None)])
        other = graph([node("Add", "x k", "b")], [], [value("b", None)])
        n = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other)
        inputs = [self.X, value("k", ["n"]), value("c", [], BOOL)]
        g = imported([n], inputs, [value("y", None)], {"w": np.float32(3)})
        assert ops(g) == ["if", "mul", "add"]
        x, k = np.float32([1, 2]), np.float32([10, 20])
        for c, want in ((True, [3, 6]), (False, [11, 22])):
            np.testing.assert_array_equal(evaluate(g, [x, k, np.array(c)])[0], want)

    def test_a_branch_keeps_its_assumptions_to_itself(self) -> None:
        def windowed(size: int, out: str) -> object:
            nodes = [
                node("Unsqueeze", "x front", f"{out}u"),
                node("AveragePool", f"{out}u", f"{out}p", kernel_shape=[size], strides=[size]),
                node("Squeeze", f"{out}p all", out),
            ]
            return graph(nodes, [], [value(out, None)])

        n = helper.make_node("If", ["c"], ["y"], then_branch=windowed(4, "a"), else_branch=windowed(16, "b"))
        constants = {"front": np.array([0, 1]), "all": np.array([0, 1, 2])}
        g = imported([n], [self.X, value("c", [], BOOL)], [value("y", None)], constants)
        assert bounds(g.inputs[0].shape[0]) == (0, None)
        assert [bounds(b.inputs[0].shape[0]) for b in (g.nodes[0].attrs["then"], g.nodes[0].attrs["else"])] == [
            (4, 7),
            (16, 31),
        ]
        (s,) = symbols(g.inputs[0].shape[0])
        assert [[dims.evaluate(d, {s.name: n}) for n in (3, 5, 35)] for d in inner_demands(g)] == [
            [1, 0, 28],
            [13, 11, 4],
        ]
        assert evaluate(g, [np.ones(5, np.float32), np.array(True)])[0] == 1
        with pytest.raises(InputError):
            evaluate(g, [np.ones(5, np.float32), np.array(False)])

    def test_exporters_spelling_of_squeeze(self) -> None:
        squeeze = graph([node("Squeeze", "p axis", "a")], [], [value("a", None)])
        n = helper.make_node("If", ["c"], ["y"], then_branch=squeeze, else_branch=_branch("Identity", "b", "p"))
        nodes = [
            node("AveragePool", "x", "p", kernel_shape=[4], strides=[4]),
            node("Shape", "p", "s"),
            node("Gather", "s two", "size"),
            node("Equal", "size one", "c"),
            n,
        ]
        constants = {"axis": np.array([2]), "two": np.array(2), "one": np.array(1)}
        g = imported(nodes, [value("x", [1, 2, "t"])], [value("y", None)], constants)
        assert (ops(g), shapes(g)) == (["avg_pool", "reshape"], ["f32[1,2]"])

    def test_a_loop_with_state_scan_and_captures(self) -> None:
        body = graph(
            [node("Add", "s k", "s2"), node("Identity", "c", "c2"), node("Mul", "s2 s2", "o")],
            [value("i", [], I64), value("c", [], BOOL), value("s", None)],
            [value("c2", [], BOOL), value("s2", None), value("o", None)],
        )
        n = helper.make_node("Loop", ["trip", "", "x"], ["last", "all"], body=body)
        g = imported([n], [self.X, value("k", ["n"])], [value("last", None), value("all", None)], {"trip": np.array(3)})
        assert shapes(g) == ["f32[n]", "f32[3,n]"]
        last, rows = evaluate(g, [np.float32([1]), np.float32([2])])
        assert last == 7
        np.testing.assert_array_equal(rows, [[9], [25], [49]])

    def test_a_loop_that_ends_by_its_condition(self) -> None:
        body = graph(
            [node("Add", "s s", "s2"), node("Less", "s2 limit", "c2"), node("Identity", "s2", "o")],
            [value("i", [], I64), value("c", [], BOOL), value("s", None)],
            [value("c2", [], BOOL), value("s2", None), value("o", None)],
        )
        n = helper.make_node("Loop", ["", "go", "x"], ["last", "all"], body=body)
        g = imported(
            [n],
            [value("x", [])],
            [value("last", None), value("all", None)],
            {"limit": np.float32(20), "go": np.array(True)},
        )
        last, rows = evaluate(g, [np.float32(1)])
        assert last == 32
        np.testing.assert_array_equal(rows, [2, 4, 8, 16, 32])

    def test_a_scan_backwards_along_an_axis(self) -> None:
        body = graph(
            [node("Add", "s x", "s2"), node("Identity", "s2", "o")],
            [value("s", [2]), value("x", [2])],
            [value("s2", [2]), value("o", [2])],
        )
        n = helper.make_node("Scan", ["s0", "x"], ["last", "y"], body=body, num_scan_inputs=1, scan_input_axes=[1],
                             scan_input_directions=[1], scan_output_axes=[1])  # fmt: skip
        g = imported(
            [n], [value("x", [2, "t"])], [value("last", None), value("y", None)], {"s0": np.zeros(2, np.float32)}
        )
        assert shapes(g) == ["f32[2]", "f32[2,t]"]
        last, y = evaluate(g, [np.float32([[1, 2, 3], [4, 5, 6]])])
        np.testing.assert_array_equal(last, [6, 15])
        np.testing.assert_array_equal(y, [[3, 5, 6], [6, 11, 15]])


class TestRefusals:
    def test_sequences_at_the_border(self) -> None:
        m = model(
            [node("SequenceConstruct", "x", "y")],
            [value("x", [2])],
            [helper.make_tensor_sequence_value_info("y", F32, None)],
        )
        with pytest.raises(UnsupportedError, match="'y' is a sequence"):
            import_model(m)

    def test_sequences_inside_stay_together(self) -> None:
        nodes = [
            node("SequenceConstruct", "x x", "s"),
            node("ConcatFromSequence", "s", "c", axis=0),
            node("Relu", "c", "y"),
        ]
        g = imported(nodes, [value("x", ["n", 2])], [value("y", ["m", 2])])
        assert ops(g) == ["onnx", "relu"]


def test_einsum_against_numpy() -> None:
    rng = np.random.default_rng(3)
    for equation, sizes in {
        "ij,jk->ik": [(2, 3), (3, 4)],
        "bhqd,bhkd->bhqk": [(2, 3, 4, 5), (2, 3, 6, 5)],
        "...ij,...jk": [(2, 1, 3, 4), (5, 4, 2)],
        "ij->ji": [(2, 3)],
        "ij->": [(2, 3)],
        "i,j->ij": [(2,), (3,)],
        "ab,bc,cd->ad": [(2, 3), (3, 4), (4, 2)],
        "bij,bj->bi": [(2, 3, 4), (2, 4)],
        "ijk,k->j": [(2, 3, 4), (4,)],
    }.items():
        arrays = {f"x{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(sizes)}
        inputs = [value(n, a.shape) for n, a in arrays.items()]
        g = imported([node("Einsum", " ".join(arrays), "y", equation=equation)], inputs, [value("y", None)])
        np.testing.assert_allclose(evaluate(g, arrays)[0], np.einsum(equation, *arrays.values()), rtol=1e-5, atol=1e-5)


def test_parse_reads_what_dims_print() -> None:
    assert str(parse("floor(h/2)")) == "(h)//(2)"


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("(float[N] x) => (float[K] v, int64[K] i) <int64[1] k = {5}> { v, i = TopK(x, k) }", 5),
        ("(float[N] x) => (float[2] y) <int64[2] k = {2, 7}> { y = Gather(x, k) }", 8),
        ("(float[N] x) => (float[2] y) <int64[2] k = {2, -7}> { y = Gather(x, k) }", 7),
        ('(float[N] x) => (float[M] y) <int64[2] p = {3, 1}> { y = Pad<mode = "reflect">(x, p) }', 4),
        ('(float[N] x) => (float[M] y) <int64[2] p = {3, 1}> { y = Pad<mode = "edge">(x, p) }', 1),
        ("(float[N] x) => (float[M] y) <int64[2] p = {-3, -1}> { y = Pad(x, p) }", 4),
        ("(float[1, 1, N] x) => (float[1, 1, M] y) <int64[3] s = {1, 1, 4}> { y = Resize(x, , , s) }", 1),
    ],
)
def test_sizes_that_operators_demand_are_demanded_of_inputs(text: str, least: int) -> None:
    """What lies outside would be memory of others."""
    head = '<ir_version: 10, opset_import: ["" : 18]> m '
    assert bounds(import_model(onnx.parser.parse_model(head + text)).inputs[0].shape[-1])[0] == least
    with pytest.raises(ModelError, match=r"out of range|too little|cut away|k is 5|nothing to make"):
        import_model(onnx.parser.parse_model(head + text.replace("N]", f"{least - 1}]")))


def test_what_is_turned_round_keeps_its_size() -> None:
    ends = "<int64[1] last = {-1}, int64[1] first = {-1099511627776}, int64[1] axis = {0}>"
    text = f"(float[N] x) => (float[N] y) {ends} {{ r = Slice(x, last, first, axis, last)  y = Add(x, r) }}"
    g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> m {text}'))
    assert (shapes(g), bounds(g.inputs[0].shape[0])) == (["f32[N]"], (0, None))


def test_sizes_of_inputs_stay_what_inputs_tell() -> None:
    """The body that defines Attention repeats heads as often as an open number says."""
    text = """(float[2,H,6,4] q, float[2,1,2,4] k, float[A,B,2,C] v, float[D,2] mask) => (float[2,H,6,C] y)
        { y = Attention<softcap = 2.0>(q, k, v, mask) }"""
    g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> m {text}'))
    assert [str(v.type) for v in g.inputs[:3]] == ["f32[2,H,6,4]", "f32[2,1,2,4]", "f32[A,B,2,C]"]


def test_letters_of_einsum_are_one_size_each() -> None:
    text = '(float[A, B, 2] x, float[C, D, E] y) => (float z) { z = Einsum<equation = "abc,abc->">(x, y) }'
    g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> m {text}'))
    assert [str(v.type) for v in g.inputs] == ["f32[A,B,2]", "f32[A,B,2]"]


def test_channels_of_group_norms_are_as_many_as_scales() -> None:
    scales = "<float[4] s = {1, 1, 1, 1}, float[4] b = {0, 0, 0, 0}>"
    text = f"(float[N, C, W] x) => (float[N, C, W] y) {scales} {{ y = GroupNormalization<num_groups = 2>(x, s, b) }}"
    g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> m {text}'))
    assert str(g.inputs[0].type) == "f32[N,4,W]"


def test_lengths_and_states_of_a_recurrence_fit_its_input() -> None:
    nodes = [node("RNN", "x w r b lens h", "y", hidden_size=2)]
    inputs = [value("x", ("T", "N", 3)), value("lens", ("L",), TensorProto.INT32), value("h", ("D", "M", "H"))]
    given = {"w": np.ones((1, 2, 3), np.float32), "r": np.ones((1, 2, 2), np.float32), "b": np.ones((1, 4), np.float32)}
    g = imported(nodes, inputs, [value("y", None)], given)
    x, lens, h = (v.shape for v in g.inputs)
    assert lens[0] == h[1] == x[1] and (h[0], h[2]) == (1, 2)
    with pytest.raises(ModelError, match="the direction is 'linear'"):
        imported([node("RNN", "x w r", "y", hidden_size=2, direction="linear")], inputs[:1], [value("y", None)], given)
    for name, wrong in (("b", (1, 3)), ("r", (2, 2, 2)), ("r", (1, 3, 2)), ("b", (4,))):
        with pytest.raises(ModelError, match="RNN"):
            imported(nodes, inputs, [value("y", None)], given | {name: np.ones(wrong, np.float32)})


def test_symbols_that_are_divided_become_multiples() -> None:
    thirds = "(float[N, 2] x) => (float[M, 3] y) <int64[2] s = {-1, 3}> { y = Reshape(x, s) }"
    blocks = "(float[1, 1, H, W] x) => (float[1, 4, h, w] y) { y = SpaceToDepth<blocksize = 2>(x) }"
    for text, shape in ((thirds, "f32[3*N_by_3,2]"), (blocks, "f32[1,1,2*H_by_2,2*W_by_2]")):
        g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> m {text}'))
        assert str(g.inputs[0].type) == shape


@pytest.mark.parametrize(
    "how", ['kernel_shape = [3, 3], auto_pad = "SAME_UPPER"', "kernel_shape = [4, 4], ceil_mode = 1"]
)
@pytest.mark.parametrize("stride", [2, 3])
def test_windows_take_any_size(how: str, stride: int) -> None:
    """What is known of a window's results says that there are some: no size has to be a multiple of the stride."""
    text = f"(float[1, 2, H, 7] x) => (float[1, 2, h, w] y) {{ y = MaxPool<strides = [{stride}, 1], {how}>(x) }}"
    g = import_model(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]> m {text}'))
    assert str(g.inputs[0].type) == "f32[1,2,H,7]"
    for h in (5, 6, 7):
        out = -(-h // stride) if "SAME" in how else -(-(h - 4) // stride) + 1
        assert evaluate(g, [np.ones((1, 2, h, 7), np.float32)])[0].shape[2] == out
