"""Drafts: a reply is the same with and without them, whatever else happens to it, on every runner."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from harness import Recorder, decode, request, torch_engine
from kits import engine_of, kit_of, prompts_for, watched_engine
from scipy.stats import chisquare
from tiny import make_tiny_backbone

from detox_guard.engine import End, Go, Rewind, Sampling
from detox_guard.engine.drafts import Drafter
from detox_guard.errors import RequestCancelledError
from detox_guard.settings import DecodingParams, EngineConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kits import Kit

    from detox_guard.engine import Scheduler, TokenStep

GREEDY = DecodingParams(temperature=0.0, alpha=1.5, max_new_tokens=24)
SAMPLED = DecodingParams(temperature=1.0, alpha=1.5, top_p=1.0, max_new_tokens=24)
WORDS = (40, 41, 42)
PROMPT = [9, 8, *(word for pair in itertools.product(WORDS, WORDS) for word in pair)]
"""It holds whatever two words of three may come to stand side by side."""


class OfWords:
    """A constraint: replies of three words. So they repeat themselves, and something is drafted at every step."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = torch.zeros(vocab_size, dtype=torch.bool)
        self._mask[list(WORDS)] = True
        self.accepted: list[int] = []

    def allowed(self) -> torch.Tensor:
        return self._mask

    def accept(self, token_id: int) -> bool:
        self.accepted.append(token_id)
        return False

    def rollback(self, tokens: int) -> None:
        del self.accepted[len(self.accepted) - tokens :]


def _said(kit: Kit, engine: Scheduler, prompt: Sequence[int], params: DecodingParams, **kw: Any) -> list[TokenStep]:
    """The steps of one reply of three words; what its constraint heard of is what was said."""
    constraint = OfWords(kit.vocab_size)
    (sink,) = decode(engine, [prompt], params, keep=True, constraint=constraint, **kw)
    if "sink" not in kw:
        assert constraint.accepted == sink.ids
    return sink.steps


