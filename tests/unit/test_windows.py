"""Token windows: nothing lost, nothing repeated, resumable anywhere, and odd tokenizers and texts."""

import json
import random

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig, Documents, is_held_out
from sae_train.harvest.windows import WindowStream, bos_rule, check_vocabulary, pieces, special_ids

WORDS = [f"w{i}" for i in range(500)]


def make_tokenizer(adds_bos=False, split=None, **special):
    """A word tokenizer: id of "w7" is 7; special tokens take the ids after the words."""
    vocab = {word: i for i, word in enumerate([*WORDS, "?", *special.values()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def write_corpus(folder, num_documents=120, longest=40):
    """Lines of JSON, each a document of 1 to `longest` words; returns (path, the documents' token ids)."""
    draw = random.Random(0)
    ids = [
        [draw.randrange(len(WORDS)) for _ in range(draw.randint(1, longest))] for _ in range(num_documents)
    ]
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(f"w{i}" for i in row)}) + "\n" for row in ids))
    return path, ids


def stream_of(path, tokenizer, split="train", **config):
    settings = {"context_length": 8, "shuffle_windows": 4, "holdout": 0.0} | config
    corpus = CorpusConfig(name=str(path), **settings)
    return WindowStream(Documents(corpus, split), tokenizer, corpus, split)


def drain(stream, n=3):
    """All that is left, as one (tokens, valid, starts, index)."""
    parts = []
    while (windows := stream.take(n)) is not None:
        parts.append((windows.tokens, windows.valid, windows.starts, windows.index))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize(("shuffle_windows", "epochs"), [(1, 1), (4, 2), (1000, 2)])
def test_a_stream_resumed_at_any_window_and_three_times_over_goes_on_with_the_same_windows(
    tmp_path, monkeypatch, shuffle_windows, epochs
):
    monkeypatch.setattr("sae_train.harvest.windows.BATCH_DOCUMENTS", 3)
    path, _ = write_corpus(tmp_path, num_documents=8)  # three batches, the last one short
    tokenizer = make_tokenizer(eos_token="</s>")

    def make():
        return stream_of(path, tokenizer, shuffle_windows=shuffle_windows, epochs=epochs)

    whole = make()
    want = drain(whole)
    total = len(want[0])
    for first in range(total - 2):
        parts, state, position = [], None, 0
        for stop in (first, first + 1, first + 3, total):
            stream = make()
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            assert stream.taken == position
            if stop > position:
                parts.append(stream.take(stop - position))
            position, state = stop, stream.state_dict()
        got = [
            torch.cat([getattr(part, name) for part in parts])
            for name in ("tokens", "valid", "starts", "index")
        ]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), first
        assert stream.take(1) is None
        assert stream.counts == whole.counts


