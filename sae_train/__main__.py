"""`python -m sae_train VERB ...` is the console script `sae-train VERB ...`."""

import sys

from sae_train.cli.main import main

sys.exit(main())
