"""Vector code written as Python expressions: builds LLVM IR, which `nkat.kernels.cpu.jit` compiles.

A kernel is a Python function that emits instructions:

    def double(k: Builder) -> None:
        x, count = k.pointer(0), k.integer(1)          # the kernel's arguments: 64-bit words
        with k.loop(0, count, 16) as i:
            k.store(k.load(F32(16), x + i * 4) * 2.0, x + i * 4)

    address = compile_kernel("double", double)         # of a C function void(const int64 *arguments, thread, threads)

Python loops unroll, `k.loop` loops at run time. Values are scalars or vectors; a Python number or a scalar beside a
vector is spread over its lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from llvmlite import ir

from nkat.host.hardware import is_x86

_POINTER = ir.PointerType()
_BIT, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
MAX_LOCAL_BYTES = 1 << 16  # of a thread's stack, which has 8 MiB on Linux and 512 KiB on macOS
DOT4 = ("avx512-vnni", "avx-vnni")  # the `isa` with one instruction for the sum of four products of bytes
Operand: TypeAlias = "Value | int | float"


def _lanes_of(element: ir.Type, lanes: int) -> ir.Type:
    return element if lanes == 1 else ir.VectorType(element, lanes)


def I8(lanes: int = 1) -> ir.Type:
    return _lanes_of(_I8, lanes)


def I16(lanes: int = 1) -> ir.Type:
    return _lanes_of(_I16, lanes)


def I32(lanes: int = 1) -> ir.Type:
    return _lanes_of(_I32, lanes)


def I64(lanes: int = 1) -> ir.Type:
    return _lanes_of(_I64, lanes)


def F16(lanes: int = 1) -> ir.Type:
    return _lanes_of(ir.HalfType(), lanes)


def F32(lanes: int = 1) -> ir.Type:
    return _lanes_of(ir.FloatType(), lanes)


def _element(kind: ir.Type) -> ir.Type:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _lanes(kind: ir.Type) -> int:
    return kind.count if isinstance(kind, ir.VectorType) else 1


class Value:
    """A scalar, vector or pointer of the code being built."""

    __slots__ = ("k", "raw")

    def __init__(self, k: Builder, raw: ir.Value) -> None:
        self.k, self.raw = k, raw

    @property
    def kind(self) -> ir.Type:
        return self.raw.type

    @property
    def lanes(self) -> int:
        return _lanes(self.kind)

    @property
    def is_float(self) -> bool:
        return isinstance(_element(self.kind), ir.HalfType | ir.FloatType)

    def _binary(self, other: Operand, integer: str, floating: str | None) -> Value:
        a, b = self.k.pair(self, other)
        name = floating if a.is_float else integer
        assert name is not None, "not an operation on floats"
        return Value(self.k, getattr(self.k.ir, name)(a.raw, b.raw))

    def __add__(self, other: Operand) -> Value:
        if isinstance(self.kind, ir.PointerType):  # bytes
            offset = self.k.value(other, _I64).raw
            return Value(self.k, self.k.ir.gep(self.raw, [offset], source_etype=_I8))
        return self._binary(other, "add", "fadd")

    def __sub__(self, other: Operand) -> Value:
        return self._binary(other, "sub", "fsub")

    def __mul__(self, other: Operand) -> Value:
        return self._binary(other, "mul", "fmul")

    def __truediv__(self, other: Operand) -> Value:
        return self._binary(other, "sdiv", "fdiv")

    def __floordiv__(self, other: Operand) -> Value:
        """Of integers that are not negative."""
        return self._binary(other, "udiv", None)

    def __mod__(self, other: Operand) -> Value:
        """Of integers that are not negative."""
        return self._binary(other, "urem", None)

    def __and__(self, other: Operand) -> Value:
        return self._binary(other, "and_", None)

    def __or__(self, other: Operand) -> Value:
        return self._binary(other, "or_", None)

    def __xor__(self, other: Operand) -> Value:
        return self._binary(other, "xor", None)

    def __lshift__(self, other: Operand) -> Value:
        return self._binary(other, "shl", None)

    def __rshift__(self, other: Operand) -> Value:
        """Zeros come in at the top."""
        return self._binary(other, "lshr", None)

    def shift_signed(self, other: Operand) -> Value:
        """Right; copies of the sign come in at the top."""
        return self._binary(other, "ashr", None)

    def _compare(self, operator: str, other: Operand) -> Value:
        a, b = self.k.pair(self, other)
        compare = self.k.ir.fcmp_ordered if a.is_float else self.k.ir.icmp_signed
        return Value(self.k, compare(operator, a.raw, b.raw))

    def __lt__(self, other: Operand) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Operand) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Operand) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Operand) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Operand) -> Value:
        return self._compare("==", other)

    def bits(self, kind: ir.Type) -> Value:
        """The same bits as another type of the same size."""
        return self if kind == self.kind else Value(self.k, self.k.ir.bitcast(self.raw, kind))

    def _to(self, element: ir.Type, operation: str) -> Value:
        return Value(self.k, getattr(self.k.ir, operation)(self.raw, _lanes_of(element, self.lanes)))

    def unsigned(self, element: ir.Type) -> Value:
        """Integers made wider with zeros."""
        return self._to(element, "zext")

    def signed(self, element: ir.Type) -> Value:
        """Integers made wider with their sign."""
        return self._to(element, "sext")

    def narrow(self, element: ir.Type) -> Value:
        """Integers cut to their low bits."""
        return self._to(element, "trunc")

    def float32(self) -> Value:
        """float16 or signed integers as float32."""
        if self.kind == F32(self.lanes):
            return self
        if self.is_float and self.k.without_half:
            return self._float32_by_hand()
        return self._to(_element(F32()), "fpext" if self.is_float else "sitofp")

    def float16(self) -> Value:
        """float32 rounded to float16."""
        if self.k.without_half:
            return self._float16_by_hand()
        return self._to(_element(F16()), "fptrunc")

    def _float32_by_hand(self) -> Value:
        whole = self.bits(I16(self.lanes)).unsigned(_I32)
        sign, size = (whole & 0x8000) << 16, whole & 0x7FFF
        small = (size.float32() * 2.0**-24).bits(size.kind)  # below the normal float16
        found = self.k.select(size < 0x0400, small, (size << 13) + (112 << 23))
        found = self.k.select(size < 0x7C00, found, (size << 13) | 0x7F800000)  # infinity and NaN keep their bits
        return (found | sign).bits(F32(self.lanes))

    def _float16_by_hand(self) -> Value:
        whole = self.bits(I32(self.lanes))
        sign, size = (whole >> 16) & 0x8000, whole & 0x7FFFFFFF
        small = (size.bits(self.kind) + 0.5).bits(size.kind) - 0x3F000000  # a half's last bit is float16's smallest
        normal = ((size + 0x0FFF + ((size >> 13) & 1)) >> 13) - (112 << 10)  # a tie goes to the even one
        found = self.k.select(size < 0x38800000, small, normal)
        found = self.k.select(size < 0x47800000, found, 0x7C00)
        found = self.k.select(size <= 0x7F800000, found, 0x7E00)
        return (found | sign).narrow(_I16).bits(F16(self.lanes))

    def truncated(self) -> Value:
        """float32 as int32, towards zero."""
        return self._to(_I32, "fptosi")

    def pick(self, indices: list[int], other: Value | None = None) -> Value:
        """A vector of the lanes at these indices of this vector, followed by `other`'s."""
        second = ir.Constant(self.kind, ir.Undefined) if other is None else other.raw
        mask = ir.Constant(ir.VectorType(_I32, len(indices)), indices)
        return Value(self.k, self.k.ir.shuffle_vector(self.raw, second, mask))

    def halves(self) -> tuple[Value, Value]:
        half = self.lanes // 2
        return self.pick(list(range(half))), self.pick(list(range(half, 2 * half)))

    def spread(self, lanes: int) -> Value:
        """A vector with this scalar in every lane."""
        if lanes == 1:
            return self
        one = ir.Constant(ir.VectorType(self.kind, lanes), ir.Undefined)
        first = self.k.ir.insert_element(one, self.raw, ir.Constant(_I32, 0))
        return Value(self.k, first).pick([0] * lanes)

    def total(self) -> Value:
        """Sum of the lanes, in halves: the order does not depend on the processor."""
        value = self
        while value.lanes > 1:
            low, high = value.halves() if value.lanes > 2 else (value.lane(0), value.lane(1))
            value = low + high
        return value

    def largest(self) -> Value:
        """Largest of the lanes."""
        value = self
        while value.lanes > 1:
            low, high = value.halves() if value.lanes > 2 else (value.lane(0), value.lane(1))
            value = self.k.maximum(low, high)
        return value

    def lane(self, index: int) -> Value:
        return Value(self.k, self.k.ir.extract_element(self.raw, ir.Constant(_I32, index)))


