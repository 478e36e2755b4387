"""The machinery of studies/: runs, results, pictures, reports."""
