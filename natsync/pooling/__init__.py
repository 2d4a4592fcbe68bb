"""What a ConnectionPool is made of: who has what (store), how it is made (keeper), and where (health)."""
