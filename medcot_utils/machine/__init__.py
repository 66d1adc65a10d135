"""The computer: its hardware, places, and secrets."""
