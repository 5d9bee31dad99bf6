"""The tools that make quire-tiny: data without leaks, the right tokens learned, an exact resume."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from embedded_baselines import Bigram
from embedded_data import code, conversations, corpus, records
from embedded_data.exchange import draw, held_out
from embedded_folder import CONFIG, FOLDER, render
from embedded_optimizer import Schedule, orthogonalized
from embedded_rows import END_ID, Row, answered
from tokenizers import Tokenizer

from quire.text.chat import render as render_template
from quire.text.tokenizer import Tokenizer as QuireTokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "1 + 2 = 3"},
]


def test_the_same_seed_gives_the_same_conversations() -> None:
    first, second = ([conversations.conversation(Random(3)) for _ in range(5)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("kind", list(conversations.SKILLS))
def test_nothing_held_out_is_ever_taught(kind: str) -> None:
    for number, skill in enumerate(conversations.SKILLS[kind]):
        random = Random(number)
        for _ in range(50):
            assert not held_out(kind, draw(kind, skill, random, want_held_out=False).key)
        assert held_out(kind, draw(kind, skill, random, want_held_out=True).key)


def test_generated_answers_are_right() -> None:
    random = Random(11)
    for _ in range(200):
        sum_of = draw("arithmetic", next(iter(conversations.SKILLS["arithmetic"])), random, want_held_out=False).answer
        left, right = sum_of.split(" = ")
        assert eval(left) == int(right)
        json.loads(records.json_extraction(random).answer)
        assert re.fullmatch(r"(SELECT|DELETE) .*;", records.sql(random).answer)


def test_functions_to_write_are_valid_python() -> None:
    for task, text in code.FUNCTIONS.items():
        compile(text, task, "exec")


def test_no_file_is_both_learned_and_held_out() -> None:
    files = corpus.documents()
    train, kept = corpus.split(files)
    assert len(train) + len(kept) == len(files)
    assert kept
    assert not {name for name, _ in train} & {name for name, _ in kept}


def test_training_text_is_what_the_chat_template_gives() -> None:
    tokenizer = QuireTokenizer.from_folder(FOLDER)
    assert render_template(tokenizer, MESSAGES, add_generation_prompt=False) == render(MESSAGES)
    assert render_template(tokenizer, MESSAGES[:2]) == render(MESSAGES[:2], for_answer=True)


def test_only_what_the_assistant_says_is_learned() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokens = tokenizer.encode(render(MESSAGES), add_special_tokens=False).ids
    learned = answered(tokens, tokenizer.encode("assistant\n", add_special_tokens=False).ids)
    chosen = [token for token, flag in zip(tokens, learned, strict=True) if flag]
    assert chosen[-1] == END_ID
    assert tokenizer.decode(chosen) == "1 + 2 = 3"


def test_bigram_probabilities_sum_to_one() -> None:
    random = Random(5)
    bigram = Bigram([random.randrange(20) for _ in range(300)], 30)
    for left in (0, 7, 25):
        assert sum(bigram.probability(left, token) for token in range(30)) == pytest.approx(1.0, abs=0.02)


def test_orthogonalized_directions_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_schedule_ends_at_zero_when_the_clock_says_so() -> None:
    schedule = Schedule(warmup=10)
    assert schedule.factor(4) == 0.5
    schedule.follow_clock(100, share_of_time=0.5, seconds_left=50, seconds_per_step=0.5)
    assert schedule.factor(99) == 1.0
    assert schedule.factor(149) == pytest.approx(0.5)
    assert schedule.factor(199) == 0.0
    assert schedule.finished(200)
    again = Schedule(warmup=10, anchors=schedule.anchors)
    assert [again.factor(step) for step in range(200)] == [schedule.factor(step) for step in range(200)]


def wishes(folder: Path, checkpoint: Path, replay: Path) -> argparse.Namespace:
    return argparse.Namespace(
        minutes=5.0,
        folder=folder,
        checkpoint=checkpoint,
        checkpoint_minutes=5.0,
        export_minutes=0.0,
        replay=replay,
        step_tokens=1024,
        matrix_rate=0.02,
        other_rate=0.004,
        seed=1,
        processes=1,
    )


def test_a_stopped_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_embedded

    files = [(f"{number}.py", f"def f{number}():\n    return {number}\n" * 60) for number in range(40)]
    monkeypatch.setattr(corpus, "documents", lambda root=None: files)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    folder = tmp_path / "model"
    folder.mkdir()
    small = {**CONFIG, "hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"intermediate_size": 48, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(small))
    (folder / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    replay = tmp_path / "schedule.json"
    replay.write_text(json.dumps({"anchors": [[0, 0.0], [2, 1.0], [6, 0.0]]}))

    def run(name: str, stop_after: int | None) -> train_embedded.Trainer:
        trainer = train_embedded.Trainer(wishes(folder, tmp_path / name, replay))
        step = trainer.step

        def stopping_step(rank: int) -> None:
            step(rank)
            trainer.stopping = trainer.progress.step == stop_after

        trainer.step = stopping_step
        trainer.lead()
        return trainer

    whole = run("whole.pt", None)
    assert run("parts.pt", 3).progress.step == 3
    resumed = run("parts.pt", None)
    assert resumed.progress.step == whole.progress.step == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_rows_are_dealt_out_evenly() -> None:
    import train_embedded

    rows = [Row([0] * length, [True] * length) for length in (700, 500, 90, 80, 70, 60)]
    dealt = train_embedded.shares(rows, 2)
    assert sorted(len(row.tokens) for share in dealt for row in share) == sorted(len(row.tokens) for row in rows)
    assert max(sum(len(row.tokens) for row in share) for share in dealt) <= 820
