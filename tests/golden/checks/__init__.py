"""One file per system: CHECKS maps the component of a case to its check."""
