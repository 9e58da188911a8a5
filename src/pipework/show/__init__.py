"""Timelines to look at: `html`, a page for the browser, and `trace`, a file for Perfetto."""
