"""What a reader sees of a training, an evaluation and a sweep: tables, pages and pictures of values that others made."""
