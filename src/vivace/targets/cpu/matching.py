"""The native function that compares the arrays of a call with what an engine takes, and learns sizes from them.

Each array, of the inputs and then of the outputs, has an entry in a table (`Entry`, then `Axis` for each axis). Sizes
lie in a table of values (`formulas`), those of symbols first. The answer is a `Likeness`.

Rules:
* LEARN: a symbol takes the first size that an axis of nothing but that symbol has; then the formulas are evaluated, and
  everything is compared. So a symbol that no such axis tells, or a size that does not fit, is "not".
* DENSE: an entry whose flags ask for it takes C-contiguous arrays. Another takes those that are dense but for one axis,
  which may have more places in memory than the array takes: as many as the value at its `pitch`, which is learnt too.
* APART: an output lies apart from every input and other output; but the one with a `pair` begins where that input does.
* FORGET: where the answer is NONE, the symbols are unset.
"""

from __future__ import annotations

from enum import IntEnum

from vivace.targets.cpu.formulas import Frame

UNSET = -1  # the value of a symbol that is to be learnt


class Likeness(IntEnum):
    """How arrays compare."""

    NONE = 0  # they are not what the engine takes, or must be looked at more closely
    SAME = 1  # they are as the values say that were there before
    NEW = 2  # they are as the values say, which were learnt from them


class ArrayField(IntEnum):
    """Bytes from the word that holds the address of an array's data to other fields of the array object."""

    TYPE = -8
    RANK = 8  # 4 bytes
    SHAPE = 16  # the address of the sizes
    STRIDES = 24
    DTYPE = 40
    FLAGS = 48  # 4 bytes: `DENSE`, `WRITEABLE`


DENSE, WRITEABLE = 0x001, 0x400  # NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_WRITEABLE


class Entry(IntEnum):
    """Words of the table of arrays."""

    TYPE = 0  # address of the class `ndarray`
    DTYPE = 1  # address of the dtype
    NONE = 2  # address of None where that may stand for the array; else 0
    FLAGS = 3  # those that the array must have
    ITEM_BYTES = 4
    PAIR = 5  # the number of the input that this output begins with; else -1
    RANK = 6
    SIZE = 7


class Axis(IntEnum):
    """Words for each axis: places in the table of values."""

    LENGTH = 0
    PITCH = 1  # -1: as the length
    SIZE = 2


class Match(IntEnum):
    """Words of a frame of `match`, behind those of the formulas."""

    ENTRIES = Frame.SIZE
    FIELD = Frame.SIZE + 1  # bytes from an array object to the address of its data
    N_KNOWN = Frame.SIZE + 2  # symbols that must be learnt: the first ones
    N_SYMBOLS = Frame.SIZE + 3  # with those of pitches
    N_INPUTS = Frame.SIZE + 4
    N_LEAST = Frame.SIZE + 5  # arrays that a call has at least
    EXTENTS = Frame.SIZE + 6  # the address of two words an array, for its first byte and that behind its last
    SIZE = Frame.SIZE + 7


def _word(name: str, at: int, kind: str = "i64", of: str = "%frame") -> str:
    return f"  %{name}.p = getelementptr i64, ptr {of}, i64 {at:d}\n  %{name} = load {kind}, ptr %{name}.p"


def _field(name: str, at: ArrayField, kind: str = "i64") -> str:
    return f"  %{name}.p = getelementptr i8, ptr %data.p, i64 {at:d}\n  %{name} = load {kind}, ptr %{name}.p"


