"""The series on Kaggle: the notebook that is pushed, the client that pushes it, the session that runs it."""
