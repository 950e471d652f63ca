"""`python -m benchmarks` is `python -m benchmarks.times`: the table of measured results."""

import sys

from benchmarks.times import main

sys.exit(main())
