"""Run the seven notebooks in order: here, on Kaggle, or on Colab."""
