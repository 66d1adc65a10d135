"""Push to the Hugging Face Hub: what is sent, how, and the record of it."""
