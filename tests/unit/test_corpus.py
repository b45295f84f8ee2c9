"""The corpus: order, split, cursor and mixture of documents, odd text, and what a user can get wrong."""

import bz2
import gzip
import json
import lzma
import random
import re
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from text_rows import ENDINGS, QUICK, ROWS, documents_of, write_rows

from sae_train.errors import InputError
from sae_train.harvest.corpus import CorpusConfig, Documents, is_held_out
from sae_train.harvest.text_files import TextSpec
from sae_train.harvest.texts import TextSource

# -- order, cursor, split ---------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_documents_resumed_after_any_document_go_on_exactly_there(tmp_path, ending):
    path = write_rows(tmp_path / f"a.{ending}", ROWS)
    config = {"documents": "line", "holdout": 0.3, "epochs": 2}
    want = list(documents_of(path, **config))
    state, got = None, []
    for _ in want:  # a new reader for every single document
        documents = documents_of(path, **config)
        if state is not None:
            documents.load_state_dict(json.loads(json.dumps(state)))
        got.append(next(documents))
        state = documents.state_dict()
    assert got == want
    assert next(documents, None) is None


def test_a_state_can_be_loaded_again_after_reading_on(tmp_path):
    documents = documents_of(write_rows(tmp_path / "a.jsonl", ROWS))
    head = [next(documents) for _ in range(5)]
    state = documents.state_dict()
    tail = list(documents)
    for _ in range(3):
        documents.load_state_dict(state)
        assert list(documents) == tail
    assert [document.text for document in head + tail] == ROWS


def test_train_and_held_out_documents_are_disjoint_and_together_complete(tmp_path):
    rows = [*ROWS, *ROWS[:10]]  # copies of a text must land on one side
    path = write_rows(tmp_path / "a.jsonl", rows)
    train, held = (
        [document.text for document in documents_of(path, split, holdout=0.3)]
        for split in ("train", "heldout")
    )
    assert held
    assert not set(train) & set(held)
    assert Counter(train) + Counter(held) == Counter(rows)


def test_the_held_out_share_is_the_one_asked_for():
    # Binomial: 4000 draws of 0.1 have a standard deviation of 19; five of them are 95.
    assert abs(sum(is_held_out(f"text {i}", 0.1) for i in range(4000)) - 400) < 95


