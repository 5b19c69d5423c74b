import json
import math
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_tcod.journal import read_journal
from megatron_tcod.metrics import (
    JsonlWriter,
    StepMetrics,
    TensorBoardWriter,
    reduce_sums,
    scores_by_turn,
    token_texts,
    trajectory_record,
)
from megatron_tcod.trajectory import Episode, Microbatch, Task, TokenRow, Turn, TurnWindow, decode, encode

MAX_TURNS = 6
PROMPT = 3
STATISTICS = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")


def make_episode(lengths, *, start=0, outcome="ok", success=False, step=4, version=4, end_reason="done"):
    """`lengths[i]` sampled tokens in turn i from `start` on; turns before it are the teacher's."""
    turns, ids, turn_ids, mask = [], [1], [-1], [0]
    for index, length in enumerate([2] * start + list(lengths)):
        is_student = index >= start
        answer = [10 + index] * length
        ids += [2] * PROMPT + answer
        turn_ids += [index] * (PROMPT + length)
        mask += [0] * PROMPT + [int(is_student)] * length
        turns.append(
            Turn(
                index=index,
                actor="student" if is_student else "teacher",
                observation="o",
                text="t",
                action="a",
                token_ids=answer,
                prompt_tokens=len(ids) - length if is_student else 0,
                cached_tokens=5 if is_student else 0,
            )
        )
    return Episode(
        task=Task(env="e", task_id=f"t{len(lengths)}", split="train"),
        sample=0,
        step=step,
        weight_version=version,
        curriculum_k=len(lengths),
        window=TurnWindow(start, start + len(lengths)),
        turns=turns,
        rows=[TokenRow(token_ids=ids, turn_ids=turn_ids, loss_mask=mask, logprobs=[-1.0] * sum(mask))],
        outcome=outcome,
        end_reason=end_reason,
        success=success,
        reward=float(success),
    )


def make_microbatch(indexed_episodes):
    """One microbatch of whole episodes, given as (index in the step, episode), packed here by hand."""
    ids, ends, positions, turn_ids, episode_ids = [], [0], [], [], []
    for index, episode in indexed_episodes:
        row = episode.rows[0]
        for place, is_sampled in enumerate(row.loss_mask):
            if is_sampled:
                positions.append(len(ids) + place - 1)
                turn_ids.append(row.turn_ids[place])
                episode_ids.append(index)
        ids += row.token_ids
        ends.append(len(ids))
    num_trained = len(positions)
    tokens, places = torch.tensor(ids), torch.tensor(positions, dtype=torch.int64)
    return Microbatch(
        token_ids=tokens,
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        positions=places,
        target_ids=tokens[places + 1],
        loss_weight=torch.full((num_trained,), 0.1),
        old_logprobs=torch.full((num_trained,), -1.0),
        turn_ids=torch.tensor(turn_ids, dtype=torch.int64),
        episode_ids=torch.tensor(episode_ids, dtype=torch.int64),
    )


def make_statistics(microbatch, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(microbatch.positions.numel(), generator=generator) - 0.2 for name in STATISTICS}


@pytest.fixture
def step():
    """Five episodes, two of which carry no loss, and the three others in two microbatches."""
    episodes = [
        make_episode([3, 1, 4], success=True),
        make_episode([2], start=2, end_reason="window"),
        make_episode([5, 5, 5, 5], outcome="diverged"),
        make_episode([4, 2], success=True, version=3),
        replace(make_episode([]), outcome="no_demonstration", end_reason="not_played"),
    ]
    microbatches = [make_microbatch([(3, episodes[3]), (0, episodes[0])]), make_microbatch([(1, episodes[1])])]
    return episodes, microbatches, [make_statistics(mb, seed) for seed, mb in enumerate(microbatches)]


def measure(step, **arguments):
    metrics = StepMetrics(max_turns=MAX_TURNS)
    return metrics.finish(metrics.local_sums(*step), step=5, **arguments)


