"""Reading a run for people: tables, figures, the HTML report, the model card. It never writes a store."""
