"""Operations with several implementations: one folder an operation, `candidates.py` chooses between them."""
