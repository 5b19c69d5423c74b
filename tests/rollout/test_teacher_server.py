"""A teacher behind a server: which numbers reach which positions, what is asked how often, and what a slow one costs."""

import itertools
import json
import math
import random
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizer_fixtures import small_tokenizer

from megatron_tcod.packing import WeightedRow, build_microbatch
from megatron_tcod.trajectory import TokenRow

pytest.importorskip("aiohttp")
from fake_teacher import VOCAB, FakeTeacher, logprobs_after  # noqa: E402

from megatron_tcod.rollout.http_json import GarbledAnswer, LogprobMismatch, RolloutError, ServerError  # noqa: E402
from megatron_tcod.rollout.sglang_client import SGLangClient  # noqa: E402
from megatron_tcod.rollout.teacher_server import ServerTeacher, TeacherFailed  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def teacher_of(fake, **options):
    return ServerTeacher(lambda: SGLangClient(fake.url, retry_s=0.2), **{"vocab_size": VOCAB} | options)


def row_of(dice, prefix, *spans):
    """A row: `prefix`, then (sampled, observed) numbers of tokens, turn after turn."""
    ids, mask = list(prefix), [0] * len(prefix)
    for sampled, observed in spans:
        ids += dice.choices(range(VOCAB), k=sampled + observed)
        mask += [1] * sampled + [0] * observed
    return TokenRow(token_ids=ids, turn_ids=[0] * len(ids), loss_mask=mask, logprobs=[-1.0] * sum(mask))


def microbatch_of(*rows, least_shared=None):
    weighted = [WeightedRow(row, [1.0] * sum(row.loss_mask), i) for i, row in enumerate(rows)]
    return build_microbatch(weighted, least_shared=least_shared)


def batch(seed=0):
    """Two microbatches; rows of one and several turns, equal and nested prefixes, one that trains its second token."""
    dice = random.Random(seed)
    trunk = dice.choices(range(VOCAB), k=60)
    rows = [row_of(dice, trunk, (4, 3), (5, 7), (2, 2)) for _ in range(3)]
    rows += [row_of(dice, trunk[:50], (6, 0)), row_of(dice, [5], (1, 0)), row_of(dice, trunk + [VOCAB - 1], (3, 9))]
    return rows, [microbatch_of(*rows[:4]), microbatch_of(*rows[4:])]


def expected_logprobs(microbatch):
    """[S] fp64, from the ids of each row up to each trained token."""
    bounds, ids, values = microbatch.cu_seqlens.tolist(), microbatch.token_ids.tolist(), []
    for position in microbatch.positions.tolist():
        start = max(bound for bound in bounds if bound <= position)
        values.append(logprobs_after(ids[start : position + 1])[ids[position + 1]])
    return torch.tensor(np.array(values))


def test_every_trained_token_gets_its_own_log_probability():
    rows, microbatches = batch()
    with FakeTeacher() as fake:
        teacher = teacher_of(fake)
        targets = teacher.score(microbatches)
        counts = teacher.take_counts()
        teacher.close()
    for target, microbatch in zip(targets, microbatches, strict=True):
        torch.testing.assert_close(target.logprob.double(), expected_logprobs(microbatch), rtol=0, atol=1e-6)
        assert target.topk_ids is None
    asked = {tuple(body["input_ids"]): body["logprob_start_len"] for body in fake.scored}
    first = [row.loss_mask.index(1) for row in rows]
    last = [len(row.loss_mask) - row.loss_mask[::-1].index(1) for row in rows]
    assert asked == {tuple(r.token_ids[:n]): p - 1 for r, p, n in zip(rows, first, last, strict=True)}
    assert len(fake.scored) == counts.rows == len(rows)
    assert counts.tokens == sum(last) and counts.projected == sum(last) - sum(first)
    assert counts.trained == sum(sum(row.loss_mask) for row in rows)
    assert counts.computed == fake.computed_tokens - sum(len(body["input_ids"]) for body in fake.warmed)


