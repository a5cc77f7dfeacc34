"""The benchmarks run through and fill their tables; what they find is not judged here."""

from irv2 import config
from scripts.benchmarks import end_to_end, loading


def test_every_row_of_the_loading_table_is_measured(monkeypatch):
    for name, value in {"SIZE": 75, "BATCH": 8, "FILES": 16, "IMAGENET": 2000, "SHARDS": 6}.items():
        monkeypatch.setattr(loading, name, value)
    found = loading.measure(rounds=1)
    lines = loading.table(found).splitlines()
    assert len(lines) == len(loading.COMPARED) + 4
    assert all(found[name]["ratio"] > 0 for name, _, _ in loading.COMPARED)
    assert found["start_s"] > 0


def test_training_from_files_is_compared_with_training_from_memory(monkeypatch):
    monkeypatch.setattr(end_to_end, "STEPS", 1)
    small = {
        "run": {"device": "cpu"},
        "model": {"blocks": [1, 1, 1]},
        "data": {
            "train": "synthetic:16x4",
            "val": "synthetic:16x4",
            "image_size": 75,
            "workers": 0,
        },
        "train": {"global_batch": 4, "micro_batch": 4},
    }
    found = end_to_end.compare(config.build(small), rounds=1)
    assert found["ratio"] > 0
    assert f"**{found['ratio']:.2f}**" in end_to_end.table(found)
