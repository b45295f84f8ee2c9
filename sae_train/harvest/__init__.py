"""From a corpus and a frozen model to activation rows: documents, token windows, hooks, filters."""
