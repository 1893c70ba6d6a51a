"""``python -m attsvm``."""

from attsvm.cli.main import run

run()
