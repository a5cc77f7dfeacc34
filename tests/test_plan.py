"""The model that plans rest on, against closed forms and simulations; the program from outside."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
import torch.distributed as dist
from calling import call
from programs import ROOT, run

from data.errors import UserError
from irv2 import build, config, config_file
from irv2.network.model import inception_resnet_v2
from irv2.training import batch
from irv2.training.distributed import WorldError
from scripts import plan
from scripts.planning import devices, prediction, steptime
from scripts.planning.prediction import Workload
from scripts.planning.steptime import Cluster, Device, Gradients, Link

RECIPE = ROOT / "configs" / "irv2_rmsprop.yaml"
SIZE = 217e6
GRADIENTS = Gradients(SIZE, messages=9)
LINK = Link(bytes_per_s=10e9, latency_s=0.0)
DEVICE = Device(images_per_s=1000.0, overhead_s=0.01, update_s=0.005, overlaps=True)
IDEAL = Cluster(
    Device(1000.0, overhead_s=0.0, update_s=0.0, overlaps=True),
    Link(math.inf, 0.0),
    Link(math.inf, 0.0),
    per_node=8,
)
WORKLOAD = Workload(
    steps=180_165,
    global_batch=640,
    micro_batch=80,
    gradients=GRADIENTS,
    mean_bytes=1e5,
    per_core_per_s=500.0,
    price_per_hour=2.0,
)


# ---------------------------------------------------------------------------------- links


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 20])
def test_a_ring_sends_what_formula_says(ranks):
    """Simulated: each rank holds `ranks` parts, passing one on at a time until all have sums."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # of whom is in which sum
    sent = [0] * ranks
    for phase, replaces in ((0, False), (1, True)):
        for turn in range(ranks - 1):
            parts = [(rank - turn + phase) % ranks for rank in range(ranks)]
            passed = [set(held[rank][part]) for rank, part in enumerate(parts)]
            for rank, part in enumerate(parts):
                receiver = (rank + 1) % ranks
                held[receiver][part] = (
                    passed[rank] if replaces else held[receiver][part] | passed[rank]
                )
                sent[rank] += 1
    assert all(part == set(range(ranks)) for parts in held for part in parts)
    assert {steptime.ring_bytes(ranks, ranks)} == set(sent)


def test_an_all_reduce_takes_its_bytes_over_the_bandwidth_and_its_latencies():
    assert steptime.all_reduce_s(1, GRADIENTS, LINK) == 0
    assert steptime.all_reduce_s(2, GRADIENTS, LINK) == pytest.approx(SIZE / 10e9)
    assert steptime.all_reduce_s(4, GRADIENTS, LINK) == pytest.approx(1.5 * SIZE / 10e9)
    late = Link(math.inf, 1e-3)
    for ranks, hops in ((2, 2), (4, 4), (5, 6), (1024, 20)):
        assert steptime.all_reduce_s(ranks, GRADIENTS, late) == pytest.approx(9 * hops * 1e-3)


def test_over_several_nodes_the_slower_link_decides():
    slow, fast = Link(1e9, 1e-5), Link(300e9, 1e-6)
    for inside, between in ((fast, slow), (slow, fast)):
        cluster = Cluster(DEVICE, inside, between, per_node=8)
        assert steptime.exchange_s(cluster, 8, GRADIENTS) == steptime.all_reduce_s(
            8, GRADIENTS, inside
        )
        travel = steptime.ring_bytes(16, SIZE) / 1e9
        latencies = 9 * 8 * between.latency_s
        assert steptime.exchange_s(cluster, 16, GRADIENTS) == pytest.approx(travel + latencies)


def test_gradients_travel_in_about_as_many_messages_as_pytorch_makes_of_the_network():
    with torch.device("meta"):
        parameters = list(inception_resnet_v2(1000).parameters())
    limits = [steptime.FIRST_BUCKET_BYTES, steptime.BUCKET_BYTES]
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters[::-1], limits)
    size = 4 * sum(p.numel() for p in parameters)
    assert abs(len(buckets) - steptime.buckets(size)) <= 2


