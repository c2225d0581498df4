"""Files that are broken on purpose, what each must be answered with, and mutations of sound ones."""