MATCHING = f"""
; Whether the arrays are as their entries and the values say. With %learn, sizes and pitches that are not set are taken
; from the arrays, and other sizes are not compared.
define internal i1 @scan(ptr %frame, ptr %places, i64 %n.places, i1 %learn) {{
entry:
{_word("entries", Match.ENTRIES, "ptr")}
{_word("field", Match.FIELD)}
{_word("n_symbols", Match.N_SYMBOLS)}
{_word("extents", Match.EXTENTS, "ptr")}
{_word("values", Frame.VALUES, "ptr")}
  %places.end = getelementptr ptr, ptr %places, i64 %n.places
  br label %array
array:
  %e = phi ptr [%entries, %entry], [%e.next, %array.next]
  %place.p = phi ptr [%places, %entry], [%place.next, %array.next]
  %extent = phi ptr [%extents, %entry], [%extent.next, %array.next]
  %is.end = icmp eq ptr %place.p, %places.end
  br i1 %is.end, label %alike, label %look
look:
{_word("type", Entry.TYPE, of="%e")}
{_word("rank", Entry.RANK, of="%e")}
  %axes = getelementptr i64, ptr %e, i64 {Entry.SIZE:d}
  %axes.words = mul i64 %rank, {Axis.SIZE:d}
  %e.next = getelementptr i64, ptr %axes, i64 %axes.words
  %place.next = getelementptr ptr, ptr %place.p, i64 1
  %extent.next = getelementptr i64, ptr %extent, i64 2
  %extent.end = getelementptr i64, ptr %extent, i64 1
  %place = load ptr, ptr %place.p
{_word("none", Entry.NONE, "ptr", "%e")}
  %is.none = icmp eq ptr %place, %none
  br i1 %is.none, label %nothing, label %kind
nothing:
  store i64 0, ptr %extent
  store i64 0, ptr %extent.end
  br label %array.next
kind:
  %data.p = getelementptr i8, ptr %place, i64 %field
{_field("its.type", ArrayField.TYPE)}
  %is.array = icmp eq i64 %its.type, %type
  br i1 %is.array, label %inside, label %unlike
inside:
{_word("dtype", Entry.DTYPE, of="%e")}
{_word("flags", Entry.FLAGS, of="%e")}
{_word("item", Entry.ITEM_BYTES, of="%e")}
{_field("its.dtype", ArrayField.DTYPE)}
{_field("its.flags.4", ArrayField.FLAGS, "i32")}
{_field("its.rank.4", ArrayField.RANK, "i32")}
{_field("shape", ArrayField.SHAPE, "ptr")}
{_field("strides", ArrayField.STRIDES, "ptr")}
  %data = load i64, ptr %data.p
  %its.flags = zext i32 %its.flags.4 to i64
  %its.rank = sext i32 %its.rank.4 to i64
  %shared.flags = and i64 %its.flags, %flags
  %same.flags = icmp eq i64 %shared.flags, %flags
  %same.dtype = icmp eq i64 %its.dtype, %dtype
  %same.rank = icmp eq i64 %its.rank, %rank
  %same.kind = and i1 %same.flags, %same.dtype
  %comparable = and i1 %same.kind, %same.rank
  %dense.flag = and i64 %flags, {DENSE}
  %is.dense = icmp ne i64 %dense.flag, 0
  br i1 %comparable, label %axis, label %unlike
axis:
  %left = phi i64 [%rank, %inside], [%i, %axis.next]
  %size = phi i64 [%item, %inside], [%size.next, %axis.next]
  %reach = phi i64 [%item, %inside], [%reach.next, %axis.next]
  %is.empty = phi i1 [false, %inside], [%is.empty.next, %axis.next]
  %waiting = phi i64 [-1, %inside], [%waiting.next, %axis.next]
  %i = sub i64 %left, 1
  %no.more = icmp eq i64 %left, 0
  br i1 %no.more, label %array.end, label %one
one:
  %n.p = getelementptr i64, ptr %shape, i64 %i
  %n = load i64, ptr %n.p
  %stride.p = getelementptr i64, ptr %strides, i64 %i
  %stride = load i64, ptr %stride.p
  %axis.at = mul i64 %i, {Axis.SIZE:d}
  %a = getelementptr i64, ptr %axes, i64 %axis.at
{_word("length", Axis.LENGTH, of="%a")}
{_word("pitch", Axis.PITCH, of="%a")}
  %wanted.p = getelementptr i64, ptr %values, i64 %length
  %wanted = load i64, ptr %wanted.p
  %is.zero = icmp eq i64 %n, 0
  %is.empty.next = or i1 %is.empty, %is.zero
  %steps = sub i64 %n, 1
  %reached = mul i64 %steps, %stride
  %reach.next = add i64 %reach, %reached
  br i1 %learn, label %learning, label %compare
learning:
  %is.symbol = icmp slt i64 %length, %n_symbols
  %is.unset = icmp eq i64 %wanted, {UNSET}
  %is.news = and i1 %is.symbol, %is.unset
  br i1 %is.news, label %set, label %lie
set:
  store i64 %n, ptr %wanted.p
  br label %lie
compare:
  %same.size = icmp eq i64 %wanted, %n
  br i1 %same.size, label %lie, label %unlike
lie:
  br i1 %is.dense, label %axis.dense, label %gaps
axis.dense:
  br label %axis.next
gaps:
  br i1 %is.zero, label %unlike, label %gaps.some
gaps.some:
  %is.one = icmp eq i64 %n, 1
  %is.waiting = icmp sge i64 %waiting, 0
  br i1 %is.one, label %pitched, label %strided
strided:
  br i1 %is.waiting, label %tell, label %plain
plain:
  %same.stride = icmp eq i64 %stride, %size
  br i1 %same.stride, label %pitched, label %unlike
tell:
  %room = sdiv i64 %stride, %size
  %rest = srem i64 %stride, %size
  %waiting.p = getelementptr i64, ptr %values, i64 %waiting
  store i64 %room, ptr %waiting.p
  %is.whole = icmp eq i64 %rest, 0
  br i1 %is.whole, label %pitched, label %unlike
pitched:
  %size.here = phi i64 [%size, %gaps.some], [%size, %plain], [%stride, %tell]
  %waiting.here = phi i64 [%waiting, %gaps.some], [%waiting, %plain], [-1, %tell]
  %is.plain = icmp slt i64 %pitch, 0
  %pitch.at = select i1 %is.plain, i64 0, i64 %pitch
  %pitch.value.p = getelementptr i64, ptr %values, i64 %pitch.at
  %pitch.value = load i64, ptr %pitch.value.p
  %is.unknown = icmp eq i64 %pitch.value, {UNSET}
  %no.pitch = or i1 %is.plain, %is.unknown
  %places.here = select i1 %no.pitch, i64 %n, i64 %pitch.value
  %has.room = icmp sge i64 %places.here, %n
  br i1 %has.room, label %stretch, label %unlike
stretch:
  %is.pitched = xor i1 %is.plain, true
  %wants = and i1 %is.pitched, %is.unknown
  %asks = and i1 %wants, %learn
  %factor = select i1 %asks, i64 1, i64 %places.here
  %size.gaps = mul i64 %size.here, %factor
  %waiting.gaps = select i1 %asks, i64 %pitch, i64 %waiting.here
  br label %axis.next
axis.next:
  %size.next = phi i64 [%size, %axis.dense], [%size.gaps, %stretch]
  %waiting.next = phi i64 [-1, %axis.dense], [%waiting.gaps, %stretch]
  br label %axis
array.end:
  %end = add i64 %data, %reach
  %begin.or.0 = select i1 %is.empty, i64 0, i64 %data
  %end.or.0 = select i1 %is.empty, i64 0, i64 %end
  store i64 %begin.or.0, ptr %extent
  store i64 %end.or.0, ptr %extent.end
  br label %array.next
array.next:
  br label %array
alike:
  ret i1 true
unlike:
  ret i1 false
}}

; Rule APART, by the extents of a scan.
define internal i1 @lie_apart(ptr %frame, i64 %n.places) {{
entry:
{_word("entries", Match.ENTRIES, "ptr")}
{_word("extents", Match.EXTENTS, "ptr")}
{_word("n_inputs", Match.N_INPUTS)}
  br label %array
array:
  %j = phi i64 [0, %entry], [%j.next, %array.next]
  %e = phi ptr [%entries, %entry], [%e.next, %array.next]
  %is.end = icmp eq i64 %j, %n.places
  br i1 %is.end, label %apart, label %one
one:
{_word("rank", Entry.RANK, of="%e")}
{_word("pair", Entry.PAIR, of="%e")}
  %axes.words = mul i64 %rank, {Axis.SIZE:d}
  %words = add i64 %axes.words, {Entry.SIZE:d}
  %e.next = getelementptr i64, ptr %e, i64 %words
  %out = getelementptr [2 x i64], ptr %extents, i64 %j
  %out.end.p = getelementptr i64, ptr %out, i64 1
  %out.begin = load i64, ptr %out
  %out.end = load i64, ptr %out.end.p
  %is.output = icmp sge i64 %j, %n_inputs
  %is.somewhere = icmp ne i64 %out.end, 0
  %is.written = and i1 %is.output, %is.somewhere
  br i1 %is.written, label %other, label %array.next
other:
  %i = phi i64 [0, %one], [%i.next, %other.next]
  %all = icmp eq i64 %i, %j
  br i1 %all, label %array.next, label %pair.or.not
pair.or.not:
  %in = getelementptr [2 x i64], ptr %extents, i64 %i
  %in.end.p = getelementptr i64, ptr %in, i64 1
  %in.begin = load i64, ptr %in
  %in.end = load i64, ptr %in.end.p
  %before = icmp sle i64 %in.end, %out.begin
  %behind = icmp sle i64 %out.end, %in.begin
  %apart.here = or i1 %before, %behind
  %together = icmp eq i64 %in.begin, %out.begin
  %is.pair = icmp eq i64 %i, %pair
  %is.right = select i1 %is.pair, i1 %together, i1 %apart.here
  br i1 %is.right, label %other.next, label %wrong
other.next:
  %i.next = add i64 %i, 1
  br label %other
array.next:
  %j.next = add i64 %j, 1
  br label %array
apart:
  ret i1 true
wrong:
  ret i1 false
}}

define internal void @forget(ptr %frame) {{
entry:
{_word("values", Frame.VALUES, "ptr")}
{_word("n_symbols", Match.N_SYMBOLS)}
  br label %test
test:
  %i = phi i64 [0, %entry], [%i.next, %one]
  %is.end = icmp eq i64 %i, %n_symbols
  br i1 %is.end, label %finish, label %one
one:
  %value.p = getelementptr i64, ptr %values, i64 %i
  store volatile i64 {UNSET}, ptr %value.p ; or LLVM calls memset
  %i.next = add i64 %i, 1
  br label %test
finish:
  ret void
}}

define internal i64 @match(ptr %frame, ptr %places, i64 %n) {{
entry:
{_word("values", Frame.VALUES, "ptr")}
{_word("n_known", Match.N_KNOWN)}
{_word("n_least", Match.N_LEAST)}
  %are.enough = icmp sge i64 %n, %n_least
  br i1 %are.enough, label %first, label %no
first:
  %is.same = call i1 @scan(ptr %frame, ptr %places, i64 %n, i1 false)
  br i1 %is.same, label %apart, label %anew
anew:
  call void @forget(ptr %frame)
  %is.read = call i1 @scan(ptr %frame, ptr %places, i64 %n, i1 true)
  br i1 %is.read, label %known, label %no
known:
  %k = phi i64 [0, %anew], [%k.next, %known.one]
  %is.known = icmp eq i64 %k, %n_known
  br i1 %is.known, label %compute, label %known.one
known.one:
  %known.p = getelementptr i64, ptr %values, i64 %k
  %known.value = load i64, ptr %known.p
  %k.next = add i64 %k, 1
  %is.set = icmp ne i64 %known.value, {UNSET}
  br i1 %is.set, label %known, label %no
compute:
  %trouble = call i64 @evaluate(ptr %frame)
  %is.good = icmp eq i64 %trouble, 0
  br i1 %is.good, label %again, label %no
again:
  %is.like = call i1 @scan(ptr %frame, ptr %places, i64 %n, i1 false)
  br i1 %is.like, label %apart, label %no
apart:
  %status = phi i64 [{Likeness.SAME:d}, %first], [{Likeness.NEW:d}, %again]
  %is.apart = call i1 @lie_apart(ptr %frame, i64 %n)
  br i1 %is.apart, label %yes, label %no
yes:
  ret i64 %status
no:
  call void @forget(ptr %frame)
  ret i64 {Likeness.NONE:d}
}}
"""
