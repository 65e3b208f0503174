"""What the project measures of itself; each module is a command that says what it measured and on what."""