class Variable:
    """A value that changes: a vector or scalar kept in a register across a loop."""

    __slots__ = ("_k", "_kind", "_slot")

    def __init__(self, k: Builder, initial: Value) -> None:
        self._k, self._kind = k, initial.kind
        with k.ir.goto_entry_block():
            self._slot = k.ir.alloca(initial.kind)
        self.value = initial

    @property
    def value(self) -> Value:
        return Value(self._k, self._k.ir.load(self._slot, typ=self._kind))

    @value.setter
    def value(self, new: Value) -> None:
        assert new.kind == self._kind
        self._k.ir.store(new.raw, self._slot)


class Builder:
    """Emits one kernel. `thread` of `threads` is running it; `isa` says which instructions it may use."""

    def __init__(self, name: str, isa: str) -> None:
        self.isa = isa
        # x86 without F16C has no instructions for float16; LLVM would call functions of a compiler's library that a
        # Python process does not have, at address 0.
        self.without_half = isa == "generic" and is_x86()
        self.module = ir.Module(name)
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [_POINTER, _I64, _I64]), name)
        self.ir = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.arguments = Value(self, self.function.args[0])
        self.thread, self.threads = (Value(self, raw) for raw in self.function.args[1:])

    # arguments, constants, memory

    def integer(self, index: int) -> Value:
        return self.load(_I64, self.arguments + 8 * index)

    def pointer(self, index: int) -> Value:
        return self.load_pointer(self.arguments + 8 * index)

    def value(self, x: Operand, kind: ir.Type) -> Value:
        """x as `kind`: a Python number becomes a constant, a scalar is spread over a vector's lanes."""
        if isinstance(x, Value):
            return x if x.kind == kind else x.spread(_lanes(kind))
        lanes = _lanes(kind)
        return Value(self, ir.Constant(kind, x if lanes == 1 else [x] * lanes))

    def constant(self, kind: ir.Type, numbers: list[int] | list[float]) -> Value:
        return Value(self, ir.Constant(kind, numbers))

    def table(self, numbers: list[int]) -> Value:
        """Where these int32 stand, beside the code."""
        kind = ir.ArrayType(_I32, len(numbers))
        place = ir.GlobalVariable(self.module, kind, self.module.get_unique_name("table"))
        place.linkage, place.global_constant, place.initializer = "private", True, ir.Constant(kind, numbers)
        return Value(self, self.ir.inttoptr(self.ir.ptrtoint(place, _I64), _POINTER))

    def vector(self, lanes: list[Value]) -> Value:
        raw = ir.Constant(ir.VectorType(lanes[0].kind, len(lanes)), ir.Undefined)
        for i, lane in enumerate(lanes):
            raw = self.ir.insert_element(raw, lane.raw, ir.Constant(_I32, i))
        return Value(self, raw)

    def pair(self, a: Value, b: Operand) -> tuple[Value, Value]:
        """Two operands brought to the same type."""
        if isinstance(b, Value) and b.lanes > a.lanes:
            return self.value(a, b.kind), b
        return a, self.value(b, a.kind)

    def load(self, kind: ir.Type, address: Value) -> Value:
        align = 8 if kind in (_I64, _POINTER) else 1
        return Value(self, self.ir.load(address.raw, typ=kind, align=align))

    def prefetch(self, address: Value, level: int = 1) -> None:
        """Asks for the cache line there, into the cache of that level: it will be read soon."""
        read, locality, data = (self.value(x, _I32) for x in (0, 4 - level, 1))
        self.perform("llvm.prefetch.p0", [address, read, locality, data])

    def load_pointer(self, address: Value) -> Value:
        return self.load(_POINTER, address)

    def store(self, value: Value, address: Value) -> None:
        self.ir.store(value.raw, address.raw, align=1)

    def is_set(self, address: Value) -> Value:
        """Whether a pointer is not null."""
        return Value(self, self.ir.icmp_unsigned("!=", address.raw, ir.Constant(_POINTER, None)))

    def local(self, nbytes: int) -> Value:
        """Memory of this call's own, on the stack. Whoever calls it bounds what a model file has a say in."""
        if nbytes > MAX_LOCAL_BYTES:
            raise ValueError(f"{nbytes} bytes are too many for a thread's stack")
        with self.ir.goto_entry_block():
            slot = self.ir.alloca(_I8, nbytes)
            number = self.ir.ptrtoint(slot, _I64)  # alloca's pointer has a type, all others here have none
            return Value(self, self.ir.inttoptr(number, _POINTER))

    # control

    def variable(self, initial: Value) -> Variable:
        return Variable(self, initial)

    @contextmanager
    def loop(self, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """for i in range(start, stop, step), i an int64."""
        stop, step = self.value(stop, _I64), self.value(step, _I64)
        counter = self.variable(self.value(start, _I64))
        head, body, after = (self.function.append_basic_block(name) for name in ("head", "body", "after"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        index = counter.value
        self.ir.cbranch((index < stop).raw, body, after)
        self.ir.position_at_end(body)
        yield index
        counter.value = index + step
        self.ir.branch(head)
        self.ir.position_at_end(after)

    @contextmanager
    def while_(self, condition: Callable[[], Value]) -> Iterator[None]:
        head, body, after = (self.function.append_basic_block(name) for name in ("head", "body", "after"))
        self.ir.branch(head)
        self.ir.position_at_end(head)
        self.ir.cbranch(condition().raw, body, after)
        self.ir.position_at_end(body)
        yield
        self.ir.branch(head)
        self.ir.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.ir.if_then(condition.raw):
            yield

    # mathematics

    def call(self, intrinsic: str, result: ir.Type, arguments: list[Value]) -> Value:
        """An LLVM intrinsic by its full name."""
        kinds = [a.kind for a in arguments]
        function = self.module.globals.get(intrinsic)
        if function is None:
            function = ir.Function(self.module, ir.FunctionType(result, kinds), intrinsic)
        return Value(self, self.ir.call(function, [a.raw for a in arguments]))

    def perform(self, intrinsic: str, arguments: list[Value]) -> None:
        """An LLVM intrinsic that returns nothing."""
        function = self.module.globals.get(intrinsic)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [a.kind for a in arguments])
            function = ir.Function(self.module, kind, intrinsic)
        self.ir.call(function, [a.raw for a in arguments])

    def _named(self, intrinsic: str, arguments: list[Value]) -> Value:
        kind = arguments[0].kind
        prefix = f"v{_lanes(kind)}" if _lanes(kind) > 1 else ""
        element = _element(kind)
        letter = f"f{16 if element == ir.HalfType() else 32}" if arguments[0].is_float else f"i{element.width}"
        return self.call(f"llvm.{intrinsic}.{prefix}{letter}", kind, arguments)

    def fma(self, a: Value, b: Operand, c: Value) -> Value:
        """a * b + c, rounded once."""
        return self._named("fma", [self.value(a, c.kind), self.value(b, c.kind), c])

    def maximum(self, a: Value, b: Operand) -> Value:
        a, b = self.pair(a, b)
        return self._named("maxnum" if a.is_float else "smax", [a, b])

    def minimum(self, a: Value, b: Operand) -> Value:
        a, b = self.pair(a, b)
        return self._named("minnum" if a.is_float else "smin", [a, b])

    def absolute(self, a: Value) -> Value:
        return self._named("fabs", [a])

    def sqrt(self, a: Value) -> Value:
        return self._named("sqrt", [a])

    def nearest(self, a: Value) -> Value:
        """Rounded to the nearest integer, half to even."""
        return self._named("rint", [a])

    def select(self, condition: Value, yes: Value, no: Operand) -> Value:
        return Value(self, self.ir.select(condition.raw, yes.raw, self.value(no, yes.kind).raw))

    def exp(self, x: Value) -> Value:
        """e**x of float32, within 2 units in the last place; 0 below -87, clipped above 88 (Cephes' polynomial).

        NaN stays NaN, so that a damaged weight is seen in the result.
        """
        x = self.select(self.value(88.0, x.kind) < x, self.value(88.0, x.kind), x)
        n = self.nearest(x * 1.44269504088896341)
        r = self.fma(n, -0.693359375, x)
        r = self.fma(n, 2.12194440e-4, r)
        p = self.value(1.9875691500e-4, x.kind)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, self.value(c, x.kind))
        p = self.fma(p, r * r, r + 1.0)
        safe = self.maximum(n, -126.0)
        power = ((safe.truncated() + 127) << 23).bits(x.kind)
        return self.select(x < -87.0, self.value(0.0, x.kind), p * power)

    @property
    def has_dot4(self) -> bool:
        """Whether the processor sums four products of bytes, whatever they are, in one instruction."""
        return self.isa in DOT4

    def dot4(self, total: Value, unsigned: Value, signed: Value, *, seven_bit: bool) -> Value:
        """total + the sums of four products of bytes in each int32 lane. seven_bit: the unsigned ones are below 128."""
        kind = total.kind
        if self.isa == "avx512-vnni":
            bytes_ = I8(64)
            operands = [total, unsigned.bits(bytes_), signed.bits(bytes_)]
            return self.call("llvm.x86.avx512.vpdpbusd.512", kind, operands)
        if self.isa in ("avx-vnni", "avx2"):
            half = self._dot4_vnni256 if self.isa == "avx-vnni" else self._dot4_avx2
            pieces = zip(total.halves(), unsigned.halves(), signed.halves(), strict=True)
            low, high = (half(t, u, s, seven_bit) for t, u, s in pieces)
            return low.pick(list(range(16)), high)
        for byte in range(4):
            u = (unsigned >> 8 * byte) & 0xFF
            s = (signed << 24 - 8 * byte).shift_signed(24)
            total = total + u * s
        return total

    def _dot4_vnni256(self, total: Value, unsigned: Value, signed: Value, seven_bit: bool) -> Value:
        operands = [total, unsigned.bits(I8(32)), signed.bits(I8(32))]
        return self.call("llvm.x86.avx512.vpdpbusd.256", total.kind, operands)

    def _dot4_avx2(self, total: Value, unsigned: Value, signed: Value, seven_bit: bool) -> Value:
        # pmaddubsw adds two products in 16 bits, which 255·127·2 would overflow: bit 7 is then multiplied apart
        parts = [unsigned] if seven_bit else [unsigned & 0x7F7F7F7F, unsigned & -0x7F7F7F80]
        ones = self.value(1, I16(16))
        for part in parts:
            pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", I16(16), [part.bits(I8(32)), signed.bits(I8(32))])
            total = total + self.call("llvm.x86.avx2.pmadd.wd", I32(8), [pairs, ones])
        return total

    def look_up(self, table: list[int], indices: Value) -> Value:
        """Byte table[i] for each byte i < 16 of an int32 vector of 16 lanes."""
        signed = [byte - 256 if byte > 127 else byte for byte in table]
        index = indices.bits(I8(64))
        if self.isa == "avx512-vnni":
            found = self.call("llvm.x86.avx512.pshuf.b.512", I8(64), [self.constant(I8(64), signed * 4), index])
        elif self.isa in ("avx-vnni", "avx2"):
            repeated = self.constant(I8(32), signed * 2)
            low, high = (self.call("llvm.x86.avx2.pshuf.b", I8(32), [repeated, half]) for half in index.halves())
            found = low.pick(list(range(64)), high)
        else:
            choices = [self.value(byte, I8(64)) for byte in signed]
            for bit in range(4):
                there = (index & (1 << bit)) > 0
                choices = [self.select(there, b, a) for a, b in zip(choices[::2], choices[1::2], strict=True)]
            found = choices[0]
        return found.bits(indices.kind)

    # threads

    def fetch_add(self, address: Value, amount: int) -> Value:
        """Adds to an int64 that other threads use too; returns what was there."""
        one = ir.Constant(_I64, amount)
        return Value(self, self.ir.atomic_rmw("add", address.raw, one, ordering="acq_rel"))

    def load_shared(self, address: Value) -> Value:
        return Value(self, self.ir.load_atomic(address.raw, ordering="acquire", align=8, typ=_I64))

    def store_shared(self, value: Value, address: Value) -> None:
        self.ir.atomic_rmw("xchg", address.raw, value.raw, ordering="release")  # store_atomic wants typed pointers

    def pause(self) -> None:
        """Tells the processor that this is a loop that waits."""
        if self.isa != "generic":
            self.perform("llvm.x86.sse2.pause", [])

    def call_address(self, function: Value, arguments: list[Value]) -> None:
        """Calls a C function of pointers and int64 that returns nothing."""
        kind = ir.FunctionType(ir.VoidType(), [a.kind for a in arguments])
        self.ir.call(_Callee(function.raw, kind), [a.raw for a in arguments])


class _Callee:
    """A pointer as something that llvmlite's `call` takes: pointers do not know the type of the function there."""

    def __init__(self, pointer: ir.Value, kind: ir.FunctionType) -> None:
        self.function_type, self.type = kind, pointer.type
        self.get_reference = pointer.get_reference
