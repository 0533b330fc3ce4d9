"""Every sentence for people about results, on the terminal and on the page.

Imports `mechanism` and what stands left of it.  A sentence is made only where the data license it.
"""
