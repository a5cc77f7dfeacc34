"""Record what TensorFlow's own RMSProp, colour and crop ops do, as data for this repo's tests.

The recipe being reproduced was trained with TF-slim, so its optimiser and its image distortions
are TensorFlow's. They differ from their PyTorch namesakes in ways that matter (RMSProp starts its
mean square at one, keeps epsilon inside the root and the learning rate inside the momentum
buffer; the random crop draws its height uniformly rather than its area). The tests must not need
TensorFlow, so this script writes down what it does, once, in ``tensorflow.json`` beside itself:

* ``rmsprop``: float32 trajectories of ``tf.compat.v1.train.RMSPropOptimizer``;
* ``colour``: ``tf.image.adjust_brightness`` and ``adjust_saturation`` in both orders, clipped to
  [0, 1] and scaled to [-1, 1], as in the fast mode of slim's ``distort_color``;
* ``crop``: the law of ``tf.image.stateless_sample_distorted_bounding_box`` with slim's settings,
  as quantiles over many draws;
* ``eval_view``: slim's ``preprocess_for_eval``, before its scaling to [-1, 1], of random pixels.

Every float32 is written with the fewest digits that restore it exactly when read back as float32.
Everything is seeded: the same TensorFlow and NumPy versions write the same file. It was made by

    pip install tensorflow-cpu && python tests/data/record_tensorflow.py
"""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf

OUTPUT = Path(__file__).with_name("tensorflow.json")
SEED = 20160823

STEPS = 25
LR_CHANGE_STEP = 12
VARIABLE_SHAPES = ((5, 3), (4,))
RMSPROP_SETTINGS: list[dict[str, Any]] = [
    {
        "name": "slim",
        "lr": [0.045] * STEPS,
        "decay": 0.9,
        "momentum": 0.9,
        "epsilon": 1.0,
    },
    {
        "name": "small_epsilon",
        "lr": [0.01] * STEPS,
        "decay": 0.95,
        "momentum": 0.5,
        "epsilon": 1e-3,
    },
    {
        "name": "lr_change",
        "lr": [0.045] * LR_CHANGE_STEP + [0.045 * 0.94] * (STEPS - LR_CHANGE_STEP),
        "decay": 0.9,
        "momentum": 0.9,
        "epsilon": 1.0,
    },
]

MAX_BRIGHTNESS_DELTA = 32.0 / 255.0
BRIGHTNESS_THEN_SATURATION = 0
SATURATION_THEN_BRIGHTNESS = 1
COLOUR_SETTINGS = (  # (brightness delta, saturation factor), for every image in both orders
    (-MAX_BRIGHTNESS_DELTA, 1.5),
    (-0.06, 0.5),
    (0.0, 1.0),
    (0.05, 1.27),
    (MAX_BRIGHTNESS_DELTA, 0.73),
)

ASPECT_RATIO_RANGE = (0.75, 1.33)
AREA_RANGE = (0.05, 1.0)
MAX_ATTEMPTS = 100
CROP_DRAWS = 50_000
CROP_CHUNK = 5_000
CROP_IMAGE_SIZES = ((375, 500), (96, 96))  # (height, width)
MIN_OBJECT_COVERED = (0.1, 0.0)
EVAL_IMAGE_SIZES = ((23, 31), (40, 17), (9, 9))  # (height, width)
EVAL_SIZE = 12
CENTRAL_FRACTION = 0.875
QUANTILES = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)


def as_json(array: Any) -> Any:
    """Nested lists of the shortest decimals that restore each float32 exactly."""
    array = np.asarray(array, dtype=np.float32)
    if array.ndim:
        return [as_json(part) for part in array]
    return float(str(array))


def random_gradients(rng: np.random.Generator) -> list[list[np.ndarray]]:
    """One float32 gradient per step and variable, of scales from 0.01 to 10."""
    scales = 10.0 ** rng.uniform(-2.0, 1.0, STEPS)
    return [
        [(scale * rng.standard_normal(shape)).astype(np.float32) for shape in VARIABLE_SHAPES]
        for scale in scales
    ]


