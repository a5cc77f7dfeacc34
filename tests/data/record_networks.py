"""Record what Keras' and TF-slim's Inception-ResNet-v2 call their variables, and their logits.

Both networks have a quarter of the published channels, 10 classes, and weights that follow from
their names (tests/drawn_weights.py), so `networks.json` beside this holds names, shapes and logits
alone; slim.ckpt.index is what TensorFlow wrote for TF-slim's, few.ckpt a checkpoint of version 1 of
its first layer. Keras' is that of keras.applications; TF-slim's is written down here after
research/slim/nets/inception_resnet_v2.py of github.com/tensorflow/models. It was made by

    pip install tensorflow-cpu==2.15.1 tf_slim && python tests/data/record_networks.py DIRECTORY

which writes the networks' files into DIRECTORY, in the forms that people have.
"""

import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tensorflow.compat.v1 as tf
from drawn_weights import drawn, image
from tensorflow import keras
from tensorflow.python.framework import ops, tensor

ops.Tensor = tensor.Tensor  # where tf_slim 1.1 looks for it
import tf_slim as slim  # noqa: E402

OUTPUT = Path(__file__).with_name("networks.json")
CLASSES, NARROW = 10, 4
VARIABLES = {
    "Conv2D": ("kernel", "bias"),
    "Dense": ("kernel", "bias"),
    "BatchNormalization": ("beta", "moving_mean", "moving_variance"),
}


class NarrowLayers:
    """keras.layers, with fewer channels but at the end of residual blocks, which have a bias."""

    def __getattr__(self, name):
        return getattr(keras.layers, name)

    def Conv2D(self, filters, *arguments, use_bias=True, **options):
        channels = filters if use_bias else filters // NARROW
        return keras.layers.Conv2D(channels, *arguments, use_bias=use_bias, **options)


def record_keras(files: Path) -> dict:
    network = keras.applications.InceptionResNetV2(
        weights=None,
        input_shape=(75, 75, 3),
        classes=CLASSES,
        classifier_activation=None,
        layers=NarrowLayers(),
    )
    layers = []
    for layer in network.layers:
        shapes = [value.shape for value in layer.get_weights()]
        if shapes:
            names = VARIABLES[type(layer).__name__]
            paths = [f"{layer.name}/{name}" for name in names]
            layer.set_weights([drawn(*pair) for pair in zip(paths, shapes)])
            layers.append([layer.name, *shapes])
    network.save_weights(files / "weights.h5")
    network.save_weights(files / "new.weights.h5")
    network.save(files / "model.h5")
    network.save(files / "model.keras")
    logits = network(image(75), training=False).numpy()[0].tolist()
    return {"layers": layers, "logits": logits}


# ----------------------------------------------------------------------------------- TF-slim


