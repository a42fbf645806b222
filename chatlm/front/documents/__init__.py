"""Reads documents: the text of a file, and what of the file that text lacks. A module for each format; all
but `texts` and `forms` run only in a sandbox."""
