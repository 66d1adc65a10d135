"""Multiple choice: the questions, the tasks of lm-eval that ask them (YAML beside), and the scores."""
