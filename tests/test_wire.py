"""Bodies cross the wire bit for bit, or are refused by name; files are there whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors

from fedtailor import wire
from fedtailor.wire import WireError

wire.allow(__name__)


@dataclass(frozen=True)
class Body:
    value: Any


@dataclass(frozen=True)
class Pair:
    left: Any
    right: Any = "unsent"


@dataclass
class Thawed:
    value: int


@dataclass(frozen=True)
class Picky:
    value: int

    def __post_init__(self) -> None:
        if self.value < 0:
            raise ValueError("value must not be negative")


@dataclass(frozen=True)
class Share:
    weight: float
    tensors: dict[str, torch.Tensor]
    loss: float
    kind: str = "share"
    flag: bool = True


def plain() -> None: ...


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.complex64)


def bits(t: torch.Tensor) -> bytes:
    """Its bytes, row by row, however it lies."""
    plain = torch.empty(t.numel(), dtype=t.dtype).copy_(t.detach().flatten())
    return bytes(plain.view(torch.uint8).tolist())


def same(one: Any, other: Any) -> bool:
    """Equal in type, structure and order, floats and tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, Body | Pair):
        return same(vars(one), vars(other))
    return bool(one == other)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, 0 to 3 axes of 0 to 3, any bits; as they lie, transposed, one column of a wider one, or expanded."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    lies = draw(st.sampled_from(("plain", "transposed", "strided", "expanded", "leaf")))
    width = 2 if lies == "strided" else 1
    count = math.prod(shape) * width * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    t = (raw % 2 == 1 if dtype == torch.bool else raw.view(dtype)).reshape(*shape, width)
    t = t[..., 0]
    if lies == "transposed":
        t = t.mT if t.dim() > 1 else t
    elif lies == "expanded":
        t = t[..., None].expand(*t.shape, 2)
    elif lies == "leaf" and dtype in FLOATS[:4]:
        t = torch.nn.Parameter(t.clone()).data.requires_grad_()
    return t


keys = st.text("ab/.$é", max_size=4).filter(lambda key: not key.startswith("$"))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors())
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.builds(Body, inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=8,
)