def record_trajectory(setting: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Run TensorFlow's RMSProp on recorded random gradients and keep every step."""
    initial = [rng.standard_normal(shape).astype(np.float32) for shape in VARIABLE_SHAPES]
    gradients = random_gradients(rng)
    variables = [tf.Variable(value) for value in initial]
    lr = tf.Variable(0.0, dtype=tf.float32)
    optimizer = tf.compat.v1.train.RMSPropOptimizer(
        learning_rate=lr.read_value,
        decay=setting["decay"],
        momentum=setting["momentum"],
        epsilon=setting["epsilon"],
    )
    values = []
    for step, step_gradients in enumerate(gradients):
        lr.assign(setting["lr"][step])
        optimizer.apply_gradients(zip(map(tf.constant, step_gradients), variables, strict=True))
        values.append([as_json(variable.numpy()) for variable in variables])
    slots = {
        name: [as_json(optimizer.get_slot(variable, slot).numpy()) for variable in variables]
        for name, slot in (("final_mean_square", "rms"), ("final_momentum", "momentum"))
    }
    return {
        **setting,
        "initial": [as_json(value) for value in initial],
        "gradients": [[as_json(gradient) for gradient in step] for step in gradients],
        "values": values,
        **slots,
    }


def record_rmsprop() -> list[dict[str, Any]]:
    """One trajectory per setting, each with its own start and gradients."""
    rng = np.random.default_rng([SEED, 1])
    return [record_trajectory(setting, rng) for setting in RMSPROP_SETTINGS]


def colour_images() -> dict[str, np.ndarray]:
    """Small float32 images in [0, 1]: random, bright, dark, grey and with special pixels."""
    rng = np.random.default_rng([SEED, 2])

    def uniform(low: float, high: float, channels: int = 3) -> np.ndarray:
        return rng.uniform(low, high, (4, 4, channels)).astype(np.float32)

    special = [
        *[(0, 0, 0), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)],
        *[(0.5, 0.5, 0.5), (0.05, 0.05, 0.05), (0.95, 0.95, 0.95), (0.5, 0, 0)],
        *[(0, 0.04, 0.09), (0.6, 0.6, 0.2), (0.2, 0.6, 0.6), (1, 0.98, 0.96)],
    ]
    return {
        "random_a": uniform(0.0, 1.0),
        "random_b": uniform(0.0, 1.0),
        "dark": uniform(0.0, 0.15),
        "bright": uniform(0.85, 1.0),
        "grey": np.repeat(uniform(0.0, 1.0, channels=1), 3, axis=-1),
        "special": np.array(special, dtype=np.float32).reshape(4, 4, 3),
    }


def distort_colour(image: np.ndarray, delta: float, factor: float, order: int) -> np.ndarray:
    """The fast mode of slim's distort_color with given draws, then its scaling to [-1, 1]."""
    if order == BRIGHTNESS_THEN_SATURATION:
        result = tf.image.adjust_saturation(tf.image.adjust_brightness(image, delta), factor)
    else:
        result = tf.image.adjust_brightness(tf.image.adjust_saturation(image, factor), delta)
    clipped = tf.clip_by_value(result, 0.0, 1.0)
    return tf.multiply(tf.subtract(clipped, 0.5), 2.0).numpy()


def record_colour() -> dict[str, Any]:
    """The images, and every image under every setting in both orders."""
    images = colour_images()
    cases = [
        {
            "image": name,
            "brightness_delta": as_json(delta),
            "saturation_factor": as_json(factor),
            "order": order,
            "result": as_json(distort_colour(image, delta, factor, order)),
        }
        for name, image in images.items()
        for delta, factor in COLOUR_SETTINGS
        for order in (BRIGHTNESS_THEN_SATURATION, SATURATION_THEN_BRIGHTNESS)
    ]
    return {"images": {name: as_json(image) for name, image in images.items()}, "cases": cases}


