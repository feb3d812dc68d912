"""Reading what runs leave behind: tables, comparisons and the page of a run."""
