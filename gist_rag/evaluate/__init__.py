"""Measuring: question-answering tasks, metrics, arms that are compared, and time to first token."""