def conv(net, channels, size, scope, **options):
    return slim.conv2d(net, channels // NARROW, size, scope=scope, **options)


def branches(net, *specs):
    """Concatenate branches: rows of (channels, kernel size, scope, options), or a pool first."""
    outputs = []
    for number, (pool, *rows) in enumerate(specs):
        with tf.variable_scope(f"Branch_{number}"):
            x = pool(net) if pool else net
            for channels, size, scope, *options in rows:
                x = conv(x, channels, size, scope, **(options[0] if options else {}))
            outputs.append(x)
    return tf.concat(outputs, 3)


def residual(net, scope, scale, activation, *specs):
    with tf.variable_scope(scope):
        up = slim.conv2d(
            *(branches(net, *specs), net.get_shape()[3], 1),
            normalizer_fn=None,
            activation_fn=None,
            scope="Conv2d_1x1",
        )
        net = net + scale * up
        return activation(net) if activation else net


DOWN = {"stride": 2, "padding": "VALID"}
BLOCK35 = (
    (None, (32, 1, "Conv2d_1x1")),
    (None, (32, 1, "Conv2d_0a_1x1"), (32, 3, "Conv2d_0b_3x3")),
    (None, (32, 1, "Conv2d_0a_1x1"), (48, 3, "Conv2d_0b_3x3"), (64, 3, "Conv2d_0c_3x3")),
)
BLOCK17 = (
    (None, (192, 1, "Conv2d_1x1")),
    (
        *(None, (128, 1, "Conv2d_0a_1x1")),
        *((160, [1, 7], "Conv2d_0b_1x7"), (192, [7, 1], "Conv2d_0c_7x1")),
    ),
)
BLOCK8 = (
    (None, (192, 1, "Conv2d_1x1")),
    (
        *(None, (192, 1, "Conv2d_0a_1x1")),
        *((224, [1, 3], "Conv2d_0b_1x3"), (256, [3, 1], "Conv2d_0c_3x1")),
    ),
)


def max_pool(net):
    return slim.max_pool2d(net, 3, **DOWN)


def average_pool(net):
    return slim.avg_pool2d(net, 3, stride=1, padding="SAME")


def repeat(net, scope, block, times, scale, specs):
    with tf.variable_scope(scope):
        for number in range(1, times + 1):
            net = residual(net, f"{block}_{number}", scale, tf.nn.relu, *specs)
    return net


def network(net):
    """Images -> logits, auxiliary logits."""
    net = conv(net, 32, 3, "Conv2d_1a_3x3", **DOWN)
    net = conv(net, 32, 3, "Conv2d_2a_3x3", padding="VALID")
    net = max_pool(conv(net, 64, 3, "Conv2d_2b_3x3"))
    net = conv(net, 80, 1, "Conv2d_3b_1x1", padding="VALID")
    net = max_pool(conv(net, 192, 3, "Conv2d_4a_3x3", padding="VALID"))
    with tf.variable_scope("Mixed_5b"):
        net = branches(
            net,
            (None, (96, 1, "Conv2d_1x1")),
            (None, (48, 1, "Conv2d_0a_1x1"), (64, 5, "Conv2d_0b_5x5")),
            (None, (64, 1, "Conv2d_0a_1x1"), (96, 3, "Conv2d_0b_3x3"), (96, 3, "Conv2d_0c_3x3")),
            (average_pool, (64, 1, "Conv2d_0b_1x1")),
        )
    net = repeat(net, "Repeat", "block35", 10, 0.17, BLOCK35)
    with tf.variable_scope("Mixed_6a"):
        last = (384, 3, "Conv2d_1a_3x3", DOWN)
        net = branches(
            net,
            (None, last),
            (None, (256, 1, "Conv2d_0a_1x1"), (256, 3, "Conv2d_0b_3x3"), last),
            (max_pool,),
        )
    net = middle = repeat(net, "Repeat_1", "block17", 20, 0.10, BLOCK17)
    with tf.variable_scope("Mixed_7a"):
        first = (256, 1, "Conv2d_0a_1x1")
        net = branches(
            net,
            (None, first, (384, 3, "Conv2d_1a_3x3", DOWN)),
            (None, first, (288, 3, "Conv2d_1a_3x3", DOWN)),
            (None, first, (288, 3, "Conv2d_0b_3x3"), (320, 3, "Conv2d_1a_3x3", DOWN)),
            (max_pool,),
        )
    net = repeat(net, "Repeat_2", "block8", 9, 0.20, BLOCK8)
    net = residual(net, "Block8", 1.0, None, *BLOCK8)
    net = conv(net, 1536, 1, "Conv2d_7b_1x1")
    with tf.variable_scope("AuxLogits"):
        aux = slim.avg_pool2d(middle, 5, stride=3, padding="VALID")
        aux = conv(aux, 128, 1, "Conv2d_1b_1x1")
        aux = conv(aux, 768, aux.get_shape()[1:3], "Conv2d_2a_5x5", padding="VALID")
        aux = slim.fully_connected(slim.flatten(aux), CLASSES, activation_fn=None, scope="Logits")
    with tf.variable_scope("Logits"):
        pooled = tf.reduce_mean(net, [1, 2])
        return slim.fully_connected(pooled, CLASSES, activation_fn=None, scope="Logits"), aux


def save(session, variables, path: Path, version: str) -> None:
    path.parent.mkdir(exist_ok=True)
    saver = tf.train.Saver(variables, write_version=getattr(tf.train.SaverDef, version))
    saver.save(session, str(path), write_meta_graph=False)


def record_slim(files: Path) -> dict:
    with tf.Graph().as_default(), tf.Session() as session:
        images = tf.placeholder(tf.float32, [1, 299, 299, 3])
        norm = {"epsilon": 1e-3, "is_training": False, "updates_collections": None}
        with (
            slim.arg_scope([slim.conv2d], normalizer_fn=slim.batch_norm, normalizer_params=norm),
            tf.variable_scope("InceptionResnetV2"),
        ):
            outputs = network(images)
        variables = tf.global_variables()
        shapes = [(each.op.name, each.shape.as_list()) for each in variables]
        step = tf.train.get_or_create_global_step()
        places = [tf.placeholder(tf.float32, shape) for _, shape in shapes]
        put = [tf.assign(*pair) for pair in zip(variables, places)]
        session.run([tf.global_variables_initializer()])
        session.run(put, {place: drawn(*pair) for place, pair in zip(places, shapes)})
        session.run([tf.assign(step, 7)])
        save(session, variables, files / "V1" / "model.ckpt", "V1")
        save(session, variables, files / "V2" / "model.ckpt", "V2")
        few = [each for each in variables if "V2/Conv2d_1a_3x3" in each.op.name] + [step]
        save(session, few, files / "few.ckpt", "V1")
        logits, aux = session.run(outputs, {images: image(299)})
    return {"variables": shapes, "logits": logits[0].tolist(), "aux_logits": aux[0].tolist()}


def main() -> None:
    files = Path(sys.argv[1])
    recorded = {"keras": record_keras(files), "slim": record_slim(files)}
    lines = [
        f'"{name}": {{\n'
        + ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in content.items())
        + "\n}"
        for name, content in recorded.items()
    ]
    shutil.copy(files / "V2" / "model.ckpt.index", OUTPUT.with_name("slim.ckpt.index"))
    shutil.copy(files / "few.ckpt", OUTPUT.with_name("few.ckpt"))
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
