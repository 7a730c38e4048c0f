"""How tensors are handed to the kernels: rows under outer axes, channels, and the packed struct."""

import itertools
import math
import re
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spikelm
from spikelm.cpu import module
from spikelm.ops.kernel import Kernel
from spikelm.ops.layout import Rows, channels_of, pack, read, rows_of
from tests.kernel_cases import LAYOUTS, arrange

FOUR = (0, 0, 0, 0)


def offsets(rows: Rows, strides: tuple[int, ...]) -> list[int]:
    """Where the kernels look for the elements of a frame, in order."""
    found = []
    for row in range(rows.rows):
        offset, rest = 0, row
        for size, stride in reversed(list(zip(rows.sizes, strides, strict=True))):
            if size:
                offset += rest % size * stride
                rest //= size
        found += range(offset, offset + rows.length)
    return found


def places(tensor: torch.Tensor) -> list[int]:
    """Where a tensor's elements are, in order and from its first one."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    steps = [[i * stride for i in range(size)] for size, stride in axes]
    return [sum(index) for index in itertools.product(*steps)]


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A permuted, sliced or expanded view of up to six axes."""
    sizes = draw(st.lists(st.integers(1, 4), max_size=6))
    order = draw(st.permutations(range(len(sizes))))
    room = [sizes[axis] + draw(st.sampled_from([0, 0, 0, 1])) for axis in order]
    view = torch.empty(room).permute(sorted(range(len(sizes)), key=order.__getitem__))
    for axis, size in enumerate(sizes):
        view = view.narrow(axis, 0, size)
        if draw(st.sampled_from([False] * 9 + [True])):
            view = view.narrow(axis, 0, 1).expand(*view.shape[:axis], size, *view.shape[axis + 1 :])
    return view


@given(views())
def test_rows_are_where_the_elements_are(view: torch.Tensor) -> None:
    rows = rows_of(tuple(view.shape), view.stride())
    if rows is None:
        axes = list(zip(view.shape, view.stride(), strict=True))
        assert view.dim() > 5 or next(stride for size, stride in reversed(axes) if size > 1) != 1
        return
    assert rows.length * rows.rows == view.numel()
    assert offsets(rows, rows.strides[0]) == places(view)


@given(views(), st.data())
def test_rows_of_two_tensors(view: torch.Tensor, data: st.DataObject) -> None:
    """Axes are merged only where both tensors allow it."""
    other = arrange(torch.empty(view.shape), data.draw(st.sampled_from(LAYOUTS)))
    rows = rows_of(tuple(view.shape), view.stride(), other.stride())
    if rows is not None:
        assert offsets(rows, rows.strides[0]) == places(view)
        assert offsets(rows, rows.strides[1]) == places(other)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((), (), Rows(1, 1, FOUR, (FOUR,))),
        ((7,), (1,), Rows(7, 1, FOUR, (FOUR,))),
        ((2, 3, 4), (12, 4, 1), Rows(24, 1, FOUR, (FOUR,))),
        ((2, 3, 4), (20, 4, 1), Rows(12, 2, (2, 0, 0, 0), ((20, 0, 0, 0),))),
        ((2, 3, 4), (4, 8, 1), Rows(4, 6, (2, 3, 0, 0), ((4, 8, 0, 0),))),
        ((5, 1), (3, 99), None),
        ((5, 1), (1, 99), Rows(5, 1, FOUR, (FOUR,))),
        ((3, 4), (1, 3), None),
        ((3, 4), (0, 1), Rows(4, 3, (3, 0, 0, 0), ((0, 0, 0, 0),))),
        ((2, 2, 2, 2, 2), (4000, 1100, 450, 200, 1), Rows(2, 16, (2, 2, 2, 2), ((4000, 1100, 450, 200),))),
        ((2, 2, 2, 2, 2, 2), (9000, 4000, 1100, 450, 200, 1), None),
    ],
)
def test_rows(shape: tuple[int, ...], strides: tuple[int, ...], expected: Rows | None) -> None:
    assert rows_of(shape, strides) == expected


