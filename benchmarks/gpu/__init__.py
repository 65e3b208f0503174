"""What runs on a GPU, and is written so that it runs without one where that is possible."""