# ---------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("pieces", [1, 2, 9, 40])
@pytest.mark.parametrize("exchange", [0.0, 0.01, 0.3, 1.0, 7.0])
def test_backward_and_exchange_overlap_as_simulated(pieces, exchange):
    """One after another: a piece leaves when it is ready and the one before it has arrived."""
    arrived = 0.0
    for piece in range(1, pieces + 1):
        arrived = max(arrived, piece / pieces) + exchange / pieces  # backward takes 1 s
    assert steptime.pipelined_s(1.0, exchange, pieces) == pytest.approx(max(arrived, 1.0))


def test_perfect_overlap_and_none_are_the_ends_of_the_range():
    assert steptime.pipelined_s(0.2, 0.1, 10**9) == pytest.approx(0.2)
    assert steptime.pipelined_s(0.1, 0.2, 10**9) == pytest.approx(0.2)
    assert steptime.pipelined_s(0.2, 0.1, 1) == pytest.approx(0.3)


def test_a_step_without_overlap_is_the_sum_of_its_parts():
    apart = dataclasses.replace(DEVICE, overlaps=False)
    step = steptime.step(Cluster(apart, LINK, LINK, 8), 2, 80, 3, GRADIENTS)
    assert step.exposed_s == step.exchange_s == pytest.approx(SIZE / 10e9)
    assert step.total_s == pytest.approx(3 * (0.01 + 0.08) + SIZE / 10e9 + 0.005)


def test_an_exchange_as_fast_as_backward_hides_but_for_its_last_message():
    slower = Link(SIZE / 0.04, 0.0)  # 40 ms, backward has 60
    step = steptime.step(Cluster(DEVICE, slower, slower, 8), 2, 80, 1, GRADIENTS)
    assert step.exchange_s == pytest.approx(0.04)
    assert step.exposed_s == pytest.approx(0.04 / 9)
    assert step.total_s == pytest.approx(0.09 + 0.005 + step.exposed_s)


# ---------------------------------------------------------------------------------- a run


def test_a_run_on_one_device_is_its_steps():
    cluster = Cluster(DEVICE, LINK, LINK, 8)
    row = prediction.predict(WORKLOAD, cluster, 1)
    seconds = 8 * (0.01 + 0.08) + 0.005
    assert row["division"] == (80, 8)
    assert row["hours"] == pytest.approx(180_165 * seconds / 3600)
    assert row["cost"] == pytest.approx(2.0 * row["hours"])
    assert row["efficiency"] == row["step"].hidden == 1.0
    assert row["sent_bytes"] == 0
    assert row["fill"] == pytest.approx(8 / 9)
    assert row["images_per_s"] == pytest.approx(640 / seconds)


@pytest.mark.parametrize("ranks", [1, 2, 8, 16, 64, 640])
def test_ideal_devices_and_links_scale_perfectly(ranks):
    row = prediction.predict(WORKLOAD, IDEAL, ranks)
    assert row["efficiency"] == pytest.approx(1)
    assert row["images_per_s"] == pytest.approx(1000 * ranks)
    assert row["loader_cores"] == pytest.approx(1000 / 500 * min(ranks, 8))
    assert row["read_bytes_per_s"] == pytest.approx(1000 * ranks * 1e5)
    assert row["cost"] == pytest.approx(prediction.predict(WORKLOAD, IDEAL, 1)["cost"])


def test_the_batch_stops_scaling_where_fixed_costs_outweigh_the_images():
    """With nothing to exchange, n devices do a micro-batch in 0.1 + 640 / (1000 n) seconds."""
    fixed = dataclasses.replace(IDEAL.device, overhead_s=0.1)
    cluster = dataclasses.replace(IDEAL, device=fixed)
    whole = dataclasses.replace(WORKLOAD, micro_batch=640)
    for least in (0.8, 0.5, 0.2):
        shares = [n for n in range(1, 641) if 640 % n == 0]
        fitting = [n for n in shares if (0.1 + 0.64) / (n * (0.1 + 0.64 / n)) >= least]
        steps = prediction.every_step(whole, cluster, 1024)
        assert prediction.most_ranks(steps, least) == fitting[-1]
    assert prediction.most_ranks(prediction.every_step(whole, IDEAL, 1024), 0.99) == 640


