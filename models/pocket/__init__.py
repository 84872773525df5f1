"""The pocket model: its tasks, its training and its evaluation."""
