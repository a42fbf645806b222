"""Families of models: a row of a table for each, in a module for those that are alike. A family opens no
files; it says what names and values in them mean."""
