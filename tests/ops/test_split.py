"""Compares the split with a definition in Python loops, on inputs that hypothesis generates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgbg_kd.ops import split
from fgbg_kd.ops.split import BACKGROUND, PADDING

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernel runs


def owner_by_definition(boxes, image_size, shape, stride, here):
    """The definition in the docstring of `split`, with one loop over cells and one over boxes."""
    height, width = image_size
    boxes = [
        (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        for x0, y0, x1, y1 in boxes
    ]
    area = [(x1 - x0) * (y1 - y0) if x1 > x0 and y1 > y0 else None for x0, y0, x1, y1 in boxes]

    def inside(p, q):
        return (p + 0.5) * stride < height and (q + 0.5) * stride < width

    def covers(b, p, q):
        x0, y0, x1, y1 = boxes[b]
        return x0 <= (q + 0.5) * stride < x1 and y0 <= (p + 0.5) * stride < y1

    cells = [(p, q) for p in range(shape[0]) for q in range(shape[1]) if inside(p, q)]
    candidates = {}
    for b, box_area in enumerate(area):
        if box_area is None or not here[b]:
            continue
        own = [c for c in cells if covers(b, *c)]
        if not own and cells:
            x0, y0, x1, y1 = boxes[b]
            last = max(cells)
            p = min(math.floor((y0 + y1) / 2 / stride), last[0])
            q = min(math.floor((x0 + x1) / 2 / stride), last[1])
            own = [(p, q)]
        for c in own:
            candidates.setdefault(c, []).append((box_area, b))
    return [
        [
            (min(candidates[p, q])[1] if (p, q) in candidates else BACKGROUND)
            if inside(p, q)
            else PADDING
            for q in range(shape[1])
        ]
        for p in range(shape[0])
    ]


# Quarter pixels are exact in fp32, so that both sides compare the same numbers.
quarter = st.integers(-80, 400).map(lambda v: v / 4)
coordinate = st.one_of(quarter, st.sampled_from([math.nan, -math.inf, math.inf]))
box = st.tuples(coordinate, coordinate, coordinate, coordinate)
image = st.tuples(st.integers(1, 64), st.integers(1, 64), st.lists(box, max_size=20))
# On the second, images of 64 pixels hold boxes of every level: from 28 and from 42 pixels on.
strides = st.sampled_from([(8, 16, 32), (2, 3, 8)])


@settings(max_examples=300, deadline=None)
@given(st.lists(image, min_size=1, max_size=3), st.sampled_from(["all", "scale"]), strides)
@pytest.mark.slow
def test_split_is_its_definition(images, assign, strides):
    sizes = [(h, w) for h, w, _ in images]
    boxes = [b for *_, b in images]
    padded = [math.ceil(max(s[i] for s in sizes) / 32) * 32 for i in (0, 1)]
    shapes = [(padded[0] // s, padded[1] // s) for s in strides]
    tensors = [torch.tensor(b).reshape(-1, 4) for b in boxes]
    result = split(tensors, sizes, shapes, strides, assign=assign)
    start = 0
    for level, (shape, stride) in enumerate(zip(shapes, strides)):
        stop = start + shape[0] * shape[1]
        for n, image_boxes in enumerate(boxes):
            here = [assign == "all" or home(b, sizes[n], strides) == level for b in image_boxes]
            expected = owner_by_definition(image_boxes, sizes[n], shape, stride, here)
            got = result.box_index[n, start:stop].reshape(shape).tolist()
            assert got == expected
        start = stop
    assert start == result.box_index.shape[1]


def home(box, size, strides):
    """DeFeat's rule: stride 8 under 112 pixels, 16 under 224, else the last level."""
    x0, x1 = (min(max(v, 0), size[1]) for v in (box[0], box[2]))
    y0, y1 = (min(max(v, 0), size[0]) for v in (box[1], box[3]))
    side = math.sqrt(max((x1 - x0) * (y1 - y0), 0))
    return next((i for i, s in enumerate(strides) if side < 14 * s), len(strides) - 1)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.lists(image, min_size=1, max_size=2), st.sampled_from(["all", "scale"]), strides)
