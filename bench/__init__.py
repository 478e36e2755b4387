"""How fast and how large: the benchmark, what to run first on a GPU, the table of sizes."""
