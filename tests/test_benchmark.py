"""The benchmarks run through and fill their tables; what they find is not judged here."""

import copy
import json
import multiprocessing
import subprocess
import sys

import fork_server
import programs
import pytest
import torch

from irv2 import config_file
from irv2.network.accelerate import accelerate
from irv2.network.cpu import threads
from irv2.network.model import inception_resnet_v2
from irv2.training import update as end_of_step
from scripts import benchmark
from scripts.benchmarks import (
    end_to_end,
    gpu,
    gpu_parts,
    limits,
    loading,
    network,
    peers,
    remote,
    scaling,
    starting,
    updating,
)
from scripts.planning import devices

pytestmark = pytest.mark.slow


def test_every_row_of_the_loading_table_is_measured(monkeypatch):
    for name, value in {"SIZE": 75, "BATCH": 8, "FILES": 16, "IMAGENET": 2000, "SHARDS": 6}.items():
        monkeypatch.setattr(loading, name, value)
    fork = multiprocessing.get_context("fork")  # a spawned process would import everything again
    monkeypatch.setattr(multiprocessing, "get_context", lambda _method=None: fork)
    found = loading.measure(rounds=1)
    lines = loading.table(found).splitlines()
    assert len(lines) == len(loading.COMPARED) + 4
    assert all(found[name]["ratio"] > 0 for name, _, _ in loading.COMPARED)
    assert found["start_s"] > 0


def test_training_from_files_is_compared_with_training_from_memory(monkeypatch):
    monkeypatch.setattr(end_to_end, "STEPS", 1)
    small = {
        "run": {"device": "cpu"},
        "model": {"blocks": [1, 1, 1], "width": 0.25},
        "data": {
            "train": "synthetic:16x4",
            "val": "synthetic:16x4",
            "image_size": 75,
            "workers": 0,
        },
        "train": {"global_batch": 4, "micro_batch": 4},
    }
    found = end_to_end.compare(config_file.from_tree(small), rounds=1)
    assert found["ratio"] > 0
    assert f"**{found['ratio']:.2f}**" in end_to_end.table(found)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["all"], ["train", "infer", "optimizer", "start", "data", "checkpoint", "scaling"]),
        (["train", "--compile"], ["train-compiled"]),
        (["data", "--peers"], ["data-peers"]),
        (["infer", "--peers"], ["infer-peers"]),
        (["remote"], ["remote"]),
    ],
)
def test_a_command_measures_what_it_names(monkeypatch, words, names):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    asked = benchmark.benchmarks(benchmark.parse_arguments(), torch.device("cpu"))
    assert [each.name for each in asked] == names


SMALL_CASE = network.Setting(batch=4, image_size=75, precision="fp32", device=torch.device("cpu"))


@pytest.fixture
def small_networks(monkeypatch):
    """Networks of one block of each kind; timm's is ours without the loops for CPUs."""

    def pair(device):
        torch.manual_seed(0)
        ours = accelerate(inception_resnet_v2(blocks=(1, 1, 1), width=0.25))
        return ours.to(memory_format=torch.channels_last), copy.deepcopy(ours)

    monkeypatch.setattr(network, "networks", pair)
    monkeypatch.setattr(
        limits, "inception_resnet_v2", lambda: inception_resnet_v2(blocks=(1, 1, 1), width=0.25)
    )
    monkeypatch.setattr(limits, "MATRIX", 256)


def test_training_and_inference_are_compared_with_the_peer_and_both_limits(small_networks):
    for measure in (network.measure_training, network.measure_inference):
        found = measure(SMALL_CASE, rounds=1, compiled=False)
        lines = network.table(found).splitlines()
        assert len(lines) == 2 + len(found["rows"]) + 2
        what = "train" if "step" in found["rows"] else "forward"
        bounds = limits.images_per_s(found["limits"], SMALL_CASE.batch, what)
        assert all(f"| {bound:.4g} |" in "".join(lines) for bound in bounds.values())
        assert all(row["ratio"] > 0 for row in found["rows"].values())


