"""``shardstage rehearse`` as somebody types it: what fits, what does not, what is not right, on a screen of 80 columns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.cluster.test_calibration import FOUND

from shardstage.cli.app import run

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 331,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(MODEL))
    return path


def rehearsed(config: Path, *arguments: str) -> int:
    return run(["rehearse", "--model", str(config), *arguments])


def test_it_proves_times_executes_and_writes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("page.html", "trace.json", "program.txt")]
    outs = [part for path in files for part in ("--out", str(path))]
    asked = ["--what-if", "bandwidth=0.5", "--what-if", "nodes=+1", "--what-if", "slow=0:9", "--text"]
    code = rehearsed(config, "--cluster", "a100-80:6", "--plan", "dp=2,pp=3,mb=1", *asked, *outs)
    shown = capsys.readouterr().out
    assert code == 0
    assert "6 ranks of 3 kinds" in shown and "24 samples, each through every stage once" in shown
    assert "3 of 6 ranks executed by the engine's own code" in shown
    assert "every collective, message and shape as the program says" in shown
    assert shown.count("what if ") == 3
    slowed = re.search(r"what if slow=0:9: .* ([\d.]+) × the samples/s", shown)
    assert slowed is not None and float(slowed[1]) < 0.8
    assert re.search(r"^rank 0 +[FBs·]{60}", shown, re.MULTILINE), "the grid"
    own_lines = [line for line in shown.splitlines() if str(tmp_path) not in line]
    assert max(map(len, own_lines)) <= 80
    assert "<canvas" in files[0].read_text()
    assert json.loads(files[1].read_text())["traceEvents"]
    assert run(["rehearse", "--program", str(files[2])]) == 0
    assert "no rank waits for ever" in capsys.readouterr().out


def test_a_calibrated_cluster_shows_the_step_that_its_runs_tell_and_how_far_it_may_be_off(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice the seconds of every cause are twice the step, in the what-ifs too, with the interval that ``plan`` has."""
    from shardstage.cluster import CAUSES, load, save

    plain, path = load("a100-80:4"), tmp_path / "ours.toml"
    save(replace(plain, calibration=replace(FOUND, factors=dict.fromkeys(CAUSES, 2.0))), path)
    asked = ["--plan", "dp=2,pp=2,mb=1", "--batch", "16", "--ranks", "none", "--what-if", "slow=0:9"]
    shown, seconds = [], []
    for cluster in ("a100-80:4", str(path)):
        assert rehearsed(config, "--cluster", cluster, *asked) == 0
        shown.append(capsys.readouterr().out)
        seconds.append(
            [float(number) for number in re.findall(r"([\d.]+) ms (?:predicted|→|a step)", shown[-1])]
        )
    assert len(seconds[0]) == 3
    assert seconds[1] == pytest.approx([2 * number for number in seconds[0]], rel=0.01)
    line = r" +calibrated by runs on this cluster: low ([\d.]+) ms, high ([\d.]+) ms"
    assert re.search(line, shown[0]) is None
    said = re.search(line, shown[1])
    assert said is not None
    low, high = map(float, said.groups())
    assert low < seconds[1][0] < high and low * high == pytest.approx(seconds[1][0] ** 2, rel=0.01)
    assert max(map(len, shown[1].splitlines())) <= 80


