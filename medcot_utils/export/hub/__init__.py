"""Push to the Hugging Face Hub: the files, the requests, and the record of each push."""
