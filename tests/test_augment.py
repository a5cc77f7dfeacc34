"""Stronger recipes: functions of the place in the run, whatever else the process does."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from data.augment import Augment, Mix, seeded

GREY = (128, 128, 128)
CLASSES = 5


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def changed(augment: Augment, index: int, epoch: int = 0) -> np.ndarray:
    pixels = picture()
    augment(pixels, (7, epoch, index))
    return pixels


def test_an_image_is_changed_by_its_seed_epoch_and_index_alone():
    augment = Augment(9, 0.5, GREY)
    first = [changed(augment, index) for index in range(12)]
    torch.manual_seed(99)
    again = [changed(augment, index) for index in reversed(range(12))]
    assert all(np.array_equal(a, b) for a, b in zip(first, reversed(again)))
    assert len({image.tobytes() for image in first}) > 8
    assert not np.array_equal(changed(augment, 3), changed(augment, 3, epoch=1))


def test_random_states_are_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    changed(Augment(9, 1.0, GREY), 0)
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    before_mix = torch.get_rng_state()
    Mix(0.2, 1.0, CLASSES, seed=0)(images, labels, [(0, 0), (0, 1)])
    assert torch.equal(torch.get_rng_state(), before_mix)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_operations_are_torchvisions():
    with seeded(7, 0, 4, 3):
        expected = v2.RandAugment(magnitude=9, fill=list(GREY))(
            v2.functional.to_pil_image(picture())
        )
    assert np.array_equal(changed(Augment(9, 0.0, GREY), 4), np.asarray(expected))


def test_off_is_off():
    assert np.array_equal(changed(Augment(None, 0.0, GREY), 0), picture())


def test_erased_parts_are_of_the_fill_level_and_as_frequent_as_asked():
    augment = Augment(None, 0.25, (1, 2, 3))
    erased = 0
    for index in range(400):
        image = changed(augment, index)
        differs = (image != picture()).any(2)
        erased += differs.any()
        assert (image[differs] == (1, 2, 3)).all()
    assert abs(erased / 400 - 0.25) < 0.07


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    images = torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return images, torch.arange(count) % CLASSES, [(0, 10 + i) for i in range(count)]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_pairs_are_mixed_and_their_labels_by_the_same_shares(mixup, cutmix):
    images, labels, keys = batch(20)
    mixed, shares = Mix(mixup, cutmix, CLASSES, seed=3)(images, labels, keys)
    torch.testing.assert_close(shares.sum(1), torch.ones(20))
    for i in range(20):
        partner = i ^ 1
        own = shares[i, labels[i]]
        expected = own * i + (1 - own) * partner  # of constant images the mean tells the share
        torch.testing.assert_close(mixed[i].mean(), expected, rtol=0, atol=1e-4)
    is_cut = [len(image.unique()) > 1 or float(image.mean()) % 1 == 0 for image in mixed]
    assert all(is_cut) == (mixup == 0)
    assert any(is_cut) == (cutmix > 0)


def test_a_pair_does_not_depend_on_the_rest_of_its_batch():
    mix = Mix(0.4, 1.0, CLASSES, seed=3)
    images, labels, keys = batch(12)
    whole = mix(images, labels, keys)
    for first, last in ((0, 4), (4, 6), (6, 12)):
        part = mix(images[first:last], labels[first:last], keys[first:last])
        assert all(torch.equal(a[first:last], b) for a, b in zip(whole, part))


def test_an_odd_image_stays_and_the_input_is_not_changed():
    images, labels, keys = batch(3)
    mixed, shares = Mix(0.4, 0.0, CLASSES, seed=3)(images, labels, keys)
    assert torch.equal(mixed[2], images[2])
    assert shares[2].tolist() == [0, 0, 1, 0, 0]
    assert torch.equal(images, batch(3)[0])
