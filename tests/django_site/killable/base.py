"""SQLite with what a database server has: a connection can be found dead."""

from django.db.backends.sqlite3 import base


class DatabaseWrapper(base.DatabaseWrapper):
    def is_usable(self):
        try:
            self.connection.execute("SELECT 1")
        except self.Database.Error:
            return False
        return True
