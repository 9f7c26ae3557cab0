"""The command line: one file per command, assembled in main.py. Files import what they need inside
their functions, so that every help text comes at once.
"""
