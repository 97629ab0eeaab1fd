"""Training of compressors and readers: ``gist-rag train``."""
