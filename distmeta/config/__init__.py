"""The job file: parsed, checked and resolved to parts."""