def test_ranks_that_cannot_share_the_batch_are_refused_as_train_py_would():
    with pytest.raises(WorldError, match="start 20 or 32 ranks"):
        prediction.predict(WORKLOAD, IDEAL, 24)


# ---------------------------------------------------------------------------------- the network


def built(**sections: dict) -> config.Config:
    return config_file.from_tree({"data": {"train": "a", "val": "b"}, **sections})


@pytest.mark.slow
def test_the_network_is_counted_as_it_is_known():
    cfg = built()
    sizes = build.memory_sizes(cfg, 1000)
    assert plan.gradients(cfg, sizes).size == sizes.trainable == 4 * 55_843_464
    assert plan.multiply_adds(cfg.model, 1000, 299) == 13_154_258_016 + 1_536_000


@pytest.mark.slow
def test_images_that_ask_for_more_take_longer_in_proportion():
    device = devices.load().devices["h100"]

    def work(**model: object) -> float:
        return plan.work_of(built(model=model), 1000, device)

    assert work() == 1
    assert work(grad_checkpointing=True) == pytest.approx(4 / 3)
    assert 0.1 < work(blocks=[1, 1, 1]) < 0.5


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_and_checkpoint_have_the_bytes_of_their_tensors(frozen):
    freeze = {"freeze": "backbone", "init": "weights.safetensors"} if frozen else {}
    cfg = built(model={"blocks": [1, 1, 1], **freeze}, train={"reduce_dtype": "bf16"})
    state = build.new_state(cfg, 10, torch.device("cpu"))
    trained = [p for p in state.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    tensors = [t for part in state.tensors().values() for t in part.values()]
    sizes = build.memory_sizes(cfg, 10)
    assert sizes.checkpoint == sum(t.numel() * t.element_size() for t in tensors)
    gradients = plan.gradients(cfg, sizes)
    assert gradients.size == sum(p.grad.bfloat16().nbytes for p in trained)
    assert gradients.messages == steptime.buckets(sum(p.nbytes for p in trained))


# ---------------------------------------------------------------------------------- the table


def test_every_figure_of_the_table_says_where_it_comes_from():
    table = devices.load()
    assert {"rtx3090", "a100-80gb", "h100"} <= set(table.devices)
    assert table.devices["rtx3090"].images_per_s.kind == "published"
    assert table.devices["h100"].images_per_s.kind == "estimate"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("value: 358.54", "value: 0", "devices.rtx3090.images_per_s.value"),
        ("kind: published", "kind: guess", "devices.rtx3090.images_per_s.kind"),
        ("inside: nvlink4", "inside: nvlnk4", "did you mean nvlink4?"),
        ("per_core_per_s:", "per_core:", "images.per_core_per_s"),
        ("devices:", "devices: [", "devices.yaml: "),
    ],
)
def test_a_mistake_in_the_table_is_told_by_its_place(tmp_path, before, after, message):
    path = tmp_path / "devices.yaml"
    path.write_text(devices.TABLE.read_text().replace(before, after, 1))
    with pytest.raises(UserError) as caught:
        devices.load(path)
    assert message in str(caught.value)


# ---------------------------------------------------------------------------------- measured


def case(**changes: float) -> dict:
    """Measurements of a CPU of 10 images a second, 0.2 s a pass whatever the batch."""
    exchange = 1e8 / 5e8 + steptime.buckets(1e8) * 4e-4  # 2 (n - 1) / n = 1 for two processes
    return {
        **{"image_size": 75, "batch": 8, "forward_s": 0.3, "backward_s": 0.7},
        **{"half_batch_s": 0.6, "update_s": 0.1, "gradient_bytes": 1e8},
        **{"reduce_s": exchange, "message_s": 4e-4, **changes},
    }


def test_a_measured_device_and_link_are_those_that_were_measured():
    device, link = devices.measured(case(), "a file")
    device, link = device.plain(work=2.0), link.plain()
    assert device.images_per_s == pytest.approx(5)  # of twice the work
    assert device.overhead_s == pytest.approx(0.2)
    assert device.update_s == pytest.approx(0.1)
    assert device.forward_share == pytest.approx(0.3)
    assert not device.overlaps
    assert link.bytes_per_s == pytest.approx(5e8)
    assert link.latency_s == pytest.approx(2e-4)


