"""What the files at the top need and no learner must read first: keys, data, documents, a run's folder, processes."""
