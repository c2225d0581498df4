"""evomerge: evolutionary search for the best way to merge fine-tuned language models.

Importing this package does nothing; import the part you need, or use the `evomerge` command.
"""

__version__ = "0.1.0"