def test_kl_figures_equal_a_token_by_token_computation(step):
    episodes, microbatches, per_token = step
    by_episode_and_turn: dict[tuple[int, int], list[float]] = {}
    for microbatch, statistics in zip(microbatches, per_token, strict=True):
        for index in range(microbatch.positions.numel()):
            key = int(microbatch.episode_ids[index]), int(microbatch.turn_ids[index])
            by_episode_and_turn.setdefault(key, []).append(float(statistics["reverse_kl"][index]))
    record = measure(step)
    tokens = [kl for values in by_episode_and_turn.values() for kl in values]
    assert record["kl/token"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
    assert record["kl/trajectory"] == pytest.approx(sum(tokens) / 3, rel=1e-6)
    for turn in range(MAX_TURNS):
        per_episode = [values for (_, of_turn), values in by_episode_and_turn.items() if of_turn == turn]
        flat = [kl for values in per_episode for kl in values]
        if not flat:
            assert f"kl/turn_{turn:02d}" not in record
            continue
        assert record[f"kl/turn_{turn:02d}"] == pytest.approx(sum(map(sum, per_episode)) / len(per_episode), rel=1e-6)
        assert record[f"kl_token/turn_{turn:02d}"] == pytest.approx(sum(flat) / len(flat), rel=1e-6)
    assert {"kl/turn_00", "kl/turn_01", "kl/turn_02"} <= record.keys() and "kl/turn_03" not in record


def test_episodes_are_counted_by_outcome_and_rates_use_those_that_can_be_trained(step):
    record = measure(step)
    assert record["rollout/episodes"] == 5
    assert record["rollout/ok"] == 3
    assert record["rollout/success"] == pytest.approx(2 / 3)
    assert record["rollout/outcome/diverged"] == record["rollout/outcome/no_demonstration"] == 1
    assert record["rollout/outcome/env_fault"] == 0
    assert record["rollout/end/done"] == 3
    assert record["rollout/end/window"] == record["rollout/end/not_played"] == 1
    assert record["turns/total"] == pytest.approx((3 + 3 + 2) / 3)
    assert record["turns/student"] == pytest.approx((3 + 1 + 2) / 3)
    assert record["turns/teacher"] == pytest.approx(2 / 3)
    assert record["curriculum/k"] == pytest.approx((3 + 1 + 4 + 2 + 0) / 5)
    assert record["curriculum/window_start"] == pytest.approx(2 / 3)
    assert record["curriculum/window_stop"] == pytest.approx((3 + 3 + 2) / 3)
    assert record["weights/version"] == pytest.approx(19 / 5)
    assert record["weights/lag"] == pytest.approx(1 / 5)


def test_tokens_and_throughput(step):
    episodes, microbatches, _ = step
    record = measure(step, seconds={"rollout": 1.5, "step": 4.0}, loss=0.25, lr=1e-4)
    assert record["tokens/generated"] == 8 + 2 + 20 + 6
    assert record["tokens/trained"] == 8 + 2 + 6
    assert record["tokens/packed"] == sum(len(episodes[i].rows[0].token_ids) for i in (0, 1, 3))
    assert record["tokens/unshared"] == record["tokens/packed"] and record["packing/saving"] == 1.0
    assert record["packing/microbatches"] == 2 and record["packing/imbalance"] == 0.0
    assert record["tokens/cached"] == 5 * (3 + 1 + 4 + 2)
    assert record["tokens/prompt"] == sum(turn.prompt_tokens for episode in episodes for turn in episode.turns)
    assert record["tokens/per_second"] == 36 / 4
    assert (record["step"], record["seconds/rollout"], record["train/loss"], record["train/lr"]) == (5, 1.5, 0.25, 1e-4)


def test_throughput_of_a_step_that_samples_nothing_counts_what_is_trained(step):
    _, microbatches, per_token = step
    metrics = StepMetrics(max_turns=MAX_TURNS)
    record = metrics.finish(metrics.local_sums([], microbatches, per_token), step=5, seconds={"step": 2.0})
    assert record["tokens/per_second"] == sum(len(microbatch.token_ids) for microbatch in microbatches) / 2


def test_token_means_of_all_statistics(step):
    _, microbatches, per_token = step
    record = measure(step)
    joined = {name: torch.cat([statistics[name] for statistics in per_token]).double() for name in STATISTICS}
    assert record["kl/forward"] == pytest.approx(float(joined["forward_kl"].mean()), rel=1e-6)
    assert record["entropy/teacher"] == pytest.approx(float(joined["teacher_entropy"].mean()), rel=1e-6)
    log_ratio = joined["student_logprob"] - joined["teacher_logprob"]
    assert record["kl/sampled"] == pytest.approx(float(log_ratio.mean()), rel=1e-6)
    assert record["logprob/rollout_gap"] == pytest.approx(float((joined["student_logprob"] + 1).abs().mean()), rel=1e-6)


def test_the_objectives_own_statistics_are_kept_when_asked_for_and_left_alone_otherwise(step):
    episodes, microbatches, per_token = step
    per_token = [statistics | {"is_clipped": torch.ones(len(statistics["reverse_kl"]))} for statistics in per_token]
    metrics = StepMetrics(max_turns=MAX_TURNS, extra=("is_clipped",))
    record = metrics.finish(metrics.local_sums(episodes, microbatches, per_token), step=5)
    assert record.pop("objective/is_clipped") == 1.0
    assert record == measure(step)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_the_record_does_not_depend_on_how_the_step_is_split_over_ranks(step, num_ranks):
    episodes, microbatches, per_token = step
    metrics = StepMetrics(max_turns=MAX_TURNS)
    shares = [
        metrics.local_sums(episodes[rank::num_ranks], microbatches[rank::num_ranks], per_token[rank::num_ranks])
        for rank in range(num_ranks)
    ]
    total = shares[0]
    for share in shares[1:]:
        reduce_sums(total, lambda sums, share=share: sums.add_(share))
    assert metrics.finish(total, step=5) == pytest.approx(measure(step), rel=1e-12)


def test_one_gloo_reduction_gives_every_rank_the_whole_step(step):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_reduce_a_share, args=(rank, port, step, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    records = [json.loads(results.get()) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    expected = measure(step)
    assert records[0] == records[1] == pytest.approx(expected, rel=1e-12)


def _reduce_a_share(rank, port, step, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    metrics = StepMetrics(max_turns=MAX_TURNS)
    sums = reduce_sums(metrics.local_sums(*(part[rank::2] for part in step)))
    results.put(json.dumps(metrics.finish(sums, step=5)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_step_without_anything_to_train_has_no_kl_and_does_not_divide_by_zero():
    metrics = StepMetrics(max_turns=MAX_TURNS)
    episode = make_episode([2], outcome="env_fault", end_reason="not_played")
    empty = make_microbatch([])
    record = metrics.finish(metrics.local_sums([episode], [empty], [{"reverse_kl": torch.zeros(0)}]), step=1)
    assert record["rollout/outcome/env_fault"] == 1
    assert not [key for key in record if key.startswith(("kl", "entropy", "turns", "rollout/success"))]
    nothing = metrics.finish(metrics.local_sums([], [], []), step=1)
    assert nothing["rollout/episodes"] == 0 and "curriculum/k" not in nothing


def test_a_non_finite_statistic_reaches_the_record(step):
    episodes, microbatches, per_token = step
    per_token[0]["reverse_kl"][2] = math.nan
    assert math.isnan(measure(step)["kl/token"])


def test_a_turn_beyond_the_horizon_is_refused(step):
    with pytest.raises(ValueError, match=r"turn 2 is outside the horizon \[0, 2\); raise max_turns"):
        StepMetrics(max_turns=2).local_sums(*step)


def test_statistics_that_do_not_fit_their_microbatch_are_refused(step):
    episodes, microbatches, per_token = step
    metrics = StepMetrics(max_turns=MAX_TURNS)
    with pytest.raises(ValueError, match="1 sets of statistics for 2 microbatches"):
        metrics.local_sums(episodes, microbatches, per_token[:1])
    with pytest.raises(ValueError, match=r"reverse_kl has shape \(2,\) for 14 trained positions"):
        metrics.local_sums(episodes, microbatches, per_token[::-1])
    with pytest.raises(ValueError, match="sums for max_turns=7"):
        StepMetrics(max_turns=7).finish(metrics.local_sums(*step), step=1)


def test_scores_go_back_to_their_episode_and_turn_in_sampling_order(step):
    episodes, microbatches, per_token = step
    scores = scores_by_turn(microbatches, per_token)
    assert {index: {turn: len(s["reverse_kl"]) for turn, s in turns.items()} for index, turns in scores.items()} == {
        3: {0: 4, 1: 2},
        0: {0: 3, 1: 1, 2: 4},
        1: {2: 2},
    }
    flat = [kl for index in (3, 0, 1) for turn in sorted(scores[index]) for kl in scores[index][turn]["reverse_kl"]]
    assert flat == pytest.approx(torch.cat([statistics["reverse_kl"] for statistics in per_token]).tolist())
    assert decode(encode(scores), dict[int, dict[int, dict[str, list[float]]]]) == scores


def test_a_trajectory_record_is_the_episode_with_aligned_scores(step, tmp_path):
    episodes, microbatches, per_token = step
    scores = scores_by_turn(microbatches, per_token)
    record = trajectory_record(episodes[1], scores[1], lambda ids: "".join(chr(55 + i) for i in ids))
    writer = JsonlWriter(tmp_path / "trajectories.jsonl")
    writer.write(record)
    writer.close()
    path = tmp_path / "trajectories.jsonl"
    assert read_journal(path, Episode).records == [episodes[1]]
    stored = read_journal(path).records[0]
    assert stored["token_texts"] == [[], [], ["C", "C"]]
    assert stored["tokens_kl"][:2] == [[], []]
    assert stored["tokens_kl"][2] == pytest.approx(per_token[1]["reverse_kl"].tolist(), rel=1e-4)
    assert stored["student_logprobs"][2] == pytest.approx(per_token[1]["student_logprob"].tolist(), rel=1e-4)
    assert stored["teacher_logprobs"][2] == pytest.approx(per_token[1]["teacher_logprob"].tolist(), rel=1e-4)


def test_an_untrained_episode_has_texts_but_no_scores(step):
    record = trajectory_record(step[0][2], {}, lambda ids: "x" * len(ids))
    assert record["token_texts"] == [["x"] * 5] * 4
    assert record["tokens_kl"] == [[]] * 4


def test_scores_that_are_not_one_a_sampled_token_are_refused(step):
    with pytest.raises(ValueError, match="turn 2: 3 values of reverse_kl for 2 sampled tokens"):
        trajectory_record(step[0][1], {2: {"reverse_kl": [0.1, 0.2, 0.3]}}, lambda ids: "x" * len(ids))


@pytest.mark.parametrize("text", ["go to desk 1", "é 🧪 日本語", " leading space", "a\n\tb"])
def test_token_texts_join_to_the_decoded_text(text):
    vocabulary = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    ids = byte_level.encode(text).ids
    texts = token_texts(ids, byte_level.decode)
    assert "".join(texts) == text
    assert len(texts) == len(ids) == len(text.encode())
    assert not any("\ufffd" in piece for piece in texts)


def test_token_texts_keep_the_spaces_that_a_decoder_strips_at_its_start():
    vocabulary = {"▁go": 0, "▁to": 1, "▁desk": 2, "s": 3}
    words = {index: word for word, index in vocabulary.items()}

    def decode_sentencepiece(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    assert token_texts([0, 1, 2, 3], decode_sentencepiece) == ["go", " to", " desk", "s"]


def test_tensorboard_is_an_error_with_a_fix_when_it_is_not_installed_and_writes_otherwise(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'megatron_tcod\[tensorboard\]'"):
            TensorBoardWriter(tmp_path)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    writer.write({"step": 3, "kl/token": 0.25})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("kl/token")] == [(3, 0.25)]


def test_packing_reports_what_shared_prefixes_save_and_how_uneven_the_replicas_work():
    forest = Microbatch(  # a prefix of 6 with two branches of 2 and 3: rows of 8 and 9
        token_ids=torch.arange(11), cu_seqlens=torch.tensor([0, 6, 8, 11], dtype=torch.int32),
        positions=torch.tensor([5, 5]), target_ids=torch.tensor([6, 8]), loss_weight=torch.ones(2),
        old_logprobs=torch.zeros(2), turn_ids=torch.zeros(2, dtype=torch.int64), episode_ids=torch.arange(2),
        parents=torch.tensor([-1, 0, 0]), ends=torch.tensor([1, 2]), row_ids=torch.arange(2),
    )  # fmt: skip
    row = replace(forest, cu_seqlens=torch.tensor([0, 11], dtype=torch.int32), parents=None, ends=None, row_ids=None)
    metrics = StepMetrics(max_turns=1, num_replicas=2, pair_cost=0.1)
    shares = [metrics.local_sums([], [forest], [{}], replica=0), metrics.local_sums([], [row, row], [{}, {}], replica=1)]
    record = metrics.finish(sum(shares), step=1)
    assert (record["tokens/packed"], record["tokens/unshared"]) == (33, 8 + 9 + 2 * 11)
    assert record["packing/saving"] == pytest.approx(39 / 33) and record["packing/microbatches"] == 3
    pairs = 21 + (7 + 8) + (7 + 8 + 9)  # every token of the forest sees itself and what stands before it in its row
    work = 11 + 0.1 * pairs, 2 * (11 + 0.1 * 66)
    assert record["packing/imbalance"] == pytest.approx(work[1] / (sum(work) / 2) - 1)
