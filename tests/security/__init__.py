"""What nobody may do to a run: each test is named in docs/threat-model.md."""
