"""The command line: a study, or `report` for any run of train.py."""
import sys

from studies.machinery import report, run

if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        sys.exit(report.main(sys.argv[2:]))
    sys.exit(run.main())
