"""The training loop: reproducible, resumable after any kill, and clear when it fails."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from blobs import BlobData
from torch import Tensor, nn

from cryobench.errors import BadFileError, CryobenchError
from cryobench.methods import flops
from cryobench.methods.base import Budget
from cryobench.methods.training import BudgetSpent, Loss, Player, TrainConfig, pick_precision, seeded, train

CPU = torch.device("cpu")
CONFIG = TrainConfig(steps=40, batch_size=4, learning_rate=3e-3, warmup=5, ema=0.9)


def network() -> nn.Module:
    """Batch statistics and dropout: state and randomness that a resumed fit must bring back."""
    with seeded(0, CPU):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 1, 3, padding=1)
        )


def batch(step: int, batch_size: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    noisy, clean = BlobData(size=16).batch(step, batch_size, seed, device)
    return noisy[:, None], clean[:, None]


def loss(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
    return (net(source + 0.01 * torch.randn_like(source)).float() - target).square().mean()


def fit(
    config: TrainConfig = CONFIG, budget: Budget | None = None, seed: int = 3, loss: Loss = loss
) -> tuple[dict[str, Tensor], dict]:
    net = network()
    facts = train(net, batch, loss, config, budget or Budget(progress=False), seed, CPU, "toy")
    return net.state_dict(), facts


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_same_weights_and_the_callers_randomness_untouched() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first, facts = fit()
    assert torch.equal(torch.rand(3), expected)
    second, _ = fit()
    assert same(first, second)
    assert not same(first, fit(seed=4)[0])
    curve = facts["loss"]
    assert [row[0] for row in curve] == list(range(1, 41))
    assert sum(row[1] for row in curve[-8:]) < 0.8 * sum(row[1] for row in curve[:8])
    assert facts["images_per_second"] == pytest.approx(160 / facts["seconds"], rel=0.1)


def test_curve_is_thinned_and_covers_all_steps() -> None:
    _, facts = fit(replace(CONFIG, steps=210, batch_size=1))
    assert len(facts["loss"]) == 105
    assert facts["loss"][-1][0] == 210


def test_out_of_time_then_resumed_any_number_of_times(tmp_path: Path) -> None:
    undisturbed, facts = fit()
    budget = Budget(seconds=0.0, checkpoint=tmp_path / "fit" / "checkpoint.pt", progress=False)
    for step in range(1, 40):
        with pytest.raises(BudgetSpent, match=f"step {step} of 40"):
            fit(budget=budget)
    resumed, pieces = fit(budget=budget)
    assert same(undisturbed, resumed)
    assert pieces["loss"] == facts["loss"]
    # done is done: the next call only reads the file
    assert same(undisturbed, fit(budget=budget)[0])


CHILD = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
import test_training as t
from pathlib import Path
from cryobench.methods import training
training.CHECKPOINT_SECONDS = 0.0
def slow(net, source, target):
    t.time.sleep(0.02)
    return t.loss(net, source, target)
t.fit(t.replace(t.CONFIG, steps=200), t.Budget(checkpoint=Path({file!r}), progress=False), loss=slow)
print("done")
"""


def test_killed_then_resumed_gives_the_weights_of_an_undisturbed_run(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=200)
    file = tmp_path / "checkpoint.pt"
    code = CHILD.format(tests=str(Path(__file__).parent), file=str(file))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not file.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    output, _ = child.communicate()
    assert "done" not in output
    reached = torch.load(file, weights_only=True)["at"]["step"]
    assert 0 < reached < 200
    resumed, facts = fit(config, Budget(checkpoint=file, progress=False))
    undisturbed, expected = fit(config)
    assert same(undisturbed, resumed)
    assert facts["loss"] == expected["loss"]


def test_a_checkpoint_that_is_not_this_fits(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    fit(budget=Budget(checkpoint=file, progress=False))
    for other in ({"seed": 4}, {"config": replace(CONFIG, learning_rate=1e-3)}):
        with pytest.raises(BadFileError, match="other settings"):
            fit(budget=Budget(checkpoint=file, progress=False), **other)
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"no checkpoint at all"):
        file.write_bytes(broken)
        with pytest.raises(BadFileError, match="delete it"):
            fit(budget=Budget(checkpoint=file, progress=False))


