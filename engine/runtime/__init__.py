"""What any command needs: the machine and its memory, exit statuses, errors, formatted numbers.

Imports no other stage.  Only `resources` imports torch; `importing` steers how others do.
"""