def test_what_does_not_fit_is_said_with_what_would(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster of devices with few MiB: rank, moment and tensors are named, and the proposed plan fits when it is typed."""
    small = tmp_path / "small.toml"
    asked = ["--cluster", str(small), "--batch", "32", "--ranks", "none"]
    from shardstage.cluster import load

    text = load("a100-80:4").to_toml()
    small.write_text(re.sub(r"memory_bytes = \S+", "memory_bytes = 9000000", text))
    assert rehearsed(config, "--plan", "dp=2,pp=2,mb=8", *asked) == 1
    shown = capsys.readouterr().out
    assert re.search(r"does not fit +rank 0 \(and 1 like it\) would hold [\d.]+ MiB at 0\w+", shown)
    assert "rank 0 holds most" in shown and "activations" in shown
    proposed = re.search(r'--plan "([^"]+)"', shown)
    assert proposed is not None and "cheapest change that fits" in shown
    assert rehearsed(config, "--plan", proposed[1], *asked) == 0
    assert "does not fit" not in capsys.readouterr().out


@pytest.mark.parametrize("plan", ["dp=4,mb=4", "dp=2,pp=2,mb=4,recompute=full"])
def test_a_rehearsed_step_of_a_tiny_model_is_the_planned_one(
    plan: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its host cannot launch as fast as a GPU computes, which the plan knew and the rehearsal did not: 82 against 24 ms."""
    asked = ["--cluster", "a100-40:4", "--plan", plan, "--batch", "64", "--seq", "128"]
    assert run(["plan", "--model", str(config), *asked, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parts_s"]["host"] > 0.5 * planned["step_time_s"]
    assert rehearsed(config, *asked, "--ranks", "none") == 0
    simulated = re.search(r"^step +([\d.]+) ms predicted", capsys.readouterr().out, re.MULTILINE)
    assert simulated is not None
    assert float(simulated[1]) == pytest.approx(1e3 * planned["step_time_s"], rel=0.05)


def test_ranks_on_several_classes_of_devices_have_their_own_speed_and_memory(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All were rehearsed on the first class."""
    asked = ["--plan", "pp=4,mb=1", "--batch", "16", "--seq", "128", "--ranks", "none"]
    assert rehearsed(config, "--cluster", "a100-40:2+h100:2", *asked) == 0
    shown = capsys.readouterr().out
    assert "of 36.8 GiB or 73.6 GiB" in shown and shown.count("fits") == 4


def test_a_program_edited_to_deadlock_is_refused_with_the_grid_and_the_ranks(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stages wait for what the other sends only later."""
    path = tmp_path / "program.txt"
    code = rehearsed(
        config, "--cluster", "a100-80:2", "--plan", "pp=2,mb=1", "--batch", "4", "--out", str(path)
    )
    assert code == 0
    text = path.read_text()
    sends = re.findall(r"0SEND_F1>1\(\w+\)", text)
    receives = re.findall(r"0RECV_B0<1\(\w+\)", text)
    assert len(sends) == len(receives) == 1
    moved = text.replace(f" {sends[0]}", "", 1).replace(receives[0], f"{receives[0]} {sends[0]}", 1)
    before = re.search(r"1RECV_F1<0\(\w+\)", text)
    assert before is not None
    late = re.search(r"1SEND_B0>0\(\w+\)", text)
    assert late is not None
    moved = moved.replace(f" {late[0]}", "", 1).replace(before[0], f"{before[0]} {late[0]}", 1)
    path.write_text(moved)
    capsys.readouterr()
    assert run(["rehearse", "--program", str(path)]) == 2
    said = capsys.readouterr().err
    assert "rank 0" in said and "rank 1" in said and "wait" in said
    assert "0RECV_B0<1" in said, "the grid shows where they are"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--ranks", "some"], "--ranks some: it is distinct, all or none", "--ranks distinct"),
        (["--out", "page.pdf"], "a file ends in .html", "--out page.html"),
        (["--out", "nowhere/page.html"], "there is no folder nowhere", "mkdir -p nowhere"),
        (["--what-if", "luck=2"], "'luck=2' is no change", "--what-if"),
        (["--plan", "tp=3,dp=2"], "6 ranks", "--cluster a100-80:6"),
        (["--program", "missing.txt"], "missing.txt cannot be read", "--program program.txt"),
        (["--model", "nothing"], "model 'nothing' is not known", "--model llama-tiny"),
    ],
)
def test_bad_input_exits_with_2_and_a_hint(
    arguments: list[str], message: str, hint: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rehearsed(config, "--cluster", "a100-80:4", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said


def test_a_plan_file_says_of_which_samples_the_step_is(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another ``--batch`` beside it was followed by nobody, and not mentioned."""
    path = tmp_path / "plan.toml"
    machine, shorthand = ("--cluster", "a100-80:2"), ("--plan", "dp=2", "--batch", "6", "--seq", "32")
    assert run(["plan", "--model", str(config), *machine, *shorthand, "--out", str(path)]) == 0
    assert rehearsed(config, *machine, "--plan", str(path), "--ranks", "none") == 0
    assert "6 samples of 32 tokens" in capsys.readouterr().out
    assert rehearsed(config, *machine, "--plan", str(path), "--batch", "8") == 2
    said = capsys.readouterr().err
    assert "is for 6 samples of 32 tokens a step, and not for 8 samples of 32 tokens" in said
    assert "hint: --batch 6 --seq 32" in said


def test_a_text_that_is_no_program_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program.txt"
    path.write_text("not a program\n")
    assert run(["rehearse", "--program", str(path)]) == 2
    assert "error:" in capsys.readouterr().err