def test_a_batch_that_costs_less_than_twice_its_half_has_no_negative_overhead():
    assert devices.affine(case(half_batch_s=0.4)) == (8.0, 0.0)
    assert devices.affine(case(half_batch_s=1.5)) == (8.0, 0.0)


def test_a_measured_step_of_two_processes_is_predicted_from_its_parts():
    device, link = devices.measured(case(), "a file")
    cluster = Cluster(device.plain(1.0), link.plain(), link.plain(), per_node=2)
    step = steptime.step(cluster, 2, 8, 1, Gradients(1e8, steptime.buckets(1e8)))
    assert step.total_s == pytest.approx(0.3 + 0.7 + 0.1 + case()["reduce_s"])


# ---------------------------------------------------------------------------------- the program


def test_the_batch_is_said_in_words_for_the_fewest_and_the_most_ranks():
    rows = [{"ranks": n, "division": batch.divide(640, 80, n)} for n in (1, 2, 8)]
    assert plan.batch_in_words(rows, 0.045) == (
        "640 images a step = 1 rank x 8 accumulated x 80\n"
        "640 images a step = 8 ranks x 1 accumulated x 80\n"
        "The rate, optim.lr=0.045, belongs to these images, not to ranks."
    )
    assert plan.batch_in_words(rows[:1], 1).count("\n") == 1


@pytest.mark.slow
def test_a_plan_has_a_row_for_every_number_of_gpus_that_can_share_the_batch(tmp_path):
    result = run("scripts/plan.py", RECIPE, "--json", tmp_path / "rows.json")
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [int(row[0][2:]) for row in rows[1:9]] == [2**n for n in range(8)]
    assert "No row for 256, 512, 1024" in result.stdout
    assert "Too fast" not in result.stdout  # the recipe is bf16's, as the figures
    assert "estimate" in result.stdout and "published" in result.stdout
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["ranks"] for row in written] == [2**n for n in range(8)]
    hours = [row["hours"] for row in written]
    assert hours == sorted(hours, reverse=True)


@pytest.mark.slow
def test_a_measured_cpu_is_planned_with(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"cases": [case()]}))
    measured = ("--measured", tmp_path / "cpu.json", "--gpus", 2, "--classes", 10)
    quickstart = ROOT / "configs" / "quickstart.yaml"
    status, out, err = call(plan, quickstart, *measured, "--images", 1437)
    assert status == 0, err
    assert "quickstart: 4 epochs of 1,437 images, 75 px" in out
    (row,) = (line for line in out.splitlines() if line.startswith("| 2 |"))
    assert " 16 (89%) " in row  # 1.6 s of 1.8
    assert "Too" not in out  # both are fp32's


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h10"], "unknown device 'h10'; did you mean h100?"),
        (["--device", "cpu"], "scripts/benchmark.py scaling --json"),
        (["--between", "infiniband"], "unknown link 'infiniband'; did you mean infiniband-"),
        (["--between", "cpu"], "unknown link 'cpu'"),
        (["--gpus", "24"], "start 20 or 32 ranks"),
        (["--measured", "absent.json"], "absent.json: cannot be read: No such file"),
        (["train.micro_batch=auto"], "such as train.micro_batch=80"),
        (["train.globalbatch=1"], "did you mean train.global_batch?"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, words):
    status, _, err = call(plan, RECIPE, *arguments)
    assert status == 1
    assert words in err
    assert err.count("\n") == 1


def test_an_exchange_slower_than_backward_is_not_hidden_by_forward():
    slower = Link(SIZE / 0.08, 0.0)  # 80 ms; of the 90 ms that a micro-batch takes, backward has 60
    step = steptime.step(Cluster(DEVICE, slower, slower, 8), 2, 80, 1, GRADIENTS)
    assert step.exposed_s == pytest.approx(0.06 / 9 + 0.08 - 0.06)  # begun after the first ninth
