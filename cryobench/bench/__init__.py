"""Tables, plans, runs, records and reports."""
