"""Says how to run a tool that was started as a file: python -m tools.NAME, in the project's folder.

Python searches the folder of a script first, so that a tool finds this module where it imports the package.
"""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
print(f"{name}: start it as a module, in the project's folder: python -m tools.{name}", file=sys.stderr)
sys.exit(2)