@tf.function
def draw_chunk(seeds: tf.Tensor, size: tf.Tensor, min_object_covered: tf.Tensor) -> tf.Tensor:
    """One crop (y, x, height, width) per seed, the object being the whole image."""

    def draw(seed: tf.Tensor) -> tf.Tensor:
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            size,
            bounding_boxes=tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=min_object_covered,
            aspect_ratio_range=ASPECT_RATIO_RANGE,
            area_range=AREA_RANGE,
            max_attempts=MAX_ATTEMPTS,
        )
        return tf.concat([begin[:2], extent[:2]], axis=0)

    return tf.map_fn(draw, seeds, fn_output_signature=tf.int32)


def draw_crops(height: int, width: int, min_object_covered: float, stream: int) -> np.ndarray:
    """Crops (y, x, height, width), one row per draw; ``stream`` keeps the cases' seeds apart."""
    size = tf.constant([height, width, 3], dtype=tf.int32)
    covered = tf.constant(min_object_covered, dtype=tf.float32)
    chunks = []
    for start in range(0, CROP_DRAWS, CROP_CHUNK):
        index = np.arange(start, min(start + CROP_CHUNK, CROP_DRAWS), dtype=np.int32)
        seeds = np.stack([np.full_like(index, SEED + stream), index], axis=1)
        chunks.append(draw_chunk(tf.constant(seeds), size, covered).numpy())
    return np.concatenate(chunks)


def summarise(values: np.ndarray) -> dict[str, Any]:
    """Quantiles at QUANTILES, extremes and mean."""
    values = values.astype(np.float64)
    return {
        "quantiles": [round(float(q), 6) for q in np.quantile(values, QUANTILES)],
        "min": round(float(values.min()), 6),
        "max": round(float(values.max()), 6),
        "mean": round(float(values.mean()), 6),
    }


def record_crop_case(
    height: int, width: int, min_object_covered: float, stream: int
) -> dict[str, Any]:
    """Draw the crops of one image size and overlap constraint and summarise them."""
    y, x, crop_height, crop_width = draw_crops(height, width, min_object_covered, stream).T
    whole = (crop_height == height) & (crop_width == width)
    return {
        "height": height,
        "width": width,
        "min_object_covered": min_object_covered,
        "whole_image_fraction": float(whole.mean()),
        "area_fraction": summarise(crop_height * crop_width / (height * width)),
        "aspect_ratio": summarise(crop_width / crop_height),
        "crop_height": summarise(crop_height),
        "crop_width": summarise(crop_width),
        "y": summarise(y),
        "x": summarise(x),
    }


def record_crop() -> dict[str, Any]:
    """Every image size under both overlap constraints."""
    settings = [
        (height, width, covered)
        for height, width in CROP_IMAGE_SIZES
        for covered in MIN_OBJECT_COVERED
    ]
    return {
        "aspect_ratio_range": list(ASPECT_RATIO_RANGE),
        "area_range": list(AREA_RANGE),
        "max_attempts": MAX_ATTEMPTS,
        "draws": CROP_DRAWS,
        "quantile_levels": list(QUANTILES),
        "cases": [record_crop_case(*setting, stream) for stream, setting in enumerate(settings)],
    }


def record_eval_view() -> list[dict[str, Any]]:
    """Random uint8 pixels, and what slim's evaluation makes of them, in units of a level."""
    rng = np.random.default_rng([SEED, 3])
    cases = []
    for height, width in EVAL_IMAGE_SIZES:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = tf.image.convert_image_dtype(tf.constant(pixels), tf.float32)
        central = tf.image.central_crop(image, CENTRAL_FRACTION)[tf.newaxis]
        shown = tf.compat.v1.image.resize_bilinear(central, [EVAL_SIZE] * 2, align_corners=False)
        cases.append({"pixels": pixels.tolist(), "result": as_json(255 * shown[0].numpy())})
    return cases


def main() -> None:
    """Record everything, single-threaded, and write it beside this script."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    record = {
        "tensorflow_version": tf.__version__,
        "numpy_version": np.__version__,
        "rmsprop": record_rmsprop(),
        "colour": record_colour(),
        "crop": record_crop(),
        "eval_view": record_eval_view(),
    }
    OUTPUT.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
