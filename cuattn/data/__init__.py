"""The sample of ``python -m cuattn``, and what is computed of it."""
