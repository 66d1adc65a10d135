"""The seven notebooks run in order: here, on Kaggle, on Colab."""
