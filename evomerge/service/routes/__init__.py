"""The routes: thin over what the commands use, one file for each kind of thing."""