def test_peers_have_a_row_each_with_their_latency(small_networks, monkeypatch):
    monkeypatch.setattr(peers, "CALLS", 2)
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)  # compiling takes a minute
    found = peers.measure(rounds=1, image_size=75)
    assert {"ours, fp32", "timm, bf16"} < found["ways"].keys()
    assert ("ONNX Runtime, int8" in found["ways"]) == peers.is_installed("onnxruntime")
    for each in found["ways"].values():
        for batch in peers.BATCHES:
            row = each[str(batch)]
            assert 0 < row["p50_ms"] <= row["p99_ms"]
            assert row["images_per_s"] * row["p50_ms"] / 1000 > batch / 10
    assert len(peers.table(found).splitlines()) == 2 + len(found["ways"])


def test_the_limits_count_every_multiply_add_of_the_model_card():
    """13.18 G at 299 px with the classifier's 1.5 M: convolutions 13,154,258,016."""
    macs = 0
    for shape, count in limits.convolutions(2, 299).items():
        _, channels, height, width = shape.input
        out = [
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                (height, width), shape.padding, shape.kernel, shape.stride
            )
        ]
        kernel = shape.kernel[0] * shape.kernel[1]
        macs += count * channels * shape.out_channels * kernel * out[0] * out[1]
    assert macs == 13_154_258_016


def test_results_that_differ_are_told(small_networks, monkeypatch):
    network.check_training(SMALL_CASE)
    network.check_inference(SMALL_CASE)
    updating.check(SMALL_CASE.device)
    pair = network.networks

    def spoilt(device):
        ours, peer = pair(device)
        with torch.no_grad():
            peer.conv2d_7b.conv.weight[:800].mul_(-1)
        return ours, peer

    monkeypatch.setattr(network, "networks", spoilt)
    for check in (network.check_training, network.check_inference):
        with pytest.raises(network.DisagreementError, match="differ from timm's by"):
            check(SMALL_CASE)


@pytest.mark.parametrize("spoilt", ["clipping", "average"])
def test_updates_that_differ_are_told(small_networks, monkeypatch, spoilt):
    if spoilt == "clipping":
        monkeypatch.setattr(end_of_step, "gradient_norm", lambda parameters: torch.tensor(1e3))
    else:
        average = network.running_average
        monkeypatch.setattr(network, "running_average", lambda model, _: average(model, 0.05))
    with pytest.raises(network.DisagreementError, match="changes of"):
        updating.check(SMALL_CASE.device)


def test_updates_are_compared(small_networks):
    found = updating.measure(SMALL_CASE.device, rounds=1)
    assert f"**{found['row']['ratio']:.2f}**" in updating.table(found)


@pytest.mark.skipif(not threads.available(), reason="PyTorch's threads: none we know")
def test_a_profile_names_operations(small_networks):
    assert "_NormReluBackward" in network.profile(SMALL_CASE, training=True)
    assert "_convolution_pointwise" in network.profile(SMALL_CASE, training=False)


@pytest.fixture
def by_forks(monkeypatch):
    """Let the benchmarks fork what they start, which spares their imports; torchrun's ranks too."""

    def start(command: list[str], **options: object) -> subprocess.Popen:
        command = command[1:]
        if "torch.distributed.run" in command:
            command = [programs.RANKS, "2", *command[command.index("--nproc-per-node=2") + 1 :]]
        return fork_server.Program(command, **options)

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.usefixtures("by_forks")
def test_the_start_is_timed_up_to_the_first_step():
    options = [
        "model.blocks=[1, 1, 1]",
        "model.width=0.25",
        "train.global_batch=4",
        "train.micro_batch=4",
    ]
    assert starting.first_step([*options, "data.workers=0"]) > 0
    with pytest.raises(RuntimeError, match="status 1"):
        starting.first_step(["train.global_batch=nonsense"])


@pytest.mark.usefixtures("by_forks")
def test_two_processes_are_compared_with_one_and_a_plan_can_rest_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "BLOCKS", [1, 1, 1])
    monkeypatch.setattr(scaling, "SIZES", ((75, 4),))
    found = scaling.measure(rounds=1)
    (case,) = found["cases"]
    assert all(case[key] > 0 for key in case if key.endswith("_s") and key != "update_s")
    assert case["ratio"] == 2 * case["one_s"] / case["two_s"]
    assert case["gradient_bytes"] == 4 * 17_042_664  # blocks [1, 1, 1], 1000 classes
    text = scaling.table(found)
    assert f"**{case['ratio']:.2f}**" in text
    assert f"| {1e3 * case['two_s']:.0f} |" in text
    (tmp_path / "cpu.json").write_text(json.dumps(found))
    table = devices.with_measured(devices.load(), tmp_path / "cpu.json", 299)
    assert table.devices["cpu"].image_size == 75
    assert table.links["gloo"].gigabytes_per_s.kind == "measured"


