"""Train DMS into a model: ``fastdms retrofit``."""