def test_training_passes_over_the_corpus_several_times_and_the_held_out_split_once(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    once = [document.text for document in documents_of(path, holdout=0.3)]
    assert [document.text for document in documents_of(path, holdout=0.3, epochs=3)] == once * 3
    held = list(documents_of(path, "heldout", holdout=0.3, epochs=3))
    assert len(held) == len(ROWS) - len(once)


def test_max_documents_counts_the_documents_read_of_either_split(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    both = [
        document.row
        for split in ("train", "heldout")
        for document in documents_of(path, split, holdout=0.3, max_documents=15)
    ]
    assert sorted(both) == list(range(15))


def test_files_of_a_folder_are_read_once_each_in_an_order_that_the_seed_sets(tmp_path):
    folder = tmp_path / "a [odd] näme*"
    for i in range(12):
        (folder / f"sub{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"sub{i % 3}" / f"{i}.txt").write_text(f"file {i}")
    (folder / "README").write_text("not text by its ending")
    orders = [[document.text for document in documents_of(folder, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(f"file {i}" for i in range(12))


def test_a_glob_names_files(tmp_path):
    for i in range(4):
        write_rows(tmp_path / f"{i}.jsonl", [f"row {i}"])
    assert sorted(document.text for document in documents_of(tmp_path / "[12].jsonl")) == ["row 1", "row 2"]


@pytest.mark.parametrize(
    ("unit", "want"), [("file", ["a\nb\n\nc\n"]), ("line", ["a", "b", "c"]), ("paragraph", ["a\nb", "c\n"])]
)
def test_a_text_file_is_cut_into_files_lines_or_paragraphs(tmp_path, unit, want):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    assert [document.text for document in documents_of(tmp_path / "a.txt", documents=unit)] == want


def test_seeking_reads_no_earlier_row_group_of_a_parquet_file(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ROWS)
    source = TextSource(TextSpec("corpus.name", str(path)), 0, QUICK)
    texts = [next(source) for _ in range(30)]
    cursor = source.tell()
    rest = list(source)
    source.seek(cursor, 30)
    assert list(source) == rest
    assert texts + rest == ROWS


def test_text_packed_by_zstandard_is_read_to_its_end_and_resumed(tmp_path):
    """As the Pile is. Files that were put together, or written by several threads, have several frames."""
    lines = [json.dumps({"text": f"{i} " + "word " * 3000}) + "\n" for i in range(40)]
    parts = ["".join(lines[:10]), "", "".join(lines[10:25]), "".join(lines[25:])]
    frames = [zstandard.compress(part.encode()) for part in parts]
    (tmp_path / "a.JSONL.zst").write_bytes(b"".join(frames))
    documents = documents_of(tmp_path)
    first = [next(documents).text for _ in range(17)]
    state = documents.state_dict()
    rest = [document.text for document in documents]
    assert [int(text.split()[0]) for text in first + rest] == list(range(40))
    again = documents_of(tmp_path)
    again.load_state_dict(state)
    assert [document.text for document in again] == rest


def test_what_else_lies_in_a_folder_is_said_and_hidden_files_are_not_read(tmp_path, caplog):
    write_rows(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / ".git").mkdir()
    for hidden in (".b.jsonl", ".git/c.jsonl"):
        write_rows(tmp_path / hidden, ROWS[2:])
    with caplog.at_level("INFO", logger="sae_train.harvest"):
        assert [document.text for document in documents_of(tmp_path)] == ROWS[:2]
    assert "are read" not in caplog.text
    (tmp_path / "README.md").write_text("about")
    with caplog.at_level("INFO", logger="sae_train.harvest"):
        documents_of(tmp_path)
    assert f"{tmp_path}: 1 files are read; no text by their endings: README.md" in caplog.text


def test_a_home_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    import datasets

    path = write_rows(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(path / "cache"))
    with pytest.raises(InputError, match=r"HF_DATASETS_CACHE='.*a.jsonl/cache': .*HF_HOME names another"):
        documents_of(path)


# -- several sources --------------------------------------------------------------------------------


def mixture(tmp_path, weights, num_rows=3000, **config):
    sources = []
    for i, weight in enumerate(weights):
        path = write_rows(tmp_path / f"{i}.jsonl", [f"source {i} row {j}" for j in range(num_rows)])
        sources.append({"name": str(path), "weight": weight})
    return Documents(CorpusConfig(sources=sources, **({"holdout": 0.0} | config)), "train", QUICK)


def test_sources_share_the_tokens_by_their_weights_to_within_one_document(tmp_path):
    weights, draw, longest = [1.0, 2.0, 5.0], random.Random(0), 100
    documents, tokens = mixture(tmp_path, weights), [0, 0, 0]
    for _ in range(2000):
        source = next(documents).source
        size = draw.randint(1, longest) * (source + 1)  # documents of the sources differ in length
        documents.took(source, size)
        tokens[source] += size
    levels = [taken / weight for taken, weight in zip(tokens, weights, strict=True)]
    assert max(levels) - min(levels) <= max(longest * (i + 1) / weight for i, weight in enumerate(weights))


def test_a_mixture_resumes_exactly_and_a_source_that_ends_drops_out(tmp_path, caplog):
    caplog.set_level("INFO", logger="sae_train.harvest")
    documents = mixture(tmp_path, [1.0, 3.0], num_rows=30)

    def read(documents, count):
        out = []
        for document in documents:
            documents.took(document.source, len(document.text) % 7 + 1)
            out.append(document)
            if len(out) == count:
                break
        return out

    first = read(documents, 25)
    state = json.loads(json.dumps(documents.state_dict()))
    rest = read(documents, 1000)
    assert Counter(document.source for document in first + rest) == {0: 30, 1: 30}
    assert {document.source for document in rest[-5:]} == {0}
    assert caplog.text.count("1.jsonl ended after 30 rows") == 1
    again = mixture(tmp_path, [1.0, 3.0], num_rows=30)
    again.load_state_dict(state)
    assert read(again, 1000) == rest


# -- odd text ---------------------------------------------------------------------------------------


def test_odd_characters_in_text_files_are_kept_or_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbom \xff\xfe bad\x00nul\r\nline " + "שלום عربي".encode())
    documents = documents_of(tmp_path / "a.txt")
    assert next(documents).text == "bom \ufffd\ufffd bad\0nul\nline שלום عربي"
    assert documents.counts["replaced_characters"] == 2


def test_odd_characters_in_json_lines_are_kept_or_replaced_and_counted(tmp_path):
    rows = [
        b'{"text":"bad \xff byte"}',
        rb'{"text":"lone \ud800 surrogate"}',
        rb'{"text":"pair \ud83d\ude00 nul \u0000"}',
        rb'{"text":"\ufeffbom"}',
        b"",
        b'{"text":"  "}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(rows) + b"\n")
    documents = documents_of(tmp_path / "a.jsonl")
    texts = [document.text for document in documents]
    assert texts == ["bad \ufffd byte", "lone \ufffd surrogate", "pair \U0001f600 nul \0", "bom"]
    assert documents.counts == {"documents": 4, "empty_documents": 2, "replaced_characters": 2}


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelname == "WARNING"]


def test_text_that_was_never_utf_8_is_warned_of_once(tmp_path, caplog):
    text = "né à l'été, où il a été élevé; " * 4
    (tmp_path / "a.jsonl").write_bytes(
        "".join(f'{{"text":"{text}{i}"}}\n' for i in range(9)).encode("latin-1")
    )
    held_out = documents_of(tmp_path / "a.jsonl", "heldout", holdout=0.5)
    assert list(held_out) and held_out.counts["replaced_characters"] > 20
    assert not warnings_in(caplog)
    documents = documents_of(tmp_path / "a.jsonl")
    next(documents)
    state = documents.state_dict()
    assert len(list(documents)) == 8
    [record] = warnings_in(caplog)
    assert re.search(
        r"36 of the first 125 characters .* U\+FFFD.*convert .*a\.jsonl to UTF-8", record.message
    )
    documents.load_state_dict(state)
    assert len(list(documents)) == 8
    assert len(warnings_in(caplog)) == 1


def test_a_few_odd_characters_are_not_warned_of(tmp_path, caplog):
    write_rows(tmp_path / "few.jsonl", ["\ufffd" * 19])
    write_rows(tmp_path / "rare.jsonl", ["a" * 25_000, "\ufffd" * 25])
    assert len(list(documents_of(tmp_path / "few.jsonl")) + list(documents_of(tmp_path / "rare.jsonl"))) == 3
    assert not warnings_in(caplog)


# -- what a user can get wrong ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [(5, r"a number \(5\)"), (["a"], r"a list \(\['a'\]\)"), ({"a": 1}, "an object")],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_row_without_text_is_named(tmp_path, ending, value, found):
    path = write_rows(tmp_path / f"a.{ending}", [value, value])
    with pytest.raises(InputError, match=rf"corpus.text_column='text': .*row 1 of .*holds {found}"):
        documents_of(path)  # what the first row shows is known on opening


def test_a_later_row_without_text_is_named_when_it_is_read(tmp_path):
    documents = documents_of(write_rows(tmp_path / "a.jsonl", ["fine", 5]))
    assert next(documents).text == "fine"
    with pytest.raises(InputError, match=r"corpus.text_column='text': .*row 2 of .*holds a number"):
        next(documents)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_missing_column_lists_those_there_are(tmp_path, ending):
    path = write_rows(tmp_path / f"a.{ending}", ROWS)
    with pytest.raises(InputError, match=r"corpus.text_column='body': expected one of the columns n, text"):
        documents_of(path, text_column="body")


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_a_text_that_is_null_is_an_empty_one(tmp_path, ending):
    documents = documents_of(write_rows(tmp_path / f"a.{ending}", [None, "fine", None]))
    assert [document.text for document in documents] == ["fine"]
    assert documents.counts["empty_documents"] == 2


def test_of_several_files_the_one_with_a_bad_row_is_named(tmp_path):
    for name in "abc":
        write_rows(tmp_path / f"{name}.jsonl", ["fine", "too", 5 if name == "b" else "as well"])
    with pytest.raises(InputError, match=r"row \d of \S+ \(which lies in \S+/b.jsonl\) holds a number"):
        list(documents_of(tmp_path))


def test_a_malformed_line_of_json_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut o')
    documents = documents_of(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"row 2 of .*Unterminated string"):
        list(documents)


# The interpreter and each parser give up at a depth of their own, and the first row is read another way.
@pytest.mark.parametrize(("depth", "rows_before"), [(900, 0), (1015, 1), (5000, 1)])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_row_of_json_nested_to_any_depth_is_refused(tmp_path, ending, depth, rows_before):
    path = tmp_path / f"a.{ending}"
    before = '{"text": "fine"}\n' * rows_before
    path.write_text(f'{before}{{"text": {"[" * depth + "]" * depth}}}\n')
    with pytest.raises(InputError, match=r"^corpus\.(name|text_column)="):
        list(documents_of(path))


@pytest.mark.parametrize(
    ("value", "found"),
    [("[" * 10**5 + "]" * 10**5, "maximum recursion depth"), ("1" * 5000, "integer string conversion")],
)
def test_a_line_of_json_that_is_too_deep_or_holds_too_long_a_number_is_named(tmp_path, value, found):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n{{"text": "fine", "n": {value}}}\n')
    with pytest.raises(InputError, match=rf"row 2 of .*{found}"):
        list(documents_of(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_malformed_file_is_refused(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(b'{"text": "cut o' * 20)
    with pytest.raises(InputError, match=rf"corpus.name=.*well-formed {ending} data"):
        documents_of(tmp_path / f"a.{ending}")


def damage_one_of_several(folder, ending, harm):
    """Three files of 500 lines of noise, of which "2" is harmed; returns its path."""
    draw = random.Random(0)
    packs = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    packs["zst"] = zstandard.ZstdCompressor(write_checksum=True).compress  # as the zstd command does
    pack = packs.get(ending.rpartition(".")[2])
    for i in range(3):
        rows = [f"{i} {draw.randbytes(40).hex()}" for _ in range(500)]
        path = write_rows(folder / f"{i}.{ending.partition('.')[0]}", rows)
        if pack:
            path = path.rename(folder / f"{i}.{ending}")
            path.write_bytes(pack(path.read_bytes()))
    path = folder / f"2.{ending}"
    path.write_bytes(harm(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    "harm",
    [
        lambda whole: whole[: len(whole) * 2 // 3],
        lambda whole: whole[: len(whole) // 2] + bytes(3000) + whole[len(whole) // 2 + 3000 :],
        lambda whole: b"no such file" * 200,
    ],
    ids=["cut", "holed", "other"],
)
@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.gz", "txt.bz2", "txt.xz", "txt.zst", "parquet"])
def test_a_damaged_local_file_is_named_at_once_and_not_tried_again(tmp_path, caplog, ending, harm):
    path = damage_one_of_several(tmp_path, ending, harm)
    with pytest.raises(InputError, match=rf"^corpus.name='{tmp_path}': expected .*{re.escape(str(path))}"):
        list(Documents(CorpusConfig(name=str(tmp_path), documents="line"), "train"))  # waits, if it retries
    assert "attempt" not in caplog.text


def test_a_damaged_local_file_can_be_replaced_and_reading_goes_on_from_the_last_document(tmp_path):
    for i in range(3):
        write_rows(tmp_path / f"{i}.txt.gz", [f"{i} {j} " + "long " * 5000 for j in range(5)])
    want = [document.text for document in documents_of(tmp_path, documents="line")]
    last = tmp_path / f"{want[-1][0]}.txt.gz"
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])  # the head is whole, the end and its checksum are missing
    documents = documents_of(tmp_path, documents="line")
    got = [next(documents).text for _ in range(10)]
    with pytest.raises(InputError, match=re.escape(str(last))):
        next(documents)
    last.write_bytes(whole)
    again = documents_of(tmp_path, documents="line")
    again.load_state_dict(documents.state_dict())
    assert got + [document.text for document in again] == want


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-16", "byte-order mark of UTF-16 or UTF-32"),
        ("utf-32", "byte-order mark of UTF-16 or UTF-32"),
        ("utf-16-le", "of the first 1024 bytes of .* are NULs"),
        ("utf-32-be", "of the first 1024 bytes of .* are NULs"),
    ],
)
@pytest.mark.parametrize("ending", ["txt", "jsonl", "txt.gz"])
def test_a_file_in_utf_16_or_32_is_named_and_refused_on_opening(tmp_path, ending, encoding, found):
    write_rows(tmp_path / f"0.{ending}", ROWS)
    path = write_rows(tmp_path / f"1.{ending.removesuffix('.gz')}", ["“quoted” – text", *ROWS])
    wide = path.read_text().encode(encoding)
    path.unlink()
    path = tmp_path / f"1.{ending}"
    path.write_bytes(gzip.compress(wide) if ending.endswith("gz") else wide)
    with pytest.raises(InputError, match=rf"expected text in UTF-8; .*{found}") as caught:
        documents_of(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "missing.jsonl", "a/b/c", "no_match_*.txt"])
def test_a_name_that_can_only_be_a_file_and_is_none_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"^corpus.name='{re.escape(name)}': expected"):
        documents_of(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "x", "b.jsonl": "{}"}, "files of one format, not jsonl, text"),
        ({"a.bin": "x"}, "files ending in .txt"),
        ({"a.txt": "", "b.txt": ""}, "these 2 are empty"),
        ({"a.txt": "\n \n"}, "all 1 documents are empty"),
    ],
)
def test_a_folder_without_usable_text_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        list(documents_of(tmp_path))


def test_parquet_without_rows_is_passed_over_among_others(tmp_path):
    write_rows(tmp_path / "a.parquet", pyarrow.array([], pyarrow.string()))
    write_rows(tmp_path / "b.parquet", ROWS)
    assert [document.text for document in documents_of(tmp_path)] == ROWS


def test_a_corpus_without_rows_is_refused(tmp_path):
    empty = write_rows(tmp_path / "a.parquet", pyarrow.array([], pyarrow.string()))
    with pytest.raises(InputError, match=r"corpus.name=.*these 1 are empty"):
        documents_of(empty)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(InputError, match=r"corpus.name="):
        documents_of(tmp_path / "a.json")


def test_a_share_that_holds_out_nothing_or_everything_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS[:3])
    with pytest.raises(InputError, match=r"corpus.holdout=1e-09: .*at least one of the corpus's 3 documents"):
        list(documents_of(path, "heldout", holdout=1e-9))
    with pytest.raises(InputError, match=r"corpus.holdout=0.999999: .*to train on"):
        list(documents_of(path, "train", holdout=0.999999))
    (tmp_path / "book.txt").write_text("One book.\n\nOf two paragraphs.")
    with pytest.raises(InputError, match=r"holdout=1e-09: .*corpus's 1 documents; .*documents=paragraph"):
        list(documents_of(tmp_path / "book.txt", "heldout", holdout=1e-9))
    with pytest.raises(InputError, match=r"corpus's 2 documents$"):
        list(documents_of(tmp_path / "book.txt", "heldout", holdout=1e-9, documents="paragraph"))
    with pytest.raises(InputError, match=r"corpus.holdout=0.0: expected a share above 0"):
        documents_of(path, "heldout")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "corpus.name=None"),
        ({"name": "a", "sources": [{"name": "b"}]}, "corpus.sources=.*not both"),
        ({"sources": [{"path": "b"}]}, r"corpus.sources\[0\]="),
        ({"sources": ["b"]}, r"corpus.sources\[0\]="),
        ({"sources": [{"name": "b", "weigth": 2}]}, r"corpus.sources\[0\]="),
        ({"sources": [{"name": "b"}, {"name": "b", "weight": 0}]}, r"corpus.sources\[1\].weight=0"),
        (
            {"name": "a", "documents": "word"},
            "corpus.documents='word': expected one of file, line, paragraph",
        ),
        ({"name": "a", "bos": "always"}, "corpus.bos='always'"),
        ({"name": "a", "holdout": 1.0}, "corpus.holdout=1.0"),
        ({"name": "a", "context_length": 0}, "corpus.context_length=0"),
        ({"name": "a", "max_documents": 0}, "corpus.max_documents=0"),
    ],
)
def test_a_configuration_that_cannot_work_names_its_key(config, message):
    with pytest.raises(InputError, match=message):
        CorpusConfig(**config).specs()


def test_files_have_no_other_split_than_train(tmp_path):
    with pytest.raises(InputError, match=r"corpus.split='test': expected train"):
        Documents(CorpusConfig(name=str(write_rows(tmp_path / "a.jsonl", ROWS)), split="test"))


def test_the_fingerprint_changes_when_a_file_does_and_not_when_it_moves(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    before = documents_of(path).fingerprint()
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved" / "a.jsonl")
    assert documents_of(moved).fingerprint() == before
    moved.write_text(moved.read_text().replace("document 7", "document 8"))
    changed = documents_of(moved).fingerprint()
    assert {key for key in before if before[key] != changed[key]} == {"corpus.0.files"}
