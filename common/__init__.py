"""What two or more recipes need; never imports a recipe."""