@pytest.mark.parametrize(
    ("threshold", "frame"),
    [
        ((), (2, 3)),
        ((1,), (2, 3)),
        ((1, 1), (2, 3)),
        ((3,), (2, 3)),
        ((1, 3), (2, 3)),
        ((2, 1), (2, 3)),
        ((4, 1, 1), (2, 4, 3, 5)),
        ((1, 4, 1, 1), (2, 4, 3, 5)),
        ((2, 1, 1, 1), (2, 4, 3, 5)),
        ((3, 1), (2, 4, 3, 5)),
        ((1,), (2, 1)),
        ((2, 1), (2, 1)),
        ((6, 1), (6, 1)),
    ],
)
def test_channels_are_where_broadcasting_puts_them(threshold: tuple[int, ...], frame: tuple[int, ...]) -> None:
    channels, inner = channels_of(threshold, frame)
    values = torch.arange(math.prod(threshold)).view(threshold)
    found = [i // inner % channels for i in range(math.prod(frame))]
    assert found == values.expand(frame).flatten().tolist()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("grad_name", [None, *LAYOUTS])
@pytest.mark.parametrize("single", [False, True])
def test_what_is_read_is_where_it_is(name: str, grad_name: str | None, single: bool) -> None:
    """Through the strides that a kernel gets, in the tensor that it gets: the elements of the one given."""
    shape = (3, 4, 2, 5)
    values = torch.arange(math.prod(shape)).view(shape)
    x = arrange(values.float()[0] if single else values.float(), name)
    grad = None if grad_name is None else arrange(-values.float(), grad_name)
    given = read(x, grad, single, False)
    for tensor, original, step, strides in (
        (given.x, x, given.places.x_step, given.places.rows.strides[0]),
        (given.grad_spikes, grad, given.places.grad_step, given.places.rows.strides[1]),
    ):
        if original is None:
            assert tensor is None
            continue
        frames = [original] if original is x and single else original.unbind(0)
        found = [[t * step + offset for offset in offsets(given.places.rows, strides)] for t in range(len(frames))]
        last = max(map(max, found))
        flat = tensor.as_strided((last + 1,), (1,), tensor.storage_offset())
        assert [flat[frame].tolist() for frame in found] == [frame.flatten().tolist() for frame in frames]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_copied(name: str) -> None:
    x = arrange(torch.randn(3, 4, 2, 5), name)
    copied = read(x, None, False, False).x.data_ptr() != x.data_ptr()
    assert copied == (name in ("strided", "channels last", "reversed"))


def test_only_the_tensor_that_needs_it_is_copied() -> None:
    """Each can be read, but together they have five outer axes: the gradient is copied, and x is not."""
    x = torch.empty(1, 2, 2, 2, 2, 2, 8)[..., :5]
    grad = torch.empty(1, 2, 2, 2, 2, 2, 5).permute(0, 5, 4, 3, 2, 1, 6)
    dense = torch.empty(1, 2, 2, 2, 2, 2, 5)
    assert read(x, dense, False, False).grad_spikes is dense
    given = read(x, grad, False, False)
    assert given.x is x
    assert given.grad_spikes is not None
    assert given.grad_spikes.is_contiguous()


def test_a_copy_lives_as_long_as_what_was_read() -> None:
    given = read(torch.arange(12.0).view(2, 6)[:, ::2], None, False, False)
    assert given.x.tolist() == [[0, 2, 4], [6, 8, 10]]


# ---- struct Arguments


def members() -> list[tuple[str, str, int]]:
    """(kind, name, entries) of every member of struct Arguments in steps.cuh; kind is "p", "q" or "d"."""
    text = (Path(spikelm.__file__).parent / "cuda" / "steps.cuh").read_text()
    body = re.search(r"struct Arguments \{(.*?)\n\};", text, re.S)
    assert body is not None
    found = []
    for line in re.sub(r"//.*", "", body[1]).split(";"):
        kind, declared = "p" if "*" in line else "q" if "long long" in line else "d", line.split()
        if declared:
            for name in re.sub(r"^.*(\*|long long|double)", "", " ".join(declared), count=1).split(","):
                size = re.search(r"\[(\d+)\]", name)
                found.append((kind, name.split("[")[0].strip(), int(size[1]) if size else 1))
    return found


def test_the_struct_has_the_members_that_are_packed() -> None:
    """In this order, with nothing but 8 bytes for each."""
    kinds = "".join(kind * entries for kind, _, entries in members())
    assert kinds == "p" * 11 + "q" * 22 + "d" * 9


def test_values_arrive_where_they_belong() -> None:
    tensors = [torch.zeros(1) for _ in range(11)]
    x, grad = torch.empty(2, 3, 5, 7)[:, :, :4, :6], torch.empty(2, 5, 3, 6)[:, :4].transpose(1, 2)
    what = read(x, grad, False, False)
    kernel = Kernel("", (0.5, 1.5, 2.5, 3.5, 4.5, 5.5))
    packed = pack(
        kernel, tensors, 13, what, (14, 15), started=True, threads=16, start=6.5, frame_weight=7.5, sum_scale=8.5
    )
    pointers = dict(zip([name for kind, name, _ in members() if kind == "p"], tensors, strict=True))
    expected = {name: [tensor.data_ptr()] for name, tensor in pointers.items()} | {
        "T": [13], "frame": [72], "x_step": [105], "grad_step": [90], "length": [6], "rows": [12],
        "sizes": [3, 4, 0, 0], "x_strides": [35, 7, 0, 0], "grad_strides": [6, 18, 0, 0], "channels": [14],
        "inner": [15], "started": [1], "threads": [16], "decay": [0.5], "v_reset": [1.5], "scale": [2.5],
        "alpha": [3.5], "levels": [4.5], "sgc_weight": [5.5], "start": [6.5], "frame_weight": [7.5], "sum_scale": [8.5],
    }  # fmt: skip
    formats = "".join({"p": "Q"}.get(kind, kind) * entries for kind, _, entries in members())
    values, found = iter(struct.unpack(f"={formats}", packed)), {}
    for _, name, entries in members():
        found[name] = [next(values) for _ in range(entries)]
    assert found == expected
    assert list(pointers) == [
        "x", "v", "threshold", "spikes", "v_last", "grad_spikes", "grad_v_last", "grad_x", "grad_v", "grad_threshold",
        "scratch",
    ]  # fmt: skip


def test_the_compiler_adds_no_padding(tmp_path: Path) -> None:
    text = (Path(spikelm.__file__).parent / "cuda" / "steps.cuh").read_text()
    body = re.search(r"struct Arguments \{.*?\n\};", text, re.S)
    assert body is not None
    program = module.compiler()
    if program is None:
        pytest.skip(module.unavailable())
    checks, offset = [], 0
    for _, name, entries in members():
        checks.append(f"static_assert(__builtin_offsetof(Arguments, {name}) == {offset});")
        offset += 8 * entries
    checks.append(f"static_assert(sizeof(Arguments) == {offset});")
    types = "typedef float IO_T; typedef signed char SPIKE_T; typedef float STATE_T;"
    (tmp_path / "struct.cpp").write_text("\n".join([types, body[0], *checks]))
    command = [program, "-std=c++17", "-fsyntax-only", str(tmp_path / "struct.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
