"""What people see: the summary of a run, tables, plots and the HTML report."""
