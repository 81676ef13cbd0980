"""Deletion and insertion: curves by hand, the symmetry of the two, random order, and a map that is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy import ndimage

from nkat_vit.deletion import RANDOM, Curves, blur_sigma, blurred, follow, measure_curves, order_by, with_error
from nkat_vit.maps import MAPS, on_pixels
from nkat_vit.model import NKATViT
from tests.vit.test_maps import BARE, CONFIG, looks_at


def test_a_curve_is_the_probability_with_so_many_cells_replaced() -> None:
    torch.manual_seed(0)
    model = NKATViT(replace(BARE, patch_size=14)).eval()  # four cells
    start, goal = torch.rand(2, 1, 1, 28, 28)
    start, goal, order = start.view(1, 1, 28, 28), goal.view(1, 1, 28, 28), torch.tensor([[2, 0, 3, 1]])
    steps: list[None] = []
    got = follow(model, start, goal, order, torch.tensor([1]), torch.arange(5), lambda: steps.append(None))
    picture, expected = start.clone(), []
    for cell in (None, 2, 0, 3, 1):
        if cell is not None:
            row, column = divmod(cell, 2)
            part = (..., slice(14 * row, 14 * row + 14), slice(14 * column, 14 * column + 14))
            picture[part] = goal[part]
        expected.append(model(picture)[0].softmax(1)[0, 1].item())
    torch.testing.assert_close(got, torch.tensor([expected]))
    assert len(steps) == 5


def test_deleting_is_inserting_backwards() -> None:
    """Taking cells away in an order ends where putting them back in the opposite order begins."""
    torch.manual_seed(0)
    model = NKATViT(CONFIG).eval()
    images, targets = torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])
    black, counts = torch.zeros_like(images), torch.arange(0, 17, 4)
    order = order_by(torch.rand(3, 16), torch.Generator().manual_seed(0))
    deleted = follow(model, images, black, order, targets, counts, lambda: None)
    inserted = follow(model, black, images, order.flip(1), targets, counts, lambda: None)
    torch.testing.assert_close(deleted, inserted.flip(1))
    same = follow(model, black, images, order, targets, counts, lambda: None)
    assert not torch.allclose(deleted, same.flip(1))  # control: the same order is another curve


def test_a_random_order_has_the_same_area_either_way_and_a_good_one_has_not() -> None:
    """Of a model that sees one of sixteen cells: halfway on average at random, at once with its own map."""
    model = looks_at(6)
    generator = torch.Generator().manual_seed(0)
    images = 0.9 + 0.1 * torch.rand(200, 1, 28, 28, generator=generator)
    black, targets, counts = torch.zeros_like(images), torch.zeros(200, dtype=torch.long), torch.arange(17)
    place = torch.zeros(200, 16)
    place[:, 6] = 1
    areas = {}
    for name, values in (("random", torch.zeros(200, 16)), ("right", place), ("wrong", -place)):
        order = order_by(values, generator)
        for kind, start, goal in (("deletion", images, black), ("insertion", black, images)):
            line = follow(model, start, goal, order, targets, counts, lambda: None)
            areas[name, kind] = torch.trapezoid(line.double(), counts / 16, dim=1)
    random = {kind: with_error(areas["random", kind]) for kind in ("deletion", "insertion")}
    error = sum(found["standard_error"] ** 2 for found in random.values()) ** 0.5
    assert random["deletion"]["mean"] == pytest.approx(random["insertion"]["mean"], abs=4 * error)
    for name, sign in (("right", 1), ("wrong", -1)):  # beyond what chance moves the random order's areas by
        assert sign * float((areas[name, "insertion"] - areas[name, "deletion"]).mean()) > 10 * error


def test_equal_values_come_in_random_order_and_others_in_theirs() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0, 1.0, 1.0, 7.0]]).expand(200, 6)
    order = order_by(values, torch.Generator().manual_seed(0))
    assert order[:, :2].tolist() == [[5, 0]] * 200
    assert len({tuple(row) for row in order[:, 2:].tolist()}) == 24  # all that there are
    assert torch.equal(order, order_by(values, torch.Generator().manual_seed(0)))
    assert not torch.equal(order, order_by(values, torch.Generator().manual_seed(1)))


def test_blurring_is_scipys() -> None:
    image = torch.rand(2, 3, 20, 20, dtype=torch.float64)
    got = blurred(image, 1.5)
    # radius 5 here, which is SciPy's own by truncate
    expected = ndimage.gaussian_filter(image.numpy(), (0, 0, 1.5, 1.5), mode="mirror", truncate=5 / 1.5)
    torch.testing.assert_close(got, torch.from_numpy(expected))
    assert blurred(torch.rand(1, 1, 4, 4), 9.0).shape == (1, 1, 4, 4)  # wider than the picture
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(blurred(flat, 4.0), flat)


def test_areas_and_their_errors() -> None:
    shares = torch.tensor([0.0, 0.5, 1.0])
    lines = {"rollout": torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 0.0]]), RANDOM: torch.tensor([[1.0, 1.0, 1.0]] * 2)}
    record = Curves(shares, lines, lines).record()
    assert record["orders"]["rollout"]["deletion"] == {"mean": 0.625, "standard_error": pytest.approx(0.125)}
    assert record["orders"]["rollout"]["deletion_from_random"]["mean"] == -0.375
    assert record["orders"]["rollout"]["insertion_curve"] == [1.0, 0.75, 0.0]
    assert "deletion_from_random" not in record["orders"][RANDOM]
    assert with_error(torch.tensor([0.5])) == {"mean": 0.5, "standard_error": None}


def test_curves_repeat_by_seed_and_begin_and_end_alike() -> None:
    torch.manual_seed(0)
    model, images = NKATViT(BARE).eval(), torch.rand(3, 1, 28, 28)
    first, again, other = (measure_curves(model, images, seed) for seed in (0, 0, 1))
    assert first.record() == again.record()
    assert first.record()["orders"][RANDOM] != other.record()["orders"][RANDOM]
    assert first.deletion.keys() == {*MAPS, RANDOM}
    with torch.no_grad():
        whole = model(images)[0].softmax(1).amax(1)
    for name in first.deletion:  # all of it there, whatever the order
        torch.testing.assert_close(first.deletion[name][:, 0], whole)
        torch.testing.assert_close(first.insertion[name][:, -1], whole)
    assert first.shares.tolist() == [i / 16 for i in range(17)]
    assert blur_sigma(model) == 3.5


def test_the_map_of_a_model_that_looks_at_one_cell_beats_chance() -> None:
    model = looks_at(9)
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    bright = on_pixels(torch.arange(16), BARE) == 9
    record = measure_curves(model, torch.where(bright, 1.0, images))
    found = record.record()["orders"]["relevance"]["deletion_from_random"]
    assert found["mean"] < -4 * found["standard_error"]
