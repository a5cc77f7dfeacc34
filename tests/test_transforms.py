"""Encoded bytes to pixels: TensorFlow's crops and colours, timm's and Pillow's pixels."""

import io
import json
import struct
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from image_zoo import PNG_GREY, ROTATED, jpeg, picture, png, saved, zoo
from photographs import CHINA, write_photographs
from PIL import EpsImagePlugin, Image
from torchvision.transforms import RandomResizedCrop

from data import transforms
from data.image_formats import count_scans, open_image
from data.prepare.shard_writer import kind_and_size
from data.resample import Box, resize
from data.to_input import Colour, ToInput
from data.transforms import (
    VIEW,
    DecodeError,
    EvalView,
    TrainView,
    decode,
    draw_colour,
    draw_crop,
)

RECORDED = json.loads(Path(__file__).with_name("data").joinpath("tensorflow.json").read_text())
AREA, ASPECT = (0.05, 1.0), (0.75, 1.33)  # the settings recorded
CROP_CASES = [case for case in RECORDED["crop"]["cases"] if case["min_object_covered"] == 0.1]
RNG = np.random.default_rng(0)
DRAWS = 20_000
TOLERANCE = 0.015  # on a probability; 3.5 standard errors of the median, both samples counted

Crop = tuple[int, int, int, int]  # x, y, width, height


# ---------------------------------------------------------------------------------- crop


def case_name(case: dict) -> str:
    return f"{case['width']}x{case['height']}"


def departures(crops: list[Crop], case: dict) -> set[str]:
    """Quantities whose distribution is not the recorded one, judged at its quantiles."""
    x, y, width, height = np.array(crops).T
    drawn = {
        "area_fraction": width * height / (case["width"] * case["height"]),
        "aspect_ratio": width / height,
        "crop_height": height,
        "crop_width": width,
        "x": x,
        "y": y,
    }
    rounding = 1e-6  # of the recorded quantiles
    return {
        name
        for name, values in drawn.items()
        for level, quantile in zip(
            RECORDED["crop"]["quantile_levels"], case[name]["quantiles"], strict=True
        )
        # Values are discrete: the level lies between P(below) and P(below or equal).
        if np.mean(values < quantile - rounding) > level + TOLERANCE
        or np.mean(values <= quantile + rounding) < level - TOLERANCE
    }


def draw_crops(case: dict, draws: int) -> list[Crop]:
    rng = np.random.default_rng(0)
    return [draw_crop(rng, case["width"], case["height"], AREA, ASPECT) for _ in range(draws)]


def draw_torchvision_crops(case: dict, draws: int) -> list[Crop]:
    """RandomResizedCrop's, drawn again where they cover too little, as TensorFlow's are."""
    torch.manual_seed(0)
    image, crops = Image.new("L", (case["width"], case["height"])), []
    while len(crops) < draws:
        y, x, height, width = RandomResizedCrop.get_params(image, list(AREA), list(ASPECT))
        if width * height >= case["min_object_covered"] * case["width"] * case["height"]:
            crops.append((x, y, width, height))
    return crops


@pytest.mark.parametrize("case", CROP_CASES, ids=case_name)
def test_crops_follow_tensorflows_law(case):
    assert departures(draw_crops(case, DRAWS), case) == set()