def _assert_equal(found: list[TokenStep], expected: list[TokenStep]) -> None:
    assert [(step.index, step.token_id) for step in found] == [(step.index, step.token_id) for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.distribution is not None
        assert other.distribution is not None
        torch.testing.assert_close(one.distribution[1], other.distribution[1], atol=1e-5, rtol=0)


def _both(kit: Kit, views: str, **bounds: Any) -> tuple[Scheduler, Scheduler]:
    return engine_of(kit, views, drafts=0, **bounds), engine_of(kit, views, drafts=3, **bounds)


def _check_counts(kit: Kit, engine: Scheduler) -> None:
    stats = engine.stats()
    assert stats.tokens_steered == stats.steps_steered
    if kit.runner("", EngineConfig()).limits.at_once:
        assert 0 < stats.tokens_accepted < stats.tokens_drafted
    else:
        assert stats.tokens_accepted == stats.tokens_drafted == 0


@pytest.mark.parametrize(
    ("views", "params"),
    [
        ("", SAMPLED.replace(alpha=0.0)),
        ("r", SAMPLED),
        ("r", GREEDY.replace(repetition_penalty=1.2)),
        ("fR", SAMPLED.replace(temperature=0.7, top_p=0.8, repetition_penalty=1.1)),
    ],
)
def test_a_reply_is_the_same_with_drafts_and_without(kit: Kit, views: str, params: DecodingParams) -> None:
    without, drafting = _both(kit, views)
    for seed in range(6):
        expected = _said(kit, without, PROMPT, params, seed=seed)
        _assert_equal(_said(kit, drafting, PROMPT, params, seed=seed), expected)
    assert without.stats().tokens_drafted == 0
    assert drafting.stats().tokens_steered == without.stats().tokens_steered
    _check_counts(kit, drafting)
    without.close()
    drafting.close()


def _reactions() -> list[Callable[[TokenStep], Any]]:
    """What a sink may do in the middle of a draft, and only once where it would never end else."""

    def once(at: int, verdict: Any) -> Callable[[TokenStep], Any]:
        left = [verdict]
        return lambda step: left.pop() if step.index == at and left else None

    other = Sampling.of(SAMPLED.replace(alpha=3.0, temperature=0.5))
    return [
        *(once(at, Rewind(back)) for at, back in ((4, 1), (5, 3), (6, 7), (9, 2))),
        once(8, Rewind(4, other, frozenset({WORDS[0]}))),
        lambda step: Go(banned=frozenset({WORDS[step.index % 3]})),
        lambda step: Go(other if step.index % 4 else None),
        once(7, End("stop")),
    ]


def test_verdicts_in_the_middle_of_a_draft(kit: Kit) -> None:
    without, drafting = _both(kit, "r")
    for first, second in zip(_reactions(), _reactions(), strict=True):
        expected = Recorder(first)
        _said(kit, without, PROMPT, SAMPLED, sink=expected)
        found = Recorder(second)
        _said(kit, drafting, PROMPT, SAMPLED, sink=found)
        _assert_equal(found.steps, expected.steps)
        assert found.outcome == expected.outcome
    assert drafting.stats().tokens_rewound == without.stats().tokens_rewound > 0
    assert drafting.stats().rows == 0
    _check_counts(kit, drafting)
    without.close()
    drafting.close()


def test_a_reply_that_is_parked_and_taken_up_again(kit: Kit) -> None:
    """It ends in the middle of a draft: what was drafted beyond its end is not saved with it."""
    without, drafting = _both(kit, "r")
    for back, end in ((1, 6), (5, 9), (8, 8)):
        replies = []
        for engine in (without, drafting):
            answers: list[Any] = [None, None, Rewind(back), End("stop")]
            sink = Recorder()
            sink.on_end = lambda reason, answers=answers: answers.pop(0)  # type: ignore[method-assign]
            replies.append(_said(kit, engine, PROMPT, SAMPLED.replace(max_new_tokens=end), sink=sink))
        _assert_equal(replies[1], replies[0])
    without.close()
    drafting.close()


def test_a_token_that_ends_the_reply_in_the_middle_of_a_draft(kit: Kit) -> None:
    without, drafting = _both(kit, "r")
    for seed in range(6):
        expected, found = (
            _said(kit, engine, PROMPT, SAMPLED, end_ids=frozenset({WORDS[2]}), seed=seed)
            for engine in (without, drafting)
        )
        _assert_equal(found, expected)
    without.close()
    drafting.close()


def test_who_is_cancelled_in_the_middle_of_a_draft_hears_no_more(kit: Kit) -> None:
    engine = engine_of(kit, "r", drafts=3)
    for at in range(3, 9):
        req, sink = request(PROMPT, GREEDY, constraint=OfWords(kit.vocab_size))
        sink.react = lambda step, req=req, at=at: req.cancel() if step.index == at else None
        engine.submit(req)
        assert isinstance(sink.wait().outcome, RequestCancelledError)
        assert len(sink.steps) == at + 1
    engine.close()


def test_several_at_once_and_joining_late(kit: Kit) -> None:
    """Of different lengths, drafts and ends; some without a constraint, and so without drafts."""
    without, drafting = _both(kit, "r")
    prompts = [PROMPT, [5, 6], PROMPT[3:], *prompts_for(kit, 2, longest=40), [7, *PROMPT]]
    lengths = [24, 9, 15, 12, 20, 17]

    def pairs(react: bool) -> list[Any]:
        made = [
            request(
                prompt,
                SAMPLED.replace(max_new_tokens=new),
                keep=True,
                seed=new,
                constraint=OfWords(kit.vocab_size) if new != 12 else None,
            )
            for prompt, new in zip(prompts, lengths, strict=True)
        ]
        for (_, sink), (following, _) in itertools.pairwise(made if react else []):
            sink.react = lambda step, f=following: drafting.submit(f) if step.index == 4 else None
        return made

    alone = pairs(False)
    for req, sink in alone:
        without.submit(req)
        sink.wait()
    for late in (False, True):
        made = pairs(late)
        for req, _ in made[:1] if late else made:
            drafting.submit(req)
        for (_, sink), (_, expected) in zip(made, alone, strict=True):
            _assert_equal(sink.wait().steps, expected.steps)
    _check_counts(kit, drafting)
    without.close()
    drafting.close()


def test_only_one_alone_drafts_and_no_more_than_is_cheap(kit: Kit) -> None:
    engine, runner = watched_engine(kit, "r", drafts=5)
    pairs = [request(PROMPT, GREEDY, constraint=OfWords(kit.vocab_size)) for _ in range(6)]
    for req, _ in pairs:
        engine.submit(req)
    for _, sink in pairs:
        sink.wait()
    decode(engine, [PROMPT], GREEDY, constraint=OfWords(kit.vocab_size))
    assert {rows for rows, _ in runner.fed} >= {2, 12}
    most = max(1, runner.limits.at_once)
    assert all(count == 1 or (rows == 2 and rows * count <= most) for rows, count in runner.fed)
    assert (max(count for _, count in runner.fed) > 1) == (most > 1)
    engine.close()


def test_a_draft_stays_within_the_models_positions() -> None:
    """Learned positions end: one token too many would be an error."""
    backbone = make_tiny_backbone("gpt2")
    assert backbone.max_positions is not None
    replies = []
    for drafts in (0, 3):
        engine = torch_engine(backbone, (), EngineConfig(drafts=drafts))
        pairs = []
        for new in (24, 30):
            prompt = ([8, 9] + [*WORDS] * backbone.max_positions)[: backbone.max_positions - new]
            params = GREEDY.replace(alpha=0.0, max_new_tokens=new)
            pairs.append(request(prompt, params, constraint=OfWords(backbone.vocab_size)))
        for req, _ in pairs:
            engine.submit(req)
        replies.append([sink.wait().ids for _, sink in pairs])
        assert {sink.outcome for _, sink in pairs} == {"length"}
        assert (engine.stats().tokens_accepted > 0) == (drafts > 0)
        engine.close()
    assert replies[0] == replies[1]


@pytest.mark.parametrize("name", ["torch", "toy"])
def test_what_is_drawn_with_drafts_has_the_steered_distribution(name: str) -> None:
    """All beginnings of three tokens, as often as the oracle says."""
    kit = kit_of(name)
    engine, oracle = engine_of(kit, "r", drafts=3), kit.reference("r")
    beginnings = list(itertools.product(WORDS, repeat=3))
    params = SAMPLED.replace(max_new_tokens=4, temperature=2.0, top_k=3)
    logits, others = oracle.logits, torch.ones(kit.vocab_size, dtype=torch.bool)
    others[list(WORDS)] = False
    oracle.logits = lambda *asked: [steps.masked_fill(others, -torch.inf) for steps in logits(*asked)]  # type: ignore[method-assign]
    expected = []
    for words in beginnings:
        p, _ = oracle.distributions(PROMPT, list(words), params)
        expected.append(float(p[range(3), list(words)].prod()))
    count = 400
    seen = dict.fromkeys(beginnings, 0)
    for seed in range(count):
        (sink,) = decode(engine, [PROMPT], params, seed=seed, constraint=OfWords(kit.vocab_size))
        seen[tuple(sink.ids[:3])] += 1
    assert engine.stats().tokens_accepted > count / 10
    # Rare ones are counted together.
    common = [i for i, p in enumerate(expected) if p * count >= 5]
    observed = [seen[beginnings[i]] for i in common]
    wanted = [expected[i] * count for i in common]
    if (rest := count - sum(wanted)) > 1e-9:
        observed.append(count - sum(observed))
        wanted.append(rest)
    assert chisquare(observed, wanted).pvalue > 1e-3
    engine.close()


def test_a_drafter_looks_up_the_last_tokens() -> None:
    assert Drafter([1, 2, 3, 4, 5]).propose([7, 1, 2, 3], 2) == [4, 5]
    assert Drafter([1, 2, 3, 4, 5, 9, 2, 3, 6]).propose([1, 2, 3], 1) == [4]  # three alike before two
    assert Drafter([9, 2, 3, 6, 8]).propose([1, 2, 3], 1) == [6]
    assert Drafter([2, 3, 6, 2, 3, 7]).propose([2, 3], 1) == [7]  # the latest
    assert Drafter([1, 2, 3]).propose([3, 1], 3) == []
    assert Drafter([5]).propose([5, 5, 5], 3) == [5]
    assert Drafter([1, 2, 3, 4, 5], end_ids={4}).propose([1, 2], 3) == [3]
    assert Drafter([1, 2, 3, 4, 5], end_ids={3}).propose([1, 2], 3) == []
    # Bytes of ids that lie across two of them are no match.
    assert Drafter([1 << 8, 2 << 8, 3 << 8, 4]).propose([1, 2], 2) == []


def test_a_drafter_that_is_mostly_wrong_proposes_less_and_then_nothing() -> None:
    drafter = Drafter([1, 2, 3, 4, 5, 6])
    lengths = []
    for _ in range(40):
        lengths.append(len(drafter.propose([1, 2], 4)))
        drafter.learn(lengths[-1], 0) if lengths[-1] else None
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] >= 3
    assert lengths[-1] == 0
    right = Drafter([1, 2, 3, 4, 5, 6])
    for _ in range(40):
        right.learn(4, 4)
    assert len(right.propose([1, 2], 4)) == 4
