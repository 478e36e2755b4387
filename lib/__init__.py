"""What the files at the top need and no learner must read first: keys, data, runs, processes."""
import sys

if sys.platform == "win32":
    sys.exit("error: Windows is not supported: use Linux or macOS, or WSL on Windows")
