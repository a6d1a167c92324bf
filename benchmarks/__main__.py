"""`python -m benchmarks`: the suite that `make bench` runs."""

import sys

from benchmarks.run import main

sys.exit(main())
