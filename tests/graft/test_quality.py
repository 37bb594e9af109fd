"""What a compressed KV cache costs, measured on a tiny model and compared with plain computations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import graft
from graft.cli import main
from graft.compiler.errors import PlanError
from graft.quality import Bootstrap, Options, Quality, measure, own_documents, read_documents
from graft.quality.metrics import compared
from graft.quality.passkeys import NEEDLE, QUESTION, passkeys
from graft.runtime.decoder import Rows
from tests.families import VOCABULARY, build

OPTIONS = Options(context=320, tokens=40, streamed=200, passkeys=2, passkey_context=240, resamples=200)
INT4 = graft.CompressKV(graft.Affine(), prompt="dense")
H2O = graft.CompressKV(graft.DensePages(), graft.H2O(ratio=0.6), prompt="dense")


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCABULARY - 3) for letter in text]}


def model() -> Any:
    return build("llama", max_position_embeddings=512, eos_token_id=None)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (OPTIONS.length,), generator=generator).tolist() for _ in range(2)]


@pytest.fixture(scope="module")
def quality() -> Quality:
    plans = {"int4": INT4, "h2o": graft.Plan(target=[H2O], draft=[graft.Lookup()])}
    return measure(model(), plans, texts(), OPTIONS, tokenizer=Letters(), backend="aten")


def test_the_full_cache_differs_from_itself_by_nothing(quality: Quality) -> None:
    full = quality["full"]
    assert full.kl.shape == (2, 40) and not full.kl.any() and full.same.all()


def test_figures_are_those_of_a_plain_computation(quality: Quality) -> None:
    """Against transformers for the full cache, and for an arm against a prompt that the decoder itself runs."""
    text = torch.tensor(texts()[1])
    with torch.no_grad():
        full = model()(text[None]).logits[0, 320:360].double().log_softmax(-1)
    targets = text[321:361]
    rows = torch.arange(40)
    torch.testing.assert_close(torch.from_numpy(quality["full"].nll[1]), -full[rows, targets], rtol=1e-4, atol=1e-5)
    plan = graft.Plan(target=[INT4], sample=[[0, 1]])
    decoder = graft.compile(model(), plan, backend="aten").decoder
    slot = decoder.open(prompt=320)
    found = []
    for start, count in ((0, 320), (320, 40)):
        chain = Rows()
        chain.add_chain(slot, text[start : start + count].tolist(), start, want_all=True)
        found.append(decoder.forward(chain))
        decoder.commit(slot, range(count))
    arm = found[1].double().log_softmax(-1)
    result = quality["int4"]
    kl = (full.exp() * (full - arm)).sum(-1)
    torch.testing.assert_close(torch.from_numpy(result.kl[1]), kl, rtol=5e-3, atol=2e-6)
    torch.testing.assert_close(torch.from_numpy(result.nll[1]), -arm[rows, targets], rtol=1e-4, atol=1e-5)
    assert result.same[1].mean() == (full.argmax(-1) == arm.argmax(-1)).double().mean()
    figures = quality.to_json()["int4"]
    assert figures["kl"]["mean"] == pytest.approx(result.kl.mean(), rel=1e-4) and result.kl.mean() > 0
    assert figures["perplexity"] == pytest.approx(math.exp(result.nll.mean()), rel=1e-4)


def test_a_text_compressed_on_the_way_is_measured_from_its_second_token(quality: Quality) -> None:
    text = torch.tensor(texts()[0][:200])
    with torch.no_grad():
        plain = torch.nn.functional.cross_entropy(model()(text[None]).logits[0, :-1], text[1:]).item()
    streamed = quality["full"].streamed
    assert streamed is not None and streamed.shape == (1, 199)
    assert streamed.mean() == pytest.approx(plain, rel=1e-4)
    other = quality["h2o"].streamed
    assert other is not None and np.allclose(other[0, :127], streamed[0, :127], atol=1e-4)  # nothing is far until then
    assert not np.allclose(other[0, 127:], streamed[0, 127:], atol=1e-4)


def test_references_stand_beside_every_arm_at_equal_bytes(quality: Quality) -> None:
    kinds = [one.candidate.kind for one in quality.results]
    assert kinds[:4] == ["full", "given", "given", "int8"] and {"recency", "random"} <= set(kinds[4:])
    for name in ("int4", "h2o", "int8 per token"):
        equal = quality[name].equal
        assert equal is not None and {quality[one].candidate.kind for one in equal.names.values()} <= {
            "recency",
            "random",
            "full",
        }
        recency = quality[equal.names["recency"]]
        ours = quality[name].allocated if equal.what == "allocated" else quality[name].read
        theirs = recency.allocated if equal.what == "allocated" else recency.read
        page = 3 * 2 * 64 * 32 * 4  # of 64 tokens of all layers and heads
        assert abs(ours - theirs) <= page
    assert "equal bytes" in str(quality)


def test_bytes_are_those_of_the_store(quality: Quality) -> None:
    token = 3 * 2 * 32 * 4  # layers, kv heads, key and value dim, float32
    assert quality["full"].bytes["dense"] == quality["full"].allocated >= 320 * token
    assert quality["full"].read == 320 * token
    int4 = quality["int4"]
    assert int4.bytes["pages"] == 3 * 2 * 4 * graft.Affine().page_bytes(16, 16, torch.float32)
    assert int4.peak >= quality["full"].allocated  # the prompt is dense until its end


def test_what_does_not_beat_recency_is_said_to() -> None:
    found = measure(
        model(),
        {"chance": graft.CompressKV(graft.DensePages(), graft.RandomEviction(ratio=0.5), prompt="dense"),
         "codes": graft.CompressKV(graft.Affine(8, 8), prompt="dense")},
        texts()[:1],
        Options(context=256, tokens=20, streamed=0, passkeys=0, resamples=50),
        backend="aten",
    )  # fmt: skip
    assert "better than" not in found.verdict(found["chance"]) and "better than" in found.verdict(found["codes"])


def test_an_interval_holds_the_mean_and_pairs_what_it_compares() -> None:
    generator = np.random.default_rng(1)
    first = generator.exponential(size=(3, 100))
    resamples = Bootstrap(3, 100, resamples=500)
    found = resamples.interval(first)
    assert found.low < found.mean < found.high and found.mean == pytest.approx(first.mean())
    again = Bootstrap(3, 100, resamples=500).interval(first)
    assert found == again
    gap = resamples.interval((first + 0.01) - first)  # of what differs by a constant, nothing is unsure
    assert gap.high - gap.low < 1e-12 < gap.low


def test_kl_and_agreement_are_taken_token_by_token() -> None:
    generator = torch.Generator().manual_seed(3)
    full, arm = (torch.randn(5, 7, generator=generator) for _ in range(2))
    found = compared(full, arm, torch.tensor([0, 1, 2, 3, 4]))
    for row in range(5):
        p, q = torch.distributions.Categorical(logits=full[row]), torch.distributions.Categorical(logits=arm[row])
        assert found.kl[row] == pytest.approx(torch.distributions.kl_divergence(p, q).item(), rel=1e-4)
        assert found.nll[row] == pytest.approx(-q.log_prob(torch.tensor(row)).item(), rel=1e-4)
        assert found.same[row] == (full[row].argmax() == arm[row].argmax())


def test_a_passkey_prompt_has_its_key_once_at_its_depth() -> None:
    tokenizer = Letters()
    found = passkeys(texts(), tokenizer, 240, 4)
    assert [one.depth for one in found] == [0.125, 0.375, 0.625, 0.875] and len({one.key for one in found}) == 4
    for one in found:
        needle = tuple(tokenizer(NEEDLE.format(key=one.key))["input_ids"])
        places = [at for at in range(len(one.context)) if one.context[at : at + len(needle)] == needle]
        assert len(places) == 1 and abs(places[0] / (240 - len(needle)) - one.depth) < 0.01
        assert len(one.context) == 240
        asked = tokenizer(f"{QUESTION} {one.key}")["input_ids"]
        assert [*one.question, *one.answer] == asked
        assert len(one.answer) == 6  # a space and five digits


def test_bad_input_is_refused_with_what_to_do(tmp_path: Path) -> None:
    small = Options(context=64, tokens=8, streamed=0, passkeys=0)
    with pytest.raises(PlanError, match="texts are too short"):
        measure(model(), {"a": INT4}, [[5] * 70], small)
    with pytest.raises(PlanError, match="nothing to measure in a plan"):
        measure(model(), {"a": graft.Plan(draft=[graft.Lookup()])}, [[5] * 100], small)
    with pytest.raises(PlanError, match="differ in more than"):
        plans = {"a": INT4, "b": graft.Plan(target=[graft.DropBlock([1]), INT4])}
        measure(model(), plans, [[5] * 100], small)
    with pytest.raises(PlanError, match="passkeys need a tokenizer"):
        measure(model(), {"a": INT4}, [[5] * 300], Options(context=64, tokens=8, streamed=0, passkey_context=64))
    with pytest.raises(PlanError, match="too few positions"):
        measure(model(), {"a": INT4}, [[5] * 700], Options(context=600, tokens=8, streamed=0, passkeys=0))
    with pytest.raises(PlanError, match="cannot be read"):
        read_documents([tmp_path / "none.txt"], Letters(), 10, 1)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(PlanError, match="too little text"):
        read_documents([tmp_path / "short.txt"], Letters(), 10, 1)
    with pytest.raises(PlanError, match="nothing to measure"):
        Options(context=0)


def test_documents_are_pieces_of_files_that_take_turns(tmp_path: Path) -> None:
    for name, text in (("a", "x" * 25), ("b", "y" * 12), ("c", "z" * 5)):
        (tmp_path / name).write_text(text)
    found = read_documents([tmp_path / name for name in "abc"], Letters(), 10, 3)
    letters = [set(one) for one in found.ids]
    x, y = (set(Letters()(letter)["input_ids"]) for letter in "xy")
    assert letters == [x, y, x] and found.source == "a, b, c" and len(found.digest) == 64
    own = own_documents(Letters(), 4000, 2)
    assert [len(one) for one in own.ids] == [4000, 4000] and own.ids[0] != own.ids[1]


def test_the_command_prints_a_table_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.quality import command

    loaded = {"AutoTokenizer": Letters(), "AutoModelForCausalLM": model()}
    monkeypatch.setattr(command, "load", lambda kind, arguments, **options: loaded[kind])
    (tmp_path / "plan.toml").write_text('[[target]]\nname = "compress-kv"\nprompt = "dense"\ncodec = "affine"\n')
    (tmp_path / "text.txt").write_text("some text " * 40)
    sizes = ("--context", "256", "--tokens", "16", "--streamed", "0", "--passkeys", "0", "--documents", "1")
    where = ("--plan", str(tmp_path / "plan.toml"), "--text", str(tmp_path / "text.txt"))
    asked = ("quality", "m", *where, *sizes, "--backend", "aten", "--quiet", "--references", "none")
    assert main([*asked, "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "plan" in shown and "KL [95%]" in shown
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["context"] == 256 and set(record["arms"]) == {"full", "plan"}
    assert main(["quality", "m", *sizes, "--quiet"]) == 2
    assert "--spec TEXT" in capsys.readouterr().err