@given(values)
@example({"nan": float("nan"), "inf": [math.inf, -math.inf], "zero": (-0.0, 0.0), "tiny": 5e-324})
@example({"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}})
@example({"": torch.tensor(1), "tensor": torch.tensor(2), "/": torch.tensor(3)})
@example({"deep": [({"x": (torch.zeros(0, 3),)},)], "empty": [{}, [], ()]})
@example("\ud800 \x00 \u2028")
@settings(max_examples=250, deadline=None)
def test_what_is_packed_comes_back_bit_for_bit(value: Any) -> None:
    assert same(wire.unpack(wire.pack(Body(value))), Body(value))


@given(values)
@settings(max_examples=60, deadline=None)
def test_equal_bodies_give_equal_bytes(value: Any) -> None:
    packed = wire.pack(Body(value))
    assert wire.pack(Body(copy.deepcopy(value))) == packed
    assert wire.pack(wire.unpack(packed)) == packed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_crosses(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    many = {"whole": whole, "turned": whole.T, "part": whole[1:3, ::2], "one": whole[2, 3], "none": whole[:0]}
    assert same(wire.unpack(wire.pack(Body(many))), Body({name: t.contiguous() for name, t in many.items()}))


def test_what_torch_only_marks_as_conjugate_or_negative_crosses_as_its_value() -> None:
    turned = torch.tensor([1 + 2j, 3 - 4j]).conj()
    back = wire.unpack(wire.pack(Body([turned, turned.imag]))).value
    assert back[0].tolist() == [1 - 2j, 3 + 4j]
    assert back[1].tolist() == [-2.0, 4.0]


def test_names_that_share_a_storage_cross_as_tensors_of_their_own() -> None:
    whole = torch.arange(6.0)
    back = wire.unpack(wire.pack(Body({"a": whole, "b": whole, "tail": whole[3:], "seen": [whole.view(2, 3)]}))).value
    back["a"].zero_()
    assert torch.equal(back["b"], whole)
    assert torch.equal(back["tail"], whole[3:])
    assert torch.equal(back["seen"][0], whole.view(2, 3))


def test_parts_of_one_storage_cross_without_a_copy_of_them_all() -> None:
    whole = torch.arange(10.0)
    parts = {"left": whole[:5], "right": whole[5:], "middle": whole[3:7], "none": whole[4:4]}
    sent = wire.tensors_of(Body(parts))
    shared = {name for name, part in sent.items() if part.untyped_storage().data_ptr() == whole.data_ptr()}
    assert shared == {"value/left", "value/right"}, "the other two lie over these"
    came = wire.unpack(wire.pack(Body(parts))).value
    assert {name: part.tolist() for name, part in came.items()} == {name: part.tolist() for name, part in parts.items()}


def test_what_was_packed_does_not_change_with_its_source() -> None:
    t = torch.ones(2)
    packed = wire.pack(Body(t))
    t.zero_()
    assert torch.equal(wire.unpack(packed).value, torch.ones(2))


def test_numpy_floats_cross_as_floats() -> None:
    back = wire.unpack(wire.pack(Body([np.float64(0.5), np.float64("nan"), np.float64("-inf")]))).value
    assert back[0] == 0.5
    assert math.isnan(back[1])
    assert back[2] == -math.inf


@pytest.mark.parametrize(
    ("value", "place", "what"),
    [
        (object(), "value", "object"),
        ({"a": [1, {2, 3}]}, "value/a/1", "set"),
        ((b"raw",), "value/0", "bytes"),
        ({"x": 1j}, "value/x", "complex"),
        ([np.zeros(2)], "value/0", "ndarray"),
        ({"x": {3: 1}}, "value/x", "3"),
        ({"x": {"$type": 1}}, "value/x", "$type"),
        ({"x": Thawed(1)}, "value/x", "Thawed must be a frozen dataclass"),
        ({"x": Body}, "value/x", "type"),
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "value/x", "complex128"),
        ({"x": torch.zeros(2).to_sparse()}, "value/x", "sparse"),
    ],
)
def test_what_cannot_cross_is_refused_by_its_place(value: Any, place: str, what: str) -> None:
    with pytest.raises(WireError) as refused:
        wire.pack(Body(value))
    assert str(refused.value).startswith(f"{place}:")
    assert what in str(refused.value)


def message(whole: Any) -> bytes:
    """Bytes of our format that say whatever we like."""
    return save_tensors({"there": torch.zeros(1)}, metadata={"fedtailor": json.dumps(whole)})


def body(value: Any) -> bytes:
    return message({"version": wire.VERSION, "body": value})


def test_a_made_up_message_is_read_like_a_packed_one() -> None:
    made = body({"$type": f"{__name__}:Body", "value": {"$tensor": "there"}})
    assert same(wire.unpack(made), Body(torch.zeros(1)))


REFUSED = {
    "a class of another package": body({"$type": "collections:OrderedDict"}),
    "a function of another package": body({"$type": "os:getcwd"}),
    "a package that only begins like ours": body({"$type": "fedtailor_evil:Body"}),
    "a thawed dataclass": body({"$type": f"{__name__}:Thawed", "value": 1}),
    "a class of ours that is no dataclass": body({"$type": "fedtailor.wire:WireError"}),
    "a function of ours": body({"$type": "fedtailor.wire:pack"}),
    "an instance of a frozen dataclass": body({"$type": f"{__name__}:AN_INSTANCE", "value": 1}),
    "a class inside another": body({"$type": "fedtailor.wire:Failure.__class__", "error": ""}),
    "a module that is not there": body({"$type": "fedtailor.nowhere:Body"}),
    "a name that is not there": body({"$type": "fedtailor.wire:Nothing"}),
    "no name": body({"$type": "fedtailor.wire"}),
    "a number for a name": body({"$type": 5}),
    "a field too few": body({"$type": f"{__name__}:Body"}),
    "a field too many": body({"$type": f"{__name__}:Body", "value": 1, "more": 2}),
    "a value that the class refuses": body({"$type": f"{__name__}:Picky", "value": -1}),
    "a value of a kind that the class cannot take": body({"$type": f"{__name__}:Picky", "value": None}),
    "a tensor that is not there": body({"$tensor": "gone"}),
    "a list for a tensor's name": body({"$tensor": ["there"]}),
    "a float that is none": body({"$float": "warm"}),
    "a tuple that is none": body({"$tuple": 5}),
    "another version": message({"version": wire.VERSION + 1, "body": 1}),
    "no version": message({"body": 1}),
    "no body": message({"version": wire.VERSION}),
    "a list": message([wire.VERSION]),
    "a number": message(5),
    "too deep": save_tensors(
        {}, metadata={"fedtailor": f'{{"version": {wire.VERSION}, "body": {"[" * 100_000 + "]" * 100_000}}}'}
    ),
    "no metadata": save_tensors({"a": torch.zeros(1)}),
    "metadata of another program": save_tensors({}, metadata={"format": "pt"}),
    "no JSON": save_tensors({}, metadata={"fedtailor": "{"}),
    "nothing": b"",
    "text": b"hello there, this is not a body of ours at all",
    "a header longer than the bytes": (2**40).to_bytes(8, "little") + b"{}",
}
AN_INSTANCE = Body(1)


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_bytes_that_are_no_body_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(data)


def test_another_version_says_what_to_do() -> None:
    with pytest.raises(WireError, match=r"wire version 9, this side speaks 1: install the same fedtailor"):
        wire.unpack(message({"version": 9, "body": 1}))


def test_a_class_of_a_package_that_is_not_allowed_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = wire.pack(Body(1))
    monkeypatch.setattr(wire, "ALLOWED", frozenset({"fedtailor"}))
    with pytest.raises(WireError, match=rf"'{__name__}:Body' is not allowed here \(allowed packages: fedtailor\)"):
        wire.unpack(packed)
    wire.allow(f"{__name__}.deeper")  # a module is allowed by its top-level package
    assert wire.unpack(packed) == Body(1)


def test_every_cut_is_noticed() -> None:
    packed = wire.pack(Pair({"w": torch.arange(5.0)}, (1.5, "text")))
    for length in range(len(packed)):
        with pytest.raises(WireError):
            wire.unpack(packed[:length])
    with pytest.raises(WireError):
        wire.unpack(packed + b"\0")


PACKED = wire.pack(Pair({"w": torch.arange(3.0), "n": [math.nan, (1, "two")]}, Body(None)))
HEADER = 8 + int.from_bytes(PACKED[:8], "little")


@given(st.integers(0, HEADER - 1), st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_damaged_header_gives_a_body_or_a_wire_error_and_nothing_else(place: int, byte: int) -> None:
    damaged = bytearray(PACKED)
    damaged[place] = byte
    with contextlib.suppress(WireError):
        wire.unpack(bytes(damaged))


def test_work_is_found_by_its_address() -> None:
    from fedtailor.methods.averaging import train

    assert wire.address(train) == "fedtailor.methods.averaging:train"
    assert wire.find_work("fedtailor.methods.averaging:train") is train


@pytest.mark.parametrize(
    "name",
    [
        "fedtailor.wire:pack",  # ours, but not in_silo
        "fedtailor.methods.averaging:train_many",  # reached through `train` alone
        "fedtailor.wire:VERSION",
        f"{__name__}:plain",
        "os:system",
        "builtins:eval",
        "fedtailor.methods.averaging:train.__cohort__",
        "fedtailor.methods.averaging:",
        "fedtailor.methods.averaging",
        "fedtailor.nowhere:train",
        "",
        ":",
    ],
)
def test_any_other_work_is_refused(name: str) -> None:
    with pytest.raises(WireError):
        wire.find_work(name)


def test_a_weighted_sum_by_hand() -> None:
    first = Share(2.0, {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor(3, dtype=torch.bfloat16)}, 0.5)
    second = Share(3.0, {"b": torch.tensor(1.0), "a": torch.tensor([10.0, 20.0])}, 1.5)
    one = wire.summed(first, first.weight)
    both = wire.summed(second, second.weight, one)
    # a: 2 * (1, -1) + 3 * (10, 20); b: 2 * 3 + 3 * 1; loss: 2 * .5 + 3 * 1.5; weight: 2 + 3, not squared
    assert same(dict(sorted(both.tensors.items())), {"a": torch.tensor([32.0, 58.0]), "b": torch.tensor(9.0)})
    assert (both.loss, both.weight, both.kind, both.flag) == (5.5, 5.0, "share", True)
    assert torch.equal(first.tensors["a"], torch.tensor([1.0, -1.0])), "the reply itself is left alone"


def test_a_sum_in_bf16_would_lose_what_fp32_keeps() -> None:
    small = Share(1.0, {"a": torch.tensor([1.0], dtype=torch.bfloat16)}, 0.0)
    total = None
    for _ in range(300):  # bfloat16 cannot count past 256
        total = wire.summed(small, 1.0, total)
    assert total.tensors["a"].item() == 300.0


def test_what_cannot_be_added_is_refused() -> None:
    one = wire.summed(Share(1.0, {"a": torch.ones(1)}, 0.0), 1.0)
    with pytest.raises(WireError, match="tensors: silos sent different names"):
        wire.summed(Share(1.0, {"b": torch.ones(1)}, 0.0), 1.0, one)
    with pytest.raises(WireError, match="kind: 'other' cannot be added"):
        wire.summed(Share(1.0, {"a": torch.ones(1)}, 0.0, kind="other"), 1.0, one)
    with pytest.raises(WireError, match="flag: False cannot be added"):
        wire.summed(Share(1.0, {"a": torch.ones(1)}, 0.0, flag=False), 1.0, one)


def test_tensors_by_their_names_on_the_wire() -> None:
    some = Pair({"w": torch.zeros(2, 3), "n": [torch.zeros((), dtype=torch.int64)]}, Body(torch.zeros(0)))
    assert list(wire.tensors_of(some)) == ["left/w", "left/n/0", "right/value"]
    assert wire.leaving(some) == [
        ("left/w", (2, 3), "float32"),
        ("left/n/0", (), "int64"),
        ("right/value", (0,), "float32"),
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_tensor_that_is_not_finite_is_named(bad: float) -> None:
    good = torch.tensor([1.0, 3.4e38])
    assert wire.not_finite(Pair(good, {"n": torch.tensor(2**40)})) is None
    assert wire.not_finite(Pair(good, {"n": torch.tensor([0.0, bad], dtype=torch.bfloat16)})) == "right/n"
