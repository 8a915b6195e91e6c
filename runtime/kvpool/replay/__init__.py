"""Plays real request traces through the prefix index and its policy, beside exact references of both."""
