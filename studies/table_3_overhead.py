"""The paper's table 3: 151 and 157 ms a step, 34,263 and 34,729 MiB, for 1B on an H100 under
torch.compile. Not a matter of losses."""
title = "Table 3, overhead"
question = "what does the unified strategy cost in time and memory?"
measured_by = "python -m bench.benchmark train configs/baseline_1b.py"