def test_divergence_rolls_back_once_with_a_lower_rate(capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def once(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(net, source, target) * (math.inf if calls == 1 + 25 else 1.0)  # the first is counted, no step

    weights, facts = fit(loss=once)
    assert facts["rolled_back_at"] == 32  # looked at every 16 steps
    assert calls == 1 + 40 + 16
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert all(math.isfinite(row[1]) for row in facts["loss"])
    assert "back to step 16" in capsys.readouterr().err
    # up to the step that was rolled back to, nothing differs
    assert [row[1] for row in facts["loss"][:16]] == [row[1] for row in fit()[1]["loss"][:16]]


def test_divergence_twice_is_an_error() -> None:
    with pytest.raises(CryobenchError, match="lower learning_rate"):
        fit(loss=lambda net, source, target: loss(net, source, target) * math.nan)


def test_a_gradient_that_is_not_finite_is_divergence_too() -> None:
    def root(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        return (net(source) * 0).square().sum().sqrt()  # value 0, gradient 0/0

    with pytest.raises(CryobenchError, match="diverged"):
        fit(loss=root)


def test_out_of_memory_computes_the_batch_in_pieces(capsys: pytest.CaptureFixture[str]) -> None:
    """Without batch statistics the pieces give the same gradient as the whole."""

    def linear(most: int) -> tuple[Tensor, int]:
        def small(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
            if len(source) > most:
                raise torch.OutOfMemoryError("simulated")
            return (net(source) - target).square().mean()

        with seeded(0, CPU):
            net = nn.Conv2d(1, 1, 5, padding=2)
        facts = train(
            net, batch, small, replace(CONFIG, batch_size=6, precision="float32"), Budget(progress=False), 0, CPU, "toy"
        )
        return net.weight.detach(), facts["pieces"]

    whole, one = linear(6)
    parts, four = linear(2)
    assert (one, four) == (1, 4)
    assert "in 4 pieces" in capsys.readouterr().err
    assert torch.allclose(whole, parts, atol=1e-5)
    with pytest.raises(CryobenchError, match="not even one image"):
        linear(0)


def test_players_take_turns_and_change_only_themselves(tmp_path: Path) -> None:
    """A critic that moves at every step and a generator at every third, each by its own loss."""

    def pair() -> nn.ModuleDict:
        with seeded(0, CPU):
            return nn.ModuleDict({"generator": nn.Conv2d(1, 1, 3, padding=1), "critic": nn.Conv2d(1, 1, 3)})

    def critic_loss(nets: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
        return nets["critic"](nets["generator"](x)).mean() - nets["critic"](y).mean()

    def generator_loss(nets: nn.ModuleDict, x: Tensor, y: Tensor) -> Tensor:
        return -nets["critic"](nets["generator"](x)).mean()

    def run(budget: Budget, rate: float = 0.5) -> tuple[nn.ModuleDict, dict]:
        nets = pair()
        players = [Player(nets["critic"], critic_loss), Player(nets["generator"], generator_loss, rate, every=3)]
        return nets, train(nets, batch, players, replace(CONFIG, ema=0.0), budget, 0, CPU, "gan")

    nets, facts = run(Budget(progress=False))
    assert len(facts["loss"][0]) == 3
    assert facts["loss"][1][2] == facts["loss"][0][2] != facts["loss"][3][2]
    still, _ = run(Budget(progress=False), rate=0.0)
    assert torch.equal(still["generator"].weight, pair()["generator"].weight)
    assert not torch.equal(still["critic"].weight, pair()["critic"].weight)
    budget = Budget(seconds=0.0, checkpoint=tmp_path / "c.pt", progress=False)
    for _ in range(39):
        with pytest.raises(BudgetSpent):
            run(budget)
    resumed, _ = run(budget)
    assert same(nets.state_dict(), resumed.state_dict())


def test_rate_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear warm-up, then a cosine from the full rate to final_rate times it."""
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    fit(replace(CONFIG, steps=101, warmup=10, learning_rate=1.0, final_rate=0.1))
    assert rates[0] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55 + 0.45 * math.cos(math.pi * 50 / 101))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert max(rates) == rates[9]
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_average_of_weights() -> None:
    """A network whose weight moves on a known path: the result is the average computed by hand."""
    path = []

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    def slope(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        path.append(float(net.weight.detach()))
        return net.weight * 1.0

    net = Counter()
    train(net, batch, slope, replace(CONFIG, steps=30, ema=0.8, channels_last=False), Budget(progress=False), 0, CPU)
    config = replace(CONFIG, steps=30, ema=0.0, channels_last=False)
    last = Counter()
    train(last, batch, slope, config, Budget(progress=False), 0, CPU)
    steps, mean = (
        [
            *path[2:31],  # the first call counts operations, the second starts from 0
            float(last.weight.detach()),
        ],
        0.0,
    )
    for k, value in enumerate(steps):
        decay = min(0.8, (1 + k) / (10 + k))
        mean = decay * mean + (1 - decay) * value
    assert float(net.weight.detach()) == pytest.approx(mean, rel=1e-5)


def test_precision() -> None:
    assert pick_precision("auto", CPU) in ("float32", "bfloat16")
    with pytest.raises(CryobenchError, match="precision"):
        pick_precision("half", CPU)
    _, facts = fit(replace(CONFIG, precision="bfloat16"))
    assert facts["precision"] == "bfloat16"
    full = fit(replace(CONFIG, precision="float32"))[1]["loss"]
    assert full != facts["loss"]
    assert facts["loss"][-1][1] == pytest.approx(full[-1][1], rel=0.2)


def test_progress_is_quiet_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    fit(replace(CONFIG, steps=3))
    assert capsys.readouterr() == ("", "")
    fit(replace(CONFIG, steps=3), Budget(progress=True))
    shown = capsys.readouterr()
    assert "train toy" in shown.err
    assert shown.out == ""


def test_operations_of_a_convolution_by_hand() -> None:
    """Two convolutions of 3 x 3 without padding, on images of 10 px; 2 operations for each multiply-add."""
    with seeded(0, CPU):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    first, second = 2 * 8 * 8 * 4 * 1 * 9, 2 * 6 * 6 * 2 * 4 * 9
    # backward: the gradients of both weights and of the second input; the images need none
    expected = (first + second) + (first + 2 * second)

    def plain(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        return net(source).float().square().mean()

    images = torch.randn(3, 1, 10, 10)
    for bfloat16 in (False, True):
        turns = [(plain, list(net.parameters()), 1)]
        assert flops.count(net, turns, images, images, bfloat16) == expected
    # a player at every fifth step whose gradient stops at the second layer
    turns = [*turns, (plain, list(net[2].parameters()), 5)]
    assert flops.count(net, turns, images, images, False) == expected + (first + 2 * second) / 5


def test_counting_leaves_no_trace() -> None:
    net = network()
    before, kept = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    source, target = batch(0, 4, 0, CPU)
    assert flops.count(net, [(loss, list(net.parameters()), 1)], source, target, False) > 0
    assert same(before, net.state_dict())
    assert torch.equal(kept, torch.get_rng_state())
    assert all(w.grad is None for w in net.parameters())

    def never(net: nn.Module, source: Tensor, target: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("simulated")

    assert flops.count(net, [(never, list(net.parameters()), 1)], source, target, False) is None


def test_operations_are_counted_once_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    count = flops.count
    monkeypatch.setattr(flops, "count", lambda *given: (calls.append(1), count(*given))[1])
    budget = Budget(seconds=0.0, checkpoint=tmp_path / "checkpoint.pt", progress=False)
    for _ in range(2):
        with pytest.raises(BudgetSpent):
            fit(replace(CONFIG, steps=3), budget)
    _, facts = fit(replace(CONFIG, steps=3), budget)
    assert len(calls) == 1
    assert facts["flop_per_image"] == 3 * (2 * 16 * 16 * 2 * 8 * 9) - 2 * 16 * 16 * 8 * 9
    assert facts["mfu"] is None
    assert facts["tflops"] == pytest.approx(facts["flop_per_image"] * facts["images_per_second"] / 1e12, rel=1e-2)


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert flops.rates(1e9, 98_900.0, "NVIDIA H100 80GB HBM3", "bfloat16")["mfu"] == 0.1
    assert flops.rates(1e9, 49_400.0, "NVIDIA H200", "float32")["mfu"] == 0.1
    assert flops.rates(1e9, 75_600.0, "NVIDIA H100 PCIe", "bfloat16")["mfu"] == 0.1
    assert flops.rates(1e9, 1.0, "an abacus", "float32") == {"flop_per_image": 10**9, "tflops": 0.001, "mfu": None}
    assert set(flops.rates(None, 1.0, "NVIDIA H200", "float32").values()) == {None}
