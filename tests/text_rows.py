"""Files of text for tests: rows in every format, and the documents that are read from them."""

import gzip
import json

import pyarrow
import pyarrow.parquet

from sae_train.harvest.corpus import CorpusConfig, Documents
from sae_train.harvest.texts import Retry

QUICK = Retry(attempts=3, initial_s=0.01, max_s=0.02)


def documents_of(path, split="train", **config):
    return Documents(CorpusConfig(name=str(path), **({"holdout": 0.0} | config)), split, QUICK)


def write_rows(path, rows):
    """Rows as JSON lines, a JSON array, parquet in groups of 7, or lines of text, by the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row, "n": i}) + "\n" for i, row in enumerate(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": row, "n": i} for i, row in enumerate(rows)]))
    elif path.suffix == ".parquet":
        table = pyarrow.table({"n": list(range(len(rows))), "text": rows})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("".join(f"{row}\n" for row in rows).encode()))
    else:
        path.write_text("".join(f"{row}\n" for row in rows))
    return path


ROWS = [f"document {i} of the corpus" for i in range(40)]
ENDINGS = ["jsonl", "json", "parquet", "txt", "txt.gz"]