def test_rows_that_share_their_prefixes_in_a_forest_are_asked_and_scored_like_rows_apart():
    rows, _ = batch()
    apart, forest = (microbatch_of(*rows, least_shared=least) for least in (None, 3))
    assert forest.num_tokens < 0.6 * apart.num_tokens == 0.6 * forest.num_row_tokens
    asked, scores = [], []
    for microbatch in (apart, forest):
        with FakeTeacher() as fake:
            teacher = teacher_of(fake, top_k=3)
            (target,) = teacher.score([microbatch])
            teacher.close()
        asked.append(sorted((body["input_ids"], body["logprob_start_len"]) for body in fake.scored))
        of_rows = [target.logprob[place.slots] for place in microbatch.rows()]
        scores.append([*of_rows, *(target.topk_logprobs[place.slots] for place in microbatch.rows())])
    assert asked[0] == asked[1]
    for expected, actual in zip(*scores, strict=True):
        assert len(expected) and torch.equal(actual, expected)


@pytest.mark.parametrize("is_flat", [True, False])
def test_the_likeliest_tokens_come_with_their_own_positions(is_flat):
    _, microbatches = batch()
    with FakeTeacher(is_flat=is_flat) as fake:
        teacher = teacher_of(fake, top_k=5, vocab_size=80)
        targets = teacher.score(microbatches)
        teacher.close()
    assert all(bool(body.get("return_flat_raw_top_logprobs_b64")) == is_flat for body in fake.scored)
    num_strange = 0
    for target, microbatch in zip(targets, microbatches, strict=True):
        bounds, ids = microbatch.cu_seqlens.tolist(), microbatch.token_ids.tolist()
        for slot, position in enumerate(microbatch.positions.tolist()):
            start = max(bound for bound in bounds if bound <= position)
            expected = logprobs_after(ids[start : position + 1])
            likeliest = np.argsort(-expected)[:5]
            assert target.topk_ids[slot].tolist() == [i if i < 80 else -1 for i in likeliest]  # the student has 80 ids
            np.testing.assert_allclose(target.topk_logprobs[slot].numpy(), expected[likeliest], rtol=0, atol=1e-6)
            num_strange += int((likeliest >= 80).sum())
    assert num_strange > 0


def test_a_microbatch_without_trained_tokens_asks_nothing():
    empty = microbatch_of(row_of(random.Random(0), [1, 2, 3]))
    with FakeTeacher() as fake:
        teacher = teacher_of(fake, top_k=2)
        (target,) = teacher.score([empty])
        assert teacher.score([]) == []
        teacher.close()
    assert target.logprob.shape == (0,) and target.topk_ids.shape == (0, 2)
    assert fake.bodies == []


