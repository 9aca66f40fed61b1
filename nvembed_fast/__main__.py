"""python -m nvembed_fast is the command nvembed-fast."""

import sys

from nvembed_fast.cli import main

sys.exit(main())