@pytest.mark.parametrize("case", CROP_CASES, ids=case_name)
def test_torchvisions_crops_are_told_from_tensorflows(case):
    departed = departures(draw_torchvision_crops(case, DRAWS // 4), case)
    assert {"area_fraction", "crop_height", "aspect_ratio"} <= departed


def test_crops_lie_inside_the_image_and_keep_to_their_area():
    rng = np.random.default_rng(0)
    sizes = [(500, 375), (96, 96), (8, 8), (3, 2), (1, 1), (400, 30), (30, 400)]
    for width, height in sizes * 300:
        x, y, crop_width, crop_height = draw_crop(rng, width, height, AREA, ASPECT)
        assert 0 <= x < x + crop_width <= width
        assert 0 <= y < y + crop_height <= height
        whole = (crop_width, crop_height) == (width, height)
        assert whole or crop_width * crop_height >= 0.1 * width * height


@pytest.mark.parametrize(
    ("width", "height", "area"),
    [(400, 10, (0.5, 1.0)), (10, 400, (0.5, 1.0)), (100, 100, (0.01, 0.05))],
    ids=["too wide", "too high", "less than a tenth"],
)
def test_impossible_ranges_give_the_whole_image(width, height, area):
    rng = np.random.default_rng(0)
    assert draw_crop(rng, width, height, area, ASPECT) == (0, 0, width, height)


# ---------------------------------------------------------------------------------- colour


def test_colours_are_uniform_in_tf_slims_ranges_and_orders_equally_frequent():
    rng = np.random.default_rng(0)
    brightness, saturation, first = np.array([draw_colour(rng) for _ in range(5000)]).T
    levels = np.linspace(0.05, 0.95, 19)
    assert np.allclose(np.quantile(brightness * 255 / 32, levels), 2 * levels - 1, atol=0.06)
    assert np.allclose(np.quantile(saturation, levels), 0.5 + levels, atol=0.03)
    assert np.abs(brightness).max() <= 32 / 255
    assert saturation.min() >= 0.5
    assert saturation.max() <= 1.5
    assert set(first) == {0.0, 1.0}
    assert abs(first.mean() - 0.5) < 0.03
    assert np.abs(np.corrcoef([brightness, saturation, first])[~np.eye(3, dtype=bool)]).max() < 0.06


# ---------------------------------------------------------------------------------- resizing


def pillow(pixels: np.ndarray, box: Box, size: tuple[int, int], bicubic: bool) -> np.ndarray:
    """Rows, then columns: releases from 13 on sometimes take the columns first if given both."""
    x, y, width, height = box
    crop = Image.fromarray(pixels).crop((x, y, x + width, y + height))
    how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    return np.asarray(crop.resize((size[0], height), how).resize(size, how))


def random_part(width: int, height: int) -> Box:
    part_width, part_height = (int(RNG.integers(1, side + 1)) for side in (width, height))
    x, y = (int(RNG.integers(0, n + 1)) for n in (width - part_width, height - part_height))
    return Box(x, y, part_width, part_height)


def random_pixels(width: int, height: int, extreme: bool = False) -> np.ndarray:
    """Noise; of black and white alone, so that a cubic's overshoot has to be cut off."""
    levels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(levels > 127, 255, 0).astype(np.uint8) if extreme else levels


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("extreme", [False, True])
def test_pixels_are_pillows_whatever_the_sizes(bicubic, extreme):
    for _ in range(60):
        width, height, *size = (int(n) for n in RNG.integers(1, 300, 4))
        pixels, box = random_pixels(width, height, extreme), random_part(width, height)
        part = random_part(*size)
        out = np.empty((part.height, part.width, 3), np.uint8)
        resize(pixels, out, box=box, size=tuple(size), corner=part[:2], bicubic=bicubic)
        expected = pillow(pixels, box, tuple(size), bicubic)
        rows, columns = slice(part.y, part.y + part.height), slice(part.x, part.x + part.width)
        assert np.array_equal(out, expected[rows, columns]), (width, height, box, size, part)


def test_an_images_own_size_leaves_it_as_it_is():
    pixels = random_pixels(50, 40)
    out = np.empty_like(pixels)
    resize(pixels, out, box=Box(0, 0, 50, 40), size=(50, 40), bicubic=True)
    assert np.array_equal(out, pixels)


@pytest.mark.parametrize(
    ("box", "size", "corner"),
    [
        (Box(0, 0, 51, 40), (8, 8), (0, 0)),
        (Box(-1, 0, 10, 10), (8, 8), (0, 0)),
        (Box(0, 35, 10, 6), (8, 8), (0, 0)),
        (Box(0, 0, 0, 10), (8, 8), (0, 0)),
        (Box(0, 0, 10, 10), (7, 8), (0, 0)),
        (Box(0, 0, 10, 10), (9, 8), (2, 0)),
    ],
)
def test_rectangles_that_do_not_fit_are_refused(box, size, corner):
    out = np.full((8, 8, 3), 9, np.uint8)
    with pytest.raises(ValueError, match=r"^Box\("):
        resize(random_pixels(50, 40), out, box=box, size=size, corner=corner)
    assert (out == 9).all()


# ---------------------------------------------------------------------------------- training view


def shown(view: TrainView | EvalView, pixels: np.ndarray, epoch: int = 0, index: int = 0) -> tuple:
    """(what the view makes of an image, whether to mirror it, its colour change)."""
    out = np.empty(view.shape, np.uint8)
    return out, *view(pixels, epoch, index, out)


def same(one: tuple, other: tuple) -> bool:
    return np.array_equal(one[0], other[0]) and one[1:] == other[1:]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def ramp() -> np.ndarray:
    """A pixel says where it was: red is x, green is y."""
    y, x = np.mgrid[:200, :250]
    return np.stack([x, y, 0 * x], 2).astype(np.uint8)


def test_a_view_is_a_function_of_seed_epoch_and_index(noise):
    views = {
        (seed, epoch, index): shown(TrainView(16, seed), noise, epoch, index)
        for seed in range(3)
        for epoch in range(3)
        for index in range(3)
    }
    shared = TrainView(16, 1)  # asked in another order, after other questions
    for epoch, index in [(2, 2), (0, 1), (2, 0), (1, 1), (0, 1)]:
        assert same(shown(shared, noise, epoch, index), views[1, epoch, index])
    assert len({pixels.tobytes() for pixels, _, _ in views.values()}) == len(views)
    assert len({colour for _, _, colour in views.values()}) == len(views)


def test_a_view_leaves_global_random_states_alone(noise):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    shown(TrainView(16, 0), noise)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_view_shows_the_crop_that_was_drawn_in_its_right_place(ramp):
    size = 50
    centres = np.arange(size) + 0.5
    for index in range(20):
        rng = np.random.default_rng((7, 2, index, VIEW))
        x, y, width, height = draw_crop(rng, 250, 200, AREA, ASPECT)
        pixels, _, _ = shown(TrainView(size, 7, AREA, ASPECT), ramp, 2, index)
        columns, rows = pixels[..., 0].mean(0), pixels[..., 1].mean(1)
        inner = slice(2, -2)  # resizing a ramp gives a ramp, but for the image's borders
        assert np.allclose(columns[inner], (x + centres * width / size - 0.5)[inner], atol=0.6)
        assert np.allclose(rows[inner], (y + centres * height / size - 0.5)[inner], atol=0.6)


def test_a_crop_is_pillows_crop_and_bilinear_resize(noise):
    for index in range(20):
        rng = np.random.default_rng((7, 2, index, VIEW))
        box = Box(*draw_crop(rng, 80, 60, AREA, ASPECT))
        pixels, _, _ = shown(TrainView(32, 7, AREA, ASPECT), noise, 2, index)
        assert np.array_equal(pixels, pillow(noise, box, (32, 32), bicubic=False))


def test_flips_change_neither_crop_nor_colour(noise):
    plain, mirrored = (shown(TrainView(16, 0, hflip=p), noise) for p in (0.0, 1.0))
    assert np.array_equal(plain[0], mirrored[0])
    assert plain[1:] == (False, mirrored[2])
    assert mirrored[1] is True


def test_views_are_flipped_as_often_as_asked(noise):
    flips = [shown(TrainView(8, 0, hflip=0.25), noise, 0, index)[1] for index in range(600)]
    assert abs(np.mean(flips) - 0.25) < 0.05


def test_without_colour_none_is_drawn_and_the_crop_is_the_same(noise):
    plain, coloured = (shown(TrainView(16, 0, colour=c), noise) for c in (False, True))
    assert plain[2] is None
    assert isinstance(coloured[2], Colour)
    assert np.array_equal(plain[0], coloured[0])
    assert plain[1] == coloured[1]


# ---------------------------------------------------------------------------------- evaluation view


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> dict[str, Path]:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.mark.parametrize(
    ("size", "crop", "interpolation"),
    [(299, 0.8975, "bicubic"), (299, 0.875, "bilinear"), (75, 1.0, "bicubic")],
)
def test_evaluation_pixels_are_timms(photographs, size, crop, interpolation):
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    transform = timm.data.create_transform(
        (3, size, size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop
    )
    to_input = ToInput(list(mean), list(std), torch.device("cpu"))
    others = []
    for name, path in photographs.items():
        with Image.open(path) as image:
            expected = transform(image.convert("RGB"))
        view = EvalView(size, crop, interpolation)
        pixels, flip, colour = shown(view, decode(path.read_bytes()))
        assert colour is None
        ours = to_input(torch.from_numpy(pixels[None]), torch.tensor([flip]), None)[0]
        if not torch.equal(ours, expected):
            others.append(name)
    assert others == []


# ---------------------------------------------------------------------------------- decoding


ZOO = zoo()
SOUND = [name for name, specimen in ZOO.items() if specimen.expected == "decodes"]
UNSOUND = [name for name in ZOO if name not in SOUND]


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_image_of_any_kind_gives_its_pixels(name):
    pixels = np.asarray(decode(ZOO[name].encoded)).astype(int)
    assert pixels.shape == ZOO[name].pixels.shape
    assert np.abs(pixels - ZOO[name].pixels).max() <= ZOO[name].tolerance


@pytest.mark.parametrize("name", UNSOUND)
def test_why_an_image_cannot_be_decoded_is_one_line(name):
    with pytest.raises(DecodeError, match=r"^cannot be decoded \(") as error:
        decode(ZOO[name].encoded)
    assert "\n" not in str(error.value)
    assert " at 0x" not in str(error.value), "an address in memory tells a reader nothing"


@pytest.mark.parametrize("name", [name for name in SOUND if "16" not in name])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_what_becomes_of_8_bit_images_is_pils_conversion(name):
    converted = Image.open(io.BytesIO(ZOO[name].encoded)).convert("RGB")
    assert np.array_equal(decode(ZOO[name].encoded), converted)


def test_both_decoders_give_the_same_pixels_of_jpegs():
    others = []
    for mode, progressive, quality, subsampling in product(
        ("RGB", "L"), (False, True), (30, 75, 95), ("4:4:4", "4:2:2", "4:2:0")
    ):
        how = {"progressive": progressive, "quality": quality}
        if mode == "RGB":
            how["subsampling"] = subsampling
        encoded = saved(Image.fromarray(CHINA[:201, :333]).convert(mode), "JPEG", **how)
        if not np.array_equal(transforms._decode_jpeg(encoded), transforms._decode_any(encoded)):
            others.append((mode, how))
    assert others == []


@pytest.mark.parametrize("name", ["cmyk.jpg", "truncated.jpg", "header_alone.jpg", "text.jpg"])
def test_what_is_no_ordinary_jpeg_is_left_to_pil(name):
    assert transforms._decode_jpeg(ZOO[name].encoded) is None


def test_the_rotated_specimen_says_that_it_is():
    image = Image.open(io.BytesIO(ZOO["rotated.jpg"].encoded))
    assert image.getexif()[0x0112] == ROTATED


def test_every_level_of_16_bits_gives_its_high_byte():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    decoded = decode(saved(Image.fromarray(levels), "PNG"))
    assert np.array_equal(decoded, np.repeat((levels // 256)[..., None], 3, 2))


@pytest.mark.parametrize("value", [-1, 65536])
def test_32_bit_levels_that_are_not_16_bit_ones_are_refused(value):
    levels = np.full((2, 3), 7, np.int32)
    levels[1, 2] = value
    with pytest.raises(DecodeError, match="32-bit pixels"):
        decode(saved(Image.fromarray(levels), "TIFF"))


def test_no_image_starts_another_program(tmp_path, monkeypatch):
    """PostScript, whatever its file is called, is drawn by Ghostscript."""
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o700)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(script))
    encoded = saved(Image.fromarray(picture()), "EPS")
    with pytest.raises(DecodeError, match="not a known kind of image"):
        decode(encoded)
    assert kind_and_size(encoded) == (None, {})
    assert not (tmp_path / "started").exists()


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    words = "25001 x 10000 px, 250 megapixels: over MAX_MEGAPIXELS, which is 250; set it in the env"
    with pytest.raises(DecodeError, match=words):
        decode(ZOO["large.png"].encoded)  # its pixels are missing: never looked at


@pytest.mark.parametrize(
    ("progressive", "repeats", "scans"),
    [(False, 0, 1), (False, 9, 1), (True, 0, 10), (True, 9, 19)],
)
def test_the_scans_that_a_jpeg_decoder_goes_through_are_counted(progressive, repeats, scans):
    encoded = jpeg(Image.fromarray(picture()), progressive=progressive)
    scan = encoded[encoded.rindex(b"\xff\xda") : -2]
    assert count_scans(encoded[:-2] + repeats * scan + encoded[-2:]) == scans
    assert count_scans(b"\xff\xd8\xff") == 0


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setenv("MAX_MEGAPIXELS", "0.00144")  # 12 scans
    encoded = jpeg(Image.fromarray(picture()), progressive=True)
    assert decode(encoded).shape == (30, 40, 3)
    scan = encoded[encoded.rindex(b"\xff\xda") : -2]
    with pytest.raises(DecodeError, match="3,010 scans of 40 x 30 px"):
        decode(encoded[:-2] + 3000 * scan + encoded[-2:])
    places = struct.pack("<16I16I", 158, *[0] * 15, len(encoded) + 3000 * len(scan), *[0] * 15)
    texture = b"BLP1" + struct.pack("<6i", 0, 0, 40, 30, 4, 1) + places + struct.pack("<I", 2)
    with pytest.raises(DecodeError, match="3,010 scans of 40 x 30 px"):  # a JPEG within
        decode(texture + encoded[:-2] + 3000 * scan + encoded[-2:])


def test_telephones_images_are_read():
    buffer = io.BytesIO()
    Image.new("L", (12032, 9024), 77).save(buffer, "JPEG")  # 108 megapixels
    pixels = decode(buffer.getvalue())
    assert pixels.shape == (9024, 12032, 3) and pixels[9000, 12000].tolist() == [77, 77, 77]
    assert open_image(png(16320, 12240, 8, PNG_GREY, b"")).size == (16320, 12240)  # 200


def test_the_limit_is_set_in_the_environment_and_is_itself_allowed(monkeypatch):
    encoded = saved(Image.fromarray(picture()), "PNG")
    monkeypatch.setenv("MAX_MEGAPIXELS", "0.0012")
    assert decode(encoded).shape == (30, 40, 3)
    monkeypatch.setenv("MAX_MEGAPIXELS", "0.001199")
    with pytest.raises(DecodeError, match=r"over MAX_MEGAPIXELS, which is 0\.001199;"):
        decode(encoded)
    for text in ("many", "nan", "inf"):
        monkeypatch.setenv("MAX_MEGAPIXELS", text)
        with pytest.raises(DecodeError, match=f"MAX_MEGAPIXELS={text} in the environment is not"):
            decode(encoded)


def test_pils_own_limit_is_ours_and_never_warns(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # PIL would refuse at 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(Image.fromarray(picture()), "PNG")).shape == (30, 40, 3)  # 1200 px


def test_no_warning_of_pils_gets_out():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in SOUND:
            decode(ZOO[name].encoded)
    assert caught == []