def test_every_row_of_the_table_of_remote_shards_is_measured(monkeypatch):
    pytest.importorskip("aiohttp", reason="remote shards are NOT tested: requirements-remote.txt")
    for name, value in {"SIZE": 75, "BATCH": 8, "FILES": 16}.items():
        monkeypatch.setattr(loading, name, value)
    monkeypatch.setattr(remote, "BATCH", 8)
    monkeypatch.setattr(remote, "DELAY_S", 0.001)
    found = remote.measure(rounds=1)
    assert len(remote.table(found).splitlines()) == len(remote.COMPARED) + 2
    assert all(found[name]["ratio"] > 0 for name, _, _ in remote.COMPARED)


# ------------------------------------------------------------------------------------- on a GPU


def part(text: str, limit_s: float, figures: dict) -> gpu.Outcome:
    return gpu.run("part", [sys.executable, "-c", text], limit_s, figures)


def test_a_part_that_hangs_is_cut_and_its_figures_count(capsys):
    figures = {}
    told = """import time; print('{"eager": 5}', "why", sep=chr(10), flush=True); time.sleep(60)"""
    cut = part(told, 2.0, figures)
    assert (cut.how, cut.reason, figures) == ("cut", "why", {"eager": 5}) and cut.seconds < 10
    failed = part("raise SystemExit('no kernel')", 10.0, figures)
    assert (failed.how, failed.reason) == ("failed", "no kernel")
    assert part("print(1)", 10.0, figures).how == "done"


def test_what_a_part_leaves_over_goes_to_those_behind_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    total = 0.0
    for part, limit_s in gpu.limits(8):
        assert limit_s >= 0.999 * 480 * part.share / sum(part.share for part in gpu.PARTS)
        total += limit_s
        now[0] += limit_s
    assert total == pytest.approx(480)  # where each takes all it may
    now[0] = 0.0
    assert list(gpu.limits(8))[-1][1] == pytest.approx(480)  # where none takes any


def test_what_to_look_at_first_on_a_gpu():
    figures = {"graph": 2000.0, "timm_compiled": 1900.0, "eager": 1000.0, "timm_eager": 900.0}
    figures |= {"identical_twice": "409 of 742", "identical_resumed": "742 of 742"}
    outcomes = [gpu.Outcome("tests", "cut", 60.0, "F."), gpu.Outcome("eager", "failed", 1.0, "why")]
    failed, bits, first, second, cut = gpu.look_first(figures, outcomes)
    assert failed == "eager failed: why" and "two processes: 409 of 742" in bits
    assert "eager" in first and "1.11, goal 2.2" in first and "1.05, goal 1.3" in second
    assert cut == "tests was cut: F."
    text = gpu.table(figures, outcomes)
    assert "| 2000 | 1900 | **1.05** | ≥ 1.3 |" in text
    assert "Not whole: tests cut after 60 s; eager failed after 1 s." in text
    assert "| large matrix product, bf16, TFLOP/s | not measured |" in text


@pytest.mark.parametrize("name", ["eager", "graph", "inference"])
def test_the_parts_are_rehearsed_on_a_cpu(monkeypatch, capsys, name):
    bench = gpu_parts.Bench(rehearsal=True)
    monkeypatch.setattr(bench, "images_per_s", lambda work, images=0: work() is None or 1.0)
    monkeypatch.setattr(gpu_parts, "best_time", lambda work, device, repeats=7: work() or 1.0)
    gpu_parts.PARTS[name](bench)
    told = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("{"):
            told |= json.loads(line)
    known = {key for row in gpu.ROWS for key in (row.ours, row.peer)}
    assert told.keys() & known and told.keys() - known <= {"regions_gib"}


def test_a_kernel_belongs_to_a_family():
    names = {
        "triton_poi_fused_relu_0": "fused by the compiler",
        "sm90_xmma_wgrad_implicit_gemm_bf16": "convolutions and products",
        "void at::native::max_pool_backward_nhwc": "pooling",
        "at::native::multi_tensor_apply_kernel": "multi-tensor",
        "Memcpy DtoD": "copies and masks",
        "void nothing()": "others",
    }
    assert {name: gpu_parts.family(name) for name in names} == names
