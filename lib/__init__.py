"""What the files at the top need and no learner must read first: keys, data, runs, processes."""