FAULTS = {
    "count": LogprobMismatch,
    "ids": LogprobMismatch,
    "no_null": LogprobMismatch,
    "positive": LogprobMismatch,
    "nan": LogprobMismatch,
    "lists": GarbledAnswer,
    "garbage": GarbledAnswer,
    "error_500": ServerError,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("is_flat", [True, False])
def test_a_wrong_answer_is_a_named_error_and_the_next_batch_is_scored(fault, is_flat):
    _, microbatches = batch()
    with FakeTeacher(is_flat=is_flat) as fake:
        teacher = teacher_of(fake, top_k=3)
        fake.fault = fault
        with pytest.raises(FAULTS[fault], match="127.0.0.1"):
            teacher.score(microbatches)
        assert set(fake.fired) == {fault}
        fake.fault = ""
        (target, _) = teacher.score(microbatches)
        assert target.logprob.isfinite().all()
        teacher.close()


def test_a_slow_teacher_makes_the_trainer_wait_and_holds_few_rows():
    dice = random.Random(1)
    rows = [row_of(dice, dice.choices(range(VOCAB), k=40), (10, 0)) for _ in range(60)]
    rows += [row_of(dice, dice.choices(range(VOCAB), k=250), (10, 0))]  # more than may be in flight: goes alone
    microbatches = [microbatch_of(*rows[at : at + 10]) for at in range(0, len(rows), 10)]
    with FakeTeacher(delay_s=0.03) as fake:
        teacher = teacher_of(fake, max_inflight_tokens=200)
        start = time.monotonic()
        targets = teacher.score(microbatches)
        seconds = time.monotonic() - start
        teacher.close()
    assert fake.most_requests == 4 and fake.most_tokens == 260  # four rows of 50 tokens, or the long one
    assert seconds >= 60 / 4 * 0.03 + 0.03, "it did not wait"
    for target, microbatch in zip(targets, microbatches, strict=True):
        torch.testing.assert_close(target.logprob.double(), expected_logprobs(microbatch), rtol=0, atol=1e-6)


def test_a_warm_up_ahead_is_waited_for_by_whoever_comes_next():
    dice = random.Random(2)
    prefixes = [dice.choices(range(VOCAB), k=80) for _ in range(6)]
    microbatch = microbatch_of(*(row_of(dice, prefix, (5, 0)) for prefix in prefixes))
    with FakeTeacher(delay_s=0.1) as fake:
        teacher = teacher_of(fake)
        start = time.monotonic()
        teacher.warm_ahead(prefixes)
        returned = time.monotonic() - start
        teacher.score([microbatch])
        teacher.close()
    assert returned < 0.1 <= fake.delay_s
    assert [bool(body["return_logprob"]) for body in fake.bodies] == [False] * 6 + [True] * 6
    assert fake.computed_tokens == 6 * 80 + 6 * (5 + 1)  # a prefix once, then each row from its last prefix token on


def test_a_run_computes_each_prefix_once_and_never_flushes():
    """B2F over a demonstration: nested prefixes, four samples a step, the next step's prefix warmed ahead."""
    dice = random.Random(3)
    demonstration = dice.choices(range(VOCAB), k=200)
    lengths = list(range(180, 40, -20))
    with FakeTeacher() as fake:
        teacher = teacher_of(fake)
        for length, following in itertools.zip_longest(lengths, lengths[1:]):
            rows = [row_of(dice, demonstration[:length], (6, 2), (4, 0)) for _ in range(4)]
            teacher.score([microbatch_of(*rows)])
            teacher.warm_ahead([demonstration[:following]] if following else [])
        counts, reuse = teacher.take_counts(), teacher.take_prefix_reuse()
        teacher.close()
    assert reuse.requests == 4 * len(lengths) and reuse.rate == 1.0
    assert reuse.reused_tokens == 4 * sum(length - 1 for length in lengths)
    assert counts.computed == 4 * len(lengths) * (12 + 1)
    # The first prefix is computed before scoring, each later one is warmed ahead, which costs its last token.
    assert reuse.warmed_tokens == 180 + len(lengths) - 1 and len(fake.warmed) == len(lengths)
    assert fake.computed_tokens == counts.computed + reuse.warmed_tokens
    assert set(fake.paths) == {"/open_session", "/generate", "/close_session"}
    assert len({body["session_id"] for body in fake.warmed}) == 1 and not fake.sessions
    assert not any("session_id" in body for body in fake.scored)


def test_a_failed_warm_up_is_logged_and_scoring_goes_on(caplog):
    dice = random.Random(4)
    prefix = dice.choices(range(VOCAB), k=60)
    microbatch = microbatch_of(row_of(dice, prefix, (5, 0)))
    with FakeTeacher(has_sessions=False) as fake:
        teacher = teacher_of(fake)
        fake.fault = "refuse_warm"
        teacher.warm_ahead([prefix])
        (target,) = teacher.score([microbatch])
        teacher.close()
    assert fake.fired == ["refuse_warm"] and "status 400" in caplog.text
    assert target.logprob.isfinite().all()


def test_only_what_fits_the_server_together_is_warmed_ahead():
    dice = random.Random(5)
    prefixes = [dice.choices(range(VOCAB), k=100) for _ in range(9)]
    with FakeTeacher(cache_tokens=900) as fake:
        teacher = teacher_of(fake, max_inflight_tokens=400)
        teacher.warm_ahead(prefixes)
        teacher.score([])  # waits for it
        teacher.close()
    assert len(fake.warmed) == 5  # 900 - 400 tokens


def refused(fake, tokenizer, **options):
    teacher = teacher_of(fake)
    try:
        with pytest.raises(ValueError) as error:
            teacher.check(tokenizer, **{"max_context": 1000} | options)
    finally:
        teacher.close()
    return str(error.value)


def test_a_teacher_that_speaks_other_ids_is_refused_at_the_start(tokenizer, tmp_path):
    with FakeTeacher(tokenizer=tokenizer) as fake:
        teacher = teacher_of(fake)
        teacher.check(tokenizer, max_context=1000)
        teacher.close()
        assert "4096 tokens, rows may have 5000" in refused(fake, tokenizer, max_context=5000)
        end, one = tokenizer.end_of_turn_id, tokenizer.encode_plain("cabinet")[0]
        for token, text in ((end, "<|other|>"), (one, "wardrobe"), (tokenizer.vocab_size - 1, "")):
            fake.texts = {token: text}
            assert f"id {token} is" in refused(fake, tokenizer)
        fake.texts, fake.model_path = {}, str(tmp_path)
        for num_ids, is_refused in ((tokenizer.vocab_size - 1, True), (tokenizer.vocab_size + 9, False)):
            (tmp_path / "config.json").write_text(json.dumps({"vocab_size": num_ids}))
            if is_refused:
                assert f"has {num_ids} ids" in refused(fake, tokenizer)
            else:
                teacher = teacher_of(fake)
                teacher.check(tokenizer, max_context=1000)
                teacher.close()
        fake.tokenizer = None
        assert "does not tell the text of its ids" in refused(fake, tokenizer)


def test_what_is_no_sglang_server_is_named():
    """A proxy or a file server answers 200 and a page to everything."""

    class Page:
        url = "http://127.0.0.1:1"

        async def get(self, path):
            return "<html>welcome</html>"

        async def close(self):
            pass

    with pytest.raises(GarbledAnswer, match="is this an SGLang server?"):
        ServerTeacher(Page, vocab_size=VOCAB)


def test_closing_waits_for_no_warm_up():
    with FakeTeacher(delay_s=30, has_sessions=False) as fake:
        teacher = teacher_of(fake)
        teacher.warm_ahead([list(range(40))])
        while not fake.warmed:
            time.sleep(0.01)
        started = time.monotonic()
        teacher.close()
        assert time.monotonic() - started < 5


def test_nothing_is_left_of_a_teacher_whose_server_is_not_there():
    with FakeTeacher() as fake:
        url = fake.url
    with pytest.raises(RolloutError):
        ServerTeacher(lambda: SGLangClient(url, retry_s=0.1), vocab_size=VOCAB)
    with pytest.raises(ValueError, match="top_k"):
        ServerTeacher(lambda: SGLangClient(url), vocab_size=VOCAB, top_k=VOCAB + 1)


def _rank(rank, store, url, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    asked = []

    def connect():
        asked.append(rank)
        return SGLangClient(url, retry_s=0.1)

    _, microbatches = batch()
    teacher = ServerTeacher(connect, vocab_size=VOCAB, top_k=3, tp_group=dist.group.WORLD)
    assert asked == [0][rank:]
    targets = teacher.score(microbatches)
    torch.save([[t.logprob, t.topk_ids, t.topk_logprobs] for t in targets], f"{folder}/{rank}.pt")
    impossible = build_microbatch([WeightedRow(row_of(random.Random(0), [1] * 9000, (1, 0)), [1.0], 0)])
    try:
        teacher.score([impossible])
    except (ServerError, TeacherFailed) as error:
        with open(f"{folder}/{rank}.error", "w") as file:
            file.write(type(error).__name__)
    teacher.close()
    dist.destroy_process_group()


def test_one_rank_asks_and_all_ranks_of_the_group_know(tmp_path):
    with FakeTeacher() as fake:
        fake.refuse_longer_than = 8000
        mp.spawn(_rank, args=(str(tmp_path / "store"), fake.url, str(tmp_path)), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    _, microbatches = batch()
    for ours, theirs, microbatch in zip(left, right, microbatches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        torch.testing.assert_close(ours[0].double(), expected_logprobs(microbatch), rtol=0, atol=1e-6)
    assert [(tmp_path / f"{rank}.error").read_text() for rank in (0, 1)] == ["ServerError", "TeacherFailed"]
    assert math.isfinite(float(left[0][0].sum()))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A served model, the tokenizer that it was served with, and its server with a cache of 4,096 tokens."""
    from sglang_process import launch_on_cpu
    from tiny_hf import tiny_model

    directory = tmp_path_factory.mktemp("real")
    tokenizer = small_tokenizer(directory / "model")
    model = tiny_model("qwen3", vocab_size=tokenizer.vocab_size + 7, max_position_embeddings=8192)
    model.save_pretrained(directory / "model")
    flags = dict(skip_tokenizer_init=False, enable_session_radix_cache=True, max_total_tokens=4096)
    with launch_on_cpu(directory, model_path=directory / "model", **flags) as server:
        yield model.double(), tokenizer, server


def real_teacher(real, **options):
    _, tokenizer, server = real
    own = dict(api_key=server.api_key, admin_key=server.admin_key)
    return ServerTeacher(lambda: SGLangClient(server.url, **own), vocab_size=tokenizer.vocab_size, **options)


@pytest.mark.sglang
@pytest.mark.parametrize("is_flat", [True, False])
def test_a_real_server_scores_as_a_float64_forward_does(real, is_flat):
    model, tokenizer, _ = real
    _, microbatches = batch(seed=7)
    teacher = real_teacher(real, top_k=4)
    teacher._is_flat &= is_flat  # servers up to 0.5.20 have no packed lists
    teacher.check(tokenizer, max_context=2000)
    with pytest.raises(ValueError, match="rows may have 9000"):
        teacher.check(tokenizer, max_context=9000)
    for _ in ("cold", "from the cache"):
        teacher.take_prefix_reuse()
        targets = teacher.score(microbatches)
        for target, microbatch in zip(targets, microbatches, strict=True):
            expected = full_logprobs(model, microbatch)  # [S, V]
            at = torch.arange(len(expected))
            torch.testing.assert_close(
                target.logprob.double(), expected[at, microbatch.target_ids], rtol=0, atol=1e-4
            )
            values, ids = expected.topk(4)
            torch.testing.assert_close(target.topk_logprobs.double(), values, rtol=0, atol=1e-4)
            assert torch.equal(target.topk_ids, torch.where(ids < tokenizer.vocab_size, ids, -1))
    reuse = teacher.take_prefix_reuse()
    assert reuse.reused_tokens == sum(length - 1 for length in (60, 60, 60, 50, 1, 61))
    teacher.close()


def full_logprobs(model, microbatch):
    """[S, V] fp64, one forward a row."""
    bounds, rows = microbatch.cu_seqlens.tolist(), []
    with torch.no_grad():
        for start, stop in itertools.pairwise(bounds):
            rows.append(torch.log_softmax(model(microbatch.token_ids[None, start:stop]).logits[0], -1))
    return torch.cat(rows)[microbatch.positions]


@pytest.mark.sglang
@pytest.mark.parametrize("is_pinned", [True, False])
def test_warmed_prefixes_outlive_a_flood_of_rows_where_the_server_has_sessions(real, is_pinned):
    dice = random.Random(8 + is_pinned)
    prefixes = [dice.choices(range(VOCAB), k=300) for _ in range(2)]
    flood = [row_of(dice, dice.choices(range(VOCAB), k=600), (8, 0)) for _ in range(10)]
    teacher = real_teacher(real, max_inflight_tokens=1300)
    if not is_pinned:
        teacher._session_id = ""
    teacher.warm_ahead(prefixes)
    teacher.score([microbatch_of(*flood)])  # 6,080 tokens through a cache of 4,096
    teacher.take_prefix_reuse()
    teacher.score([microbatch_of(*(row_of(dice, prefix, (5, 0)) for prefix in prefixes))])
    reuse = teacher.take_prefix_reuse()
    assert reuse.reusable_tokens == 2 * 299
    assert reuse.reused_tokens == (2 * 299 if is_pinned else 0)
    if is_pinned:
        teacher.close()