def test_every_token_of_the_corpus_comes_once_and_in_order_when_nothing_is_shuffled(tmp_path):
    path, ids = write_corpus(tmp_path)
    tokenizer = make_tokenizer(eos_token="</s>")
    tokens, valid, starts, index = drain(stream_of(path, tokenizer, shuffle_windows=1))
    eos = tokenizer.eos_token_id
    flat = [token for row in ids for token in [*row, eos]]
    assert tokens[valid].tolist() == flat
    assert index.tolist() == list(range(-(-len(flat) // 8)))
    assert valid[:-1].all()
    assert int(starts.sum()) == len(ids)
    assert tokens[starts].tolist() == [row[0] for row in ids]
    assert tokens[~valid].unique().tolist() in ([], [eos])


def test_shuffling_permutes_windows_within_a_block_by_the_seed_alone(tmp_path):
    path, _ = write_corpus(tmp_path)
    tokenizer = make_tokenizer()
    plain = drain(stream_of(path, tokenizer, shuffle_windows=1))[0]
    shuffled = drain(stream_of(path, tokenizer, shuffle_windows=16, seed=1))
    other = drain(stream_of(path, tokenizer, shuffle_windows=16, seed=2))[0]
    again = drain(stream_of(path, tokenizer, shuffle_windows=16, seed=1), n=7)[0]
    assert torch.equal(shuffled[0], again)
    assert not torch.equal(shuffled[0], other)
    assert shuffled[3].tolist() == list(range(len(plain)))
    for start in range(0, len(plain), 16):
        block, want = shuffled[0][start : start + 16], plain[start : start + 16]
        assert not torch.equal(block, want)
        assert sorted(block.tolist()) == sorted(want.tolist())


def test_bos_goes_where_the_rule_says(tmp_path):
    path, ids = write_corpus(tmp_path, num_documents=30)
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    by_document = drain(stream_of(path, tokenizer, bos="document", shuffle_windows=1))
    assert by_document[0][by_document[1]].tolist() == [token for row in ids for token in [bos, *row]]
    assert (by_document[0][by_document[2]] == bos).all()
    by_window = drain(stream_of(path, tokenizer, bos="window", shuffle_windows=1))
    assert (by_window[0][:, 0] == bos).all()
    assert not by_window[2][:, 0].any()
    text = by_window[0][:, 1:][by_window[1][:, 1:]]
    assert text.tolist() == [token for row in ids for token in [*row, eos]]


def test_automatic_bos_follows_what_the_tokenizer_itself_does():
    assert bos_rule(make_tokenizer(adds_bos=True, bos_token="<s>"), "auto")[0] == "document"
    assert bos_rule(make_tokenizer(bos_token="<s>"), "auto") == ("none", None)
    assert bos_rule(make_tokenizer(), "auto") == ("none", None)
    with pytest.raises(InputError, match=r"corpus.bos='document'.*has no BOS"):
        bos_rule(make_tokenizer(), "document")


def test_a_tokenizer_without_special_tokens_packs_text_and_pads_with_zero(tmp_path):
    path, ids = write_corpus(tmp_path, num_documents=3, longest=5)
    tokens, valid, _, _ = drain(stream_of(path, make_tokenizer(), context_length=64))
    assert tokens.shape == (1, 64)
    assert tokens[valid].tolist() == [token for row in ids for token in row]
    assert tokens[~valid].unique().tolist() == [0]


@pytest.mark.parametrize("text", ["w1", "w1 w2 w3"])
def test_a_corpus_of_one_short_document_gives_one_padded_window(tmp_path, text):
    (tmp_path / "one.txt").write_text(text)
    windows = stream_of(tmp_path / "one.txt", make_tokenizer()).take(5)
    assert windows.tokens.shape == (1, 8)
    assert int(windows.valid.sum()) == len(text.split())


def test_held_out_windows_hold_the_held_out_documents_only(tmp_path):
    path, ids = write_corpus(tmp_path)
    tokenizer = make_tokenizer()
    texts = [" ".join(f"w{i}" for i in row) for row in ids]
    for split, side in (("train", False), ("heldout", True)):
        tokens, valid, _, _ = drain(stream_of(path, tokenizer, split, holdout=0.3, shuffle_windows=1))
        want = [
            token
            for row, text in zip(ids, texts, strict=True)
            if is_held_out(text, 0.3) is side
            for token in row
        ]
        assert tokens[valid].tolist() == want


def test_a_tokenizer_of_another_model_is_refused_before_the_model_runs():
    tokenizer = make_tokenizer(eos_token="</s>")
    check_vocabulary(tokenizer, 502)
    with pytest.raises(
        InputError, match=r"model.tokenizer.*largest id, 501, is below the model's vocabulary of 501"
    ):
        check_vocabulary(tokenizer, 501)


def test_special_ids_are_those_of_the_tokenizer():
    tokenizer = make_tokenizer(eos_token="</s>", bos_token="<s>")
    assert special_ids(tokenizer).tolist() == sorted([tokenizer.eos_token_id, tokenizer.bos_token_id])
    assert special_ids(make_tokenizer()).tolist() == []


def test_a_corpus_of_special_tokens_only_is_refused(tmp_path):
    (tmp_path / "marks.txt").write_text("</s> </s>\n</s>\n")
    stream = stream_of(tmp_path / "marks.txt", make_tokenizer(eos_token="</s>"), documents="line")
    with pytest.raises(InputError, match=r"corpus.name=.*made 5 special tokens"):
        stream.take(1)


def test_a_document_on_which_the_tokenizer_panics_is_skipped_counted_and_logged(tmp_path, caplog):
    # Oniguruma gives up on this pattern after too many retries, and the Rust side panics.
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("(a+)+$"), "isolated")]
    )
    (tmp_path / "bad.txt").write_text("w1 w2\n" + "a" * 5000 + "b\nw3\n")
    stream = stream_of(tmp_path / "bad.txt", make_tokenizer(split=split), documents="line")
    windows = stream.take(5)
    assert windows.tokens[windows.valid].tolist() == [1, 2, 3]
    assert stream.counts["skipped_documents"] == 1
    assert stream.counts["documents"] == 3
    assert "skipped document 1" in caplog.text


def test_a_corpus_that_the_tokenizer_cannot_encode_at_all_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("w1 unknown\n")
    backend = Tokenizer(
        models.WordLevel({"w1": 0}, unk_token="?")
    )  # its unknown token is not in the vocabulary
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(InputError, match="1 documents it cannot encode"):
        stream_of(tmp_path / "x.txt", tokenizer).take(1)


def test_a_document_of_a_million_characters_is_cut_at_white_space_and_loses_nothing(tmp_path):
    text = " ".join(f"w{i % 500}" for i in range(220_000))
    assert len(text) > 10**6
    parts = list(pieces(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100_000
    assert all(part.startswith(" ") for part in parts[1:])
    (tmp_path / "long.txt").write_text(text)
    tokens, valid, starts, _ = drain(
        stream_of(tmp_path / "long.txt", make_tokenizer(), shuffle_windows=1), n=4096
    )
    assert tokens[valid].tolist() == [i % 500 for i in range(220_000)]
    assert int(starts.sum()) == 1


def test_a_word_of_a_million_characters_is_cut_by_length():
    parts = list(pieces("^" * 10**6))
    assert [len(part) for part in parts] == [100_000] * 10


def test_a_tokenizer_saved_with_truncation_and_padding_still_gives_whole_documents(tmp_path):
    path, ids = write_corpus(tmp_path, num_documents=20)
    tokenizer = make_tokenizer(pad_token="<pad>")
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50, pad_token="<pad>")
    tokens, valid, _, _ = drain(stream_of(path, tokenizer, shuffle_windows=1))
    assert tokens[valid].tolist() == [token for row in ids for token in row]


def test_the_fingerprint_changes_with_what_changes_the_windows_and_with_nothing_else(tmp_path):
    path, _ = write_corpus(tmp_path)
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    base = stream_of(path, tokenizer)
    print_ = base.fingerprint()
    base.take(5)
    assert base.fingerprint() == print_
    assert stream_of(path, tokenizer, epochs=3, allow_short=True).fingerprint() == print_
    for change in (
        {"context_length": 9},
        {"bos": "window"},
        {"shuffle_windows": 5},
        {"seed": 1},
        {"holdout": 0.1},
    ):
        assert stream_of(path, tokenizer, **change).fingerprint() != print_, change
    assert stream_of(path, make_tokenizer(eos_token="</s>")).fingerprint() != print_
