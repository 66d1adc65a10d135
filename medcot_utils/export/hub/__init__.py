"""A push to the Hugging Face Hub, from what lies there to what was verified."""
