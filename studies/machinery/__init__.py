"""What makes the runs of a study, and its results, tables, pictures and reports."""