def test_the_kernel_is_the_definition(images, assign, strides):
    sizes = [(h, w) for h, w, _ in images]
    tensors = [torch.tensor(b, device=DEVICE).reshape(-1, 4) for *_, b in images]
    arguments = (tensors, sizes, [(64 // s, 64 // s) for s in strides], strides)
    plain, fused = (split(*arguments, assign=assign, impl=i) for i in ("torch", "triton"))
    assert torch.equal(plain.box_index, fused.box_index)
    assert torch.equal(plain.weight, fused.weight)


@pytest.mark.slow
def test_the_kernel_takes_nan_many_boxes_and_odd_shapes():
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(-20, 200, (150, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(-5, 60, (150, 2), generator=generator)], 1)
    boxes[::7, 1] = math.nan
    boxes = boxes.to(DEVICE)
    arguments = ([boxes, boxes[:0]], [(97, 131), (50, 60)], [(13, 17), (7, 9)], (8, 16))
    plain, fused = (split(*arguments, assign="all", impl=i) for i in ("torch", "triton"))
    assert torch.equal(plain.box_index, fused.box_index)
    assert plain.box_index.max() > 100


@settings(max_examples=60, deadline=None)
@given(st.lists(image, min_size=1, max_size=3))
def test_each_object_weighs_one_on_each_level_it_owns(images):
    sizes = [(h, w) for h, w, _ in images]
    tensors = [torch.tensor(b).reshape(-1, 4) for *_, b in images]
    result = split(tensors, sizes, [(8, 8), (4, 4)], (8, 16), assign="all")
    assert result.weight.dtype == torch.float32
    assert (result.weight[~result.foreground] == 0).all()
    for n in range(len(images)):
        for level in (slice(0, 64), slice(64, 80)):
            index, weight = result.box_index[n, level], result.weight[n, level]
            for b in index[index >= 0].unique():
                torch.testing.assert_close(weight[index == b].sum(), torch.tensor(1.0))


def test_by_hand_two_images_of_different_size_in_one_batch():
    # One level of stride 8, padded to 4 x 4 cells; the second image is 16 x 20 pixels.
    boxes = [torch.tensor([[0.0, 0, 32, 32], [4, 4, 12, 12]]), torch.tensor([[9.0, 1, 11, 3]])]
    got = split(boxes, [(32, 32), (16, 20)], [(4, 4)], [8], assign="all")
    assert got.box_index[0].reshape(4, 4).tolist() == [
        [1, 0, 0, 0],  # centre (4, 4) is in [4, 12): the small box wins it, and not (12, 12)
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert got.box_index[1].reshape(4, 4).tolist() == [
        [-1, 0, -2, -2],  # covers no centre, so it owns the cell that holds its own
        [-1, -1, -2, -2],  # the third column's centre is at 20, not under 20
        [-2, -2, -2, -2],
        [-2, -2, -2, -2],
    ]
    assert got.weight[0].reshape(4, 4)[0].tolist() == pytest.approx([1, 1 / 15, 1 / 15, 1 / 15])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_of_equal_boxes_the_first_owns_the_cells(impl):
    boxes = [torch.tensor([[0.0, 0, 16, 16], [0, 0, 16, 16]], device=DEVICE)]
    got = split(boxes, [(16, 16)], [(2, 2)], [8], assign="all", impl=impl)
    assert got.box_index.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    "width, height, level",
    [(111, 112, 0), (112, 112, 1), (56, 224, 1), (223, 224, 1), (224, 224, 2), (500, 500, 2)],
)
@pytest.mark.slow
def test_by_scale_a_box_is_on_stride_8_under_112_pixels_and_on_16_under_224(
    impl, width, height, level
):
    box = [torch.tensor([[0.0, 0, width, height]], device=DEVICE)]
    shapes = [(64, 64), (32, 32), (16, 16)]
    got = split(box, [(512, 512)], shapes, [8, 16, 32], assign="scale", impl=impl)
    on = [x.any().item() for x in got.foreground[0].split([h * w for h, w in shapes])]
    assert on == [i == level for i in range(3)]


def test_degenerate_outside_and_nan_boxes_own_nothing():
    nan, inf = math.nan, math.inf
    rows = [
        [5, 5, 5, 9],
        [9, 5, 5, 9],
        [-9, -9, 0, 0],
        [40, 0, 50, 9],
        [nan, 0, 9, 9],
        [0, 0, nan, 9],
    ]
    boxes = [torch.tensor(rows, dtype=torch.float32)]
    assert (split(boxes, [(32, 32)], [(4, 4)], [8], assign="all").box_index == BACKGROUND).all()
    everything = [torch.tensor([[-inf, -inf, inf, inf]])]
    assert (split(everything, [(32, 32)], [(4, 4)], [8], assign="all").box_index == 0).all()


def test_no_boxes_is_a_normal_input():
    got = split([torch.zeros(0, 4)] * 2, [(32, 32), (16, 16)], [(4, 4)], [8], assign="all")
    assert not got.foreground.any() and got.weight.sum() == 0
    assert got.background.sum() == 16 + 4


def test_a_thousand_boxes_an_image_are_chunked_to_the_same_result():
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 200, (1000, 2), generator=generator).float()
    size = torch.randint(1, 60, (1000, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + size], dim=1)
    got = (
        split([boxes], [(200, 256)], [(25, 32)], [8], assign="all")
        .box_index[0]
        .reshape(25, 32)
        .tolist()
    )
    assert got == owner_by_definition(boxes.tolist(), (200, 256), (25, 32), 8, [True] * 1000)


def test_owner_spreads_boxes_and_classes_to_their_cells():
    boxes = [torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16]])]
    got = split(boxes, [(16, 16)], [(2, 2)], [8], assign="all")
    assert got.owner(torch.tensor([[7, 9]]))[0, [0, 3]].tolist() == [7, 9]
    assert torch.equal(got.owner(got.boxes)[0, 3], boxes[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_boxes_of_any_type_of_numbers_are_compared_in_fp32(dtype):
    boxes = torch.tensor([[0, 0, 8, 16], [8, 8, 16, 16]])
    got, expected = (
        split([b], [(16, 16)], [(2, 2)], [8], assign="all")
        for b in (boxes.to(dtype), boxes.float())
    )
    assert got.boxes.dtype == torch.float32 and torch.equal(got.boxes, expected.boxes)
    assert torch.equal(got.box_index, expected.box_index)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gt_boxes": []}, "0 box lists for 1 images"),
        ({"image_sizes": [(8, 8), (8, 8)]}, "1 box lists for 2 images"),
        ({"strides": [8, 16]}, "1 feature levels but 2 strides"),
        ({"assign": "some"}, "'all' or 'scale'"),
        ({"gt_boxes": [torch.zeros(3, 5)]}, r"shape \(3, 5\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    good = {
        "gt_boxes": [torch.zeros(0, 4)],
        "image_sizes": [(8, 8)],
        "level_shapes": [(1, 1)],
        "strides": [8],
        "assign": "all",
    }
    with pytest.raises(ValueError, match=message):
        split(**{**good, **change})


def test_an_objects_weight_of_1_is_shared_by_its_cells_in_proportion_to_their_quality():
    boxes = [torch.tensor([[0.0, 0, 16, 8], [16.0, 16, 24, 24]])]
    cells = split(boxes, [(32, 32)], [(4, 4), (2, 2)], [8, 16], assign="all")
    quality = torch.full((1, 20), 0.9)  # of background too, which gets no weight
    # Box 0 owns two cells of the fine level and one of the coarse level.
    assert cells.box_index[0].tolist() == [0, 0] + [-1] * 8 + [1] + [-1] * 5 + [0, -1, -1, 1]
    quality[0, [0, 1, 16]] = torch.tensor([0.1, 0.0, 0.3])
    quality[0, [10, 19]] = 0.0  # the teacher does not see box 1
    weight = cells.weighted(quality).weight
    expected = torch.zeros(1, 20)
    expected[0, [0, 1, 16, 10, 19]] = torch.tensor([0.25, 0.0, 0.75, 0.5, 0.5])
    torch.testing.assert_close(weight, expected, atol=1e-6, rtol=0)


def test_weights_by_quality_do_not_depend_on_the_order_of_a_sum():
    torch.manual_seed(0)
    corner = torch.rand(2, 30, 2) * 400
    boxes = list(torch.cat([corner, corner + 20 + torch.rand(2, 30, 2) * 100], 2))
    shapes = [(64, 64), (32, 32), (16, 16)]
    cells = split(boxes, [(512, 512)] * 2, shapes, [8, 16, 32], assign="all")
    quality = torch.rand(cells.box_index.shape) ** 4
    weighted = cells.weighted(quality)
    owners = cells.box_index.unique().clamp(min=0).unique()
    total = torch.zeros(2, 30).scatter_add(
        1, cells.box_index.clamp(min=0).long(), weighted.weight * cells.foreground
    )
    assert len(owners) == 30
    torch.testing.assert_close(total[total > 0], torch.ones(int((total > 0).sum())))
    turned = cells._replace(box_index=cells.box_index.flip(1)).weighted(quality.flip(1))
    assert torch.equal(turned.weight.flip(1), weighted.weight)


def test_a_quality_that_is_nan_stays_visible_in_its_image_only():
    boxes = [torch.tensor([[0.0, 0, 16, 16]])] * 2
    cells = split(boxes, [(16, 16)] * 2, [(2, 2)], [8], assign="all")
    quality = torch.full((2, 4), 0.5)
    quality[0, 3] = torch.nan
    weight = cells.weighted(quality).weight
    assert weight[0].isnan().all() and torch.equal(weight[1], torch.full((4,), 0.25))
