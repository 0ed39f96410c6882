"""What a user would write instead of this project: the same model and the same answer, served in other ways."""
