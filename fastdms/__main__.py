"""``python -m fastdms`` is the ``fastdms`` command."""

import sys

from fastdms.cli import main

if __name__ == "__main__":
    sys.exit(main())
