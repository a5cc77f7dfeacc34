"""Where the network looked: maps that add up to what a class's logit owes to each place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from calling import call
from PIL import Image
from programs import write_images
from small_weights import SYNSETS
from torch import Tensor

import validate
from data.pictures import see
from data.to_input import ToInput
from irv2 import explain, input_pipeline
from irv2.run import trained
from irv2.run.trained import Trained
from scripts import neighbours, predict

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(small_weights: Path) -> Trained:
    pytest.importorskip("captum")
    return trained.load_weights(str(small_weights))


def test_at_the_last_map_it_is_the_class_activation_map(network):
    """Pooling and a linear layer follow it: each place owes weight times activation (CAM)."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), dtype=np.uint8)
    large = trained.seen_as(network, {"image_size": 299})
    maps = explain.ClassMaps(large, CPU)
    found = maps.maps(pixels, [0, 2])
    with torch.no_grad():
        x = maps.to_input(torch.from_numpy(pixels), torch.zeros(2, dtype=torch.bool), None)
        features = large.model.forward_features(x)
        cams = torch.einsum("bchw,bc->bhw", features, large.model.classif.weight[[0, 2]]).relu()
    expected = torch.nn.functional.interpolate(cams[:, None], (299, 299), mode="bilinear")[:, 0]
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
    assert expected.std() > 0.01
    assert torch.allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("size, layer", [(75, "repeat"), (139, "repeat_1"), (267, "conv2d_7b")])
def test_the_map_has_seven_places_a_side_or_more(network, size, layer):
    shapes = []
    part = getattr(network.model, layer)
    handle = part.register_forward_hook(lambda module, given, out: shapes.append(out.shape))
    with torch.inference_mode():
        network.model(torch.zeros(1, 3, size, size))
    handle.remove()
    assert min(shapes[0][2:]) == 7
    least = next(least for least, name in explain.LAYERS if size >= least)
    assert dict(explain.LAYERS)[least] == layer


def test_colours_lie_where_the_map_is_large():
    pixels, found = np.full((2, 2, 3), 100, np.uint8), Tensor([[0.0, 1.0], [0.0, 0.0]])
    drawn = explain.over(pixels, found)
    assert (drawn[found.numpy() == 0] == 100).all() and drawn[0, 1].tolist() != [100] * 3
    joined = explain.side_by_side([pixels, drawn])
    assert joined.size == (4 + explain.GAP, 2) and joined.getpixel((2, 0)) == (255, 255, 255)


def test_both_programs_draw(network, small_weights, tmp_path):
    pictures = write_images(tmp_path / "val", SYNSETS, 2)
    own = ("--weights", small_weights, "--device", "cpu")
    done = call(predict, pictures, *own, "--explain", tmp_path / "drawn")
    assert (done.status, done.err) == (0, "")
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == [f"{n + 1:04}_{n % 2}.png" for n in range(6)]
    assert Image.open(drawn[0]).size == (3 * 75 + 2 * explain.GAP, 75)

    report = ("--report", tmp_path / "page", "--explain", "--workers", 0)
    done = call(validate, *own, "--data", pictures, *report)
    assert done.status == 0, done.err
    page = (tmp_path / "page" / "index.html").read_text()
    assert '<ul class="pictures explained">' in page and "HiResCAM" in page


def test_embeddings_are_the_features_and_tell_the_nearest_pictures(small_weights, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = write_images(tmp_path / "val", SYNSETS, 2)
    (pictures / "broken.png").write_bytes(b"no image")
    own = (pictures, "--weights", small_weights, "--device", "cpu", "--batch", 4, "--embeddings")
    done = call(predict, *own, tmp_path / "a.npy")
    assert done.status == 1 and done.err.count("\n") == 1  # of the broken one
    features = np.load(tmp_path / "a.npy")
    model = trained.load_weights(str(small_weights)).model
    assert features.shape == (6, model.num_features) and features.dtype == np.float32
    call(predict, *own, tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert np.allclose(np.array(table["embedding"].to_pylist()), features, atol=1e-6)
    names = [line.split()[0] for line in done.out.splitlines()]
    assert [Path(name).name for name in table["image"].to_pylist()] == [Path(n).name for n in names]
    view = trained.load_weights(str(small_weights)).data
    maps_input = ToInput(view.mean, view.std, CPU)
    first = see(table["image"][0].as_py(), input_pipeline.evaluation_view(view)).pixels
    x = maps_input(torch.from_numpy(first[None]), torch.zeros(1, dtype=torch.bool), None)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert np.allclose(features[0], expected.numpy(), atol=1e-4)

    done = call(neighbours, tmp_path / "a.parquet", "--among", tmp_path / "a.parquet")
    assert (done.status, done.err) == (0, "")
    for line, name in zip(done.out.splitlines(), table["image"].to_pylist(), strict=True):
        assert line.startswith(f"{name}  {name} 1.000, ")  # itself, then the others
        cosines = [float(word.split()[1]) for word in line.split("  ")[1].split(", ")]
        assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True)
    done = call(neighbours, small_weights, "--among", tmp_path / "a.parquet")
    assert done.status == 1 and "no embeddings of predict.py's" in done.err
    done = call(predict, *own, tmp_path / "a.txt")
    assert done.status == 1 and "must end in .npy or .parquet" in done.err


def test_what_is_not_installed_is_said_first(monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "is_installed", lambda name: False)
    done = call(predict, "absent.jpg", "--weights", "absent", "--explain", tmp_path)
    assert done.status == 1 and "pip install -r requirements-explain.txt" in done.err
    done = call(validate, "--weights", "absent", "--explain")
    assert done.status == 2 and "--explain is of a page: --report DIR" in done.err
