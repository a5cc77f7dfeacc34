"""uint8 batches to the network's input: TensorFlow's colours, and one result on every device."""

import json
from pathlib import Path

import pytest
import torch

from data.to_input import ToInput, apply_colour, transform

RECORDED = json.loads(Path(__file__).with_name("data").joinpath("tensorflow.json").read_text())
CPU = torch.device("cpu")
MEAN, STD = [0.5, 0.4, 0.3], [0.5, 0.25, 0.2]
COLOURS = torch.tensor([[0.1, 1.5, 0.0], [-0.1, 0.5, 1.0], [0.0, 1.0, 0.0]])
FLIPS = torch.tensor([True, False, True])


def random_batch() -> torch.Tensor:
    """uint8 [3, 5, 7, 3] with grey, black and white among its pixels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 5, 7, 3), dtype=torch.uint8, generator=generator)
    images[:, 0, 0], images[:, 1, 1], images[:, 2, 2] = 0, 255, 77
    return images


def test_colour_is_tensorflows():
    cases = RECORDED["colour"]["cases"]
    images = torch.tensor([RECORDED["colour"]["images"][case["image"]] for case in cases])
    colours = torch.tensor(
        [[case["brightness_delta"], case["saturation_factor"], case["order"]] for case in cases]
    )
    result = (apply_colour(images.permute(0, 3, 1, 2), colours) - 0.5) * 2
    expected = torch.tensor([case["result"] for case in cases]).permute(0, 3, 1, 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_normalisation_is_pixels_over_255_less_mean_over_std():
    images, flips = random_batch(), torch.zeros(3, dtype=torch.bool)
    expected = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    result = ToInput(MEAN, STD, CPU)(images, flips, None)
    torch.testing.assert_close(result.permute(0, 2, 3, 1).double(), expected, rtol=0, atol=2e-6)


def test_colour_comes_before_normalisation():
    coloured = apply_colour(random_batch().permute(0, 3, 1, 2) / 255, COLOURS)
    expected = (coloured - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    result = ToInput(MEAN, STD, CPU)(random_batch(), torch.zeros(3, dtype=torch.bool), COLOURS)
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("colours", [None, COLOURS])
def test_only_flipped_images_are_mirrored_left_to_right(colours):
    to_input = ToInput(MEAN, STD, CPU)
    plain = to_input(random_batch(), torch.zeros(3, dtype=torch.bool), colours)
    expected = torch.stack([plain[0].flip(2), plain[1], plain[2].flip(2)])
    assert torch.equal(to_input(random_batch(), FLIPS, colours), expected)


@pytest.mark.parametrize(("colours", "tolerance"), [(None, 0), (COLOURS, 5e-6)])
def test_the_compiled_loop_gives_what_other_devices_do(colours, tolerance):
    to_input = ToInput(MEAN, STD, CPU)
    expected = transform(random_batch(), FLIPS, colours, *to_input._constants)
    result = to_input(random_batch(), FLIPS, colours)
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("colours", [None, COLOURS])
def test_input_is_float32_in_channels_last_memory_and_the_batch_unchanged(colours):
    images = random_batch()
    result = ToInput(MEAN, STD, CPU)(images, FLIPS, colours)
    assert result.shape == (3, 3, 5, 7)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, random_batch())
